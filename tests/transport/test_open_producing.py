"""A producer of open segments and its readers over several shards: deaths, losses, moves. No Ray."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.transport.directory_rigs import ME, SETTINGS, W1, Rig, segment
from transport.directory.client import DirectoryClient
from transport.directory.opening import News, Opened
from transport.errors import DirectoryUnavailable, WorkerLost
from transport.types import BlockId, BlockRef, Incarnation, SegmentKey

KEY = SegmentKey("s", b"open")
SIZE = 2


def update(first: int, count: int, **more: Any) -> Opened:
    options = {"key": KEY, "start": 0, "layout": "l", "producer": "p", "block_tokens": SIZE, **more}
    blocks = tuple(BlockRef(BlockId(i), 1, 10, (0,)) for i in range(first, first + count))
    return Opened(
        first=first, blocks=blocks, token_ids=tuple(range(SIZE * first, SIZE * (first + count))), **options
    )


def watch(client: DirectoryClient, after: int) -> News | None:
    return client.watch(KEY, life=int(ME.incarnation), after=after, holder=W1, ttl_s=5.0, wait_s=0.0)


def blocks(news: News | None) -> list[int]:
    return [] if news is None or news.lease is None else [b.block for b in news.lease.located.segment.blocks]


def refresh(rig: Rig) -> None:
    """What every heartbeat does."""
    rig.client._own.opens.refresh(ME)


def test_a_shard_that_does_not_answer_is_told_later() -> None:
    rig = Rig()
    (first,) = rig.client.fleet.replicas(KEY)
    assert rig.client.advance(ME, update(0, 2)) == ""
    rig.calls.dead.add(first)
    assert rig.client.advance(ME, update(2, 1)) == "unreachable"
    with pytest.raises(DirectoryUnavailable):
        watch(rig.reader(), 0)
    rig.calls.dead.clear()
    rig.client.fleet._mark_up(first)
    assert blocks(watch(rig.reader(), 0)) == [0, 1]
    refresh(rig)
    assert blocks(watch(rig.reader(), 0)) == [0, 1, 2]


def test_a_call_that_acts_without_an_answer_is_not_taken_twice() -> None:
    rig = Rig()
    (first,) = rig.client.fleet.replicas(KEY)
    rig.calls.lossy.add(first)
    assert rig.client.advance(ME, update(0, 2)) == "unreachable"
    rig.calls.lossy.clear()
    rig.client.fleet._mark_up(first)
    assert rig.client.advance(ME, update(2, 1)) == ""
    assert blocks(watch(rig.reader(), 0)) == [0, 1, 2]


def test_a_restarted_shard_hears_everything_and_a_long_one_in_parts() -> None:
    rig = Rig()
    (first,) = rig.client.fleet.replicas(KEY)
    for at in range(0, 1200, 300):
        assert rig.client.advance(ME, update(at, 300)) == ""
    rig.restart(first)
    sent = len(rig.calls.sent)
    refresh(rig)
    assert len(rig.calls.sent) - sent <= 5
    assert rig.client.stats()["open_blocks"] == 1200
    rig.restart(first)
    done = update(1200, 0, state="closed", final=segment(1).key, num_tokens=2400)
    assert rig.client.advance(ME, done) == "", "the end is told behind all that was missed"
    news = watch(rig.reader(), 1200)
    assert news is not None
    assert (news.state, news.final) == ("closed", segment(1).key)
    refresh(rig)
    assert len(rig.client._own.opens) == 0


def test_with_two_replicas_readers_hear_from_the_other_one() -> None:
    rig = Rig(replace(SETTINGS, replicas=2))
    first, second = rig.client.fleet.replicas(KEY)
    rig.client.advance(ME, update(0, 1))
    rig.calls.killed.add(first)
    assert rig.client.advance(ME, update(1, 1)) == ""
    assert blocks(watch(rig.reader(), 0)) == [0, 1]
    rig.calls.killed.add(second)
    with pytest.raises(DirectoryUnavailable):
        watch(rig.reader(), 0)


def test_keys_that_move_take_their_open_answers_along() -> None:
    rig = Rig()
    keys = [SegmentKey("s", bytes([n])) for n in range(40)]
    before = {key: rig.client.fleet.replicas(key) for key in keys}
    for key in keys:
        rig.client.advance(ME, update(0, 1, key=key))
    rig.resize("a", "b", "c", "d", "e", drain_s=0.0)
    for key in keys:
        assert rig.client.advance(ME, update(1, 1, key=key)) == ""
    moved = [key for key in keys if rig.client.fleet.replicas(key) != before[key]]
    assert moved
    reader = rig.reader()
    for key in keys:
        news = reader.watch(key, life=0, after=0, holder=W1, ttl_s=5.0, wait_s=0.0)
        assert blocks(news) == [0, 1], "with what the shard that had it knew"


def test_a_fenced_producer_is_told() -> None:
    rig = Rig()
    rig.client.advance(ME, update(0, 1))
    rig.reader().announce(replace(ME, incarnation=Incarnation(2)))
    with pytest.raises(WorkerLost, match="replaced"):
        rig.client.advance(ME, update(1, 1))


def test_a_gap_of_the_producer_s_own_is_its_mistake() -> None:
    rig = Rig()
    rig.client.advance(ME, update(0, 1))
    with pytest.raises(ValueError, match="block 3"):
        rig.client.advance(ME, update(3, 1))


def test_what_nobody_has_heard_of_cannot_be_aborted() -> None:
    rig = Rig()
    assert rig.client.advance(ME, update(0, 0, state="aborted", reason="test")) == ""
    assert rig.calls.sent == []
