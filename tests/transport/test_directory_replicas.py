"""Two shards know every key: a dead one costs no hits, and nothing is evicted that any of them has leased."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.transport.directory_rigs import ME, SETTINGS, W1, Rig, segment
from tests.transport.rigs import wait_for
from transport.directory.ring import Ring
from transport.errors import DirectoryUnavailable
from transport.types import Lease, SegmentKey

TWO = replace(SETTINGS, replicas=2)
ALL = [segment(i) for i in range(40)]
KEYS = [s.key for s in ALL]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(TWO)
    yield rig
    rig.client.close()


def held_at(rig: Rig) -> Counter[bytes]:
    """In how many shards each digest is entered."""
    return Counter(k.digest for s in rig.shards.values() for k in s._table._segments)


def test_replicas_are_distinct_and_the_first_is_the_responsible_one() -> None:
    ring = Ring(["a", "b", "c"])
    for key in KEYS:
        two = ring.replicas(key, 2)
        assert len(set(two)) == 2
        assert two[0] == ring.shard(key)
        assert ring.replicas(key, 1) == two[:1]
        assert set(ring.replicas(key, 5)) == {"a", "b", "c"}


def test_publish_enters_every_key_twice_and_lookups_ask_once(rig: Rig) -> None:
    rig.client.publish(ME, ALL)
    assert set(held_at(rig).values()) == {2}
    rig.calls.sent.clear()
    assert len(rig.client.lookup(KEYS)) == 40
    assert sorted(rig.calls.sent) == [("a", "lookup"), ("b", "lookup"), ("c", "lookup")]


@pytest.mark.parametrize("victim", ["a", "b", "c"])
@pytest.mark.parametrize("how", ["dead", "killed"])
def test_a_dead_shard_costs_no_hits(rig: Rig, victim: str, how: str) -> None:
    c = rig.client
    c.publish(ME, ALL[:30])
    getattr(rig.calls, how).add(victim)
    c.publish(ME, ALL[30:])
    found = c.lookup(KEYS)
    assert found.keys() == set(KEYS)
    assert found.unanswered == frozenset()
    leases = c.lease(KEYS, holder=W1, ttl_s=5)
    assert leases.keys() == set(KEYS)
    assert all(c.renew(list(leases.values()), ttl_s=5).values())
    c.release(list(leases.values()))
    getattr(rig.calls, how).clear()
    assert c.stats()["leases"] == 0


def test_a_restarted_empty_shard_costs_no_hits(rig: Rig) -> None:
    rig.client.publish(ME, ALL)
    rig.restart("a")  # nobody announces here: it stays empty
    assert len(rig.client.lookup(KEYS)) == 40
    assert len(rig.client.lease(KEYS, holder=W1, ttl_s=5)) == 40


def test_both_replicas_dead_is_said(rig: Rig) -> None:
    rig.client.publish(ME, ALL)
    rig.calls.dead = {"a", "b"}
    found = rig.client.lookup(KEYS)
    both = {k for k in KEYS if set(rig.client.fleet.replicas(k)) == {"a", "b"}}
    assert both
    assert found.unanswered == both
    assert found.keys() == set(KEYS) - both
    with pytest.raises(DirectoryUnavailable):
        rig.client.publish(ME, ALL)


def test_a_publish_that_one_replica_missed_reaches_it_later(rig: Rig) -> None:
    held = list(ALL[:30])
    rig.client.start_owner(ME, lambda: tuple(held))
    rig.calls.dead = {"b"}
    held.extend(ALL[30:])
    rig.client.publish(ME, ALL[30:])
    rig.calls.dead = set()
    wait_for(lambda: sorted(held_at(rig).values()) == [2] * 40, "b hears of the rest")


def test_a_lease_at_the_standby_keeps_a_copy_everywhere(rig: Rig) -> None:
    c = rig.client
    c.publish(ME, ALL)
    reader = rig.reader()
    first = c.fleet.replicas(KEYS[0])[0]
    rig.calls.dead = {first}  # as this reader sees it
    lease = reader.lease(KEYS[:1], holder=W1, ttl_s=5)[KEYS[0]]
    rig.calls.dead = set()
    assert not lease.id.startswith(first)
    gone = c.evict(ME, nbytes=10**9)
    assert {s.key for s in gone} == set(KEYS[1:])
    assert set(held_at(rig).values()) == {2}, "entered again where it had been removed"
    reader.release([lease])
    assert [s.key for s in c.evict(ME, nbytes=10**9)] == [KEYS[0]]
    assert not held_at(rig)


def test_nothing_is_evicted_that_an_unreachable_replica_may_have_leased(rig: Rig) -> None:
    c = rig.client
    c.publish(ME, ALL)
    rig.calls.dead = {"b"}
    safe = {k for k in KEYS if "b" not in c.fleet.replicas(k)}
    c.lookup(KEYS)  # notices
    assert {s.key for s in c.evict(ME, nbytes=10**9)} == safe
    rig.calls.killed = {"b"}  # its leases died with it
    gone: set[SegmentKey] = set()

    def rest_goes() -> bool:
        gone.update(s.key for s in c.evict(ME, nbytes=10**9))
        return gone == set(KEYS) - safe

    wait_for(rest_goes, "the rest is evicted as soon as b is known to be dead")


def test_eviction_goes_by_the_use_that_the_first_replica_saw(rig: Rig) -> None:
    for s in ALL[:12]:
        rig.client.publish(ME, [s])
        rig.passed_s += 0.5
    rig.client.release(list(rig.client.lease(KEYS[:3], holder=W1, ttl_s=5).values()))
    assert {s.key for s in rig.client.evict(ME, nbytes=450)} == set(KEYS[3:8])


def test_readers_and_an_evicting_owner_at_once_with_shards_failing() -> None:
    """Leases taken while shards drop out and come back, against an owner that evicts all it can: no block is
    freed while a lease on it is live, as the reader that holds it counts."""
    rig = Rig(replace(TWO, owner_timeout_s=1e6))
    c = rig.client
    held = {s.key: s for s in ALL}
    lock = threading.Lock()
    live: dict[str, Lease] = {}
    faults: list[str] = []
    stop = threading.Event()
    c.start_owner(ME, lambda: tuple(held.values()))

    def read(seed: int) -> None:
        chance, reader = random.Random(seed), rig.reader()
        while not stop.is_set():
            keys = chance.sample(KEYS, 4)
            with lock:  # evicting and leasing are steps of one order, so that the check below is exact
                got = list(reader.lease(keys, holder=W1, ttl_s=60).values())
                live.update({x.id: x for x in got})
            stop.wait(0.001)
            with lock:
                for lease in got:
                    live.pop(lease.id, None)
                reader.release(got)

    readers = [threading.Thread(target=read, args=(n,), name=f"test-reader-{n}") for n in range(3)]
    for thread in readers:
        thread.start()
    chance = random.Random(7)
    evicted = 0
    deadline = time.monotonic() + 30
    try:
        for turn in itertools.count():  # how much finds no reader in its way depends on the threads' turns
            if (turn >= 150 and evicted > 100) or time.monotonic() > deadline:
                break
            rig.calls.dead = {chance.choice(["a", "b", "c"])} if chance.random() < 0.5 else set()
            with lock:
                gone = c.evict(ME, nbytes=1500)
                evicted += len(gone)
                leased = {x.located.segment.key for x in live.values()}
                faults.extend(str(s.key) for s in gone if s.key in leased)
                if turn % 5 == 4:  # leases whose release met a dead shard end by themselves
                    rig.passed_s += 61
                    live.clear()
            c.publish(ME, list(gone))
    finally:
        stop.set()
        rig.calls.dead = set()
        for thread in readers:
            thread.join(10)
    c.close()
    assert not faults
    assert evicted > 100, "the owner did evict"
