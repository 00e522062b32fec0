"""The product on several hosts: relays over a network, and cables that fail under them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from relay_cluster import Cluster
from relay_cluster.report import RunReport
from tests.e2e.conftest import PIPELINE, QUESTION
from tests.multihost.pairs import (
    FAULTS,
    PULL_TIMEOUT_S,
    SLACK_S,
    TWO_NODES,
    Sabotage,
    answers,
    assert_recomputed,
    config,
    exact,
    run,
    until_pulled,
)
from tests.multihost.rig import ROOT, Lan, RayOnHosts
from transport.errors import ConfigError

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


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
        # A prompt that is prepared while others write pulls nothing.
        command += ["--stream", "off", "--max-new-tokens", "32", "--limit", "1", "--json", str(out)]
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
        Cluster(config(nodes, (1, 9)), agents_hint=PIPELINE),
    ):
        pass


@pytest.mark.parametrize("backend", ["tcp", pytest.param("nixl", marks=pytest.mark.nixl)])
def test_cable_cut_during_a_pull(lan: Lan, nodes: RayOnHosts, backend: str) -> None:
    with Cluster(config(nodes, (2, 1), backend), agents_hint=PIPELINE) as cluster:
        question = f"{QUESTION} ({backend})"
        sabotage = Sabotage(lan, lambda: (lan.cut(2), threading.Timer(8.0, lan.restore).start()))
        began = time.monotonic()
        result = run(cluster, question, on_event=sabotage.on_event)
        assert time.monotonic() - began < 2 * PULL_TIMEOUT_S + SLACK_S
        assert sabotage.done is not None
        assert sabotage.done.result(10) > 1 << 20
        critic = result["critic"]
        assert_recomputed(critic, FAULTS)
        assert critic.stages.pull_s < 2 * PULL_TIMEOUT_S + 3.0
        # The timer mends the cable after 8 s; what follows must not run into that.
        time.sleep(max(0.0, 10.0 - (time.monotonic() - began)))
        lan.restore()
        assert answers(result) == answers(exact(cluster, question))
        again = until_pulled(cluster, question, backend)
        assert again["critic"].relayed_tokens > 0
