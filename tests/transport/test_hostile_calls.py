"""Hostile calls at a directory shard, and hostile replies at its callers: typed errors; the shard lives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
import ray
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.transport.directory_rigs import ME, segment
from tests.transport.hostile import VALUES
from transport.directory import wire, wire_open
from transport.directory.catalogue import Filter
from transport.directory.opening import Opened
from transport.directory.shard import Shard
from transport.settings import DirectorySettings
from transport.types import Incarnation, SegmentKey, WorkerId

OPENED = Opened(
    key=SegmentKey("s", b"open"),
    start=7,
    layout="l",
    producer="p",
    block_tokens=2,
    blocks=segment(1).blocks,
    token_ids=(3, 4),
)
CALLS: dict[str, list[Any]] = {
    "announce": [wire.pack_announcing(ME, 5)],
    "publish": [wire.pack_announcing(ME, 5), wire.pack_segments([segment(1), segment(2)])],
    "lookup": [wire.pack_keys([segment(1).key]), "w1"],
    "lease": [wire.pack_keys([segment(1).key]), "w1", 5.0, 1],
    "renew": [["a:1:1"], 5.0],
    "release": [["a:1:1"], True],
    "candidates": [wire.OWNER.pack(ME), 100],
    "evict_copies": [wire.OWNER.pack(ME), wire.pack_copies([(segment(1).key, "")])],
    "retire": [wire.OWNER.pack(ME), wire.pack_copies([(segment(1).key, "")])],
    "retract": [wire.OWNER.pack(ME), wire.pack_segments([segment(1)])],
    "drop_owner": ["w0", 1],
    "advance": [wire.pack_announcing(ME, 5), wire_open.pack_opened([OPENED])],
    "watch": wire_open.pack_watch(OPENED.key, 1, 0, "w1", 5.0, 0.0),
    "unwatch": [wire.pack_keys([OPENED.key]), "w1"],
    "page": [wire.FILTER.pack(Filter()), None, 10],
    "wish": ["w0", wire.pack_copies([(segment(1).key, "")])],
    "pin": [wire.FILTER.pack(Filter()), "p", 5.0, None, 10],
    "unpin": [wire.FILTER.pack(Filter()), "p", None, 10],
    "pin_copies": ["w0", wire.pack_copies([(segment(1).key, "")]), "p", 5.0],
    "stats": [],
    "settings": [],
    "view": [],
    "set_view": [[1, ["a"]]],
}


@pytest.mark.parametrize("method", list(CALLS))
def test_the_calls_that_are_spoilt_are_right_ones(method: str) -> None:
    """Else the shard would refuse them for that."""
    shard = Shard("a", DirectorySettings())
    reply = wire.unpack_reply(shard.serve(method, wire.pack_request(0, CALLS[method])))
    assert reply.status == wire.OK
    assert set(CALLS) == set(shard._methods)


def test_a_shard_takes_the_same_calls_as_an_actor() -> None:
    """Ray adds a keyword to the methods of an actor's class, which is no argument of a call."""
    actor: Any = ray.remote(Shard)
    changed = actor.__ray_metadata__.modified_class
    assert changed is not Shard
    for method, arguments in CALLS.items():
        shard = changed("a", DirectorySettings())
        assert wire.unpack_reply(shard.serve(method, wire.pack_request(0, arguments))).status == wire.OK


def _spoilt(draw: Callable[[st.SearchStrategy[Any]], Any], value: Any) -> Any:
    """`value` with one thing in it replaced, left out or doubled, at any depth."""
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        how = draw(st.integers(0, 5))
        if how == 0:
            return [*value[:at], *value[at + 1 :]]
        if how == 1:
            return [*value[: at + 1], *value[at:]]
        return [*value[:at], _spoilt(draw, value[at]), *value[at + 1 :]]
    return draw(VALUES)


