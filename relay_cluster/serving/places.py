"""Who may run, who may wait, and who is sent away: a bounded queue for one event loop.

    waiting (at most max_waiting, first come first served) -> running (at most `running`) -> left

Knows nothing of requests, workers or HTTP; what it raises says what a client should do.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from relay_cluster.serving.errors import ApiError

_LONGEST_RETRY_S = 60
_SMOOTHING = 0.2


class Places:
    """Places to run in, and to wait in.

    Args:
        running: requests that run at once. max_waiting: that wait at most. queue_timeout_s: longest wait.
    """

    def __init__(self, *, running: int, max_waiting: int, queue_timeout_s: float) -> None:
        self._limit = running
        self._max_waiting = max_waiting
        self._queue_timeout_s = queue_timeout_s
        self._taken = 0
        self._line: deque[asyncio.Future[None]] = deque()
        self._seconds = 1.0  # what a request took of late
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        """Places that are taken."""
        return self._taken

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    @property
    def draining(self) -> bool:
        """Whether nobody is let in any more."""
        return self._draining

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Run inside, once there is a place.

        Raises:
            ApiError: 429 when the line is full, 503 after queue_timeout_s in it or at shutdown.
        """
        await self._enter()
        begin = time.monotonic()
        try:
            yield
        finally:
            self._seconds += _SMOOTHING * (time.monotonic() - begin - self._seconds)
            self._leave()

    async def drain(self, timeout_s: float) -> bool:
        """Let nobody in any more; whether all that run have left within `timeout_s`."""
        self._draining = True
        while self._line:
            waiter = self._line.popleft()
            if not waiter.done():
                waiter.set_exception(self._shutting_down())
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _enter(self) -> None:
        if self._draining:
            raise self._shutting_down()
        if self._taken < self._limit and not self._line:
            self._take()
            return
        if len(self._line) >= self._max_waiting:
            raise ApiError(
                429,
                f"{self._taken} requests run and {len(self._line)} wait, which is the limit "
                "(serve.max_waiting). Try again later.",
                code="queue_full",
                retry_after_s=self._retry_after_s(),
            )
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(waiter)
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._leave()  # the place came just as we gave up
            elif waiter in self._line:
                self._line.remove(waiter)
            if isinstance(error, TimeoutError):
                raise ApiError(
                    503,
                    f"no worker came free within {self._queue_timeout_s:.0f} s (serve.queue_timeout_s).",
                    code="overloaded",
                    retry_after_s=self._retry_after_s(),
                ) from None
            raise

    def _take(self) -> None:
        self._taken += 1
        self._idle.clear()

    def _leave(self) -> None:
        self._taken -= 1
        while self._line and self._taken < self._limit:
            waiter = self._line.popleft()
            if not waiter.done():
                self._take()  # in his name: nobody can overtake
                waiter.set_result(None)
        if not self._taken:
            self._idle.set()

    def _retry_after_s(self) -> int:
        """When a place may be free: the line's length in requests' durations."""
        seconds = self._seconds * (len(self._line) + 1) / self._limit
        return max(1, min(_LONGEST_RETRY_S, math.ceil(seconds)))

    @staticmethod
    def _shutting_down() -> ApiError:
        return ApiError(503, "the service is shutting down.", code="shutting_down", retry_after_s=5)
