"""Leases that name several owners' copies, and reads that count for all of them."""

from __future__ import annotations

import pytest

from tests.transport.test_table_tiers import key, owner
from transport.directory import wire
from transport.directory.table import Table
from transport.types import BlockId, BlockRef, Lease, NodeId, Owner, Segment, WorkerId

READER = WorkerId("reader")


def _owner(number: int, node: str = "n") -> Owner:
    return Owner(WorkerId(f"w{number}"), owner().incarnation, NodeId(node))


def _segment(name: str = "x", *, block: int = 1, **options: object) -> Segment:
    blocks = (BlockRef(BlockId(block), 1, 100, (7,)),)
    return Segment(key(name), 4, 0, blocks, **options)  # type: ignore[arg-type]


@pytest.fixture
def table() -> Table:
    return Table(owner_timeout_s=100, lease_prefix="t:")


def _lease(table: Table, copies: int = 2, holder: WorkerId = READER) -> Lease:
    return table.lease([key("x")], 1.0, holder=holder, ttl_s=5.0, copies=copies)[key("x")]


def test_it_names_as_many_copies_as_are_asked_for_and_there(table: Table) -> None:
    for number in range(3):
        table.publish(_owner(number), [_segment(block=number)], 0.0)
    assert _lease(table, 1).others == ()
    for copies in (2, 3, 4):
        lease = _lease(table, copies)
        workers = {lease.located.owner.worker, *(x.located.owner.worker for x in lease.others)}
        assert len(workers) == 1 + len(lease.others) == min(3, copies)
    ids = [lease.id for lease in (_lease(table, 3), *_lease(table, 3).others)]
    assert len(set(ids)) == len(ids)


def test_each_copy_is_pinned_until_its_own_lease_is_released(table: Table) -> None:
    for number in range(2):
        table.publish(_owner(number), [_segment()], 0.0)
    lease = _lease(table)
    (other,) = lease.others
    for each in (lease, other):
        assert table.evict(each.located.owner, 1, 1.0) == ()
        table.release([each.id], 1.0)
        assert len(table.evict(each.located.owner, 1, 1.0)) == 1
    assert table.stats(1.0)["leases"] == 0


@pytest.mark.parametrize(
    "unfit", [{"variant": "of another context"}, {"complete": False}, {"spilled": True}], ids=str
)
def test_only_whole_copies_of_the_same_variant_are_named(table: Table, unfit: dict[str, object]) -> None:
    table.publish(_owner(0), [_segment()], 0.0)
    table.publish(_owner(1), [_segment(**unfit)], 0.0)
    assert _lease(table).others == ()


def test_who_has_it_itself_needs_no_other(table: Table) -> None:
    table.publish(_owner(0), [_segment()], 0.0)
    table.publish(_owner(1), [_segment()], 0.0)
    lease = _lease(table, holder=WorkerId("w1"))
    assert (lease.located.owner.worker, lease.others) == ("w1", ())


def test_a_read_counts_for_every_copy(table: Table) -> None:
    """Else the one that the bytes did not come from would wait for its reader for ever."""
    table.publish(_owner(0), [_segment(consumers=2)], 0.0)
    table.publish(_owner(1), [_segment(consumers=1, reads=1)], 0.0)
    lease = _lease(table)
    table.release([lease.id], 2.0, read=True)
    table.release([x.id for x in lease.others], 2.0)
    gone = {number: table.evict(_owner(number), 1, 3.0)[0].reads for number in (0, 1)}
    assert gone == {0: 1, 1: 2}


def test_over_the_wire(table: Table) -> None:
    keys = [key(name) for name in "xyz"]
    table.publish(_owner(0), [_segment("x"), _segment("y")], 0.0)
    table.publish(_owner(1, "elsewhere"), [_segment("x", block=9)], 0.0)
    granted = table.lease(keys, 1.0, holder=READER, ttl_s=5.0, copies=2)
    packed = wire.unpack(wire.pack(wire.pack_shared(granted, keys)))
    assert wire.unpack_shared(packed, keys, READER) == granted
    assert len(granted[key("x")].others) == 1
    with pytest.raises(wire.MalformedMessage):
        wire.unpack_shared([], keys, READER)
