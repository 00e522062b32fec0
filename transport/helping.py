"""Work of one pull shared with a second thread: copying and hashing let others run meanwhile, so that a
second core, where one is idle, halves the time; where none is, nothing is lost but a wake-up.

One helper for the whole process, for one pull at a time: the others work alone. This module does not know
what the work is.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
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


class Helped:
    """Jobs of one pull, each run once, in any order: by the helper from the moment that they are added, and
    by the caller too once it waits for them.

        with Helped() as helped:
            for step in reading:
                helped.add(partial(verify, step))
            helped.wait()

    The helper is another pull's again after each `wait`. When the block is left, no job runs any more; what
    had not begun by then is left out. Not for several threads.
    """

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        self._faults: list[Exception] = []
        self._lock = threading.Lock()  # of `_helps`: whether the helper will look at the jobs again
        self._helps = False
        self._helper: Future[None] | None = None
        self._has_helper = False

    def __enter__(self) -> Helped:
        return self

    def __exit__(self, *_: object) -> None:
        self._jobs.clear()
        self._join()
        self._faults.clear()  # something else ended the pull; see `_first_fault`

    def add(self, job: Callable[[], None]) -> None:
        """For the helper; where it serves another pull, or there is none, the job is done here and now.

        Raises:
            Exception: of a job that is done here.
        """
        self._has_helper = self._has_helper or (not _ALONE and _FREE.acquire(blocking=False))
        if not self._has_helper:
            job()
            return
        self._jobs.append(job)
        with self._lock:
            if not self._helps:
                self._helps, self._helper = True, _submit(self._help)

    def wait(self) -> None:
        """Help, until every job has been done.

        Raises:
            Exception: the first that a job raised; jobs that had not begun by then are left out.
        """
        self._work()
        self._join()
        if self._faults:
            raise self._first_fault()

    # -- inside ----------------------------------------------------------------------------------------

    def _help(self) -> None:
        while True:
            self._work()
            with self._lock:
                if not self._jobs:
                    self._helps = False
                    return

    def _work(self) -> None:
        while not self._faults:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            try:
                job()
            except Exception as fault:  # noqa: BLE001 - raised by `wait`, in the caller's thread
                self._faults.append(fault)
        self._jobs.clear()

    def _join(self) -> None:
        if self._helper is not None and not self._helper.cancel():
            self._helper.result()  # at most one job: a step copied (it has a deadline), or summed
        self._helper, self._helps = None, False
        if self._has_helper:
            self._has_helper = False
            _FREE.release()

    def _first_fault(self) -> Exception:
        # Out of the list: its traceback leads here, and the arena would hang on that circle.
        first = self._faults[0]
        self._faults.clear()
        return first
