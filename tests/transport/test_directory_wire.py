"""Messages of the directory: what goes in comes out, and bytes that are no such message are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.directory_rigs import ME, segment
from transport.directory import wire
from transport.directory.catalogue import Filter, Listed, Page
from transport.directory.shard import Shard
from transport.directory.table import Announced, Candidate
from transport.directory.view import View
from transport.settings import DirectorySettings
from transport.types import (
    BlockId,
    Incarnation,
    Lease,
    LeaseId,
    Located,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

KEYS = [segment(i).key for i in range(5)]


def through(value: object) -> object:
    return wire.unpack(wire.pack(value))


def blocks() -> st.SearchStrategy[tuple[object, ...]]:
    """Block references with any values that an arena may give them, whatever their fields are."""
    first = segment(1).blocks[0]
    numbers = st.integers(0, 2**64 - 1)
    return st.lists(
        st.builds(
            lambda b, g, n: replace(first, block=BlockId(b), generation=g, nbytes=n),
            numbers,
            numbers,
            st.integers(1, 2**40),
        ),
        max_size=4,
    ).map(tuple)


segments = st.builds(
    Segment,
    key=st.builds(SegmentKey, st.text(max_size=9), st.binary(max_size=20)),
    num_tokens=st.integers(0, 10**7),
    start=st.integers(0, 10**7),
    blocks=blocks(),
    variant=st.text(max_size=9),
    layout=st.text(max_size=9),
    producer=st.text(max_size=9),
    complete=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(segments, max_size=4), st.booleans())
def test_segments_survive(made: list[Segment], packed: bool) -> None:
    back = wire.unpack_segments(through(wire.pack_segments(made)), packed=packed)
    assert back == made
    assert [s.nbytes for s in back] == [s.nbytes for s in made]
    again = wire.unpack_segments(through(wire.pack_segments(back)), packed=False)
    assert again == made
    assert all(type(s.blocks) is tuple for s in again)


def test_packed_blocks_are_the_same_blocks() -> None:
    made = segment(1)
    packed = wire.PackedBlocks.of(made.blocks)
    assert packed == made.blocks
    assert made.blocks == packed
    assert hash(packed) == hash(made.blocks)
    assert (len(packed), packed[0], list(packed)) == (1, made.blocks[0], list(made.blocks))
    assert packed != segment(1, generation=2).blocks
    assert packed == wire.PackedBlocks.of(wire.PackedBlocks.of(segment(1).blocks))


def test_answers_survive() -> None:
    other = Owner(WorkerId("w9"), Incarnation(2**62), NodeId("n9"), {})
    found = {KEYS[n]: Located(segment(n), other if n == 3 else ME) for n in (0, 3, 4)}
    assert wire.unpack_located(through(wire.pack_located(found, KEYS)), KEYS) == found
    leases = {
        k: Lease(LeaseId(f"a:1:{n}"), x, WorkerId("r"), 2.5, token=bytes([n]))
        for n, (k, x) in enumerate(found.items())
    }
    packed = through(wire.pack_leases(leases, KEYS))
    assert wire.unpack_leases(packed, KEYS, WorkerId("r")) == leases
    told = Announced(None, True, ((KEYS[0], "v"), (KEYS[1], "")), owners=7)
    assert wire.unpack_announced(through(wire.pack_announced(told))) == told
    offers = [Candidate(KEYS[0], "v", 5, 0.25), Candidate(KEYS[1], "", 7, 3.0)]
    assert wire.unpack_candidates(through(wire.pack_candidates(offers))) == offers
    row = Listed(
        key=KEYS[0],
        variant="v",
        num_tokens=3,
        nbytes=9,
        owner=WorkerId("w"),
        node=NodeId("n"),
        leases=1,
        pins={"p": 1.5},
        idle_s=0.5,
        complete=True,
    )
    page = Page((row,), row.cursor)
    assert wire.unpack_page(through(wire.pack_page(page))) == page
    chosen = Filter(key_prefix="a", kind="exact", pinned=True, idle_s=2.0)
    assert wire.FILTER.unpack(through(wire.FILTER.pack(chosen))) == chosen
    seven = DirectorySettings(shards=7, replicas=2)
    assert wire.SETTINGS.unpack(through(wire.SETTINGS.pack(seven))) == seven
    reply = wire.Reply(wire.MOVED, 3, 2**62, View(3, ("a", "b")), None)
    assert wire.unpack_reply(wire.pack_reply(reply)) == reply


def test_an_owner_stands_once_in_a_reply() -> None:
    heavy = replace(ME, addresses={"nixl": bytes(2000)})
    found = {k: Located(segment(n), heavy) for n, k in enumerate(KEYS)}
    assert len(wire.pack(wire.pack_located(found, KEYS))) < 2 * 2000


def serve(method: str, *arguments: object) -> bytes:
    shard = Shard("a", DirectorySettings())
    shard.serve(
        "publish", wire.pack_request(0, (wire.pack_announcing(ME, 1), wire.pack_segments([segment(1)])))
    )
    return shard.serve(method, wire.pack_request(0, arguments))


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("lookup", ([["s"], [[1, b"x"]]], None)),  # no such space
        ("lookup", ([["s"], [[0, "x"]]], None)),  # a text is no digest
        ("lookup", ([["s"]], None)),
        ("lookup", (wire.pack_keys(KEYS), 7)),
        ("lease", (wire.pack_keys(KEYS), "w", "5", 1)),
        ("renew", ([1], 5.0)),
        ("announce", ([["w0", "1", "n", {}], b"", 1],)),
        ("announce", ([["w0", 1, "n", {"tcp": "text"}], b"", 1],)),
        ("announce", ([["w0", 1, "n"], b"", 1],)),
        ("announce", (wire.OWNER.pack(ME),)),  # without key and clock
        ("announce", ([wire.OWNER.pack(ME), bytes(31), 1],)),  # a key too short
        ("announce", ([wire.OWNER.pack(ME), "k" * 32, 1],)),
        ("announce", ([wire.OWNER.pack(ME), bytes(32), -1],)),
        ("announce", ([wire.OWNER.pack(ME), bytes(32), 1 << 62],)),
        ("announce", ([wire.OWNER.pack(ME), bytes(32), float("nan")],)),
        ("publish", (wire.pack_announcing(ME, 1), [wire.pack_keys(KEYS), []])),
        ("page", (wire.FILTER.pack(Filter())[:-1], None, 10)),
        ("page", (["", "", 0.0, "exakt", False, False], None, 10)),
        ("page", (wire.FILTER.pack(Filter()), ["s", "x", "", ""], 10)),
        ("set_view", ([1, ["a", 2]],)),
    ],
)
def test_a_shard_refuses_what_is_no_such_call(method: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(wire.MalformedMessage):
        serve(method, *arguments)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", pickle.dumps([0, []]), msgpack.packb([0]), msgpack.packb({"a": 1}), b"\x91" * 5000],
    ids=["empty", "reserved", "pickle", "short", "map", "deep"],
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(wire.MalformedMessage):
        wire.unpack_request(data)
    with pytest.raises(wire.MalformedMessage):
        wire.unpack_reply(data)


def test_a_message_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 100)
    with pytest.raises(wire.MalformedMessage, match="exceeds 100"):
        wire.unpack(wire.pack(bytes(101)))
    with pytest.raises(wire.MalformedMessage):
        wire.unpack_located([[wire.OWNER.pack(ME)], [[9, 0, wire.pack_segment(segment(1))]]], KEYS)


def test_broken_blocks_are_noticed_by_the_reader() -> None:
    data = wire.pack_segment(segment(1))
    data[-1] = wire.pack([[1, "x", 2, 3]])
    wire.unpack_segment(KEYS[0], list(data), packed=True)  # a shard does not look into them
    with pytest.raises(wire.MalformedMessage):
        wire.unpack_segment(KEYS[0], list(data), packed=False)
