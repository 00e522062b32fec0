"""The store with real arenas, a real directory table and the in-process transport; blocks of a toy layout."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from transport.arena import Arena
from transport.auto import AutoTransport, make_transport
from transport.base import Answers
from transport.directory.local import LocalDirectory
from transport.errors import ArenaFull, DirectoryUnavailable, RelayError, WorkerLost
from transport.settings import TransportSettings
from transport.types import (
    BlockId,
    Incarnation,
    Lease,
    Located,
    NodeId,
    Outcome,
    Owner,
    Segment,
    SegmentKey,
    Transfer,
    WorkerId,
)
from workers.fetching import Acquired, Fetching
from workers.layout import BlockViews, KVLayout
from workers.store import SegmentStore

LAYOUT = KVLayout(
    num_layers=1,
    num_kv_heads=1,
    head_dim=4,
    hidden_size=4,
    dtype="float32",
    block_tokens=4,
    checkpoint_layer=0,
)


def key(name: str) -> SegmentKey:
    return SegmentKey("space", name.encode())


class Directory(LocalDirectory):
    """A LocalDirectory that can be told to fail."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(clock=lambda: self.now)
        self.raises: dict[str, Exception] = {}
        self.down: set[SegmentKey] = set()  # keys whose shard does not answer
        self.lossy = False  # publishes arrive, their answers do not
        self.on_publish: Callable[[], object] = lambda: None
        self.released = 0

    def _fail(self, method: str) -> None:
        if method in self.raises:
            raise self.raises[method]

    def lookup(self, keys: Sequence[SegmentKey], *, near: WorkerId | None = None) -> Answers[Located]:
        self._fail("lookup")
        asked = [k for k in keys if k not in self.down]
        return Answers(super().lookup(asked, near=near), set(keys) & self.down)

    def lease(
        self, keys: Sequence[SegmentKey], *, holder: WorkerId, ttl_s: float, copies: int = 1
    ) -> Answers[Lease]:
        self._fail("lease")
        return super().lease(keys, holder=holder, ttl_s=ttl_s, copies=copies)

    def release(self, leases: Sequence[Lease], *, read: bool = False) -> None:
        self._fail("release")
        self.released += len(leases)
        super().release(leases, read=read)

    def retract(self, owner: Owner, segments: Sequence[Segment]) -> None:
        self._fail("retract")
        super().retract(owner, segments)

    def evict(self, owner: Owner, *, nbytes: int) -> tuple[Segment, ...]:
        self._fail("evict")
        return super().evict(owner, nbytes=nbytes)

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> None:
        self._fail("publish")
        self.on_publish()
        super().publish(owner, segments)
        if self.lossy:
            raise DirectoryUnavailable("no answer")


@dataclass
class Desk:
    """One worker's store and its parts."""

    store: SegmentStore
    arena: Arena
    transport: AutoTransport
    owner: Owner

    def put(self, name: str, blocks: int = 1, value: float = 1.0, **options: Any) -> Segment:
        def fill(views: Sequence[BlockViews]) -> None:
            for v in views:
                v.kv.body.fill_(value)
                v.checkpoint.fill_(value)
                v.mass.fill_(value)

        return self.store.publish(key(name), fill, start=0, num_tokens=4 * blocks, producer="t", **options)

    def get(self, *names: str) -> Acquired:
        return self.store.acquire({key(n): 1 for n in names})

    def used(self) -> int:
        return self.arena.stats().used


class Cluster:
    """Some workers around one directory."""

    def __init__(self) -> None:
        self.directory = Directory()
        self.desks: list[Desk] = []

    def desk(self, name: str, blocks: int = 8) -> Desk:
        incarnation = Incarnation(len(self.desks) + 1)
        arena = Arena(blocks * (LAYOUT.block_nbytes + 128), LAYOUT.block_nbytes, incarnation=incarnation)
        transport = make_transport(TransportSettings(backend="inprocess"), worker=name)
        transport.register(arena)
        owner = Owner(WorkerId(name), incarnation, NodeId("n"), transport.addresses(), arena.pull_key)
        self.directory.announce(owner)
        store = SegmentStore(
            owner, LAYOUT, arena, transport, self.directory, lease_ttl_s=10.0, pull_timeout_s=5.0
        )
        self.desks.append(Desk(store, arena, transport, owner))
        return self.desks[-1]

    def check(self) -> None:
        """At the end nobody holds anything but published segments."""
        assert self.directory.stats()["leases"] == 0
        for desk in self.desks:
            assert desk.used() == sum(len(s.blocks) for s in desk.store.segments())
            assert not desk.store.holding._pins
            assert not desk.store.holding._doomed


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    for desk in cluster.desks:
        desk.transport.close()
    cluster.check()


