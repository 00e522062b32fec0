"""Real shard actors: the operations, and a killed shard whose owners announce everything again."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest
import ray

from tests.transport.directory_rigs import wait_for_shards
from tests.transport.rigs import wait_for
from transport.base import Answers
from transport.directory.client import DirectoryClient
from transport.directory.opening import News, Opened
from transport.directory.operate import DirectoryOperator
from transport.directory.shard import create_shard, create_shards, find_names, find_shards, kill_shards
from transport.errors import DirectoryUnavailable
from transport.settings import DirectorySettings
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    Located,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SETTINGS = DirectorySettings(shards=2, heartbeat_s=0.2, call_timeout_s=5.0)
ME = Owner(WorkerId("w0"), Incarnation(1), NodeId("n0"), {"tcp": b"x"})
ALL = [Segment(SegmentKey("s", bytes([i])), 1, 0, (BlockRef(BlockId(i), 1, 100, (0,)),)) for i in range(20)]
KEYS = [s.key for s in ALL]


@pytest.fixture(scope="module")
def shards() -> Iterator[dict[str, Any]]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, namespace="test-directory", log_to_driver=False)
    handles = create_shards(SETTINGS)
    wait_for_shards(handles)
    yield handles
    ray.shutdown()


def test_operations_over_ray(shards: dict[str, Any]) -> None:
    assert find_shards(SETTINGS).keys() == shards.keys()
    client = DirectoryClient(list(shards), SETTINGS)
    client.publish(ME, ALL)
    assert client.lookup(KEYS)[KEYS[0]].owner == replace(ME, addresses={}), "where is told with a lease"
    leases = client.lease(KEYS[:5], holder=WorkerId("w1"), ttl_s=30)
    assert leases[KEYS[0]].located.owner == ME
    assert all(client.renew(list(leases.values()), ttl_s=30).values())
    assert len(client.evict(ME, nbytes=10**9)) == 15
    client.release(list(leases.values()))
    assert len(client.evict(ME, nbytes=10**9)) == 5
    assert client.stats()["shards_up"] == 2
    client.close()


def test_retract_over_ray_comes_in_order(shards: dict[str, Any]) -> None:
    client = DirectoryClient(shards, SETTINGS)
    client.publish(ME, ALL)
    client.retract(ME, ALL[:10])  # not waited for
    found = client.lookup(KEYS)
    assert found.keys() == set(KEYS[10:])
    assert found.unanswered == frozenset()
    client.publish(ME, ALL[:10])
    assert client.lookup(KEYS).keys() == set(KEYS)
    client.evict(ME, nbytes=10**9)
    client.close()


OPEN = SegmentKey("s", b"open")
READER = WorkerId("w1")


def opened(first: int, count: int, **more: Any) -> Opened:
    """Blocks [first, first + count) of an answer that is written."""
    blocks = tuple(BlockRef(BlockId(i), 1, 100, (0,)) for i in range(first, first + count))
    ids = tuple(range(2 * first, 2 * (first + count)))
    options = {"key": OPEN, "start": 0, "layout": "l", "producer": "p", "block_tokens": 2, **more}
    return Opened(first=first, blocks=blocks, token_ids=ids, **options)


def watching(
    client: DirectoryClient, after: int, wait_s: float = 60.0, key: SegmentKey = OPEN
) -> tuple[threading.Thread, list[News]]:
    """A watch on a thread of its own, once a shard knows of it; what it hears."""
    heard: list[News] = []

    def watch() -> None:
        news = client.watch(key, life=1, after=after, holder=READER, ttl_s=5.0, wait_s=wait_s)
        heard.extend([] if news is None else [news])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    wait_for(lambda: client.stats()["watches"] == 1, "a shard knows of the watch", 30)
    return thread, heard


def test_a_watch_is_answered_when_a_block_comes_and_not_before(shards: dict[str, Any]) -> None:
    owner, reader = DirectoryClient(shards, SETTINGS), DirectoryClient(shards, SETTINGS)
    thread, heard = watching(reader, after=0)
    owner.publish(ME, ALL)  # other calls are answered meanwhile
    assert len(reader.lookup(KEYS)) == 20
    assert thread.is_alive()
    assert owner.advance(ME, opened(0, 1)) == ""
    thread.join(30)
    assert [len(n.lease.located.segment.blocks) for n in heard if n.lease] == [1]
    thread, heard = watching(reader, after=1)
    reader.unwatch(OPEN, holder=READER)
    thread.join(30)
    assert (thread.is_alive(), heard, reader.stats()["watches"]) == (False, [], 0)
    thread, heard = watching(reader, after=1)
    owner.drop_owner(ME.worker, ME.incarnation)
    thread.join(30)
    assert [n.state for n in heard] == ["aborted"]
    assert reader.stats()["open_segments"] == 0
    owner.close()
    reader.close()


def test_a_reader_that_is_gone_leaves_nothing_behind(shards: dict[str, Any]) -> None:
    """Nobody dismisses its watch: it ends by its deadline."""
    client = DirectoryClient(shards, SETTINGS)
    thread, heard = watching(client, after=0, wait_s=3.0, key=SegmentKey("s", b"nobody's"))
    thread.join(30)
    assert (thread.is_alive(), heard) == (False, [])
    assert client.stats()["watches"] == 0
    client.close()


def test_a_shard_that_restarts_hears_of_open_answers_again(shards: dict[str, Any]) -> None:
    me = replace(ME, incarnation=Incarnation(2))
    owner, reader = DirectoryClient(shards, SETTINGS), DirectoryClient(shards, SETTINGS)
    owner.start_owner(me, list)
    assert owner.advance(me, opened(0, 3)) == ""
    ray.kill(shards[owner.fleet.replicas(OPEN)[0]], no_restart=False)

    # By the one that comes back; the one that is being killed may still answer for a moment.
    wait_for(lambda: reader.stats()["open_gaps_total"] >= 1, "it says what it has missed", 60)

    def hears() -> bool:
        try:
            news = reader.watch(OPEN, life=2, after=2, holder=READER, ttl_s=5.0, wait_s=1.0)
        except DirectoryUnavailable:
            return False
        return news is not None and news.first == 2 and news.token_ids == (4, 5)

    wait_for(hears, "the third block is told again, and only that", 60)
    assert owner.advance(me, opened(3, 0, state="aborted", reason="test")) == ""
    wait_for(lambda: reader.stats()["open_segments"] == 0, "it ends", 30)
    owner.close()
    owner.drop_owner(me.worker, me.incarnation)
    reader.close()


def test_a_killed_shard_returns_and_owners_announce_again(shards: dict[str, Any]) -> None:
    client = DirectoryClient(shards, SETTINGS)
    client.start_owner(replace(ME, incarnation=Incarnation(3)), lambda: ALL)
    assert len(client.lookup(KEYS)) == 20
    before = client.stats()["republished"]
    victim = next(iter(shards.values()))
    ray.kill(victim, no_restart=False)
    wait_for(lambda: client.stats()["republished"] > before, "segments are published again", 30)
    wait_for(lambda: len(client.lookup(KEYS)) == 20, "and found again", 10)
    client.close()


def shard_pids() -> list[int]:
    """Processes of shard actors that this driver's Ray has started."""
    mine = psutil.Process().children(recursive=True)
    return [p.pid for p in mine if p.is_running() and "ray::WatchedShard" in " ".join(p.cmdline())]


