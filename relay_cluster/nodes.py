"""Which Ray node a worker is put on, and what it takes of it. Knows neither models nor requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from relay_cluster.config import ClusterConfig
from transport.errors import ConfigError

_A_BIT: Final = 0.001
"""Of the resource that every node offers under its own address: enough to be put there."""


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


def shares(config: ClusterConfig, count: int) -> tuple[float, float]:
    """CPUs and GPUs for each of `count` workers.

    Raises:
        ConfigError: worker.device is "cuda", and there are not enough GPUs.
    """
    total = ray.cluster_resources()
    gpus, share = total.get("GPU", 0.0), config.worker.gpu_share
    fits = int(1 / share) * int(gpus) >= count  # Ray does not divide a share between two GPUs
    if config.worker.device == "cuda" and not fits:
        raise ConfigError(
            f'worker.device is "cuda" and {count} workers need {share:g} of a GPU each, but Ray has '
            f'{int(gpus)}. Lower `workers` or worker.gpu_share, or set worker.device to "auto" or "cpu".'
        )
    # Without a GPU of its own Ray hides them all from an actor; with "auto" we take them when all fit.
    wanted = config.worker.device == "cuda" or (config.worker.device == "auto" and fits)
    # A share of the CPUs each: all workers must fit, and one agent computes at a time in a chain.
    return min(1.0, float(total.get("CPU", 1)) / (count + 1)), share if wanted else 0.0


def bundles(config: ClusterConfig, count: int) -> list[dict[str, float]]:
    """One bundle of a placement group for each of `count` workers, on the nodes of the file in turn.

    Raises:
        ConfigError: not enough GPUs, or none of the live nodes is meant.
    """
    cpus, gpus = shares(config, count)
    base = {"CPU": round(cpus, 3), **({"GPU": gpus} if gpus else {})}
    live = [node for node in ray.nodes() if node["Alive"]]
    on = [{f"node:{_find(name, live)['NodeManagerAddress']}": _A_BIT} for name in config.nodes] or [{}]
    return [{**base, **on[i % len(on)]} for i in range(count)]


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
