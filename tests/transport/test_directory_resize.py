"""Adding and removing shards while owners and readers run: misses at most, never a wrong answer."""

from __future__ import annotations

import random
import threading
import time
from contextlib import closing
from dataclasses import replace

import pytest
import ray

from tests.transport.directory_rigs import ME, SETTINGS, W1, Rig, segment
from tests.transport.rigs import wait_for
from transport.directory.catalogue import Filter
from transport.directory.fleet import RayCalls, ShardFailed
from transport.directory.view import View
from transport.errors import ConfigError, RelayError
from transport.types import Incarnation, NodeId, Owner, Segment, SegmentKey

ALL = [segment(i) for i in range(60)]
KEYS = [s.key for s in ALL]
AB, ABC = ("a", "b"), ("a", "b", "c")


def start(names: tuple[str, ...], held: list[Segment], replicas: int = 1) -> Rig:
    rig = Rig(replace(SETTINGS, replicas=replicas), names)
    rig.client.start_owner(ME, lambda: tuple(held))
    return rig


def entered(rig: Rig) -> dict[str, set[SegmentKey]]:
    return {name: set(s._table._segments) for name, s in rig.shards.items()}


def settled(rig: Rig) -> bool:
    """Every copy is at the shards that answer for it, and nowhere else."""
    replicas = rig.client.fleet.replicas
    return entered(rig) == {n: {k for k in KEYS if n in replicas(k)} for n in rig.shards}


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("before", "after"), [(AB, ABC), (ABC, AB), (("a",), ABC), (ABC, ("a",))])
def test_keys_move_and_nothing_stays_behind(
    before: tuple[str, ...], after: tuple[str, ...], replicas: int
) -> None:
    rig = start(before, list(ALL), replicas)
    stranger = rig.reader()  # has no heartbeat, and hears of it from a reply
    assert len(stranger.lookup(KEYS)) == 60
    assert rig.resize(*after) == View(1, after)
    assert rig.shards.keys() == set(after)
    wait_for(lambda: settled(rig), "the owner has moved what it holds")
    wait_for(lambda: len(stranger.lookup(KEYS)) == 60, "everything is found")
    assert stranger.fleet.view == View(1, after)
    rig.client.close()


def test_leases_of_before_stay_good_and_keep_their_copies() -> None:
    rig = start(AB, list(ALL))
    reader = rig.reader()
    leases = reader.lease(KEYS, holder=W1, ttl_s=30)
    rig.resize(*ABC)
    wait_for(lambda: len(reader.lookup(KEYS)) == 60, "moved")
    moved = [k for k in KEYS if rig.client.fleet.ring.shard(k) == "c"]
    assert moved
    assert rig.client.evict(ME, nbytes=10**9) == (), "leased where they were before"
    assert all(reader.renew(list(leases.values()), ttl_s=30).values())
    reader.release([leases[k] for k in moved])
    assert {s.key for s in rig.client.evict(ME, nbytes=10**9)} == set(moved)
    reader.release(list(leases.values()))
    assert reader.stats()["leases"] == 0
    rig.client.close()


def test_a_shard_that_leaves_waits_for_its_leases() -> None:
    rig = start(ABC, list(ALL))
    reader = rig.reader()
    leases = reader.lease(KEYS, holder=W1, ttl_s=30)
    at_c = [x for x in leases.values() if x.id.startswith("c:")]
    assert at_c
    resizing = threading.Thread(target=rig.resize, args=AB, name="test-resize")
    resizing.start()
    wait_for(lambda: len(reader.lookup(KEYS)) == 60 and reader.fleet.view.epoch == 1, "moved")
    assert "c" in rig.shards
    assert all(reader.renew(at_c, ttl_s=30).values())
    assert rig.client.evict(ME, nbytes=10**9) == ()
    reader.release(at_c)
    resizing.join(10)
    assert not resizing.is_alive()
    assert rig.shards.keys() == set(AB)
    assert {s.key for s in rig.client.evict(ME, nbytes=10**9)} == {x.located.segment.key for x in at_c}
    rig.client.close()


def test_pins_move_with_their_keys() -> None:
    rig = start(AB, list(ALL))
    operator = rig.operator()
    assert len(operator.pin(Filter(), name="demo", ttl_s=600)) == 60
    rig.resize(*ABC)
    wait_for(lambda: len(list(rig.operator().rows(Filter(pinned=True)))) == 60, "pinned where they are now")
    assert rig.client.evict(ME, nbytes=10**9) == ()
    assert all(590 < row.pins["demo"] <= 600 for row in rig.operator().rows())
    rig.resize("a")
    wait_for(lambda: len(list(rig.operator().rows(Filter(pinned=True)))) == 60, "and back")
    rig.operator().unpin(Filter(), name="demo")
    wait_for(lambda: len(rig.client.evict(ME, nbytes=10**9)) == 60, "free again")
    rig.client.close()


def test_a_restarted_shard_and_a_late_worker_learn_the_present_list() -> None:
    rig = start(AB, list(ALL))
    rig.resize(*ABC)
    rig.restart("b")
    wait_for(lambda: rig.shards["b"].view == View(1, ABC), "told by whoever asks it")
    wait_for(lambda: settled(rig), "and filled again")
    late = Rig(rig.settings, AB)  # only for a client that knows the list of long ago
    late.client.fleet._calls = rig.calls
    assert len(late.client.lookup(KEYS)) == 60
    other = Owner(W1, Incarnation(1), NodeId("n1"), {})
    late.client.publish(other, ALL[:20])
    assert late.client.fleet.view == View(1, ABC)
    assert late.client.drop_owner(W1, 1) is None
    rig.client.close()