def test_sigkill_of_a_shard_while_lookups_run_costs_no_hits(shards: dict[str, Any]) -> None:
    two = replace(SETTINGS, replicas=2)
    others = set(shard_pids())
    names = create_shards(two, prefix="relay-directory-pair")
    wait_for_shards(names)
    owner, reader = DirectoryClient(names, two), DirectoryClient(list(names), two)
    owner.start_owner(ME, lambda: ALL)
    found: list[Answers[Located]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            found.append(reader.lookup(KEYS))

    looking = threading.Thread(target=look, name="test-lookups")
    looking.start()
    try:
        wait_for(lambda: len(found) > 20, "lookups run", 20)
        republished = owner.stats()["republished"]
        victim = (set(shard_pids()) - others).pop()
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: owner.stats()["republished"] > republished, "it is back and filled", 30)
        at = len(found)
        wait_for(lambda: len(found) > at + 20, "lookups run on", 20)
    finally:
        stop.set()
        looking.join(20)
        owner.close()
    assert victim not in shard_pids()
    assert [x for x in found if x.keys() != set(KEYS)] == [], "zero misses"
    kill_shards("relay-directory-pair")
    assert "relay-directory-pair" not in find_names()


def test_resize_over_ray(shards: dict[str, Any]) -> None:
    first = create_shards(replace(SETTINGS, shards=1), prefix="relay-directory-grow")
    wait_for_shards(first)
    client, reader = DirectoryClient(first, SETTINGS), DirectoryClient(list(first), SETTINGS)
    client.start_owner(ME, lambda: ALL)
    lease = reader.lease(KEYS, holder=WorkerId("w1"), ttl_s=30)
    names = [f"relay-directory-grow-{i}" for i in range(3)]
    operator = DirectoryOperator.of(list(first))
    view = operator.resize(names, start=lambda n: create_shard(n, SETTINGS, detached=True), end=ray.kill)
    assert (view.epoch, view.shards) == (1, tuple(names))
    wait_for(lambda: len(reader.lookup(KEYS)) == 20, "moved", 20)
    assert all(reader.renew(list(lease.values()), ttl_s=30).values())
    reader.release(list(lease.values()))
    per_shard = DirectoryOperator.of(names).stats()
    wait_for(lambda: sum(s["segments"] for s in DirectoryOperator.of(names).stats().values()) == 20, "swept")
    assert per_shard.keys() == set(names)
    ended: list[str] = []
    DirectoryOperator.of(names).resize(names[:1], start=pytest.fail, end=ended.append)
    assert ended == names[1:]
    wait_for(lambda: len(reader.lookup(KEYS)) == 20, "moved back", 20)
    client.close()
    kill_shards("relay-directory-grow")
