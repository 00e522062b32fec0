"""Work of one pull shared with a second thread: copying and hashing let others run meanwhile, so that a
second core, where one is idle, halves the time; where none is, nothing is lost but a wake-up.

One helper for the whole process, for one pull at a time: the others work alone. This module does not know
what the work is.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

_POOL: Final = ThreadPoolExecutor(1, thread_name_prefix="pull-helper")
_FREE: Final = threading.Lock()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_ALONE: Final = usable_cores() < 2


def _submit(work: Callable[[], None]) -> Future[None] | None:
    try:
        return _POOL.submit(work)
    except RuntimeError:  # the interpreter is on its way out
        return None


def together(jobs: Iterable[Callable[[], None]]) -> None:
    """Run every job once, in any order, here and in the helper; when this returns, none runs any more.

    Raises:
        Exception: the first that a job raised; jobs that had not begun by then are left out.
    """
    waiting = deque(jobs)
    faults: list[Exception] = []

    def work() -> None:
        while not faults:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            try:
                job()
            except Exception as fault:  # noqa: BLE001 - raised below, in the caller's thread
                faults.append(fault)

    if len(waiting) < 2 or _ALONE or not _FREE.acquire(blocking=False):
        work()
    else:
        try:
            helper = _submit(work)
            try:
                work()
            finally:  # whatever came in between: the helper must not go on behind the caller's back
                waiting.clear()
                if helper is not None and not helper.cancel():
                    helper.result()
        finally:
            _FREE.release()
    if faults:
        raise faults[0]