def values(got: Acquired, name: str) -> set[float]:
    pulled = got.pulled[key(name)]
    return set(pulled.gather("checkpoint").flatten().tolist()) | set(pulled.gather("mass").tolist())


def reasons(got: Acquired) -> dict[str, str]:
    return {k.digest.decode(): str(m.reason) for k, m in got.misses.items()}


def test_publish_pull_release(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x", 2, value=3.0)
    got = b.get("x", "y")
    assert values(got, "x") == {3.0}
    assert reasons(got) == {"y": "not_found"}
    assert (b.used(), cluster.directory.stats()["leases"]) == (2, 1)
    b.store.release(got)
    b.store.release(got)
    assert (b.used(), cluster.directory.released) == (0, 1)
    assert got.hits.keys() == {key("x")}
    assert b.get().hits == {}


def test_bytes_are_released_before_leases(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x")
    b.put("y")
    got = b.get("x", "y")
    b.store.release_bytes(got)
    b.store.release_bytes(got)
    assert (got.pulled, b.used()) == ({}, 1)
    assert cluster.directory.stats()["leases"] == 2
    b.store.release(got)


def test_release_survives_a_directory_fault(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x")
    for fault in (DirectoryUnavailable("down"), RuntimeError("a bug")):
        got = b.get("x")
        cluster.directory.raises["release"] = fault
        b.store.release(got)
        b.store.release(got)
        del cluster.directory.raises["release"]
    assert caplog.text.count("left to expire") == 2
    assert b.used() == 0
    cluster.directory.now = 100.0


def test_release_logs_arena_misuse(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x", 2)
    got = b.get("x")
    b.arena.free(got.landing[:1])
    b.store.release(got)
    assert "was not given back" in caplog.text


# -- local hits ---------------------------------------------------------------------------------------------


def test_a_local_hit_outlives_its_lease(cluster: Cluster) -> None:
    a = cluster.desk("a", blocks=2)
    old = a.put("x", 2, value=1.0)
    first, second = a.get("x"), a.get("x")
    assert first.transfers[0][1].backend == "local"
    cluster.directory.now = 100.0  # the leases are over: the table may give the segment to `evict`
    with pytest.raises(ArenaFull):
        a.put("y", 2, value=2.0)
    assert a.store.segments() == []
    assert values(first, "x") == {1.0}
    a.store.release_bytes(first)
    a.store.release_bytes(first)
    assert a.used() == 2, "the second reader is still there"
    a.store.release(second)
    assert a.used() == 0
    new = a.put("y", 2, value=2.0)
    assert {b.block for b in new.blocks} == {b.block for b in old.blocks}
    a.store.release(first)


def test_evicting_a_pinned_segment_goes_on_to_the_next(cluster: Cluster) -> None:
    a = cluster.desk("a", blocks=2)
    a.put("x")
    a.put("y")
    got = a.get("x")
    cluster.directory.now = 100.0
    a.store.release(a.get("y"))  # used last, but the only one whose block is free at once
    a.put("z")
    assert [s.key for s in a.store.segments()] == [key("z")]
    assert values(got, "x") == {1.0}
    a.store.release(got)


def test_a_local_hit_with_other_blocks_is_stale(cluster: Cluster) -> None:
    a = cluster.desk("a")
    real = a.put("x")
    for held in (None, Segment(real.key, 4, 0, (), layout=LAYOUT.fingerprint)):
        a.store.holding._held = {} if held is None else {real.key: held}
        got = a.get("x")
        assert reasons(got) == {"x": "stale"}
        assert [t.outcome for _, t in got.transfers] == [Outcome.STALE]
        a.store.release(got)
    a.store.holding._held = {real.key: real}


def test_readers_and_writers_at_once(cluster: Cluster) -> None:
    a = cluster.desk("a", blocks=3)
    cluster.directory.lease = lambda keys, *, holder, ttl_s, copies: (  # type: ignore[method-assign]
        LocalDirectory.lease(cluster.directory, keys, holder=holder, ttl_s=0.0, copies=copies)
    )  # leases that are over at once: pins alone must protect the bytes
    wrong: list[object] = []

    def work(seed: int) -> None:
        for i in range(60):
            n = (seed * 7 + i) % 5
            with contextlib.suppress(ArenaFull):
                a.put(str(n), value=float(n))
            got = a.get(str(n))
            for k in list(got.pulled):
                if values(got, k.digest.decode()) != {float(n)}:
                    wrong.append((k, n))
            a.store.release(got)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


# -- faults of transport and directory ----------------------------------------------------------------------


@pytest.mark.parametrize("quarantined", [False, True])
def test_a_broken_backend_is_a_miss(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, quarantined: bool
) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x", 2)
    a.put("y", 2)

    def pull(lease: Lease, into: Sequence[BlockId], **_: Any) -> Transfer:
        if quarantined:
            b.arena.quarantine(into[:1])
        raise RuntimeError("backend bug")

    monkeypatch.setattr(b.transport, "pull", pull)
    got = b.get("x", "y")
    assert reasons(got) == {"x": "transport_error", "y": "transport_error"}
    assert "backend bug" in got.misses[key("x")].detail
    b.store.release(got)
    assert b.used() == 0
    assert b.arena.stats().quarantined == (2 if quarantined else 0)


def test_nothing_leaks_when_acquire_breaks(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x", 2)
    a.put("y", 2)
    b.put("z")
    pull, go_on = b.transport.pull, threading.Event()
    seen: list[Acquired] = []

    def slow(*args: Any, **options: Any) -> Transfer:
        assert go_on.wait(10)
        return pull(*args, **options)

    def interrupted(_: Any, got: Acquired, *, pipelined: bool) -> None:
        seen.append(got)
        raise KeyboardInterrupt

    monkeypatch.setattr(b.transport, "pull", slow)
    monkeypatch.setattr(Fetching, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        b.get("z", "x", "y")
    go_on.set()  # the pulls were in the middle of it
    assert seen[0].settle(10)
    cluster.check()


def test_no_room_is_a_miss(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), cluster.desk("b", blocks=1)
    a.put("x", 2)
    cluster.directory.raises["evict"] = RelayError("a shard's bug")
    got = b.get("x")
    assert reasons(got) == {"x": "arena_full"}
    b.store.release(got)


@pytest.mark.parametrize("method", ["lookup", "lease"])
@pytest.mark.parametrize("fault", [DirectoryUnavailable("gone"), RelayError("a shard's bug")])
def test_a_directory_fault_is_a_miss(cluster: Cluster, method: str, fault: Exception) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    if method == "lease":  # what nobody holds is looked up as well: it may be spilled
        a.put("x")
    cluster.directory.raises[method] = fault
    got = b.get("x")
    assert reasons(got) == {"x": "directory_down"}
    assert got.misses[key("x")].detail == str(fault)
    b.store.release(got)


def test_a_silent_shard_is_not_an_absent_key(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    for name in ("x", "y", "z"):
        a.put(name)
    cluster.directory.down = {key("x")}

    def lease(keys: Sequence[SegmentKey], *, holder: WorkerId, ttl_s: float, copies: int) -> Answers[Lease]:
        assert set(keys) == {key("x"), key("y"), key("z"), key("w")}
        return Answers({}, {key("x"), key("y")})

    monkeypatch.setattr(cluster.directory, "lease", lease)
    got = b.get("x", "y", "z", "w")
    assert reasons(got) == {
        "x": "directory_down",
        "y": "directory_down",
        "z": "lease_expired",
        "w": "not_found",
    }


@pytest.mark.parametrize("outcome", [Outcome.TIMED_OUT, Outcome.PEER_GONE])
def test_a_dead_owner_costs_one_deadline(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, outcome: Outcome
) -> None:
    """Eight pulls run side by side; once one of them has found the owner dead, no further one begins."""
    a, b, c = cluster.desk("a", blocks=12), cluster.desk("b"), cluster.desk("c", blocks=20)
    names = [f"x{i}" for i in range(12)]
    for name in names:
        a.put(name)
    b.put("v")
    pull, tried = c.transport.pull, []
    together = threading.Barrier(8, timeout=30)

    def half_dead(lease: Lease, into: Sequence[BlockId], **options: Any) -> Transfer:
        owner = lease.located.owner.worker
        tried.append(owner)
        if owner != "a":
            return pull(lease, into, **options)
        together.wait()
        if outcome is Outcome.TIMED_OUT:
            c.arena.quarantine(into)
        return Transfer(owner, lease.holder, "tcp", 0, len(into), 5.0, outcome, "no answer")

    monkeypatch.setattr(c.transport, "pull", half_dead)
    got = c.get(*names, "v")
    assert sorted(tried) == [*["a"] * 8, "b"]
    assert got.hits.keys() == {key("v")}
    assert reasons(got) == dict.fromkeys(names, outcome.value)
    assert sum("just before" in miss.detail for miss in got.misses.values()) == 4
    c.store.release(got)
    tried.clear()
    together.abort()
    c.store.release(c.get("x0"))
    assert tried == ["a"], "the next request tries again"


# -- publishing ---------------------------------------------------------------------------------------------


def test_publishing_again_changes_nothing(cluster: Cluster) -> None:
    a = cluster.desk("a")
    assert a.put("x", value=1.0) is a.put("x", value=2.0)
    assert a.used() == 1


def test_a_publish_whose_answer_is_lost_leaves_no_copy(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    cluster.directory.lossy = True
    with pytest.raises(DirectoryUnavailable):
        a.put("x")
    assert a.store.segments() == []
    assert a.used() == 0
    assert reasons(b.get("x")) == {"x": "not_found"}
    cluster.directory.lossy = False
    a.put("x", value=5.0)
    got = b.get("x")
    assert values(got, "x") == {5.0}
    b.store.release(got)


def test_a_copy_that_cannot_be_retracted_reads_as_stale(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    cluster.directory.lossy = True
    cluster.directory.raises["retract"] = RuntimeError("gone as well")
    with pytest.raises(DirectoryUnavailable):
        a.put("x", variant="phantom")
    assert "without its blocks" in caplog.text
    cluster.directory.lossy = False
    for desk in (a, b):
        got = desk.get("x")
        assert reasons(got) == {"x": "stale"}
        desk.store.release(got)
    a.put("x", variant="real")
    a.store.evict(1)  # takes the phantom, which frees nothing, and then the real one
    assert a.store.segments() == []
    assert a.used() == 0


def test_a_phantom_does_not_free_the_real_copy(cluster: Cluster) -> None:
    a = cluster.desk("a")
    cluster.directory.lossy = True
    cluster.directory.raises["retract"] = RuntimeError("gone as well")
    with pytest.raises(DirectoryUnavailable):
        a.put("x", variant="phantom")
    cluster.directory.lossy = False
    cluster.directory.now = 1.0
    a.put("x", variant="real")
    got = a.get("x")  # leases the one used last, the real one
    a.store.evict(1)
    assert [s.variant for s in a.store.segments()] == ["real"]
    a.store.release(got)


def test_a_refused_publish_holds_nothing(cluster: Cluster) -> None:
    a = cluster.desk("a")
    cluster.directory.drop_owner(WorkerId("a"), int(a.owner.incarnation))
    with pytest.raises(WorkerLost):
        a.put("x")
    assert a.store.segments() == []

    def fill(_: Sequence[BlockViews]) -> None:
        raise ValueError("no KV")

    with pytest.raises(ValueError, match="no KV"):
        a.store.publish(key("x"), fill, start=0, num_tokens=4, producer="t")
    assert a.used() == 0


def test_a_segment_is_held_before_it_is_published(cluster: Cluster) -> None:
    a = cluster.desk("a")
    seen: list[list[SegmentKey]] = []
    cluster.directory.on_publish = lambda: seen.append([s.key for s in a.store.segments()])
    a.put("x")
    assert seen == [[key("x")]], "a shard that restarts now hears of it from the heartbeat"


def test_an_eviction_during_the_publish_leaves_no_copy(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")

    def heartbeat_then_evict() -> None:
        LocalDirectory.publish(cluster.directory, a.owner, a.store.segments())
        a.store.evict(1)
        assert a.used() == 1, "its bytes stay while it is being published"

    cluster.directory.on_publish = heartbeat_then_evict
    a.put("x")
    assert a.store.segments() == []
    assert reasons(b.get("x")) == {"x": "not_found"}


def test_an_exact_segment_takes_the_place_of_a_rectified_one_and_not_the_other_way(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x", value=1.0, variant="c~naive")
    assert a.put("x", value=2.0, variant="c~other").variant == "c~naive"
    reading = a.get("x")
    assert a.put("x", value=3.0, variant="c").variant == "c"
    assert values(reading, "x") == {1.0}, "who reads the old one here keeps its bytes"
    a.store.release(reading)
    assert a.used() == 1
    got = b.get("x")
    assert values(got, "x") == {3.0}
    b.store.release(got)
    assert a.put("x", value=4.0, variant="c~naive").variant == "c"
    assert cluster.directory.stats()["segments"] == 1
    a.store.evict(1)
    assert a.used() == 0


def test_a_better_segment_that_cannot_be_published_leaves_nothing_behind(cluster: Cluster) -> None:
    a = cluster.desk("a")
    a.put("x", variant="c~naive")
    cluster.directory.raises["publish"] = DirectoryUnavailable("down")
    with pytest.raises(DirectoryUnavailable):
        a.put("x", variant="c")
    assert a.store.segments() == []
    assert a.used() == 0