@pytest.mark.parametrize("method", list(CALLS))
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_call_is_answered_or_refused_and_the_shard_lives(method: str, data: st.DataObject) -> None:
    """A right call with something spoilt in it, to a shard that holds something."""
    shard = Shard("a", DirectorySettings())
    for held in ("publish", "advance"):
        shard.serve(held, wire.pack_request(0, CALLS[held]))
    try:
        wire.unpack_reply(shard.serve(method, wire.pack(_spoilt(data.draw, [0, CALLS[method]]))))
    except wire.MalformedMessage:
        event("refused")
    wire.unpack_reply(shard.serve("stats", wire.pack_request(9, [])))
    other = replace(ME, worker=WorkerId("w9"), incarnation=Incarnation(2**62))
    told = shard.serve("announce", wire.pack_request(9, [wire.pack_announcing(other, 5)]))
    assert wire.unpack_reply(told).status == wire.OK


@given(st.binary(max_size=200) | VALUES.map(lambda v: bytes(msgpack.packb(v) or b"")))
def test_any_reply_of_a_shard_is_read_or_refused(data: bytes) -> None:
    """What a reader makes of what a shard sends."""
    keys = [segment(i).key for i in range(3)]
    readers: list[Callable[[Any], Any]] = [
        lambda r: wire.unpack_leases(r, keys, WorkerId("w")),
        lambda r: wire.unpack_located(r, keys),
        wire.unpack_announced,
        wire.unpack_candidates,
        wire.unpack_page,
        wire.unpack_view,
        wire.unpack_announcing,
        lambda r: wire.unpack_segments(r, packed=False),
        wire.SETTINGS.unpack,
        lambda r: wire_open.unpack_advanced(r, 1),
        lambda r: wire_open.unpack_news(r, keys[0], WorkerId("w")),
        wire_open.unpack_opened,
    ]
    try:
        result = wire.unpack(data)
    except wire.MalformedMessage:
        return
    for read in readers:
        try:
            read(result)
        except wire.MalformedMessage:
            continue
    try:
        wire.unpack_reply(data)
    except wire.MalformedMessage:
        return


@pytest.mark.parametrize("seconds", [math.nan, -1.0, -math.inf])
def test_a_lease_cannot_be_made_to_last_for_ever(seconds: float) -> None:
    """A time to live that is no number never compares as over, and would hold up every expiry behind it."""
    now = [0.0]
    shard = Shard("a", DirectorySettings(max_lease_s=60.0), clock=lambda: now[0])
    shard.serve("publish", wire.pack_request(0, CALLS["publish"]))
    keys = CALLS["lease"][0]
    for method, arguments in (
        ("lease", [keys, "w1", seconds, 1]),
        ("renew", [["a:1:1"], seconds]),
        ("watch", wire_open.pack_watch(OPENED.key, 1, 0, "w1", seconds, 0.0)),
        ("watch", wire_open.pack_watch(OPENED.key, 1, 0, "w1", 5.0, seconds)),
        ("pin", [wire.FILTER.pack(Filter()), "p", seconds, None, 10]),
        ("pin_copies", ["w0", wire.pack_copies([(segment(1).key, "")]), "p", seconds]),
    ):
        with pytest.raises(wire.MalformedMessage, match="seconds"):
            shard.serve(method, wire.pack_request(0, arguments))
    shard.serve("lease", wire.pack_request(0, [keys, "w1", math.inf, 1]))
    assert wire.unpack_reply(shard.serve("stats", wire.pack_request(0, []))).result["leases"] == 1
    now[0] = 9.9  # before the owner is dropped for its silence
    shard.serve("announce", wire.pack_request(0, CALLS["announce"]))
    for at in range(10, 70, 5):
        now[0] = float(at)
        shard.serve("announce", wire.pack_request(0, CALLS["announce"]))
    assert wire.unpack_reply(shard.serve("stats", wire.pack_request(0, []))).result["leases"] == 0
