"""The directory client over plain shard objects: routing, evicting over shards, restarts, dead shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.transport.rigs import wait_for
from transport.directory.client import DirectoryClient, ShardFailed
from transport.directory.local import LocalDirectory
from transport.directory.shard import Shard
from transport.errors import DirectoryUnavailable, WorkerLost
from transport.settings import DirectorySettings
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

W0, W1 = WorkerId("w0"), WorkerId("w1")
ME = Owner(W0, Incarnation(1), NodeId("n0"), {})
SETTINGS = DirectorySettings(shards=3, heartbeat_s=0.02, call_timeout_s=0.5)


class PlainCalls:
    """Shards as plain objects; those in `dead` do not answer, those in `lossy` act without answering."""

    def __init__(self) -> None:
        self.dead: set[str] = set()
        self.lossy: set[str] = set()
        self.sent: list[tuple[str, str]] = []

    def send(self, shard: Any, method: str, args: tuple[Any, ...]) -> Any:
        self.sent.append((shard.name, method))
        if shard.name in self.dead:
            return None
        result = getattr(shard, method)(*args)
        return None if shard.name in self.lossy else (result,)

    def wait(self, pending: Any, timeout_s: float) -> Any:
        if pending is None:
            raise ShardFailed("gone")
        return pending[0]


class NamedShard(Shard):
    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        super().__init__(name, owner_timeout_s=10.0, clock=clock)
        self.name = name


def segment(i: int, nbytes: int = 100) -> Segment:
    return Segment(SegmentKey("s", bytes([i])), 1, 0, (BlockRef(BlockId(i), 1, nbytes, (0,)),))


class Rig:
    def __init__(self) -> None:
        self.calls = PlainCalls()
        self.passed_s = 0.0  # time that a test lets pass without waiting for it
        self.shards: dict[str, Any] = {n: NamedShard(n, self.clock) for n in ("a", "b", "c")}
        self.client = DirectoryClient(self.shards, SETTINGS, calls=self.calls)

    def clock(self) -> float:
        return time.monotonic() + self.passed_s

    def restart(self, name: str) -> None:
        fresh = NamedShard(name, self.clock)
        self.client._shards[name] = fresh


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.client.close()


ALL = [segment(i) for i in range(40)]
KEYS = [s.key for s in ALL]


def test_every_operation_crosses_shards(rig: Rig) -> None:
    c = rig.client
    c.publish(ME, ALL)
    assert c.lookup(KEYS).keys() == set(KEYS)
    leases = c.lease(KEYS, holder=W1, ttl_s=5)
    assert len(leases) == 40
    assert c.evict(ME, nbytes=10**9) == ()
    held = list(leases.values())
    assert all(c.renew(held, ttl_s=5).values())
    c.release(held[:10])
    assert len(c.evict(ME, nbytes=10**9)) == 10
    stats = c.stats()
    assert (stats["segments"], stats["leases"], stats["owners"], stats["shards_up"]) == (30, 30, 1, 3)
    assert stats["bytes"] == 3000
    c.drop_owner(W0, 1)
    assert c.lookup(KEYS) == {}
    with pytest.raises(WorkerLost, match="End this process"):
        c.publish(ME, ALL[:1])


def test_one_call_per_shard(rig: Rig) -> None:
    rig.client.publish(ME, ALL)
    rig.calls.sent.clear()
    rig.client.lookup(KEYS)
    assert sorted(rig.calls.sent) == [("a", "lookup"), ("b", "lookup"), ("c", "lookup")]


def test_evict_takes_the_oldest_over_all_shards(rig: Rig) -> None:
    for s in ALL[:12]:
        rig.client.publish(ME, [s])
        rig.passed_s += 0.5  # shards are asked one after the other: ages must differ by more than that takes
    rig.client.release(list(rig.client.lease(KEYS[:3], holder=W1, ttl_s=5).values()))
    gone = rig.client.evict(ME, nbytes=450)
    assert {s.key for s in gone} == set(KEYS[3:8])
    assert {s.key for s in rig.client.evict(ME, nbytes=10**9)} == set(KEYS[8:12]) | set(KEYS[:3])


def test_a_dead_shard_costs_hits_only(rig: Rig) -> None:
    c = rig.client
    c.publish(ME, ALL)
    leases = list(c.lease(KEYS, holder=W1, ttl_s=5).values())
    rig.calls.dead = {"b"}
    found = c.lookup(KEYS)
    assert 0 < len(found) < 40
    held = c.renew(leases, ttl_s=5)
    assert sum(held.values()) == len(found)
    c.release(leases)
    assert len(c.evict(ME, nbytes=10**9)) == len(found)
    with pytest.raises(DirectoryUnavailable, match="publish: no answer from directory shard"):
        c.publish(ME, ALL)
    assert c.stats()["shards_up"] == 2
    rig.calls.dead = {"a", "b", "c"}
    assert c.lookup(KEYS) == {}
    with pytest.raises(DirectoryUnavailable):
        c.announce(ME)
    with pytest.raises(DirectoryUnavailable):
        c.drop_owner(W1, 1)


def test_answers_name_the_keys_that_could_not_be_asked(rig: Rig) -> None:
    c = rig.client
    c.publish(ME, ALL[:20])
    in_b = {k for k in KEYS if c._ring.shard(k) == "b"}
    assert c.lookup(KEYS).unanswered == frozenset()
    rig.calls.dead = {"b"}
    for _ in range(2):  # the shard times out; then it is left alone
        found = c.lookup(KEYS)
        assert found.unanswered == in_b
        assert found.keys() == set(KEYS[:20]) - in_b
    leases = c.lease(KEYS, holder=W1, ttl_s=5)
    assert leases.unanswered == in_b
    assert leases.keys() == found.keys()
    assert c.lookup([]).unanswered == frozenset()


def test_what_may_have_been_published_is_retracted(rig: Rig) -> None:
    c = rig.client
    c.start_owner(ME, lambda: tuple(ALL))  # an owner that never updates its list
    lease = c.lease(KEYS[:1], holder=W1, ttl_s=5)[KEYS[0]]
    rig.calls.lossy = {c._ring.shard(KEYS[0])}
    with pytest.raises(DirectoryUnavailable):
        c.publish(ME, ALL[:1])
    c.retract(ME, ALL[:1])  # reaches the shard although it is down
    rig.calls.lossy = set()
    assert c.renew([lease], ttl_s=5) == {lease.id: False}, "a lease does not keep it"
    rig.restart(c._ring.shard(KEYS[0]))
    wait_for(lambda: len(c.lookup(KEYS)) == 39, "the rest is published again")
    assert KEYS[0] not in c.lookup(KEYS)
    c.publish(ME, ALL[:1])
    assert KEYS[0] in c.lookup(KEYS)


def test_retract_does_not_raise(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(*_: Any) -> Any:
        raise ShardFailed("gone")

    monkeypatch.setattr(rig.calls, "send", send)
    rig.client.retract(ME, ALL)
    assert rig.client.lookup(KEYS).unanswered == set(KEYS)


def test_a_dead_shard_is_left_alone_for_a_moment(rig: Rig) -> None:
    rig.client.publish(ME, ALL)
    rig.calls.dead = {"b"}
    rig.client.lookup(KEYS)
    rig.calls.sent.clear()
    rig.client.lookup(KEYS)
    assert ("b", "lookup") not in rig.calls.sent
    rig.calls.dead = set()
    wait_for(lambda: len(rig.client.lookup(KEYS)) == 40, "it is asked again")


def test_a_restarted_shard_gets_everything_again(rig: Rig) -> None:
    held = list(ALL)
    rig.client.start_owner(ME, lambda: tuple(held))
    assert rig.client.lookup(KEYS).keys() == set(KEYS)
    rig.restart("a")
    wait_for(lambda: len(rig.client.lookup(KEYS)) == 40, "published again")
    assert rig.client.stats()["republished"] > 40


def test_what_was_evicted_does_not_come_back(rig: Rig) -> None:
    rig.client.start_owner(ME, lambda: tuple(ALL))  # an owner that never updates its list
    gone = {s.key for s in rig.client.evict(ME, nbytes=2000)}
    for name in ("a", "b", "c"):
        rig.restart(name)
    wait_for(lambda: len(rig.client.lookup(KEYS)) == 20, "the rest is published again")
    assert not gone & rig.client.lookup(KEYS).keys()
    rig.client.publish(ME, [s for s in ALL if s.key in gone])
    assert len(rig.client.lookup(KEYS)) == 40


def test_an_evict_whose_answer_is_lost_is_published_again(rig: Rig) -> None:
    rig.client.start_owner(ME, lambda: tuple(ALL))
    in_b = {s.key for s in ALL if rig.client._ring.shard(s.key) == "b"}
    rig.calls.lossy = {"b"}
    rig.client._evict_parts(ME, {"b": [(k, "") for k in in_b]})
    rig.calls.lossy = set()
    wait_for(lambda: in_b <= rig.client.lookup(KEYS).keys(), "the owner still holds them, and says so")


def test_the_heartbeat_stops_when_fenced(rig: Rig) -> None:
    rig.client.start_owner(ME, lambda: ())
    rig.shards["a"].announce(Owner(W0, Incarnation(2), NodeId("n0"), {}))
    wait_for(lambda: rig.client.fenced is not None, "the replaced worker notices")
    assert isinstance(rig.client.fenced, WorkerLost)


def test_the_heartbeat_survives_a_faulty_source(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    faults = [ValueError("source"), None]

    def source() -> tuple[Segment, ...]:
        fault = faults.pop() if faults else None
        if fault:
            raise fault
        return tuple(ALL)

    rig.client.start_owner(ME, source)
    rig.restart("a")
    wait_for(lambda: not faults, "the fault happened")
    wait_for(lambda: len(rig.client.lookup(KEYS)) == 40, "and was overcome")
    assert "heartbeat of w0 failed" in caplog.text


def test_local_directory_is_the_same_contract() -> None:
    now = [0.0]
    d = LocalDirectory(SETTINGS, clock=lambda: now[0])
    d.start_owner(ME, lambda: ALL[:2])
    lease = d.lease(KEYS[:1], holder=W1, ttl_s=5)[KEYS[0]]
    assert d.lookup(KEYS[:3], near=W0).keys() == set(KEYS[:2])
    assert d.renew([lease], ttl_s=5) == {lease.id: True}
    assert [s.key for s in d.evict(ME, nbytes=10**9)] == [KEYS[1]]
    now[0] = 1e6
    assert d.lookup(KEYS[:1]), "nobody is dropped for silence in one process"
    d.release([lease])
    d.retract(ME, ALL[:1])
    assert d.lookup(KEYS[:1]) == {}
    assert d.lookup(KEYS[:1]).unanswered == d.lease(KEYS[:1], holder=W1, ttl_s=1).unanswered == frozenset()
    d.drop_owner(W0, 1)
    with pytest.raises(WorkerLost):
        d.announce(ME)
    assert d.stats()["segments"] == 0
    d.close()
