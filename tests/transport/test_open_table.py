"""Open segments at one table: what readers hear, gaps, restarts, limits, and how segments end. No I/O."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.directory_rigs import ME, W0, W1, segment
from transport.directory.catalogue import Filter
from transport.directory.opening import BLOCKS_PER_NEWS, News, Opened, OpenTable
from transport.types import BlockId, BlockRef, Incarnation, NodeId, Owner, SegmentKey, WorkerId

KEY = SegmentKey("s", b"open")
FINAL = segment(9).key
SIZE = 2
TTL_S = 5.0


def update(first: int, count: int, **more: Any) -> Opened:
    """Blocks [first, first + count) of one answer."""
    options = {"key": KEY, "start": 10, "layout": "l", "producer": "p", "block_tokens": SIZE, **more}
    blocks = tuple(BlockRef(BlockId(100 + i), 1, 10, (i,)) for i in range(first, first + count))
    ids = tuple(range(first * SIZE, (first + count) * SIZE))
    return Opened(first=first, blocks=blocks, token_ids=ids, **options)


def make(**options: Any) -> OpenTable:
    return OpenTable(**{"owner_timeout_s": 10.0, "lease_prefix": "t:1:", **options})


def advance(table: OpenTable, made: Opened, now: float = 0.0, owner: Owner = ME) -> tuple[str, int]:
    (told,) = table.advance(owner, [made], now)
    assert told.fenced_by is None
    return told.verdict, told.expects


def watch(
    table: OpenTable, after: int, now: float = 0.0, *, life: int = 1, key: SegmentKey = KEY
) -> News | None:
    return table.watch(key, life=life, after=after, holder=W1, now=now, ttl_s=TTL_S)


def blocks_of(news: News | None) -> list[int]:
    assert news is not None
    assert news.lease is not None
    return [b.block for b in news.lease.located.segment.blocks]


def listed(table: OpenTable, now: float = 0.0) -> list[tuple[int, int, bool]]:
    return [(x.num_tokens, x.nbytes, x.complete) for x in table.page(Filter(), now, limit=9).rows]


def test_a_reader_hears_of_blocks_in_order_and_of_the_end() -> None:
    table = make()
    assert watch(table, 0) is None, "nobody has opened it"
    assert advance(table, update(0, 0)) == ("taken", 0)
    assert watch(table, 0) is None, "it has no blocks yet"
    assert table.take_changed() == ()
    assert advance(table, update(0, 2)) == ("taken", 2)
    assert table.take_changed() == (KEY,)
    news = watch(table, 0)
    assert blocks_of(news) == [100, 101]
    assert news is not None
    assert (news.first, news.token_ids, news.life) == (0, (0, 1, 2, 3), ME.incarnation)
    part = news.lease.located.segment if news.lease else None
    assert part is not None
    assert (part.start, part.num_tokens, part.complete, part.layout) == (10, 4, False, "l")
    assert watch(table, 2) is None
    advance(table, update(2, 1))
    news = watch(table, 2)
    assert blocks_of(news) == [102]
    assert news is not None
    assert news.lease is not None
    assert (news.first, news.lease.located.segment.start) == (2, 14)
    advance(table, update(3, 0, state="closed", final=FINAL, num_tokens=7))
    news = watch(table, 1)
    assert news is not None
    assert (news.state, news.final, news.num_tokens, news.lease) == ("closed", FINAL, 7, None)


def test_it_is_listed_and_nobody_can_have_it_as_a_whole() -> None:
    table = make()
    advance(table, update(0, 3))
    assert listed(table) == [(6, 30, False)]
    assert table.stats(0.0)["bytes"] == 30
    assert table.lookup([KEY], 0.0) == {}
    assert table.lease([KEY], 0.0, holder=W1, ttl_s=TTL_S) == {}
    assert table.candidates(ME, 1000, 0.0) == []
    assert table.evict_copies(ME, [(KEY, "")], 0.0) == ()
    advance(table, update(3, 0, state="aborted", reason="enough"))
    assert listed(table) == []
    stats = table.stats(0.0)
    assert (stats["bytes"], stats["open_segments"], stats["aborted_total"]) == (0, 0, 1)


def test_what_is_missing_is_asked_for_and_what_is_known_is_not_taken_twice() -> None:
    table = make()
    assert advance(table, update(2, 1)) == ("gap", 0), "a shard that has restarted knows nothing"
    assert advance(table, update(0, 2)) == ("taken", 2)
    assert advance(table, update(3, 1)) == ("gap", 2)
    assert watch(table, 2) is None
    assert advance(table, update(1, 3)) == ("taken", 4)
    assert blocks_of(watch(table, 0)) == [100, 101, 102, 103]
    assert advance(table, update(5, 0, state="closed", final=FINAL)) == ("gap", 4), (
        "nor can it end with a gap"
    )
    assert table.stats(0.0)["open_gaps_total"] == 3


def test_a_newer_life_of_the_producer_begins_again() -> None:
    table = make()
    advance(table, update(0, 3))
    newer = replace(ME, incarnation=Incarnation(2))
    table.announce(newer, 1.0)
    news = watch(table, 3, 1.0)
    assert news is not None
    assert (news.state, news.reason) == ("aborted", "its producer is gone")
    assert advance(table, update(0, 1), 1.0, newer) == ("taken", 1)
    news = watch(table, 3, 1.0)
    assert blocks_of(news) == [100], "whoever has seen blocks of the older life gets all of the newer one"
    assert news is not None
    assert (news.life, news.first) == (2, 0)
    (told,) = table.advance(ME, [update(3, 1)], 1.0)
    assert told.fenced_by is not None


def test_an_owner_that_falls_silent_or_is_dropped_takes_its_answers_along() -> None:
    for drop in (True, False):
        table = make()
        advance(table, update(0, 1))
        table.take_changed()
        if drop:
            table.drop_owner(W0, 1, 1.0)
        else:
            table.tick(11.0)
        assert table.take_changed() == (KEY,), "readers are woken"
        news = watch(table, 1, 11.0)
        assert news is not None
        assert news.state == "aborted"


def test_an_answer_that_its_owner_no_longer_tells_of_is_aborted() -> None:
    """The shard has missed the end, or does not answer for the key any more."""
    table = make()
    advance(table, update(0, 1))
    other = replace(update(0, 1), key=SegmentKey("s", b"other"))
    advance(table, other)
    for now in (4.0, 8.0, 12.0):
        table.announce(ME, now)
        advance(table, replace(other, first=1, blocks=(), token_ids=()), now)
    news = watch(table, 1, 12.0)
    assert news is not None
    assert (news.state, news.reason) == ("aborted", "its producer is silent")
    assert watch(table, 1, 12.0, key=other.key) is None, "still open"


def test_limits() -> None:
    table = make(max_open=2, max_open_blocks=3)
    for name in (b"a", b"b"):
        assert advance(table, replace(update(0, 1), key=SegmentKey("s", name)))[0] == "taken"
    assert advance(table, update(0, 1)) == ("too_many", 0)
    advance(table, replace(update(1, 0, state="aborted"), key=SegmentKey("s", b"a")))
    assert advance(table, update(0, 3)) == ("taken", 3)
    assert advance(table, update(3, 1)) == ("too_long", 3)
    stranger = Owner(WorkerId("w9"), Incarnation(5), NodeId("n"))
    assert advance(table, update(0, 1), owner=stranger) == ("taken_by_other", 0)
    assert advance(table, replace(update(3, 0), block_tokens=3)) == ("malformed", 3)
    assert table.stats(0.0)["open_refused_total"] == 4


def test_news_is_bounded_and_goes_on_where_it_stopped() -> None:
    table = make()
    advance(table, update(0, 2 * BLOCKS_PER_NEWS + 1))
    seen: list[int] = []
    while (news := watch(table, len(seen))) is not None:
        assert len(blocks_of(news)) <= BLOCKS_PER_NEWS
        seen += blocks_of(news)
    assert seen == [100 + i for i in range(2 * BLOCKS_PER_NEWS + 1)]


def test_ends_are_forgotten() -> None:
    table = make(ended_s=5.0)
    advance(table, update(0, 1, state="closed", final=FINAL))
    assert watch(table, 0, 4.0) is not None
    table.announce(ME, 4.0)
    assert watch(table, 0, 6.0) is None
    assert table._open == {}
    assert not table._ended
    assert not table._live


def _tell(table: OpenTable, first: int, told: int, now: float) -> None:
    """Blocks [first, told), and what was missing before them."""
    verdict, expects = advance(table, update(first, told - first), now)
    if verdict == "gap":
        assert advance(table, update(expects, told - expects), now) == ("taken", told)


def _hear(table: OpenTable, seen: list[int], now: float) -> bool:
    """Add what a reader that has seen that much hears."""
    news = watch(table, len(seen), now)
    seen += [] if news is None else blocks_of(news)
    return news is not None


STEPS = st.tuples(st.sampled_from(["grow", "lose", "again", "restart", "watch"]), st.integers(0, 5))


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(STEPS, min_size=5, max_size=40))
def test_whatever_is_lost_doubled_or_late_readers_hear_every_block_once(steps: list[tuple[str, int]]) -> None:
    """A producer that tells what is expected, to a table that forgets everything now and then."""
    table, told, now = make(), 0, 0.0
    seen: list[int] = []
    for step, count in steps:
        now += 0.1
        if step == "grow":
            told += count
            _tell(table, told - count, told, now)
        elif step == "lose":
            told += count  # the message never came
        elif step == "again":
            _tell(table, max(0, told - count), told, now)
        elif step == "restart":
            table = make()
        else:
            _hear(table, seen, now)
    _tell(table, told, told, now)
    while _hear(table, seen, now):
        pass
    assert seen == [100 + i for i in range(told)]


@pytest.mark.parametrize("state", ["closed", "aborted"])
def test_nothing_can_be_added_to_what_has_ended(state: Any) -> None:
    table = make()
    advance(table, update(0, 1))
    advance(table, update(1, 0, state=state, final=FINAL if state == "closed" else None))
    assert advance(table, update(1, 1)) == ("taken", 1)
    news = watch(table, 0)
    assert news is not None
    assert news.state == state
    assert listed(table) == []
