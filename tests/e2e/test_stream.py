"""Pipelines whose readers are prepared while their upstream agents write: real workers, Ray and model."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from relay_cluster import Agent, Cluster, Pipeline
from tests.e2e.conftest import QUESTION, small_cluster
from transport.directory.catalogue import Filter
from transport.directory.operate import DirectoryOperator
from transport.directory.shard import find_names
from transport.errors import RelayError

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKENS = 24
BLOCK = 16
OPEN_TOKENS = 2 * BLOCK + 5
"""Of an answer that has full blocks before it ends."""
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


def left(cluster: Cluster) -> list[Any]:
    """What requests, preparations, open answers and those who follow them hold, on any worker or shard."""
    found: list[Any] = []
    for stats in cluster.stats().values():
        memory = stats["memory"]
        found += [stats["preparations"], stats["cache_blocks"] - stats["free_cache_blocks"]]
        found += [memory[name] for name in ("open_blocks", "landing_blocks", "pins", "leases")]
        found += [memory["opening"]["live"], memory["following"]["live"], memory["following"]["blocks"]]
    directory = cluster.directory_stats()
    return [*found, *(directory[name] for name in ("leases", "watches", "open_segments"))]


def assert_nothing_left(cluster: Cluster) -> None:
    """Every block, lease and subscription is given back; a step that is being given up may take a moment."""
    deadline = time.monotonic() + 60
    while any(left(cluster)):
        assert time.monotonic() < deadline, left(cluster)
        time.sleep(0.05)  # between two looks


TWO = Pipeline(
    [
        Agent("solver", prompt="Write a long story about a lighthouse keeper.", max_new_tokens=OPEN_TOKENS),
        Agent("critic", prompt="Here is a story:\n{solver}\nHow does it end?", max_new_tokens=4),
    ],
    name="two",
)
"""No shared inputs: whether these are held already would change what is relayed."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A thread for each worker: readers compute while writers do, and two teams on two cores wait for each
    other at every operator."""
    worker = {"device": "cpu", "cache_tokens": 4096, "break_even": False, "threads": 1}
    # Small blocks, so that short answers have full ones.
    transport = {"arena_bytes": 128 << 20, "pull_timeout_s": 4.0, "block_tokens": BLOCK}
    with Cluster(small_cluster(worker=worker, transport=transport), agents_hint=THREE) as running:
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


def test_relay_pulls_what_is_published_while_it_is_written(cluster: Cluster) -> None:
    """With every entry recomputed, relayed KV gives what full prefill gives."""
    result = cluster.run(TWO, method="cacheblend:r=1", stream="relay", compare="full_prefill", repeats=1)
    solver, critic = result["solver"], result["critic"]
    assert (solver.pulled_ahead_blocks, solver.relayed_tokens) == (0, 0)
    assert critic.pulled_ahead_blocks >= 1
    assert critic.pulled_ahead_bytes > 0
    assert critic.relayed_tokens == OPEN_TOKENS - 1
    assert sum(t.blocks for t in critic.transfers) <= 1, "the last block at most crosses the wire at the end"
    assert critic.prepared_tokens > 0, "what stands before the story is computed ahead"
    assert critic.fallbacks == ()
    assert critic.compare is not None
    assert critic.compare.top1 == 1.0
    assert critic.compare.kl_first is not None
    assert critic.compare.kl_first < 1e-6
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


# -- relay, in minutes ---------------------------------------------------------------------------------------

FAN = Pipeline(
    [
        Agent("solver", prompt="Write a long story about a lighthouse keeper.", max_new_tokens=OPEN_TOKENS),
        Agent("critic", prompt="Write a long poem about a farmer.", max_new_tokens=2 * OPEN_TOKENS),
        Agent("judge", prompt="A poem:\n{critic}\nA story:\n{solver}\nWhich is better?", max_new_tokens=4),
    ],
    name="fan",
)
"""The judge reads what ends last before what ends first."""


def forget(cluster: Cluster) -> None:
    """What an earlier run has left: the same answer again would be found at once."""
    (names,) = find_names().values()
    DirectoryOperator.of(names).evict(Filter(), timeout_s=60.0)
    assert cluster.directory_stats()["segments"] == 0


@pytest.mark.long
@pytest.mark.parametrize("method", ["epic", "cacheblend", "context_mass", "relay_caching"])
def test_relay_answers_are_those_of_the_method_without_streaming(cluster: Cluster, method: str) -> None:
    """Slots behind an open one are pulled ahead as well, to their end."""
    tokens = {}
    for stream in ("off", "relay"):
        forget(cluster)
        result = cluster.run(FAN, method=method, stream=stream)  # type: ignore[arg-type]
        tokens[stream] = {a: result[a].tokens for a in FAN.order}
        assert result["judge"].fallbacks == ()
    assert tokens["relay"] == tokens["off"]
    judge = result["judge"]
    remote = [t for t in judge.transfers if t.backend != "local"]
    if any(t.slot == "solver" for t in remote):
        assert sum(t.blocks for t in remote if t.slot == "solver") == 0, "it had been over for long"
    assert judge.pulled_ahead_blocks >= 1
    assert_nothing_left(cluster)


@pytest.mark.long
def test_a_writer_that_dies_half_way_is_followed_again(cluster: Cluster) -> None:
    forget(cluster)
    once = threading.Lock()

    def kill(kind: str, agent: str, *more: Any) -> None:
        if (kind, agent) == ("token", "solver") and more[0] == 2 * BLOCK + 3 and once.acquire(blocking=False):
            os.kill(cluster.workers[cluster._placed["solver"]].pid, signal.SIGKILL)

    result = cluster.run(
        TWO, method="cacheblend:r=1", stream="relay", compare="full_prefill", repeats=1, on_event=kill
    )
    critic = result["critic"]
    assert result["solver"].retries == 1
    assert critic.compare is not None
    assert critic.compare.top1 == 1.0
    assert critic.compare.kl_first is not None
    assert critic.compare.kl_first < 1e-6
    assert_nothing_left(cluster)


@pytest.mark.long
def test_a_run_that_ends_early_leaves_no_open_answer(cluster: Cluster) -> None:
    forget(cluster)

    class Enough(RelayError):
        pass

    def stop(kind: str, agent: str, *more: Any) -> None:
        if (kind, agent) == ("token", "solver") and more[0] == 2 * BLOCK + 3:
            raise Enough("the caller has had enough")

    with pytest.raises(Enough):
        cluster.run(TWO, method="epic", stream="relay", on_event=stop)
    assert_nothing_left(cluster)
    assert cluster.directory_stats()["aborted_total"] >= 1


@pytest.mark.long
def test_shards_that_die_half_way_are_told_again(cluster: Cluster) -> None:
    forget(cluster)
    once = threading.Lock()

    def kill(kind: str, agent: str, *more: Any) -> None:
        if (kind, agent) == ("token", "solver") and more[0] == BLOCK + 3 and once.acquire(blocking=False):
            for name in next(iter(find_names().values())):
                ray.kill(ray.get_actor(name), no_restart=False)

    long = Pipeline([replace(a, max_new_tokens=4 * OPEN_TOKENS if a.slots == () else 4) for a in TWO.agents])
    result = cluster.run(long, method="cacheblend:r=1", stream="relay", compare="full_prefill", on_event=kill)
    critic = result["critic"]
    assert critic.compare is not None
    assert critic.compare.top1 == 1.0
    assert critic.pulled_ahead_blocks >= 1, "blocks that fill after the restart are heard of"
    assert_nothing_left(cluster)
