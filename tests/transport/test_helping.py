"""Work shared with a helper thread: all of it is done, once, and none of it behind the caller's back."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial

import pytest

from transport import helping
from transport.helping import Helped

two_cores = pytest.mark.skipif(helping._ALONE, reason="one core: there is no helper")


def together(jobs: Iterable[Callable[[], None]]) -> None:
    """As a pull does it whose steps come all at once."""
    with Helped() as helped:
        for job in jobs:
            helped.add(job)
        helped.wait()


@pytest.mark.parametrize("n", [0, 1, 2, 500])
def test_every_job_is_done_once(n: int) -> None:
    done: Counter[int] = Counter()
    lock = threading.Lock()

    def job(i: int) -> None:
        with lock:
            done[i] += 1

    together(partial(job, i) for i in range(n))
    assert done == Counter(range(n))


@two_cores
def test_a_job_begins_while_the_caller_does_something_else() -> None:
    with Helped() as helped:
        for _ in range(500):  # whatever the helper was about to do when the job came
            begun = threading.Event()
            helped.add(begun.set)
            assert begun.wait(10), "the caller has not even begun to wait"
        helped.wait()


@two_cores
def test_two_jobs_can_meet() -> None:
    """Which they could not, were they not done at the same time."""
    meeting = threading.Barrier(2)
    together([lambda: meeting.wait(10) and None] * 2)
    assert not meeting.broken


@two_cores
def test_a_second_caller_does_not_wait_for_the_helper() -> None:
    """Its jobs are done in its own thread, each when it is added, while the helper serves another pull."""
    inside, leave = threading.Barrier(3), threading.Event()

    def stay() -> None:
        inside.wait(10)
        leave.wait(10)

    first = threading.Thread(target=together, args=([stay, stay],))
    first.start()
    inside.wait(10)
    where: list[int] = []
    with Helped() as helped:
        for n in range(5):
            helped.add(lambda: where.append(threading.get_ident()))
            assert len(where) == n + 1
        helped.wait()
    leave.set()
    first.join(10)
    assert where == [threading.get_ident()] * 5


@two_cores
def test_leaving_waits_for_what_runs_and_drops_the_rest() -> None:
    """Whatever ends a pull, its blocks are nobody's business any more when it is over."""
    begun, ended = threading.Event(), threading.Event()
    others: list[int] = []

    def long() -> None:
        begun.set()
        time.sleep(0.05)  # it still runs when the pull ends
        ended.set()

    def pull() -> None:
        with Helped() as helped:
            helped.add(long)
            for n in range(100):
                helped.add(partial(others.append, n))
            assert begun.wait(10)
            raise LookupError

    with pytest.raises(LookupError):
        pull()
    assert ended.is_set()
    assert others == []
    together([lambda: others.append(0)] * 2)  # and the helper is free again
    assert others == [0, 0]


@two_cores
def test_the_helper_is_free_after_each_wait() -> None:
    """A pull over a slow wire does not keep it from others between its parts."""
    with Helped() as slow:
        slow.add(lambda: None)
        slow.wait()
        begun = threading.Event()
        where: list[int] = []
        with Helped() as other:
            other.add(lambda: where.append(threading.get_ident()))
            other.add(begun.set)
            assert begun.wait(10)
            other.wait()
        assert where != [threading.get_ident()]
        slow.add(lambda: None)
        slow.wait()


def test_a_fault_keeps_nothing_alive() -> None:
    """Its traceback leads through the job to an arena, whose memory must not wait for a collection."""

    class Arena:
        pass

    def pull() -> weakref.ref[Arena]:
        arena = Arena()

        def job(_: Arena = arena) -> None:
            raise KeyError

        with contextlib.suppress(KeyError):
            together([job] * 4)
        return weakref.ref(arena)

    gc.disable()
    try:
        assert pull()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_fault_comes_out_when_nothing_runs_any_more(at: int) -> None:
    running: list[int] = []
    begun: list[int] = []

    def job(i: int) -> None:
        begun.append(i)
        running.append(i)
        time.sleep(0.002)  # so that the other thread is inside one as well
        running.remove(i)
        if i == at:
            raise KeyError(i)

    with pytest.raises(KeyError, match=str(at)):
        together(partial(job, i) for i in range(200))
    assert running == []
    assert len(begun) < 200, "what had not begun is left out"
    count = len(begun)
    time.sleep(0.02)  # time for ten more, if anybody still ran them
    assert len(begun) == count
    together([lambda: begun.clear()] * 2)  # and the helper is free again
    assert begun == []
