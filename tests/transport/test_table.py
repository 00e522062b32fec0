"""The directory's state machine: written-down rules, then a random walk against a simple model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from transport.directory import table as table_module
from transport.directory.catalogue import PIN_PREFIX, Cursor, Filter, Listed
from transport.directory.operating import OperatedTable
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


def table() -> OperatedTable:
    return OperatedTable(owner_timeout_s=TIMEOUT, lease_prefix="t:")


def listed(t: OperatedTable, chosen: Filter, now: float = 0.0, limit: int = 2) -> list[Listed]:
    """All rows, by small pages."""
    rows: list[Listed] = []
    after: Cursor | None = None
    while True:
        page = t.page(chosen, now, after=after, limit=limit)
        assert len(page.rows) <= limit
        rows.extend(page.rows)
        after = page.after
        if after is None:
            return rows


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
    t = table()
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


def test_of_equal_distance_the_least_loaded_owner_comes_first() -> None:
    t = table()
    for worker in (W0, W1, W2):
        t.announce(owner(worker, node="n0" if worker == W0 else "n1"), 0)
    t.publish(owner(W1, node="n1"), [segment(1), segment(2, nbytes=300), segment(3)], 0)
    t.publish(owner(W2, node="n1"), [segment(1), segment(2, nbytes=300)], 1)
    assert t.lookup([key(1)], 2, near=W0)[key(1)].owner.worker == W2, "used last"
    first = t.lease([key(2)], 2, holder=W0, ttl_s=60)[key(2)]
    assert first.located.owner.worker == W2
    assert t.lookup([key(1)], 2, near=W0)[key(1)].owner.worker == W1, "the other one is reading from w2"
    more = t.lease([key(1), key(3)], 2, holder=W0, ttl_s=60)
    assert {x.located.owner.worker for x in more.values()} == {W1}
    assert t.lookup([key(1)], 2, near=W0)[key(1)].owner.worker == W1, "by bytes: 200 there, 300 here"
    t.pin(Filter(owner="w1"), 2, name="p", ttl_s=60, limit=9)
    assert t.lookup([key(1)], 2, near=W0)[key(1)].owner.worker == W1, "a pin is no load"
    assert t.lookup([key(1)], 2, near=W2)[key(1)].owner.worker == W2, "what is here comes before all others"
    t.release([first.id], 2)
    assert t.lookup([key(1)], 2, near=W0)[key(1)].owner.worker == W2
    t.publish(owner(W0, node="n0"), [segment(1, variant="c~naive")], 2)
    assert t.lookup([key(1)], 2, near=W0)[key(1)].owner.worker == W2, "exact before near and idle"


def test_existence_probes_never_extend_life() -> None:
    """Mooncake#2187: probes renewed leases, so that nothing could be evicted any more."""
    t = table()
    t.publish(owner(W0), [segment(1), segment(2)], 0)
    lease = t.lease([key(1)], 0, holder=W1, ttl_s=5)[key(1)]
    for at in range(1, 9):
        t.announce(owner(W0), at)
        t.lookup([key(1), key(2)], at, near=W1)
        assert len(listed(t, Filter(), at)) == 2
    assert t.renew([lease.id], 9, ttl_s=5) == {lease.id: False}
    assert [s.key for s in t.evict(owner(W0), 10**9, 9)] == [key(2), key(1)]


def test_leases_and_pins_are_bounded_in_time_and_number() -> None:
    t = OperatedTable(owner_timeout_s=1e9, max_lease_s=20, max_pin_s=50, max_leases=2)
    t.publish(owner(W0), [segment(i) for i in range(4)], 0)
    leases = t.lease([key(i) for i in range(4)], 0, holder=W1, ttl_s=1000)
    assert [x.ttl_s for x in leases.values()] == [20, 20]
    assert t.stats(0)["refused_leases"] == 2
    assert len(t.lease([key(3)], 0, holder=W2, ttl_s=1)) == 1, "the limit is of one holder"
    t.renew([x.id for x in leases.values()], 10, ttl_s=1000)
    assert t.stats(29)["leases"] == 2
    assert t.stats(30)["leases"] == 0
    assert [len(r.pins) for r in t.pin(Filter(), 30, name="p", ttl_s=1e9, limit=9).rows] == [1, 1, 0, 0]
    assert [r.pins for r in listed(t, Filter(pinned=True), 40)] == [{"p": 40.0}] * 2
    assert t.stats(80)["pins"] == 0


