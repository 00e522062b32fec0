"""The directory client over plain shard objects: routing, evicting over shards, restarts, dead shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.transport.directory_rigs import ME, SETTINGS, W0, W1, Rig, segment
from tests.transport.rigs import wait_for
from transport.directory.fleet import ShardFailed
from transport.directory.local import LocalDirectory
from transport.errors import DirectoryUnavailable, WorkerLost
from transport.types import Incarnation, NodeId, Owner, Segment, WorkerId


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


def test_a_lease_names_other_owners_copies(rig: Rig) -> None:
    other = Owner(W1, Incarnation(1), NodeId("n1"))
    rig.client.publish(ME, ALL)
    rig.client.publish(other, ALL[:20])
    leases = rig.client.lease(KEYS, holder=WorkerId("w2"), ttl_s=5, copies=2)
    shared = {k: x for k, x in leases.items() if x.others}
    assert shared.keys() == set(KEYS[:20])
    for key, lease in shared.items():
        (twin,) = lease.others
        assert {lease.located.owner.worker, twin.located.owner.worker} == {W0, W1}
        assert (twin.located.segment.key, twin.holder, twin.ttl_s) == (key, "w2", lease.ttl_s)
    every = [each for x in leases.values() for each in (x, *x.others)]
    assert len({x.id for x in every}) == rig.client.stats()["leases"] == 60
    assert all(rig.client.renew(every, ttl_s=5).values())
    rig.client.release(every)
    assert rig.client.stats()["leases"] == 0


def test_one_call_per_shard(rig: Rig) -> None:
    rig.client.publish(ME, ALL)
    rig.calls.sent.clear()
    rig.client.lookup(KEYS)
    assert sorted(rig.calls.sent) == [("a", "lookup"), ("b", "lookup"), ("c", "lookup")]


def test_calls_are_timed_by_operation_and_failures_counted(rig: Rig) -> None:
    rig.client.publish(ME, ALL)
    for _ in range(3):
        rig.client.lookup(KEYS)
    calls = rig.client.calls()
    assert {name: sum(found.counts) for name, found in calls["latencies"].items()} == {
        "publish": 1,
        "lookup": 3,
    }
    assert all(found.seconds > 0 for found in calls["latencies"].values())
    assert calls["failures"] == 0
    rig.calls.dead.add("b")
    rig.client.lookup(KEYS)
    assert rig.client.calls()["failures"] == 1
    asked = len(rig.calls.sent)
    rig.client.calls()
    assert len(rig.calls.sent) == asked, "nobody is asked for it"


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
    in_b = {k for k in KEYS if c.fleet.ring.shard(k) == "b"}
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
    rig.calls.lossy = {c.fleet.ring.shard(KEYS[0])}
    with pytest.raises(DirectoryUnavailable):
        c.publish(ME, ALL[:1])
    c.retract(ME, ALL[:1])  # reaches the shard although it is down
    rig.calls.lossy = set()
    assert c.renew([lease], ttl_s=5) == {lease.id: False}, "a lease does not keep it"
    rig.restart(c.fleet.ring.shard(KEYS[0]))
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


def test_a_dead_shard_is_left_alone_for_a_moment() -> None:
    rig = Rig(replace(SETTINGS, heartbeat_s=0.5))  # also how long it is left alone
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
    in_b = {s.key for s in ALL if rig.client.fleet.ring.shard(s.key) == "b"}
    rig.calls.lossy = {"b"}
    rig.client._own._remove_everywhere(ME, {"b": [(k, "") for k in in_b]})
    rig.calls.lossy = set()
    wait_for(lambda: in_b <= rig.client.lookup(KEYS).keys(), "the owner still holds them, and says so")


def test_the_heartbeat_stops_when_fenced(rig: Rig) -> None:
    rig.client.start_owner(ME, lambda: ())
    rig.shards["a"]._table.announce(Owner(W0, Incarnation(2), NodeId("n0"), {}), rig.clock())
    wait_for(lambda: rig.client.fenced is not None, "the replaced worker notices")
    assert isinstance(rig.client.fenced, WorkerLost)


def test_many_owners_announce_themselves_less_often() -> None:
    """Each of them at every shard: without a bound the directory would be busy with that alone."""
    rig = Rig(replace(SETTINGS, max_heartbeats_per_s=10.0, owner_timeout_s=60.0))
    try:
        for i in range(49):
            rig.shards["b"]._table.announce(
                Owner(WorkerId(f"o{i}"), Incarnation(1), NodeId("n0"), {}), rig.clock()
            )
        rig.client.start_owner(ME, lambda: ())
        assert rig.client._own._beat_s == pytest.approx(5.0)
    finally:
        rig.client.close()
    few, many = (SETTINGS.beat_s(owners) for owners in (2, 100_000))
    assert few == SETTINGS.heartbeat_s
    assert many == SETTINGS.owner_timeout_s / 4, "nobody may be dropped for it"


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
