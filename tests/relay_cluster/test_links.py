"""Which format keys and values travel in, and the probe that decides it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from relay_cluster import links
from transport.settings import TransportSettings, WireFormat

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.mark.parametrize(
    ("gbit_s", "expected"), [(100.0, "raw"), (8.0, "raw"), (5.0, "bf16"), (1.0, "int8"), (0.01, "int8")]
)
def test_slow_links_get_fewer_bytes(gbit_s: float, expected: WireFormat) -> None:
    assert links.format_for(gbit_s) == expected


def test_what_is_configured_is_not_measured() -> None:
    settings = TransportSettings(wire="int8")
    # Nodes that are not there: a probe would fail.
    assert links.choose_wire(settings, ["a", "b"], timeout_s=1.0) == ("int8", "transport.wire")


def test_one_node_has_no_slow_link() -> None:
    assert links.choose_wire(TransportSettings(), ["a"], timeout_s=1.0) == ("raw", "one node")


@pytest.fixture(scope="module")
def node() -> Iterator[str]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(num_cpus=1, include_dashboard=False, namespace="test-links", log_to_driver=False)
    yield str(ray.nodes()[0]["NodeID"])
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.long
def test_a_probe_over_loopback(node: str) -> None:
    """Real sockets between real actors; both on the one node that there is."""
    found = links.measure_links([node, node], timeout_s=20.0)
    assert found[node, node] > 0.1
    wire, why = links.choose_wire(TransportSettings(), [node, node], timeout_s=20.0)
    assert why.endswith("Gbit/s")
    assert wire == links.format_for(float(why.split()[-2]))


@pytest.mark.ray
def test_a_node_that_is_not_there_costs_speed_and_not_the_cluster(node: str) -> None:
    wire, why = links.choose_wire(TransportSettings(), [node, "ab" * 28], timeout_s=3.0)
    assert (wire, why) == ("raw", "the links could not be measured")
