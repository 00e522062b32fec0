"""Answers that are followed while they are written, between two workers: real arenas, tables, pulls."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.transport.rigs import wait_for
from tests.workers.stores import Cluster, Desk, key, numbers
from transport.directory.opening import Opened
from transport.errors import ArenaFull
from transport.types import BlockRef, Owner, SegmentKey
from workers.fetching import Acquired
from workers.layout import BlockViews
from workers.opening import OpenAnswer

OPEN = key("open")
SIZE = 16
WITHIN_S = 600.0


class Writing:
    """An answer that one desk writes, a number in every place of its block's KV."""

    def __init__(self, desk: Desk, opened: SegmentKey = OPEN) -> None:
        self.desk = desk
        self.tokens: list[int] = []
        self.opening = desk.store.opening
        self.answer = self.opening.begin(OpenAnswer(opened, 100, "t", self.tokens, self.copy))

    def copy(self, first: int, count: int, blocks: Any) -> None:
        views: BlockViews
        for n, views in enumerate(blocks):
            value = float(1 + first // SIZE + n)
            for part in (views.kv.body, views.checkpoint, views.mass):
                part.fill_(value)

    def write(self, blocks: int) -> None:
        """Full blocks more, and one token, which has no KV yet."""
        for _ in range(blocks * SIZE + (not self.tokens)):
            self.tokens.append(len(self.tokens))
            self.opening.grew(self.answer, len(self.tokens))

    def close(self, name: str = "final", tail: int = 3) -> Any:
        """Publish it whole, with `tail` tokens in a last block of their own."""
        full = (len(self.tokens) - 1) // SIZE
        first = self.opening.stop(self.answer, self.tokens)
        segment = self.desk.store.publish(
            key(name),
            lambda views: self.copy(len(first) * SIZE, 0, views),
            start=100,
            num_tokens=full * SIZE + tail,
            producer="t",
            first=first,
        )
        self.opening.closed(self.answer, segment)
        return segment


@pytest.fixture
def pair() -> Iterator[tuple[Cluster, Desk, Desk]]:
    cluster = Cluster()
    a, b = cluster.desk("a", blocks=40), cluster.desk("b", blocks=40)
    yield cluster, a, b
    for desk in (a, b):
        wait_for(lambda d=desk: d.stats()["open_blocks"] == 0, "what was open is given back", 10)
        wait_for(lambda d=desk: d.stats()["following"]["live"] == 0, "and nothing is followed", 10)
        wait_for(lambda d=desk: d.stats()["opening"]["live"] == 0, "nor written", 10)
    cluster.check()
    cluster.close()


def ahead(desk: Desk) -> int:
    return desk.stats()["following"]["blocks"]


def follow(desk: Desk, *, request: str = "r", opened: SegmentKey = OPEN) -> None:
    desk.store.following.follow(request, [opened], WITHIN_S)


def get(desk: Desk, tokens: list[int], name: str = "final") -> Acquired:
    return desk.store.acquire({key(name): 1}, token_ids={key(name): tokens})


def values(got: Acquired, name: str = "final") -> list[float]:
    """The number in each block."""
    assert numbers(got, name)
    return [float(b.kv.body.flatten()[0]) for b in got.pulled[key(name)].blocks]


def finish(desk: Desk, got: Acquired, request: str = "r") -> None:
    desk.store.release(got)
    desk.store.following.leave(request)


def test_only_what_was_not_pulled_ahead_is_pulled_at_the_end(pair: tuple[Cluster, Desk, Desk]) -> None:
    _, a, b = pair
    follow(b)  # before it is opened
    answer = Writing(a)
    answer.write(2)
    wait_for(lambda: ahead(b) == 2, "two full blocks come", 10)
    answer.write(1)
    wait_for(lambda: ahead(b) == 3, "and one more", 10)
    b.store.following._by_key[OPEN].wanted = True  # as if the request had come with the end
    segment = answer.close()
    assert len(segment.blocks) == 4
    got = get(b, answer.tokens)
    (transfer,) = [t for _, t in got.transfers]
    assert (transfer.blocks, transfer.nbytes) == (1, a.arena.block_nbytes)
    assert (got.ahead_blocks, got.ahead_bytes) == (3, 3 * b.arena.block_nbytes)
    assert values(got) == [1.0, 2.0, 3.0, 4.0]
    finish(b, got)
    stats = b.stats()["following"]
    assert (stats["pulled_blocks"], stats["used_blocks"], stats["wasted_blocks"]) == (3, 3, 0)


def test_the_end_is_pulled_as_well_where_there_is_time(pair: tuple[Cluster, Desk, Desk]) -> None:
    """A reader that waits for another answer."""
    _, a, b = pair
    follow(b)
    answer = Writing(a)
    answer.write(2)
    answer.close()
    wait_for(lambda: ahead(b) == 3, "the last, partial block comes too", 10)
    got = get(b, answer.tokens)
    assert [(t.backend, t.nbytes) for _, t in got.transfers] == [("ahead", 0)]
    assert values(got) == [1.0, 2.0, 3.0]
    finish(b, got)


def test_two_requests_of_one_worker_share_what_was_pulled(pair: tuple[Cluster, Desk, Desk]) -> None:
    _, a, b = pair
    follow(b, request="r1")
    follow(b, request="r2")
    answer = Writing(a)
    answer.write(2)
    answer.close()
    wait_for(lambda: ahead(b) == 3, "it is pulled once", 10)
    first, second = get(b, answer.tokens), get(b, answer.tokens)
    finish(b, first, "r1")
    assert values(second) == [1.0, 2.0, 3.0], "the other one still reads"
    finish(b, second, "r2")
    assert b.stats()["following"]["pulled_blocks"] == 3


def test_other_tokens_are_not_used(pair: tuple[Cluster, Desk, Desk]) -> None:
    """The key says which tokens they are; this is what keeps a wrong key from mattering."""
    _, a, b = pair
    follow(b)
    answer = Writing(a)
    answer.write(2)
    wait_for(lambda: ahead(b) == 2, "it comes, with its tokens", 10)
    answer.close()
    wait_for(lambda: ahead(b) == 3, "to the end", 10)
    got = get(b, [7, *answer.tokens[1:]])
    assert got.ahead_blocks == 0
    assert [t.blocks for _, t in got.transfers] == [3]
    finish(b, got)
    assert b.stats()["following"]["wasted_blocks"] == 3


def test_an_answer_that_is_given_up_is_thrown_away(pair: tuple[Cluster, Desk, Desk]) -> None:
    cluster, a, b = pair
    follow(b)
    answer = Writing(a)
    answer.write(3)
    wait_for(lambda: ahead(b) == 3, "it comes", 10)
    answer.opening.abort(answer.answer, "ended")
    answer.opening.abort(answer.answer, "ended")
    assert a.arena.stats().used == 0, "its blocks are free at once"
    wait_for(lambda: ahead(b) == 0, "and so are those of who followed it", 10)
    wait_for(lambda: a.stats()["opening"]["ended"] == {"ended": 1}, "it is counted once", 10)
    assert b.stats()["following"]["ended"]["aborted"] == 1
    assert cluster.directory.stats()["open_segments"] == 0
    b.store.following.leave("r")


def test_an_answer_that_ends_elsewhere_than_it_went_keeps_what_fits(pair: tuple[Cluster, Desk, Desk]) -> None:
    """A stop text, or control tokens: the answer is shorter than what was decoded."""
    _, a, b = pair
    follow(b)
    answer = Writing(a)
    answer.write(3)
    wait_for(lambda: ahead(b) == 3, "it comes", 10)
    answer.tokens[SIZE + 5 :] = [99]
    segment = answer.close(tail=6)
    assert len(segment.blocks) == 2
    got = get(b, answer.tokens)
    assert got.ahead_blocks == 0, "more came than there is: nothing of it is trusted"
    assert values(got) == [1.0, 2.0]
    finish(b, got)


def test_a_full_arena_ends_the_stream_and_not_the_answer() -> None:
    cluster = Cluster()
    a, b = cluster.desk("a", blocks=3), cluster.desk("b", blocks=40)
    follow(b)
    answer = Writing(a)
    answer.write(4)
    wait_for(lambda: a.stats()["opening"]["live"] == 0, "it fails", 10)
    assert answer.answer.failed == "arena_full"
    wait_for(lambda: a.arena.stats().used == 0, "and frees what it had", 10)
    first = answer.opening.stop(answer.answer, answer.tokens)
    assert first == ()
    with pytest.raises(ArenaFull):
        a.put("final", blocks=5)
    answer.opening.abort(answer.answer, "ended")
    assert a.stats()["opening"]["ended"] == {"arena_full": 1}
    wait_for(lambda: ahead(b) == 0, "who followed it throws it away", 10)
    b.store.following.leave("r")
    cluster.check()
    cluster.close()


def test_a_failed_publish_frees_the_blocks_it_was_given(pair: tuple[Cluster, Desk, Desk]) -> None:
    _, a, b = pair
    follow(b)
    answer = Writing(a)
    answer.write(2)
    wait_for(lambda: ahead(b) == 2, "it comes", 10)
    first = answer.opening.stop(answer.answer, answer.tokens)

    def divide(_: Sequence[BlockViews]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        a.store.publish(key("x"), divide, start=0, num_tokens=40, producer="t", first=first)
    assert a.arena.stats().used == 0
    answer.opening.abort(answer.answer, "ended")
    wait_for(lambda: ahead(b) == 0, "and readers hear of it", 10)
    b.store.following.leave("r")


def test_what_is_held_already_wins(pair: tuple[Cluster, Desk, Desk]) -> None:
    """The same answer again: readers get what there was, whole."""
    _, a, b = pair
    held = a.put("final", blocks=3, value=5.0)
    follow(b)
    answer = Writing(a)
    answer.write(2)
    wait_for(lambda: ahead(b) == 2, "it comes", 10)
    assert answer.close().blocks == held.blocks
    got = get(b, answer.tokens)
    assert got.ahead_blocks == 0
    assert values(got) == [5.0, 5.0, 5.0]
    finish(b, got)


def test_a_block_that_was_spoilt_on_the_way_is_pulled_with_the_rest(pair: tuple[Cluster, Desk, Desk]) -> None:
    _, a, b = pair
    follow(b)
    answer = Writing(a)
    sealed = a.arena.seal

    def spoilt(block: Any) -> BlockRef:
        ref = sealed(block)
        a.arena.payload(block)[0] += 1  # after its checksum was taken
        return ref

    a.arena.seal = spoilt  # type: ignore[method-assign]
    answer.write(1)
    wait_for(lambda: b.stats()["following"]["ended"].get("corrupt") == 1, "it is refused", 10)
    a.arena.seal = sealed  # type: ignore[method-assign]
    assert ahead(b) == 0
    answer.opening.abort(answer.answer, "ended")
    b.store.following.leave("r")


def test_a_request_that_is_over_is_not_followed_for(pair: tuple[Cluster, Desk, Desk]) -> None:
    """A draft that comes late."""
    _, _, b = pair
    b.store.following.leave("r")
    follow(b)
    assert b.stats()["following"]["live"] == 0


def test_a_worker_does_not_pull_from_itself(pair: tuple[Cluster, Desk, Desk]) -> None:
    _, a, _ = pair
    follow(a)
    answer = Writing(a)
    answer.write(1)
    wait_for(lambda: a.stats()["following"]["ended"].get("local") == 1, "it is here", 10)
    answer.close()
    got = get(a, answer.tokens)
    assert [t.backend for _, t in got.transfers] == ["local"]
    finish(a, got)


def test_a_slow_directory_does_not_slow_the_writer(pair: tuple[Cluster, Desk, Desk]) -> None:
    """Every token is only noted; blocks wait for the directory, tokens do not."""
    cluster, a, b = pair
    let_go, real = threading.Event(), cluster.directory.advance

    def slow(owner: Owner, update: Opened) -> str:
        assert let_go.wait(30)
        return real(owner, update)

    cluster.directory.advance = slow  # type: ignore[method-assign]
    answer = Writing(a)
    answer.write(5)
    assert len(answer.tokens) == 5 * SIZE + 1, "written while the first call still waits"
    assert a.stats()["opening"]["blocks"] <= 1
    follow(b)
    let_go.set()
    wait_for(lambda: ahead(b) == 5, "then all of them come", 10)
    answer.opening.abort(answer.answer, "ended")
    wait_for(lambda: ahead(b) == 0, "and go", 10)
    b.store.following.leave("r")


def test_pulling_ahead_leaves_room(pair: tuple[Cluster, Desk, Desk]) -> None:
    """At most a quarter of the arena."""
    _, a, b = pair
    follow(b)
    answer = Writing(a)
    for n in range(1, 13):
        answer.write(1)
        if n <= 10:
            wait_for(lambda n=n: ahead(b) == n, "a block comes", 10)
    wait_for(lambda: b.stats()["following"]["ended"].get("room") == 1, "the eleventh does not", 10)
    assert ahead(b) == 10
    answer.close()
    got = get(b, answer.tokens)
    assert got.ahead_blocks == 10
    assert values(got) == [float(n) for n in range(1, 14)]
    finish(b, got)
