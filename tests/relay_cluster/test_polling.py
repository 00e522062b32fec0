"""Statistics of workers and shards with a deadline: what does not answer is missing, and holds nobody up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import ray

from relay_cluster.collecting import ClusterCollector, Facts, samples_of
from relay_cluster.polling import Poll
from tests.transport.directory_rigs import wait_for_shards
from transport.directory.shard import create_shards
from transport.latency import BOUNDS_S, Durations, Latencies
from transport.settings import DirectorySettings
from transport.types import NodeId, WorkerId
from workers.actor import WorkerInfo

SETTINGS = DirectorySettings(shards=2, heartbeat_s=0.2)


def info(name: str) -> WorkerInfo:
    facts: dict[str, Any] = dict.fromkeys(WorkerInfo.__slots__)
    return WorkerInfo(**{**facts, "worker": WorkerId(name), "node": NodeId("n"), "model": "m"})


class Talker:
    """Answers as a worker does, after a while."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._calls = 0

    def stats(self) -> dict[str, int]:
        self._calls += 1
        time.sleep(self._after_s)  # what makes it slow
        return {"calls": self._calls}

    def ready(self) -> None:
        pass


def test_without_ray_nothing_is_started() -> None:
    if ray.is_initialized():
        pytest.skip("another test of this process runs Ray")
    poll = Poll(lambda: {WorkerId("w0"): (None, info("w0"))}, {}, SETTINGS)
    assert poll() == Facts({}, {})
    assert not ray.is_initialized()


@pytest.fixture(scope="module")
def running() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, namespace="test-polling", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.long  # a frozen worker is in tests/e2e/test_serving.py
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_who_does_not_answer_is_missing(running: None) -> None:
    made: Any = ray.remote(Talker).options(num_cpus=0)
    actors: dict[str, Any] = {"quick": made.remote(0), "slow": made.remote(60), "dead": made.remote(0)}
    shards = create_shards(SETTINGS, prefix="relay-directory-poll")
    wait_for_shards(shards)
    ray.get([actor.ready.remote() for actor in actors.values()], timeout=120)
    for victim in (actors["dead"], shards["relay-directory-poll-1"]):
        ray.kill(victim, no_restart=True)
    poll = Poll(
        lambda: {WorkerId(n): (a, info(n)) for n, a in actors.items()}, shards, SETTINGS, timeout_s=5.0
    )
    told = poll()
    assert {str(w): stats for w, (_, stats) in told.workers.items()} == {
        "quick": {"calls": 1},
        "slow": None,
        "dead": None,
    }
    assert {name: answer is not None for name, answer in told.shards.items()} == {
        "relay-directory-poll-0": True,
        "relay-directory-poll-1": False,
    }
    again = poll()
    assert again.workers[WorkerId("quick")][1] == {"calls": 2}
    assert again.workers[WorkerId("slow")][1] is None, "the open call is not answered, and no other is made"


def test_a_silent_worker_and_a_silent_shard_have_nothing_but_up() -> None:
    facts = Facts({WorkerId("w0"): (info("w0"), None)}, {"relay-directory-12ab-3": None})
    samples = [sample for family in samples_of(facts).families() for sample in family.samples]
    assert [(s.name, s.labels, s.value) for s in samples] == [
        ("relay_worker_up", {"worker": "w0", "node": "n", "model": "m"}, 0.0),
        ("relay_directory_shard_up", {"shard": "3"}, 0.0),
    ]


def test_scrapes_at_the_same_time_ask_once() -> None:
    asked: list[bool] = []

    def poll() -> Facts:
        asked.append(True)
        return Facts({}, {})

    collector = ClusterCollector(poll)
    assert collector.describe() == []
    for _ in range(3):
        assert list(collector.collect()) == []
    assert len(asked) == 1


def test_latencies_are_counted_in_buckets() -> None:
    latencies = Latencies()
    for seconds in (0.0001, BOUNDS_S[0], 0.02, 99.0):
        latencies.observe("lookup", seconds)
    (found,) = latencies.snapshot().values()
    assert found.seconds == pytest.approx(99.0206)
    assert sum(found.counts) == 4
    assert found.counts[0] == 2, "a bound belongs to its bucket, as with Prometheus"
    assert found.counts[-1] == 1
    assert len(found.counts) == len(BOUNDS_S) + 1


def test_counts_become_a_histogram() -> None:
    from relay_cluster.collecting import Samples

    out = Samples()
    counts = (1,) * (len(BOUNDS_S) + 1)
    out.put_durations("relay_directory_operation_seconds", Durations(counts, 7.0), "w0", "n", "lease")
    (family,) = out.families()
    told = {(s.name, s.labels.get("le")): s.value for s in cast("Any", family).samples}
    assert told["relay_directory_operation_seconds_bucket", "0.0005"] == 1
    assert told["relay_directory_operation_seconds_bucket", "+Inf"] == len(counts)
    assert told["relay_directory_operation_seconds_count", None] == len(counts)
    assert told["relay_directory_operation_seconds_sum", None] == 7.0
