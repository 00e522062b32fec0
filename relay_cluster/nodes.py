"""Which Ray node a worker is put on. Knows neither models nor requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transport.errors import ConfigError


def affinities(wanted: Sequence[str]) -> list[NodeAffinitySchedulingStrategy]:
    """Ray's scheduling strategy for each wanted node.

    A node is preferred, not insisted on: where it has died, Ray restarts its workers on another one.

    Args:
        wanted: addresses, host names, Ray node ids, or custom resources that one node offers.

    Raises:
        ConfigError: none of the live nodes is meant.
    """
    live = [node for node in ray.nodes() if node["Alive"]]
    return [NodeAffinitySchedulingStrategy(_find(name, live)["NodeID"], soft=True) for name in wanted]


def _find(wanted: str, live: Sequence[dict[str, Any]]) -> dict[str, Any]:
    for node in live:
        names = (node["NodeManagerAddress"], node["NodeManagerHostname"], node["NodeID"])
        if wanted in names or wanted in node["Resources"]:
            return node
    known = ", ".join(f"{n['NodeManagerAddress']} ({n['NodeManagerHostname']})" for n in live) or "none"
    raise ConfigError(
        f'nodes: "{wanted}" is no live node of this Ray cluster (live: {known}), and no resource of one. '
        "Start it with `ray start --address=HEAD:6379 --node-ip-address=...`, or correct `nodes`."
    )
