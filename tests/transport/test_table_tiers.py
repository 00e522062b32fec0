"""The table's rules for expected readers and for spilled copies."""

from __future__ import annotations

from dataclasses import replace

from transport.directory.table import Table
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


def owner(worker: WorkerId = W0) -> Owner:
    return Owner(worker, Incarnation(1), NodeId(f"node of {worker}"), {})


def key(name: str) -> SegmentKey:
    return SegmentKey("s", name.encode())


def segment(name: str, *, block: int = 0, consumers: int = 0, variant: str = "") -> Segment:
    refs = (BlockRef(BlockId(block), 1, 100, (0,)),)
    return Segment(key(name), 10, 0, refs, variant=variant, consumers=consumers)


def read(table: Table, name: str, now: float, *, success: bool = True) -> None:
    lease = table.lease([key(name)], now, holder=W1, ttl_s=5)[key(name)]
    table.release([lease.id], now, read=success)


def names(segments: tuple[Segment, ...]) -> list[str]:
    return [s.key.digest.decode() for s in segments]


def table_with(*segments: Segment) -> Table:
    """A table in which the segments were published one second apart, in order."""
    table = Table(owner_timeout_s=1000.0, lease_prefix="t:")
    for at, made in enumerate(segments):
        table.publish(owner(), [made], float(at))
    return table


def test_what_all_expected_readers_have_read_goes_first_and_lru_behind_it() -> None:
    t = table_with(
        segment("old"), segment("middle"), segment("read", consumers=2), segment("half", consumers=2)
    )
    for name in ("read", "half", "read"):
        read(t, name, 10.0)
    assert [c.key for c in t.candidates(owner(), 10**6, 11.0)] == [
        key(n) for n in ("read", "old", "middle", "half")
    ]
    assert [c.consumed for c in t.candidates(owner(), 10**6, 11.0)] == [True, False, False, False]
    assert names(t.evict(owner(), 150, 11.0)) == ["read", "old"]


def test_only_a_successful_read_counts() -> None:
    t = table_with(segment("old"), segment("x", consumers=1))
    read(t, "x", 2.0, success=False)
    t.lease([key("x")], 3.0, holder=W1, ttl_s=1.0)  # ends by itself
    t.lookup([key("x")], 4.5)
    assert names(t.evict(owner(), 1, 5.0)) == ["old"]
    read(t, "x", 6.0)
    t.publish(owner(), [segment("new")], 0.0)
    (gone,) = t.evict(owner(), 1, 7.0)
    assert (gone.key, gone.reads, gone.consumed) == (key("x"), 1, True)


def test_a_lease_protects_what_was_read() -> None:
    t = table_with(segment("old"), segment("x", consumers=1))
    read(t, "x", 2.0)
    lease = t.lease([key("x")], 3.0, holder=W1, ttl_s=5.0)[key("x")]
    assert names(t.evict(owner(), 10**6, 4.0)) == ["old"]
    t.release([lease.id], 5.0)
    assert names(t.evict(owner(), 10**6, 6.0)) == ["x"]


def test_more_readers_may_be_expected_later() -> None:
    t = table_with(segment("old"), segment("x", consumers=1))
    read(t, "x", 2.0)
    t.publish(owner(), [segment("x", consumers=2)], 3.0)
    assert names(t.evict(owner(), 1, 4.0)) == ["old"]
    read(t, "x", 5.0)
    t.publish(owner(), [segment("young")], 0.0)
    assert names(t.evict(owner(), 1, 6.0)) == ["x"], "reads go on counting"


def test_unknown_readers_never_make_it_consumed() -> None:
    t = table_with(segment("x"), segment("y"))
    for _ in range(5):
        read(t, "x", 2.0)
    assert names(t.evict(owner(), 1, 3.0)) == ["y"]


def test_a_spilled_copy_is_found_last_and_never_leased_or_evicted_for_room() -> None:
    t = table_with()
    stub = replace(segment("x"), spilled=True)
    t.publish(owner(), [stub], 0.0)
    assert t.lookup([key("x")], 1.0)[key("x")].segment == stub
    assert t.lease([key("x")], 1.0, holder=W1, ttl_s=1.0) == {}
    assert t.candidates(owner(), 10**6, 1.0) == []
    t.publish(owner(W1), [segment("x", block=3)], 2.0)
    assert t.lookup([key("x")], 3.0, near=W0)[key("x")].owner.worker == W1, "rather far than spilled"
    assert t.lease([key("x")], 3.0, holder=W0, ttl_s=1.0)[key("x")].located.owner.worker == W1


def test_an_exact_spilled_copy_is_found_before_a_rectified_one_but_the_latter_is_leased() -> None:
    t = table_with(replace(segment("x", variant="c"), spilled=True))
    t.publish(owner(W1), [segment("x", variant="c~naive")], 1.0)
    assert t.lookup([key("x")], 2.0)[key("x")].segment.spilled
    assert t.lease([key("x")], 2.0, holder=W1, ttl_s=1.0)[key("x")].located.segment.variant == "c~naive"


def test_a_promoted_copy_takes_the_place_of_the_spilled_one_and_not_the_other_way() -> None:
    t = table_with()
    stub, back = replace(segment("x"), spilled=True), segment("x", block=7)
    t.publish(owner(), [stub], 0.0)
    t.publish(owner(), [back], 1.0)
    lease = t.lease([key("x")], 2.0, holder=W1, ttl_s=9.0)[key("x")]
    t.publish(owner(), [stub], 3.0)  # late
    t.retract(owner(), [stub], 3.0)  # as late
    assert t.renew([lease.id], 4.0, ttl_s=9.0) == {lease.id: True}
    assert t.lookup([key("x")], 4.0)[key("x")].segment == back
    assert t.stats(4.0)["segments"] == 1


def test_an_evicted_copy_can_come_in_again_as_spilled_and_be_retracted() -> None:
    t = table_with(segment("x", consumers=3))
    read(t, "x", 1.0)
    (gone,) = t.evict(owner(), 1, 2.0)
    stub = replace(gone, spilled=True)
    t.publish(owner(), [stub], 3.0)
    t.publish(owner(), [replace(stub, blocks=segment("x", block=5).blocks, spilled=False)], 4.0)
    for _ in range(2):
        read(t, "x", 5.0)
    t.publish(owner(), [segment("older")], 0.0)
    assert names(t.evict(owner(), 1, 6.0)) == ["x"], "reads from before it was spilled still count"
    t.publish(owner(), [stub], 7.0)
    t.retract(owner(), [stub], 8.0)
    assert t.lookup([key("x")], 9.0) == {}
    assert t.stats(9.0)["bytes"] == 100