def test_what_is_over_is_forgotten() -> None:
    """Fences, leases that were released, and expiries do not grow for ever."""
    t = OperatedTable(owner_timeout_s=1e9)
    t.publish(owner(W0), [segment(1)], 0)
    for _ in range(5000):
        held = [x.id for x in t.lease([key(1)], 0, holder=W1, ttl_s=1e6).values()]
        for at in range(3):
            t.renew(held, at, ttl_s=1e6)
        t.release(held, 0)
    book = t._leases
    assert len(book._expiries) < 3000
    assert (book._held_by, dict(book._load), t._segments[key(1)][0].leases) == ({}, {}, None)


def test_forgotten_fences_keep_fenced_lives_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "_FENCES", 3)
    t = OperatedTable(owner_timeout_s=1e9)
    t.announce(owner(W1, 5), 0)
    for i in range(10):
        t.drop_owner(WorkerId(f"gone{i}"), 100 + i, 0)
    assert t.stats(0)["fences"] <= 3 + 1
    for i in range(10):
        assert t.publish(owner(WorkerId(f"gone{i}"), 100 + i), [segment(1)], 0).fenced_by is not None
    assert t.announce(owner(W1, 5), 0).known, "a live owner is not forgotten"
    assert t.announce(owner(WorkerId("gone1"), 500), 0).fenced_by is None, "its successor is younger"


def test_leases_are_counted_by_age() -> None:
    t = OperatedTable(owner_timeout_s=1e9)
    t.publish(owner(W0), [segment(1)], 0)
    for at in (0, 55, 59.5):
        t.lease([key(1)], at, holder=W1, ttl_s=1000)
    t.pin(Filter(), 0, name="p", ttl_s=1e6, limit=1)
    stats = t.stats(61)
    ages = [stats[f"leases_age_{x}"] for x in ("le_1", "le_10", "le_60", "gt_60")]
    assert ages == [0, 2, 0, 1]


def test_retire_says_what_is_leased() -> None:
    t = table()
    t.publish(owner(W0), [segment(1), segment(2), segment(3, complete=False)], 0)
    t.lease([key(2)], 0, holder=W1, ttl_s=5)
    named = [(key(n), "") for n in (1, 2, 3, 9)]
    assert t.retire(owner(W0, 2), named, 0) == [], "another life holds nothing"
    assert t.retire(owner(W0), named, 0) == [1]
    assert [r.key for r in listed(t, Filter())] == [key(2)]
    assert t.retire(owner(W0), named, 5) == []
    assert t.stats(5)["segments"] == 0


def test_pages_come_in_order_and_filters_choose() -> None:
    t = table()
    t.publish(owner(W1), [segment(n) for n in (7, 3, 5)], 0)
    t.publish(owner(W0), [segment(3), segment(3, variant="a~x"), segment(5, complete=False)], 4)
    names = [(r.key, r.variant, r.owner) for r in listed(t, Filter(), 5)]
    expected = [(3, "", W0), (3, "", W1), (3, "a~x", W0), (5, "", W0), (5, "", W1), (7, "", W1)]
    assert names == [(key(k), v, w) for k, v, w in expected]
    assert [r.owner for r in listed(t, Filter(key_prefix="03"), 5, limit=1)] == [W0, W1, W0]
    assert len(listed(t, Filter(key_prefix="s/0"), 5)) == 6
    assert listed(t, Filter(key_prefix="x/0"), 5) == []
    assert {r.owner for r in listed(t, Filter(idle_s=2), 5)} == {W1}
    assert [r.variant for r in listed(t, Filter(kind="rectified"), 5)] == ["a~x"]
    assert [r.complete for r in listed(t, Filter(owner="w0", kind="exact"), 5)] == [True, False]
    t.lease([key(7)], 5, holder=W0, ttl_s=1)
    assert [(r.leases, r.busy) for r in listed(t, Filter(leased=True), 5)] == [(1, True)]