def test_of_two_resizes_at_once_one_is_refused() -> None:
    rig = start(AB, list(ALL))

    def start_while_another_resizes(name: str) -> None:
        rig.start(name)
        rig.resize(*ABC)

    with pytest.raises(RelayError, match=r"another one came first, to 3 shards \(epoch 1\)"):
        rig.operator().resize(["a", "b", "d"], start=start_while_another_resizes, end=rig.end)
    assert {name: s.view.epoch for name, s in rig.shards.items()} == {"a": 1, "b": 1, "c": 1, "d": 0}
    with pytest.raises(ConfigError, match="cannot become"):
        rig.operator().resize(["b", "a"], start=rig.start, end=rig.end)
    rig.client.close()


LEASE_S = 4.0


class Traffic:
    """An owner that evicts and publishes again, and readers that lease, over one rig. `faults` collects what
    must not happen: a lease on blocks that the owner does not hold, an eviction under a lease."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.held: dict[SegmentKey, Segment] = {s.key: s for s in ALL}
        self.live: dict[str, tuple[SegmentKey, float]] = {}  # with the instant at which it ends
        self.lock = threading.Lock()  # evicting and leasing are steps of one order: the checks are exact
        self.faults: list[str] = []
        self.leased = self.evicted = 0
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self.own, name="test-owner")]
        self.threads += [
            threading.Thread(target=self.read, args=(n,), name=f"test-reader-{n}") for n in (1, 2)
        ]

    def __enter__(self) -> Traffic:
        self.rig.client.start_owner(ME, lambda: tuple(dict(self.held).values()))
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(20)

    def flow(self) -> None:
        """Wait until some more has been leased and evicted, however slow the machine is."""
        leased, evicted = self.leased + 25, self.evicted + 25
        wait_for(lambda: self.leased > leased and self.evicted > evicted, "traffic flows", 30)

    def read(self, seed: int) -> None:
        chance, reader = random.Random(seed), self.rig.reader()
        while not self.stop.is_set():
            with self.lock:
                # Shorter than a leaving shard is waited for, as in a cluster: a lease that a resize overtook
                # on its way back is released by nobody.
                ends = time.monotonic() + LEASE_S
                got = reader.lease(chance.sample(KEYS, 6), holder=W1, ttl_s=LEASE_S)
                self.leased += len(got)
                self.live.update({x.id: (key, ends) for key, x in got.items()})
                wrong = [x.located.segment for k, x in got.items() if self.held.get(k) != x.located.segment]
                self.faults.extend(f"{s.key}: {s.blocks} is leased and not held" for s in wrong)
            self.stop.wait(0.001)
            with self.lock:
                for lease in got.values():
                    self.live.pop(lease.id)
                reader.release(list(got.values()))

    def own(self) -> None:
        chance, generation = random.Random(5), 1
        while not self.stop.is_set():
            with self.lock:
                gone = self.rig.client.evict(ME, nbytes=chance.choice([300, 2000]))
                self.evicted += len(gone)
                now = time.monotonic()  # a reader that got no turn meanwhile may have none any more
                leased = {key for key, ends in self.live.values() if now < ends}
                self.faults.extend(f"{s.key}: evicted under a lease" for s in gone if s.key in leased)
                for s in gone:
                    del self.held[s.key]
            generation += 1
            for s in gone:
                fresh = segment(s.key.digest[0], generation=generation)
                self.held[s.key] = fresh  # held before it is published, as the store does
                self.rig.client.publish(ME, [fresh])


@pytest.mark.parametrize("replicas", [1, 2])
def test_resizes_while_everything_runs(replicas: int) -> None:
    rig = Rig(replace(SETTINGS, replicas=replicas), AB)
    with closing(rig.client):
        with Traffic(rig) as traffic:
            for names in (ABC, ("a",), AB, ("a", "c"), ABC):
                rig.resize(*names)
                traffic.stop.wait(0.1)
                traffic.flow()
        assert not [x for x in traffic.faults if "under a lease" in x]
        # An entry that a move overtook reads as stale at its owner: a lost hit, never a wrong answer.
        assert len(traffic.faults) <= max(5, traffic.leased // 50)
        wait_for(lambda: len(rig.client.lookup(KEYS)) == 60, "all is found in the end")
        assert rig.client.fenced is None


@pytest.mark.parametrize("replicas", [1, 2])
def test_shards_that_restart_are_refilled_while_everything_runs(replicas: int) -> None:
    rig = Rig(replace(SETTINGS, replicas=replicas), ABC)
    with closing(rig.client):
        with Traffic(rig) as traffic:
            for turn in range(9):
                before = rig.client.stats()["republished"]
                rig.restart(ABC[turn % 3])
                wait_for(lambda before=before: rig.client.stats()["republished"] > before, "it is refilled")
                traffic.stop.wait(0.1)
                traffic.flow()
        # As above; and who restarts does not know what is leased, so evictions under a lease may be.
        stale = [x for x in traffic.faults if "and not held" in x]
        assert len(stale) <= max(5, traffic.leased // 50)
        wait_for(lambda: len(rig.client.lookup(KEYS)) == 60, "all is found in the end")


def test_a_client_that_left_ray_does_not_start_one() -> None:
    """A call on an actor's handle starts a Ray of its own where there is none: a heartbeat must not."""
    assert not ray.is_initialized()
    calls = RayCalls()
    with pytest.raises(ShardFailed, match="left Ray"):
        calls.find("relay-directory-0")
    with pytest.raises(ShardFailed, match="left Ray"):
        calls.send(object(), "view", b"")
    assert not ray.is_initialized()
