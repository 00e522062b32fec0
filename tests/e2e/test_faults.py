"""What happens when a process dies: the answer of full prefill, in time, with the reason in the report.

It takes minutes, and the campaign (`test_fault_campaign.py`) has the same faults on one cluster.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from relay_cluster import Cluster
from relay_cluster.turns import Turn, agent_report
from tests.e2e.conftest import PIPELINE, QUESTION, environment, small_cluster
from transport.types import WorkerId
from workers.messages import Request
from workers.segment import SlotValue
from workers.settings import SamplingSettings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

W0, W1 = WorkerId("w0"), WorkerId("w1")
BACKENDS = [
    pytest.param("tcp", {"RELAY_DISABLE_BACKENDS": "shm,nixl"}, id="tcp"),
    # Without shared memory, so that the owner has to take part in the transfer.
    pytest.param(
        "nixl", {"UCX_TLS": "tcp", "RELAY_DISABLE_BACKENDS": "shm"}, id="nixl", marks=pytest.mark.nixl
    ),
]


def _request(name: str, method: str, tokens: int = 12, **values: SlotValue) -> Request:
    agent = PIPELINE[name]
    return Request(
        id=f"{name}-{time.time_ns()}",
        agent=name,
        system=agent.system,
        prompt=agent.prompt,
        values=values,
        method=method,
        sampling=SamplingSettings(max_new_tokens=tokens),
    )


def _nothing(*_: object) -> None:
    """Tokens are not watched here."""


@pytest.mark.parametrize(("backend", "variables"), BACKENDS)
def test_the_owner_is_killed_in_the_middle_of_a_pull(backend: str, variables: dict[str, str]) -> None:
    with environment(**variables), Cluster(small_cluster(), agents_hint=PIPELINE) as cluster:
        question = SlotValue(text=QUESTION)
        first, _ = cluster.generate(W0, _request("solver", "auto", 70, question=question), _nothing)
        values: dict[str, Any] = {"question": question, "solver": first.output}
        # Not published, or the second request would find the segments on its own worker.
        oracle = replace(_request("critic", "full_prefill", **values), publish=False)
        expected, _ = cluster.generate(W1, oracle, _nothing)
        owner = cluster.workers[W0].pid
        # A stopped owner serves nothing: the pull is in flight until the process dies.
        os.kill(owner, signal.SIGSTOP)
        asked = _request("critic", "auto", **values)
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(cluster.generate, W1, asked, _nothing)
            time.sleep(1.0)  # long enough to be inside the pull, well below its deadline of 4 s
            assert not future.done(), "the pull did not wait for the owner"
            os.kill(owner, signal.SIGKILL)
            reply, ttft_s = future.result(timeout=60)
        took = time.monotonic() - began
    assert reply.token_ids == expected.token_ids
    assert reply.relayed_tokens == 0
    report = agent_report(Turn(PIPELINE["critic"], asked, reply, ttft_s, 0))
    assert {f.slot for f in report.fallbacks} == {"question", "solver"}
    assert {f.reason for f in report.fallbacks} <= {"peer_gone", "timed_out", "lease_expired"}
    assert all(f.detail for f in report.fallbacks)
    assert {t.source for t in report.transfers} == {"w0"}
    pulls_s = report.stages.pull_s
    assert pulls_s < 2 * 4.0 + 2.0, f"two pulls of at most 4 s each took {pulls_s:.1f} s"
    assert took < 60


def test_without_nixl_the_same_pipeline_runs_over_tcp_with_the_same_tokens() -> None:
    answers = []
    for variables in ({"RELAY_DISABLE_BACKENDS": "shm"}, {"RELAY_DISABLE_BACKENDS": "shm,nixl"}):
        said: list[str] = []
        with (
            environment(**variables),
            Cluster(
                small_cluster(),
                agents_hint=PIPELINE,
                on_event=lambda kind, text, said=said: said.append(text),
            ) as cluster,
        ):
            result = cluster.run(PIPELINE, question=QUESTION, max_new_tokens=40)
        answers.append([result[name].tokens for name in ("solver", "critic")])
        without = "nixl" in variables["RELAY_DISABLE_BACKENDS"]
        wanted = "tcp" if without else "nixl"
        assert {t.backend for t in result["critic"].transfers} == {wanted}
        notes = [line for line in said if "nixl is not available" in line]
        assert len(notes) == (1 if without else 0)
        assert list(result.report.cluster.notes) == notes
    assert answers[0] == answers[1]


def test_a_worker_that_dies_under_its_request_is_replaced() -> None:
    with Cluster(small_cluster(), agents_hint=PIPELINE) as cluster:
        whole = cluster.run(PIPELINE, question=QUESTION, method="full_prefill", max_new_tokens=60)
        pids = {info.worker: info.pid for info in cluster.workers.values()}
        killed = threading.Event()

        def kill_the_critic(kind: str, agent: str, *_: Any) -> None:
            if kind == "token" and agent == "critic" and not killed.is_set():
                killed.set()
                os.kill(pids[whole["critic"].worker], signal.SIGKILL)

        result = cluster.run(
            PIPELINE, question=QUESTION, method="full_prefill", max_new_tokens=60, on_event=kill_the_critic
        )
        assert killed.is_set()
        assert result["critic"].retries == 1
        assert result["critic"].tokens == whole["critic"].tokens
        # The replacement is a full member: it relays again.
        again = cluster.run(PIPELINE, question=QUESTION, max_new_tokens=40)
        assert again["critic"].reuse is not None