def test_a_listing_goes_on_while_keys_come_and_go() -> None:
    t = table()
    t.publish(owner(W0), [segment(n) for n in range(8)], 0)
    page = t.page(Filter(), 0, limit=3)
    t.retract(owner(W0), [segment(n) for n in (3, 4)], 0)
    t.publish(owner(W0), [segment(n) for n in (9,)], 0)
    rest = t.page(Filter(), 0, after=page.after, limit=9)
    assert [r.key for r in rest.rows] == [key(n) for n in (5, 6, 7)]
    assert rest.after is None
    assert len(listed(t, Filter())) == 7


def test_wishes_reach_the_owner_once_and_only_for_what_it_holds() -> None:
    t = table()
    t.publish(owner(W0), [segment(n) for n in range(4)], 0)
    assert t.wish(W0, [(key(n), "") for n in (1, 2, 9)], 0) == 2
    assert t.wish(W1, [(key(1), "")], 0) == 0
    t.evict_copies(owner(W0), [(key(2), "")], 0)
    assert t.announce(owner(W0), 1).wishes == ((key(1), ""),)
    assert t.announce(owner(W0), 1).wishes == ()
    assert t.stats(1)["segments"] == 3, "the owner evicts, the table does not"


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
        self.freed: set[tuple[WorkerId, BlockId, int]] = set()  # blocks whose owner was told to free them
        self.generation = 0
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
        smallest distance; of these, the ones with the fewest leased bytes."""
        nodes = {w: NODES[w] for w in self.seen}
        ranks: dict[WorkerId, tuple[bool, int, int]] = {}
        for (worker, at, _), copy in self.copies.items():
            if at == k and copy.segment.complete:
                same = near in nodes and nodes[near] == nodes[worker]
                distance = 0 if worker == near else 1 if same else 2
                rank = "~" in copy.segment.variant, distance, self.load(worker)
                ranks[worker] = min(rank, ranks.get(worker, rank))
        return {w for w, r in ranks.items() if r == min(ranks.values())}

    def load(self, worker: WorkerId) -> int:
        mine = [c for (w, _, _), c in self.copies.items() if w == worker]
        return sum(c.segment.nbytes * sum(not self.is_pin(x) for x in c.leases) for c in mine)

    def is_pin(self, lease: LeaseId) -> bool:
        return self.leases[lease][1].startswith(PIN_PREFIX)

    def told_to_free(self, worker: WorkerId, segments: Sequence[Segment]) -> None:
        """The owner frees the blocks: nobody may hold a lease on them from here on."""
        for s in segments:
            copy = self.copies.pop((worker, s.key, s.variant))
            assert not copy.leases, "evicted under a lease or a pin"
            self.freed |= {(worker, b.block, b.generation) for b in s.blocks}

    # -- rules --------------------------------------------------------------------------------------------

    workers = st.sampled_from([W0, W1, W2])
    variants = st.sampled_from(["", "v", "v~naive"])
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
        variant=variants,
        nbytes=st.sampled_from([100, 200]),
        complete=st.sampled_from([True, True, False]),
    )
    def publish(self, worker: WorkerId, life: int, k: int, variant: str, nbytes: int, complete: bool) -> None:
        name = (worker, key(k), variant)
        old = self.copies.get(name)
        if old is not None and old.segment.nbytes == nbytes:
            made = replace(old.segment, complete=complete)  # the same blocks again
        else:
            self.generation += 1  # a freed block comes back under another generation, as in the arena
            made = segment(k, nbytes, variant, complete=complete)
            made = replace(made, blocks=(replace(made.blocks[0], generation=self.generation),))
        reply = self.table.publish(owner(worker, life, NODES[worker]), [made], self.now)
        accepted = self.admit(owner(worker, life))
        assert (reply.fenced_by is None) == accepted
        if accepted:
            old = self.copies.get(name)  # it may have gone with an older life
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
            worker = located.owner.worker
            held = {(worker, b.block, b.generation) for b in located.segment.blocks}
            assert not held & self.freed, "a lease on freed blocks"
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
        self.told_to_free(worker, gone)

    @rule(worker=workers, life=lives, ks=st.lists(st.integers(0, 2), max_size=3), variant=variants)
    def evict_named(self, worker: WorkerId, life: int, ks: list[int], variant: str) -> None:
        named = [(key(k), variant) for k in ks]
        gone = self.table.evict_copies(owner(worker, life), named, self.now)
        mine = self.seen.get(worker, (0, 0.0))[0] == life
        there = {c: self.copies.get((worker, *c)) for c in named if mine}
        free = {c for c, x in there.items() if x is not None and not x.leases and x.segment.complete}
        assert {(s.key, s.variant) for s in gone} == free
        self.told_to_free(worker, gone)

    @rule(worker=workers, life=lives, ks=st.lists(st.integers(0, 2), max_size=3, unique=True))
    def retire(self, worker: WorkerId, life: int, ks: list[int]) -> None:
        named = [(key(k), "") for k in ks]
        mine = self.seen.get(worker, (0, 0.0))[0] == life
        there = [self.copies.get((worker, *c)) if mine else None for c in named]
        kept = self.table.retire(owner(worker, life), named, self.now)
        assert kept == [at for at, x in enumerate(there) if x is not None and x.leases]
        self.told_to_free(worker, [x.segment for x in there if x is not None and not x.leases])

    @rule(worker=workers, life=lives, k=st.integers(0, 2), variant=variants)
    def retract(self, worker: WorkerId, life: int, k: int, variant: str) -> None:
        copy = self.copies.get((worker, key(k), variant))
        if copy is None:
            return
        self.table.retract(owner(worker, life), [copy.segment], self.now)
        if self.seen[worker][0] == life:
            for lease in list(copy.leases):
                self.end(lease)
            self.told_to_free(worker, [copy.segment])

    @rule(worker=workers, ttl=st.sampled_from([1.0, 8.0]), name=st.sampled_from(["p", "q"]))
    def pin(self, worker: WorkerId, ttl: float, name: str) -> None:
        holder = WorkerId(PIN_PREFIX + name)
        self.table.pin(Filter(owner=worker), self.now, name=name, ttl_s=ttl, limit=100)
        for (w, k, v), copy in self.copies.items():
            if w != worker:
                continue
            mine = [x for x in copy.leases if self.leases[x][1] == holder]
            if mine:
                expires, _, life = self.leases[mine[0]]
                self.leases[mine[0]] = (max(expires, self.now + ttl), holder, life)
                continue
            state = next(c for c in self.table._segments[k] if (c.worker, c.segment.variant) == (w, v))
            new = next(iter(set(state.leases or ()) - copy.leases))
            copy.leases.add(new)
            self.leases[new] = (self.now + ttl, holder, 0)

    @rule(worker=workers, name=st.sampled_from(["p", ""]))
    def unpin(self, worker: WorkerId, name: str) -> None:
        self.table.unpin(Filter(owner=worker), self.now, name=name, limit=100)
        for (w, _, _), copy in self.copies.items():
            for lease in list(copy.leases):
                holder = self.leases[lease][1]
                if w == worker and self.is_pin(lease) and name in ("", holder.removeprefix(PIN_PREFIX)):
                    self.end(lease)

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
        assert stats["pins"] == sum(map(self.is_pin, self.leases))
        for worker in (W0, W1, W2):
            assert self.table._leases.load(worker) == self.load(worker)

    @invariant()
    def listing_agrees(self) -> None:
        rows = listed(self.table, Filter(), self.now, limit=4)
        assert [(r.owner, r.key, r.variant) for r in rows] == sorted(
            self.copies, key=lambda c: (c[1].space, c[1].digest, c[2], c[0])
        )
        for row in rows:
            held = self.copies[(row.owner, row.key, row.variant)].leases
            assert row.leases + len(row.pins) == len(held)

    @invariant()
    def fenced_lives_hold_nothing(self) -> None:
        for worker, state in self.table._owners.items():
            assert state.owner.incarnation > self.fence.get(worker, 0)
        assert {row.owner for row in listed(self.table, Filter(), self.now, limit=50)} <= self.seen.keys()


NODES = {W0: "n0", W1: "n1", W2: "n1"}
TestTableMachine = TableMachine.TestCase
TestTableMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
