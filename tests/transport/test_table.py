"""The directory's state machine: written-down rules, then a random walk against a simple model."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from transport.directory.table import Table
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    LeaseId,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

W0, W1, W2 = WorkerId("w0"), WorkerId("w1"), WorkerId("w2")
TIMEOUT = 10.0


def owner(worker: WorkerId, incarnation: int = 1, node: str = "n0") -> Owner:
    return Owner(worker, Incarnation(incarnation), NodeId(node), {})


def key(i: int) -> SegmentKey:
    return SegmentKey("s", bytes([i]))


def segment(i: int, nbytes: int = 100, variant: str = "", block: int = 0, complete: bool = True) -> Segment:
    refs = (BlockRef(BlockId(block), 1, nbytes, (0,)),)
    return Segment(key(i), 10, 0, refs, variant=variant, complete=complete)


def table() -> Table:
    return Table(owner_timeout_s=TIMEOUT, lease_prefix="t:")


def test_lookup_prefers_self_then_node_then_any() -> None:
    t = table()
    for worker, node in ((W0, "n0"), (W1, "n1"), (W2, "n1")):
        t.announce(owner(worker, node=node), 0)
    t.publish(owner(W0, node="n0"), [segment(1)], 1)
    t.publish(owner(W1, node="n1"), [segment(1)], 0)
    assert t.lookup([key(1)], 1)[key(1)].owner.worker == W0, "most recently used, when nothing is near"
    assert t.lookup([key(1)], 1, near=W1)[key(1)].owner.worker == W1
    assert t.lookup([key(1)], 1, near=W2)[key(1)].owner.worker == W1, "same node"
    assert t.lookup([key(1), key(2)], 1).keys() == {key(1)}


def test_open_segments_are_held_but_not_found_nor_evicted() -> None:
    t = table()
    t.publish(owner(W0), [segment(1, complete=False)], 0)
    assert t.lookup([key(1)], 0) == {}
    assert t.lease([key(1)], 0, holder=W1, ttl_s=1) == {}
    assert t.evict(owner(W0), 10**9, 0) == ()
    t.publish(owner(W0), [segment(1)], 0)
    assert key(1) in t.lookup([key(1)], 0)


def test_leased_segments_survive_eviction_until_released_or_expired() -> None:
    t = table()
    t.publish(owner(W0), [segment(1), segment(2), segment(3)], 0)
    leases = t.lease([key(1), key(2)], 0, holder=W1, ttl_s=5)
    assert [s.key for s in t.evict(owner(W0), 10**9, 1)] == [key(3)]
    t.release([leases[key(1)].id, LeaseId("unknown")], 1)
    assert [s.key for s in t.evict(owner(W0), 10**9, 1)] == [key(1)]
    assert t.evict(owner(W0), 10**9, 4.9) == ()
    assert [s.key for s in t.evict(owner(W0), 10**9, 5.0)] == [key(2)]


def test_renew_extends_only_what_is_alive_and_never_shortens() -> None:
    t = table()
    t.publish(owner(W0), [segment(1)], 0)
    lease = t.lease([key(1)], 0, holder=W1, ttl_s=5)[key(1)]
    assert t.renew([lease.id], 4, ttl_s=5) == {lease.id: True}
    assert t.renew([lease.id], 8, ttl_s=0.1) == {lease.id: True}
    assert t.renew([lease.id], 8.9, ttl_s=1) == {lease.id: True}, "not shortened to 8.1"
    assert t.renew([lease.id], 9.9, ttl_s=1) == {lease.id: False}


def test_lookup_is_no_use_but_lease_is() -> None:
    t = table()
    t.publish(owner(W0), [segment(1), segment(2), segment(3)], 0)
    t.lookup([key(1)], 1)
    t.release([x.id for x in t.lease([key(2)], 1, holder=W1, ttl_s=1).values()], 1)
    evicted = [t.evict(owner(W0), 1, 2)[0].key for _ in range(3)]
    assert evicted == [key(1), key(3), key(2)]


def test_evict_covers_the_bytes_asked_for() -> None:
    t = table()
    t.publish(owner(W0), [segment(i, nbytes=100) for i in range(5)], 0)
    assert len(t.evict(owner(W0), 101, 0)) == 2
    assert t.evict(owner(W0), 0, 0) == ()
    assert t.evict(owner(W1), 100, 0) == ()


def test_retract_takes_these_very_copies_leased_or_not() -> None:
    t = Table(owner_timeout_s=TIMEOUT)
    old, new = segment(0, block=1), segment(0, block=2)
    t.publish(owner(W0), [new, segment(1)], 0)
    t.publish(owner(W1), [new], 0)
    lease = t.lease([key(0)], 0, holder=W0, ttl_s=5)[key(0)]
    t.retract(owner(W0), [old, segment(2)], 1)
    assert t.renew([lease.id], 1, ttl_s=5) == {lease.id: True}, "published after what is retracted"
    t.retract(owner(W0, incarnation=2), [new], 1)
    t.retract(owner(W0), [new], 1)
    assert t.renew([lease.id], 1, ttl_s=5) == {lease.id: False}
    assert t.lookup([key(0), key(1)], 1)[key(0)].owner.worker == W1
    assert t.stats(1)["segments"] == 2


def test_evict_of_named_copies_checks_leases_again() -> None:
    t = table()
    t.publish(owner(W0), [segment(1), segment(2)], 0)
    offered = [(c.key, c.variant) for c in t.candidates(owner(W0), 10**9, 0)]
    t.lease([key(1)], 0, holder=W1, ttl_s=5)
    assert [s.key for s in t.evict_copies(owner(W0), [*offered, (key(9), "")], 0)] == [key(2)]


def test_a_newer_incarnation_fences_the_older() -> None:
    t = table()
    t.publish(owner(W0, 1), [segment(1)], 0)
    t.publish(owner(W1, 1), [segment(2)], 0)
    on_w0 = t.lease([key(1)], 0, holder=W1, ttl_s=9)[key(1)]
    by_w0 = t.lease([key(2)], 0, holder=W0, ttl_s=9)[key(2)]
    assert not t.announce(owner(W0, 2), 1).known
    assert t.lookup([key(1)], 1) == {}
    assert t.renew([on_w0.id, by_w0.id], 1, ttl_s=9) == {on_w0.id: False, by_w0.id: False}
    assert t.publish(owner(W0, 1), [segment(3)], 1).fenced_by is not None
    assert t.announce(owner(W0, 1), 1).fenced_by is not None
    assert t.lookup([key(3)], 1) == {}
    assert t.evict(owner(W0, 1), 10**9, 1) == ()


def test_the_fence_outlives_the_silence_of_the_newer_one() -> None:
    t = table()
    t.announce(owner(W0, 2), 0)
    t.tick(TIMEOUT + 1)
    assert t.publish(owner(W0, 1), [segment(1)], TIMEOUT + 2).fenced_by is not None
    assert t.announce(owner(W0, 2), TIMEOUT + 2).fenced_by is None


def test_silent_owners_are_dropped_and_told_to_publish_again() -> None:
    t = table()
    t.publish(owner(W0), [segment(1)], 0)
    assert t.announce(owner(W0), TIMEOUT).known
    assert key(1) in t.lookup([key(1)], 2 * TIMEOUT)
    assert t.lookup([key(1)], 2 * TIMEOUT + 0.1) == {}
    assert not t.announce(owner(W0), 2 * TIMEOUT + 0.1).known


def test_a_dropped_owner_cannot_publish_late_but_its_successor_can() -> None:
    t = table()
    t.publish(owner(W0, 1), [segment(1)], 0)
    t.drop_owner(W0, 1, 1)
    assert t.lookup([key(1)], 1) == {}
    assert t.publish(owner(W0, 1), [segment(1)], 1).fenced_by == 1
    assert t.publish(owner(W0, 2), [segment(1)], 1).fenced_by is None
    t.drop_owner(W0, 1, 2)
    assert key(1) in t.lookup([key(1)], 2), "an old obituary does not hit the successor"


def test_republish_replaces_and_keeps_leases_of_the_same_blocks() -> None:
    t = table()
    t.publish(owner(W0), [segment(1)], 0)
    lease = t.lease([key(1)], 0, holder=W1, ttl_s=9)[key(1)]
    t.publish(owner(W0), [segment(1)], 1)
    assert t.renew([lease.id], 1, ttl_s=9) == {lease.id: True}
    t.publish(owner(W0), [segment(1, nbytes=50, block=7)], 1)
    assert t.renew([lease.id], 1, ttl_s=9) == {lease.id: False}
    assert t.stats(1)["bytes"] == 50
    assert t.lookup([key(1)], 1)[key(1)].segment.blocks[0].block == 7


def test_variants_are_apart() -> None:
    t = table()
    t.publish(owner(W0), [segment(1, variant="a"), segment(1, variant="b", block=1)], 0)
    assert t.stats(0)["segments"] == 2
    assert t.stats(0)["keys"] == 1
    assert len(t.evict(owner(W0), 1, 0)) == 1
    assert t.lookup([key(1)], 0)[key(1)].segment.variant == "b"


def test_an_exact_copy_comes_before_a_nearer_rectified_one() -> None:
    t = table()
    t.publish(owner(W0), [segment(1, variant="b~naive"), segment(2, variant="b~naive")], 0)
    t.publish(owner(W1), [segment(1, variant="a")], 0)
    found = t.lookup([key(1), key(2)], 1, near=W0)
    assert (found[key(1)].owner.worker, found[key(1)].segment.variant) == (W1, "a")
    assert found[key(2)].segment.rectified, "better than nothing"
    lease = t.lease([key(1)], 1, holder=W0, ttl_s=1)[key(1)]
    assert lease.located == found[key(1)]


@dataclass
class ModelCopy:
    segment: Segment
    used_at: int
    leases: set[LeaseId] = field(default_factory=set)


class TableMachine(RuleBasedStateMachine):
    """The model is naive on purpose: flat dictionaries, everything recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.table = table()
        self.now = 0.0
        self.order = 0
        self.seen: dict[WorkerId, tuple[int, float]] = {}  # worker -> (incarnation, last heard)
        self.fence: dict[WorkerId, int] = {}
        self.copies: dict[tuple[WorkerId, SegmentKey, str], ModelCopy] = {}
        self.leases: dict[LeaseId, tuple[float, WorkerId, int]] = {}
        self.ever: list[LeaseId] = []

    # -- the model ----------------------------------------------------------------------------------------

    def forget(self, worker: WorkerId) -> None:
        self.seen.pop(worker, None)
        for name in [n for n in self.copies if n[0] == worker]:
            for lease in self.copies.pop(name).leases:
                self.leases.pop(lease, None)

    def end(self, lease: LeaseId) -> None:
        self.leases.pop(lease, None)
        for copy in self.copies.values():
            copy.leases.discard(lease)

    def admit(self, o: Owner) -> bool:
        if o.incarnation <= self.fence.get(o.worker, 0):
            return False
        known = self.seen.get(o.worker)
        if known is not None and o.incarnation < known[0]:
            return False
        if known is None or o.incarnation > known[0]:
            self.forget(o.worker)
            self.fence[o.worker] = o.incarnation - 1
            for lease in [x for x, v in self.leases.items() if v[1] == o.worker and v[2] < o.incarnation]:
                self.end(lease)
        self.seen[o.worker] = (o.incarnation, self.now)
        return True

    def reap(self) -> None:
        for lease in [x for x, (expires, _, _) in self.leases.items() if expires <= self.now]:
            self.end(lease)
        for worker in [w for w, (_, at) in self.seen.items() if self.now - at > TIMEOUT]:
            self.forget(worker)

    def best(self, k: SegmentKey, near: WorkerId) -> set[WorkerId]:
        """Workers that a lookup may answer with: of those with an exact copy, or else of all, those at the
        smallest distance."""
        nodes = {w: NODES[w] for w in self.seen}
        ranks: dict[WorkerId, tuple[bool, int]] = {}
        for (worker, at, _), copy in self.copies.items():
            if at == k and copy.segment.complete:
                same = near in nodes and nodes[near] == nodes[worker]
                distance = 0 if worker == near else 1 if same else 2
                rank = "~" in copy.segment.variant, distance
                ranks[worker] = min(rank, ranks.get(worker, rank))
        return {w for w, r in ranks.items() if r == min(ranks.values())}

    # -- rules --------------------------------------------------------------------------------------------

    workers = st.sampled_from([W0, W1, W2])
    keys = st.sampled_from([key(i) for i in range(3)])
    lives = st.integers(1, 3)

    @rule(dt=st.sampled_from([0.5, 2.0, 6.0, 11.0]))
    def advance(self, dt: float) -> None:
        self.now += dt
        self.table.tick(self.now)
        self.reap()

    @rule(worker=workers, life=lives)
    def announce(self, worker: WorkerId, life: int) -> None:
        reply = self.table.announce(owner(worker, life, NODES[worker]), self.now)
        before = self.seen.get(worker, (0, 0.0))[0]
        accepted = self.admit(owner(worker, life))
        assert (reply.fenced_by is None) == accepted
        assert reply.known == (accepted and before == life)

    @rule(
        worker=workers,
        life=lives,
        k=st.integers(0, 2),
        variant=st.sampled_from(["", "v", "v~naive"]),
        nbytes=st.sampled_from([100, 200]),
        complete=st.sampled_from([True, True, False]),
    )
    def publish(self, worker: WorkerId, life: int, k: int, variant: str, nbytes: int, complete: bool) -> None:
        made = segment(k, nbytes, variant, complete=complete)
        reply = self.table.publish(owner(worker, life, NODES[worker]), [made], self.now)
        accepted = self.admit(owner(worker, life))
        assert (reply.fenced_by is None) == accepted
        if accepted:
            name = (worker, made.key, variant)
            old = self.copies.get(name)
            keep = old is not None and old.segment.blocks == made.blocks
            if old is not None and not keep:
                for lease in list(old.leases):
                    self.end(lease)
            self.order += 1
            self.copies[name] = ModelCopy(made, self.order, old.leases if old and keep else set())

    @rule(k=keys, near=workers)
    def lookup(self, k: SegmentKey, near: WorkerId) -> None:
        found = self.table.lookup([k], self.now, near=near)
        assert {x.owner.worker for x in found.values()} <= self.best(k, near)
        assert bool(found) == bool(self.best(k, near))

    @rule(k=keys, holder=workers, ttl=st.sampled_from([1.0, 5.0]))
    def lease(self, k: SegmentKey, holder: WorkerId, ttl: float) -> None:
        best = self.best(k, holder)
        for lease in self.table.lease([k], self.now, holder=holder, ttl_s=ttl).values():
            located = lease.located
            assert located.owner.worker in best
            assert lease.id not in self.ever
            self.ever.append(lease.id)
            life = self.seen[holder][0] if holder in self.seen else 0
            self.leases[lease.id] = (self.now + ttl, holder, life)
            copy = self.copies[(located.owner.worker, k, located.segment.variant)]
            self.order += 1
            copy.used_at = self.order
            copy.leases.add(lease.id)
            return
        assert not best

    @rule(at=st.integers(0, 10**6), ttl=st.sampled_from([1.0, 5.0]))
    def renew(self, at: int, ttl: float) -> None:
        if self.ever:
            lease = self.ever[at % len(self.ever)]
            assert self.table.renew([lease], self.now, ttl_s=ttl) == {lease: lease in self.leases}
            if lease in self.leases:
                expires, holder, life = self.leases[lease]
                self.leases[lease] = (max(expires, self.now + ttl), holder, life)

    @rule(at=st.integers(0, 10**6))
    def release(self, at: int) -> None:
        if self.ever:
            lease = self.ever[at % len(self.ever)]
            self.table.release([lease], self.now)
            self.end(lease)

    @rule(worker=workers, life=lives, nbytes=st.sampled_from([1, 150, 10**6]))
    def evict(self, worker: WorkerId, life: int, nbytes: int) -> None:
        gone = self.table.evict(owner(worker, life), nbytes, self.now)
        mine = self.seen.get(worker, (0, 0.0))[0] == life
        free = sorted(
            (
                c
                for n, c in self.copies.items()
                if mine and n[0] == worker and not c.leases and c.segment.complete
            ),
            key=lambda c: c.used_at,
        )
        expected: list[Segment] = []
        while free and sum(s.nbytes for s in expected) < nbytes:
            expected.append(free.pop(0).segment)
        assert list(gone) == expected, "oldest unleased first, no more than needed"
        for s in gone:
            del self.copies[(worker, s.key, s.variant)]

    @rule(worker=workers, life=lives)
    def drop(self, worker: WorkerId, life: int) -> None:
        self.table.drop_owner(worker, life, self.now)
        self.fence[worker] = max(life, self.fence.get(worker, 0))
        if self.seen.get(worker, (99, 0.0))[0] <= life:
            self.forget(worker)
        for lease in [x for x, v in self.leases.items() if v[1] == worker and v[2] <= life]:
            self.end(lease)

    @invariant()
    def totals_agree(self) -> None:
        stats = self.table.stats(self.now)
        assert stats["segments"] == len(self.copies)
        assert stats["bytes"] == sum(c.segment.nbytes for c in self.copies.values())
        assert stats["leases"] == len(self.leases)
        assert stats["owners"] == len(self.seen)
        assert stats["keys"] == len({k for _, k, _ in self.copies})


NODES = {W0: "n0", W1: "n1", W2: "n1"}
TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
