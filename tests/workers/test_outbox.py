"""An answer's way to its caller: nothing lost, in order, the first token at once, errors at their place."""

from __future__ import annotations

import queue
import threading
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.messages import Reply, Token
from workers.outbox import Outbox

WAIT_S = 10.0


def tokens(count: int) -> list[Token]:
    return [Token(i, str(i)) for i in range(count)]


def reply() -> Reply:
    """Only its type matters here."""
    return cast("Reply", object.__new__(Reply))


@given(count=st.integers(0, 40), interval=st.integers(1, 12))
def test_all_come_in_order_and_the_reply_is_the_last(count: int, interval: int) -> None:
    outbox, last = Outbox(interval, timeout_s=WAIT_S), reply()
    for token in tokens(count):
        outbox.put(token)
    outbox.end(last)
    *sent, end = outbox.take()
    assert end is last
    assert outbox.ended
    assert [t for some in sent for t in cast("tuple[Token, ...]", some)] == tokens(count)
    assert len(sent) <= 1, "what waits goes together"


@pytest.mark.parametrize(("interval", "sizes"), [(1, [1] * 10), (4, [1, 4, 4, 1]), (8, [1, 8, 1])])
def test_the_first_goes_at_once_and_the_others_in_intervals(interval: int, sizes: list[int]) -> None:
    """With a sender that takes each token as soon as it is drawn."""
    outbox = Outbox(interval, timeout_s=WAIT_S)
    taken: list[int] = []
    seen = threading.Semaphore(0)
    get = outbox._items.get

    def one_by_one(*args: Any, **kwargs: Any) -> Any:
        seen.release()  # the sender waits for the next one
        return get(*args, **kwargs)

    def send() -> None:
        taken.extend(
            len(cast("tuple[Token, ...]", some)) for some in outbox.take() if isinstance(some, tuple)
        )

    class Items:
        get, put, empty = staticmethod(one_by_one), outbox._items.put, outbox._items.empty

    outbox._items = cast("Any", Items)
    sender = threading.Thread(target=send)
    sender.start()
    for token in tokens(10):
        assert seen.acquire(timeout=WAIT_S)
        outbox.put(token)
    assert seen.acquire(timeout=WAIT_S)
    outbox.end(reply())
    sender.join(WAIT_S)
    assert taken == sizes


def test_an_error_comes_behind_what_was_drawn() -> None:
    outbox = Outbox(8, timeout_s=WAIT_S)
    for token in tokens(3):
        outbox.put(token)
    outbox.end(KeyError("broken"))
    taking = outbox.take()
    assert next(taking) == tuple(tokens(3))
    with pytest.raises(KeyError, match="broken"):
        next(taking)
    assert outbox.ended


def test_silence_has_a_deadline_and_leaves_the_answer_unended() -> None:
    outbox = Outbox(1, timeout_s=0.01)
    outbox.put(Token(1, "a"))
    taking = outbox.take()
    assert next(taking) == (Token(1, "a"),)
    with pytest.raises(queue.Empty):
        next(taking)
    assert not outbox.ended
