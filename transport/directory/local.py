"""A directory of one table in this process: for tests and single-process use. Real logic, no Ray.

It does not know of shards, and cannot be unavailable.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from transport.base import Answers
from transport.directory.opening import News, Opened, OpenTable
from transport.directory.table import Announced
from transport.errors import WorkerLost
from transport.settings import DirectorySettings
from transport.types import Lease, Located, Owner, Segment, SegmentKey, WorkerId


def refuse_fenced(owner: Owner, reply: Announced) -> None:
    """Turn a fenced reply into an error.

    Raises:
        WorkerLost: a newer incarnation has taken the owner's name.
    """
    if reply.fenced_by is not None:
        raise WorkerLost(
            f"{owner.worker}: incarnation {owner.incarnation} was replaced by {reply.fenced_by} or dropped "
            "as dead; its segments are gone from the directory. End this process."
        )


def _owner_clock_ms() -> int:
    """Of an owner in this process, whatever clock the table goes by."""
    return int(time.monotonic() * 1e3)


class LocalDirectory:
    """KVDirectory over one Table. Thread-safe.

    Args:
        settings: timeouts; defaults as in DirectorySettings.
        drop_silent: whether owners that do not announce are dropped, as in a cluster. Off by default: there
            is no heartbeat within one process, and nobody in it dies alone.
        clock: monotonic seconds; tests pass their own.
    """

    def __init__(
        self,
        settings: DirectorySettings | None = None,
        *,
        drop_silent: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        timeout = (settings or DirectorySettings()).owner_timeout_s if drop_silent else math.inf
        self._table = OpenTable(owner_timeout_s=timeout, lease_prefix="local:")
        self._clock = clock
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._watching: dict[tuple[SegmentKey, WorkerId], int] = {}  # how many do

    def announce(self, owner: Owner) -> None:
        """See KVDirectory. Raises WorkerLost when `owner` is fenced."""
        with self._lock:
            reply = self._table.announce(owner, self._clock(), clock_ms=_owner_clock_ms())
        refuse_fenced(owner, reply)

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See KVDirectory. Raises WorkerLost when `owner` is fenced."""
        with self._lock:
            reply = self._table.publish(owner, segments, self._clock(), clock_ms=_owner_clock_ms())
        refuse_fenced(owner, reply)

    def retract(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See KVDirectory."""
        with self._lock:
            self._table.retract(owner, segments, self._clock())

    def lookup(self, keys: Sequence[SegmentKey], *, near: WorkerId | None = None) -> Answers[Located]:
        """See KVDirectory."""
        with self._lock:
            return Answers(self._table.lookup(keys, self._clock(), near=near))

    def lease(
        self, keys: Sequence[SegmentKey], *, holder: WorkerId, ttl_s: float, copies: int = 1
    ) -> Answers[Lease]:
        """See KVDirectory."""
        with self._lock:
            return Answers(self._table.lease(keys, self._clock(), holder=holder, ttl_s=ttl_s, copies=copies))

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> dict[str, bool]:
        """See KVDirectory."""
        with self._lock:
            held = self._table.renew([x.id for x in leases], self._clock(), ttl_s=ttl_s)
        return {str(k): v for k, v in held.items()}

    def release(self, leases: Sequence[Lease], *, read: bool = False) -> None:
        """See KVDirectory."""
        with self._lock:
            self._table.release([x.id for x in leases], self._clock(), read=read)

    def evict(self, owner: Owner, *, nbytes: int) -> tuple[Segment, ...]:
        """See KVDirectory."""
        with self._lock:
            return self._table.evict(owner, nbytes, self._clock())

    def drop_owner(self, worker: WorkerId, incarnation: int) -> None:
        """See KVDirectory."""
        with self._lock:
            self._table.drop_owner(worker, incarnation, self._clock())

    def advance(self, owner: Owner, update: Opened) -> str:
        """See KVDirectory. Raises WorkerLost when `owner` is fenced."""
        with self._lock:
            (found,) = self._table.advance(owner, [update], self._clock(), clock_ms=_owner_clock_ms())
            if self._table.take_changed():
                self._news.notify_all()
        refuse_fenced(owner, Announced(found.fenced_by, known=True))
        return "" if found.verdict == "taken" else found.verdict

    def watch(
        self, key: SegmentKey, *, life: int, after: int, holder: WorkerId, ttl_s: float, wait_s: float
    ) -> News | None:
        """See KVDirectory."""
        deadline, me = time.monotonic() + wait_s, (key, holder)
        with self._lock:
            self._watching[me] = self._watching.get(me, 0) + 1
            while True:
                news = self._table.watch(
                    key, life=life, after=after, holder=holder, now=self._clock(), ttl_s=ttl_s
                )
                left_s = deadline - time.monotonic()
                if me not in self._watching:
                    return news  # dismissed
                if news is not None or left_s <= 0:
                    self._watching[me] -= 1
                    if not self._watching[me]:
                        del self._watching[me]
                    return news
                self._news.wait(left_s)

    def unwatch(self, key: SegmentKey, *, holder: WorkerId) -> None:
        """See KVDirectory."""
        with self._lock:
            self._watching.pop((key, holder), None)
            self._news.notify_all()

    def stats(self) -> dict[str, float]:
        """See KVDirectory."""
        with self._lock:
            return {**self._table.stats(self._clock()), "shards_up": 1.0}

    def start_owner(
        self,
        owner: Owner,
        segments_source: Callable[[], Sequence[Segment]],
        on_evicted: Callable[[Sequence[Segment]], None] | None = None,
    ) -> None:
        """Same call as `DirectoryClient.start_owner`, without its heartbeat: this table never restarts, and
        has no operators."""
        self.announce(owner)
        held = segments_source()
        if held:
            self.publish(owner, held)

    def close(self) -> None:
        """Nothing to stop."""
