"""A pair of agents on two hosts, and what may happen to the network between them: helpers of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from relay_cluster import Cluster, ClusterConfig
from relay_cluster.cluster import Result
from relay_cluster.report import AgentReport
from tests.e2e.conftest import PIPELINE
from tests.multihost.rig import ROOT, Lan, RayOnHosts, wait_until

TWO_NODES = ROOT / "configs" / "clusters" / "two_nodes.yaml"
MAX_NEW = 80  # a block and a bit
PULL_TIMEOUT_S = 4.0
SLACK_S = 60.0  # what a request may take beside its pulls on a busy machine
SLOW = "24mbit"  # a segment of 6 MiB takes 2 s
FAULTS = {"timed_out", "peer_gone", "lease_expired", "no_route"}
EXACT = "context_mass:ratio=1+start=0+end=30"
"""Relays, and computes every relayed entry again: its tokens are always those of full prefill."""


def config(
    nodes: RayOnHosts, places: tuple[int, ...], backend: str = "auto", **changes: Any
) -> ClusterConfig:
    """The shipped two-node file, for hosts by number and with less patience."""
    shipped = ClusterConfig.load(TWO_NODES).model_dump()
    shipped["nodes"] = [f"10.77.0.{number}" for number in places]
    shipped["workers"], shipped["stream"] = len(places), "off"
    shipped["worker"] |= {"cache_tokens": 4096, "break_even": False}
    shipped["transport"] |= {"backend": backend, "arena_bytes": 128 << 20, "pull_timeout_s": PULL_TIMEOUT_S}
    shipped["ray"] |= {"address": nodes.address}
    for section, values in changes.items():
        shipped[section] |= values
    return ClusterConfig.model_validate(shipped)


def run(cluster: Cluster, question: str, method: str = "auto", **options: Any) -> Result:
    return cluster.run(PIPELINE, question=question, method=method, max_new_tokens=MAX_NEW, **options)


def exact(cluster: Cluster, question: str) -> Result:
    """The run without a fault and without reuse. Only after the other one: it leaves every text with every
    worker, so that nothing would have to travel."""
    return run(cluster, question, "full_prefill")


def answers(result: Result) -> list[tuple[int, ...]]:
    return [result[agent].tokens for agent in ("solver", "critic")]


def assert_recomputed(critic: AgentReport, reasons: set[str]) -> None:
    """Nothing relayed, every slot counted with its reason."""
    assert critic.relayed_tokens == 0, (critic.transfers, critic.fallbacks, critic.stages)
    assert {f.slot for f in critic.fallbacks} == {"question", "solver"}
    assert {f.reason for f in critic.fallbacks} <= reasons, critic.fallbacks
    assert critic.fresh_tokens == critic.prompt_tokens


class Sabotage:
    """Does something to the network while an agent on host 1 pulls from another host: when a part of the
    segments has come over the wire."""

    def __init__(
        self, lan: Lan, deed: Callable[[], None], after_bytes: int = 1 << 20, agent: str = "critic"
    ) -> None:
        self._lan, self._deed, self._after_bytes, self._agent = lan, deed, after_bytes, agent
        self._pool = ThreadPoolExecutor(1)
        self.done: Any = None

    def on_event(self, kind: str, agent: str, *_: Any) -> None:
        if (kind, agent) == ("agent_started", self._agent) and self.done is None:
            self._lan.shape(SLOW)
            self.done = self._pool.submit(self._watch, self._lan.received_bytes(1))

    def _watch(self, before: int) -> int:
        wait_until(
            lambda: self._lan.received_bytes(1) - before > self._after_bytes, "the pull is under way", 30
        )
        self._deed()
        return self._lan.received_bytes(1) - before


def until_pulled(cluster: Cluster, question: str, backend: str) -> Result:
    """Runs with fresh questions until one relays over `backend` again, a minute at most."""
    deadline = time.monotonic() + 60
    for number in range(20):
        result = run(cluster, f"{question} Attempt {number}.")
        if any(t.bytes and t.backend == backend for t in result["critic"].transfers):
            break
        assert time.monotonic() < deadline, result["critic"].fallbacks
    return result
