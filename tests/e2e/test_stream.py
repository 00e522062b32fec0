"""Pipelines whose readers are prepared while their upstream agents write: real workers, Ray and model."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from relay_cluster import Agent, Cluster, Pipeline
from tests.e2e.conftest import QUESTION, small_cluster
from transport.errors import RelayError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKENS = 24
THREE = Pipeline(
    [
        Agent("solver", prompt="Solve this problem.\n{question}", system="You are a maths tutor."),
        Agent(
            "critic",
            prompt="Problem:\n{question}\nSolution:\n{solver}\nIs this right?",
            system="You check solutions.",
        ),
        Agent(
            "judge",
            prompt="Problem:\n{question}\nOne says:\n{critic}\nThe solution was:\n{solver}\nDecide.",
            system="You decide.",
        ),
    ],
    name="three",
)


def assert_nothing_left(cluster: Cluster) -> None:
    """No preparation, and every cache block free; a step that is being given up may take a moment."""
    deadline = time.monotonic() + 60
    while True:
        stats = cluster.stats().values()
        if all(s["preparations"] == 0 and s["free_cache_blocks"] == s["cache_blocks"] for s in stats):
            return
        assert time.monotonic() < deadline, [s["preparations"] for s in stats]
        time.sleep(0.05)  # between two looks


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A thread for each worker: readers compute while writers do, and two teams on two cores wait for each
    other at every operator."""
    worker = {"device": "cpu", "cache_tokens": 4096, "break_even": False, "threads": 1}
    with Cluster(small_cluster(worker=worker), agents_hint=THREE) as running:
        yield running


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> dict[str, tuple[int, ...]]:
    """What full prefill answers."""
    result = cluster.run(THREE, question=QUESTION, method="full_prefill", max_new_tokens=TOKENS)
    return {a: result[a].tokens for a in THREE.order}


def test_exact_answers_are_full_prefill_s_and_most_is_ready(
    cluster: Cluster, whole: dict[str, tuple[int, ...]]
) -> None:
    before = cluster.stats()
    result = cluster.run(THREE, question=QUESTION, stream="exact", max_new_tokens=TOKENS)
    assert {a: result[a].tokens for a in THREE.order} == whole
    for name in ("critic", "judge"):
        agent = result[name]
        assert agent.relayed_tokens == 0
        assert agent.prepared_tokens > 0
        assert agent.ahead == "exact: the request relays nothing"
        assert agent.fresh_tokens == agent.prompt_tokens
    assert result["solver"].prepared_tokens == 0, "nothing of it has to be waited for"
    used = sum(s["prepared_tokens_used"] for s in cluster.stats().values())
    assert used > sum(s["prepared_tokens_used"] for s in before.values())
    assert_nothing_left(cluster)


def test_auto_relays_what_there_was_no_time_for(cluster: Cluster) -> None:
    """Whatever was prepared and whatever was relayed, it adds up."""
    result = cluster.run(THREE, question=QUESTION, stream="auto", max_new_tokens=TOKENS)
    for name in THREE.order:
        agent = result[name]
        assert agent.fresh_tokens + agent.relayed_tokens == agent.prompt_tokens
        assert agent.prepared_tokens <= agent.prefix_tokens <= agent.fresh_tokens
    assert not result["solver"].ahead, "nothing of it has to be waited for"
    for name in ("critic", "judge"):
        assert result[name].ahead.startswith(("exact: ", "relay: ")), result[name].ahead
    assert_nothing_left(cluster)


def test_an_upstream_agent_that_dies_half_way_costs_only_work(
    cluster: Cluster, whole: dict[str, tuple[int, ...]]
) -> None:
    once = threading.Lock()

    def kill(kind: str, agent: str, *more: Any) -> None:
        if (kind, agent) == ("token", "critic") and more[0] == 10 and once.acquire(blocking=False):
            os.kill(cluster.workers[cluster._placed["critic"]].pid, signal.SIGKILL)

    result = cluster.run(THREE, question=QUESTION, stream="exact", max_new_tokens=TOKENS, on_event=kill)
    assert result["critic"].retries == 1
    assert {a: result[a].tokens for a in THREE.order} == whole
    assert_nothing_left(cluster)


def test_a_run_that_ends_early_leaves_nothing_prepared(cluster: Cluster) -> None:
    class Enough(RelayError):
        pass

    def stop(kind: str, agent: str, *more: Any) -> None:
        if (kind, agent) == ("token", "solver") and more[0] == 12:
            raise Enough("the caller has had enough")

    with pytest.raises(Enough):
        cluster.run(THREE, question=QUESTION, stream="auto", max_new_tokens=TOKENS, on_event=stop)
    assert_nothing_left(cluster)
