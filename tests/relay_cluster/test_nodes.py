"""Which node a name in a cluster file means, and what is said of one that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay_cluster import cli
from relay_cluster.config import ClusterConfig
from relay_cluster.nodes import _find
from transport.errors import ConfigError

LIVE = [
    {
        "NodeID": "a" * 8,
        "NodeManagerAddress": "10.0.0.1",
        "NodeManagerHostname": "one",
        "Resources": {"CPU": 4.0, "prefill": 1.0},
    },
    {
        "NodeID": "b" * 8,
        "NodeManagerAddress": "10.0.0.2",
        "NodeManagerHostname": "two",
        "Resources": {"CPU": 4.0},
    },
]


@pytest.mark.parametrize(
    ("name", "node"), [("10.0.0.2", 1), ("two", 1), ("b" * 8, 1), ("one", 0), ("prefill", 0)]
)
def test_a_node_goes_by_address_name_id_or_resource(name: str, node: int) -> None:
    assert _find(name, LIVE) is LIVE[node]


def test_the_error_tells_which_nodes_there_are() -> None:
    with pytest.raises(ConfigError, match=r'"three" .*10\.0\.0\.1 \(one\), 10\.0\.0\.2 \(two\)'):
        _find("three", LIVE)


def test_nodes_are_a_list_of_names(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: 10.0.0.1\n")
    with pytest.raises(ConfigError, match=r"cluster\.yaml:1 nodes: must be a list"):
        ClusterConfig.load(path)
    path.write_text("nodes: [10.0.0.1, 10.0.0.2]\n")
    assert ClusterConfig.load(path).nodes == ["10.0.0.1", "10.0.0.2"]
    assert ClusterConfig().nodes == []


def test_the_link_is_measured_between_two_nodes(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("workers: 2\nnodes: [10.0.0.1, 10.0.0.1]\n")
    done = CliRunner().invoke(cli.app, ("bench", "link", "--cluster", str(path)), env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "between two nodes" in done.output
