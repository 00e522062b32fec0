"""What `import relay_cluster` offers, and that it stays cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import relay_cluster


def test_exports() -> None:
    assert relay_cluster.__all__ == [
        *("Agent", "Cluster", "ClusterConfig", "ConfigError", "Pipeline", "PipelineConfig", "PipelineError"),
        *("RelayError", "RunReport", "__version__"),
    ]
    for name in relay_cluster.__all__:
        assert getattr(relay_cluster, name) is not None
    assert dir(relay_cluster) == sorted(relay_cluster.__all__)


def test_the_three_names_of_the_readme() -> None:
    from relay_cluster import Agent, Cluster, Pipeline

    graph = Pipeline([Agent("plan", prompt="Plan: {question}"), Agent("solve", prompt="{question}\n{plan}")])
    assert graph.order == ("plan", "solve")
    assert Cluster.__module__ == "relay_cluster.cluster"


def test_import_is_cheap() -> None:
    code = (
        "import sys; from relay_cluster import Agent, Pipeline\n"
        "heavy = {'torch', 'ray', 'transformers', 'pydantic', 'typer', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Clusters'"):
        relay_cluster.Clusters  # noqa: B018
