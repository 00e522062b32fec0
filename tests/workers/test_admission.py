"""Admission: all that come together get in together or not at all, nobody waits for ever, nothing is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.workers import tiny
from transport.errors import CacheFull, CacheTooSmall, Cancelled
from workers.admission import Admission, Arrival
from workers.kv_cache import CachePool
from workers.messages import Request
from workers.methods import parse_reuse
from workers.methods.base import Span
from workers.segment import Prompt
from workers.turn import Turn

BLOCK = 16
SLOTS = 4
NAIVE = parse_reuse("naive")


@pytest.fixture
def pool() -> Iterator[CachePool]:
    """Ten blocks; all of them are free again at the end."""
    made = CachePool(tiny.Rig(tiny.build("llama")).layout, 10 * BLOCK)
    assert made.num_blocks == 10
    yield made
    assert made.free_blocks == 10


def admission(pool: CachePool, timeout_s: float = 20.0) -> Admission:
    return Admission(pool, max_sequences=SLOTS, timeout_s=timeout_s)


def arrivals(name: str, *blocks: int) -> list[Arrival]:
    """Requests that need so many blocks each."""
    return [
        Arrival(Request(id=f"{name}-{i}", agent="a", prompt="x"), NAIVE, Prompt((1,) * 8, (Span(0, 8),)), n)
        for i, n in enumerate(b * BLOCK - 8 for b in blocks)
    ]


def end(door: Admission, turns: list[Turn]) -> None:
    for turn in turns:
        door.end(turn)


def test_requests_get_in_together_or_not_at_all(pool: CachePool) -> None:
    door = admission(pool, timeout_s=0.3)
    inside = door.admit(arrivals("a", 4))
    assert (inside[0].cache.num_blocks, pool.free_blocks, door.running) == (4, 6, 1)
    with pytest.raises(CacheFull, match="no room"):
        door.admit(arrivals("b", 3, 3, 1))
    assert (pool.free_blocks, door.running) == (6, 1)
    both = door.admit(arrivals("c", 3, 3))
    assert (pool.free_blocks, door.running) == (0, 3)
    with pytest.raises(CacheFull, match="4 requests are running"):
        door.admit(arrivals("d", 1, 1))
    end(door, [*inside, *both])
    end(door, door.admit(arrivals("e", 1, 1, 1, 1)))
    assert door.running == 0


def test_what_can_never_fit_is_refused_at_once(pool: CachePool) -> None:
    door = admission(pool)
    inside = door.admit(arrivals("a", 1))
    for blocks in ((6, 5), (1, 1, 1, 1, 1)):
        with pytest.raises(CacheTooSmall, match="Ask for fewer"):
            door.admit(arrivals("b", *blocks))
    with pytest.raises(CacheTooSmall, match="shorten the prompt"):
        door.admit(arrivals("c", 11))
    end(door, inside)
    assert door.admit([]) == []


def test_background_work_does_not_wait_and_says_so(pool: CachePool) -> None:
    door = admission(pool)
    inside = door.admit(arrivals("a", 1, 1, 1, 1))
    begin = time.monotonic()
    with pytest.raises(CacheFull, match="background does not wait"):
        door.admit(arrivals("b", 1), background_s=30)
    end(door, inside)
    inside = door.admit(arrivals("c", 9))
    with pytest.raises(CacheFull, match="no room"):
        door.admit(arrivals("d", 2), background_s=30)
    assert time.monotonic() - begin < 5
    end(door, inside)
    (turn,) = door.admit(arrivals("e", 1), background_s=3)
    assert 0 < turn.remaining_s <= 3
    door.end(turn)


@pytest.mark.parametrize("blocks", [(1, 1), (3, 3)])
def test_a_batch_that_waits_is_cancelled_by_any_of_its_requests(
    pool: CachePool, blocks: tuple[int, int]
) -> None:
    """While it waits for slots, or for memory."""
    door = admission(pool)
    inside = door.admit(arrivals("a", *((1, 1, 1) if blocks == (1, 1) else (6,))))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(door.admit, arrivals("b", *blocks))
        deadline = time.monotonic() + 10
        # Nothing says when a call begins to wait; polled, for at most so long.
        while door.running < len(inside) + 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert door.cancel("b-1")
        with pytest.raises(Cancelled):
            waiting.result(timeout=10)
    assert door.running == len(inside)
    end(door, inside)
    assert not door.cancel("b-1")


def test_a_cancellation_may_overtake_its_request(pool: CachePool) -> None:
    door = admission(pool)
    assert not door.cancel("a-0")
    (turn,) = door.admit(arrivals("a", 1))
    assert turn.cancelled.is_set()
    door.end(turn)
    (turn,) = door.admit(arrivals("a", 1))
    assert not turn.cancelled.is_set(), "it is for one request, not for its id for ever"
    door.end(turn)


def test_batches_and_single_requests_never_wait_for_each_other(pool: CachePool) -> None:
    """Calls that want most of the slots and most of the memory, many at a time: each of them gets in long
    before its deadline, and never are there more inside than fit."""
    door = admission(pool, timeout_s=30)
    inside, most, lock = 0, 0, threading.Lock()

    def call(n: int) -> None:
        nonlocal inside, most
        draw = random.Random(n)
        size = draw.choice([1, 1, 2, 3, 4])
        turns = door.admit(arrivals(str(n), *(draw.randint(1, 10 // size) for _ in range(size))))
        with lock:
            inside += size
            most = max(most, inside)
        time.sleep(draw.random() * 0.004)  # stays inside, so that calls overlap, each time for another while
        with lock:
            inside -= size
        end(door, turns)

    with ThreadPoolExecutor(12) as threads:
        for done in [threads.submit(call, n) for n in range(150)]:
            done.result(timeout=30)
    assert (door.running, inside) == (0, 0)
    assert 1 < most <= SLOTS
