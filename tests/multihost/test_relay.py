"""The product on several hosts: relays over a network, and hosts and cables that fail under them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from relay_cluster import Cluster, ClusterConfig
from relay_cluster.cluster import Result
from relay_cluster.report import AgentReport, RunReport
from tests.e2e.conftest import PIPELINE, QUESTION
from tests.multihost.rig import ROOT, Lan, RayOnHosts, wait_until
from transport.errors import ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

TWO_NODES = ROOT / "configs" / "clusters" / "two_nodes.yaml"
MAX_NEW = 80  # a block and a bit
PULL_TIMEOUT_S = 4.0
SLACK_S = 60.0  # what a request may take beside its pulls on a busy machine
SLOW = "24mbit"  # a segment of 6 MiB takes 2 s
FAULTS = {"timed_out", "peer_gone", "lease_expired", "no_route"}


@pytest.fixture(scope="module")
def nodes(lan: Lan) -> Iterator[RayOnHosts]:
    with RayOnHosts(lan) as nodes:
        yield nodes


def _config(
    nodes: RayOnHosts, places: tuple[int, ...], backend: str = "auto", **changes: Any
) -> ClusterConfig:
    """The shipped two-node file, for hosts by number and with less patience."""
    shipped = ClusterConfig.load(TWO_NODES).model_dump()
    shipped["nodes"] = [f"10.77.0.{number}" for number in places]
    shipped["workers"] = 2
    shipped["worker"] |= {"cache_tokens": 4096, "break_even": False}
    shipped["transport"] |= {"backend": backend, "arena_bytes": 128 << 20, "pull_timeout_s": PULL_TIMEOUT_S}
    shipped["ray"] |= {"address": nodes.address}
    for section, values in changes.items():
        shipped[section] |= values
    return ClusterConfig.model_validate(shipped)


def _run(cluster: Cluster, question: str, method: str = "auto", **options: Any) -> Result:
    return cluster.run(PIPELINE, question=question, method=method, max_new_tokens=MAX_NEW, **options)


def _exact(cluster: Cluster, question: str) -> Result:
    """The run without a fault and without reuse. Only after the other one: it leaves every text with every
    worker, so that nothing would have to travel."""
    return _run(cluster, question, "full_prefill")


def _answers(result: Result) -> list[tuple[int, ...]]:
    return [result[agent].tokens for agent in ("solver", "critic")]


def _assert_recomputed(critic: AgentReport, reasons: set[str]) -> None:
    """Nothing relayed, every slot counted with its reason."""
    assert critic.relayed_tokens == 0
    assert {f.slot for f in critic.fallbacks} == {"question", "solver"}
    assert {f.reason for f in critic.fallbacks} <= reasons, critic.fallbacks
    assert critic.fresh_tokens == critic.prompt_tokens


def test_relay_run_over_two_hosts_answers_as_on_one(lan: Lan, nodes: RayOnHosts, tmp_path: Path) -> None:
    """The shipped file and pipeline, as a user types them; then the same with both workers on one host."""
    reports: list[RunReport] = []
    alone = tmp_path / "one_host.yaml"
    alone.write_text(TWO_NODES.read_text().replace("- 10.77.0.2\n", "- 10.77.0.1\n"))
    for cluster in (TWO_NODES, alone):
        out = tmp_path / f"{cluster.stem}.json"
        before = lan.received_bytes(2)
        command = [sys.executable, "-m", "relay_cluster", "run", "configs/pipelines/demo.yaml"]
        command += ["--input-file", "configs/pipelines/demo_input.jsonl", "--cluster", str(cluster)]
        command += ["--max-new-tokens", "32", "--limit", "1", "--json", str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        report = RunReport.from_json(json.loads(out.read_text()))
        reports.append(report)
        pulled = [t for row in report.rows for a in row.agents for t in a.transfers if t.bytes]
        assert pulled
        assert all(t.outcome == "pulled" for t in pulled)
        if cluster is TWO_NODES:
            crossed = sum(t.bytes for t in pulled if t.source_node == "10.77.0.1")
            assert 0 < crossed <= lan.received_bytes(2) - before, "it came over the wire"
    two, one = reports
    assert (two.cluster.nodes, one.cluster.nodes) == (2, 1)
    assert one.cluster.backend == "shm"
    assert "nixl" in two.cluster.backend.split("+"), "and shm between workers of one host, if at all"
    assert {a.node for a in two.rows[0].agents} == {"10.77.0.1", "10.77.0.2"}
    assert [a.node for a in two.rows[0].agents][:2] == ["10.77.0.1", "10.77.0.2"], "in turn"
    assert [a.tokens for a in two.rows[0].agents] == [a.tokens for a in one.rows[0].agents]
    assert all(not a.fallbacks for a in two.rows[0].agents)


def test_a_node_that_is_not_there_is_named_with_those_that_are(nodes: RayOnHosts) -> None:
    with (
        pytest.raises(ConfigError, match=r"10\.77\.0\.9.*live: .*10\.77\.0\.1"),
        Cluster(_config(nodes, (1, 9)), agents_hint=PIPELINE),
    ):
        pass


class _Sabotage:
    """Does something to the network while the critic, on host 1, pulls from the solver's host 2: when a part
    of the segments has come over the wire."""

    def __init__(self, lan: Lan, deed: Callable[[], None], after_bytes: int = 1 << 20) -> None:
        self._lan, self._deed, self._after_bytes = lan, deed, after_bytes
        self._pool = ThreadPoolExecutor(1)
        self.done: Any = None

    def on_event(self, kind: str, agent: str, *_: Any) -> None:
        if (kind, agent) == ("agent_started", "critic") and self.done is None:
            self._lan.shape(SLOW)
            self.done = self._pool.submit(self._watch, self._lan.received_bytes(1))

    def _watch(self, before: int) -> int:
        wait_until(
            lambda: self._lan.received_bytes(1) - before > self._after_bytes, "the pull is under way", 30
        )
        self._deed()
        return self._lan.received_bytes(1) - before


def _until_pulled(cluster: Cluster, question: str, backend: str) -> Result:
    """Runs with fresh questions until one relays over `backend` again, a minute at most."""
    deadline = time.monotonic() + 60
    for number in range(20):
        result = _run(cluster, f"{question} Attempt {number}.")
        if any(t.bytes and t.backend == backend for t in result["critic"].transfers):
            break
        assert time.monotonic() < deadline, result["critic"].fallbacks
    return result


@pytest.mark.parametrize("backend", ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)])
def test_cable_cut_during_a_pull(lan: Lan, nodes: RayOnHosts, backend: str) -> None:
    with Cluster(_config(nodes, (2, 1), backend), agents_hint=PIPELINE) as cluster:
        question = f"{QUESTION} ({backend})"
        sabotage = _Sabotage(lan, lambda: (lan.cut(2), threading.Timer(8.0, lan.restore).start()))
        began = time.monotonic()
        result = _run(cluster, question, on_event=sabotage.on_event)
        assert time.monotonic() - began < 2 * PULL_TIMEOUT_S + SLACK_S
        assert sabotage.done is not None
        assert sabotage.done.result(10) > 1 << 20
        critic = result["critic"]
        _assert_recomputed(critic, FAULTS)
        assert critic.stages.pull_s < 2 * PULL_TIMEOUT_S + 3.0
        # The timer mends the cable after 8 s; what follows must not run into that.
        time.sleep(max(0.0, 10.0 - (time.monotonic() - began)))
        lan.restore()
        assert _answers(result) == _answers(_exact(cluster, question))
        again = _until_pulled(cluster, question, backend)
        assert again["critic"].relayed_tokens > 0
