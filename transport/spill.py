"""Where evicted segments go: first ordinary memory, then files, each within a byte budget.

    put --fits--> host --older than the rest--> queued --written--> disk --older than the rest--> lost
       '--host is off or too small-------------^  '--no room, or the disk fails--> lost
    anywhere --drop--> gone            anywhere --load--> stays, until its reader drops it

One thread writes files; `put` never waits for a disk. What is lost is told to `on_lost`, and costs a hit,
never an answer. This module does not know of arenas, of the directory, or of what the bytes mean.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from transport.settings import SpillSettings
from transport.spill_files import Payload, SpillDamaged, SpillFolder
from transport.types import Incarnation, Segment, SegmentKey, WorkerId

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 10.0


class Tier(StrEnum):
    """Where a spilled segment is. QUEUED: in memory, about to be written."""

    HOST = "host"
    QUEUED = "queued"
    DISK = "disk"


class Lost(StrEnum):
    """Why a segment did not stay."""

    BUDGET = "budget"
    """Older than all that its last tier has room for."""
    TOO_LARGE = "too_large"
    """No tier holds as much as this segment alone."""
    QUEUE_FULL = "queue_full"
    """Evictions came faster than the disk writes."""
    DISK_ERROR = "disk_error"
    """No space, a limit of the process, a broken disk."""
    DAMAGED = "damaged"
    """A file was not what had been written; it was not used."""


@dataclass(slots=True)
class _Entry:
    segment: Segment
    tier: Tier
    nbytes: int  # of its tier: payloads in memory, the whole file on disk
    payloads: Sequence[Payload] = ()
    path: Path | None = None


class Spill:
    """Spilled segments of one worker, one for each key. Thread-safe.

    Args:
        settings: budgets and folder.
        worker, incarnation: whose.
        on_lost: told of segments that the spill gave up by itself; called from any thread, without a lock.
        before_write: called with the bytes that are about to be written; may raise OSError (for tests).
    """

    def __init__(
        self,
        settings: SpillSettings,
        worker: WorkerId,
        incarnation: Incarnation,
        on_lost: Callable[[Sequence[Segment]], None],
        before_write: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._before_write = before_write
        self._settings = settings
        self._on_lost = on_lost
        self._entries: dict[SegmentKey, _Entry] = {}
        # Keys by tier, the least recently spilled first.
        self._order: dict[Tier, OrderedDict[SegmentKey, None]] = {tier: OrderedDict() for tier in Tier}
        self._used: Counter[Tier] = Counter()
        self._lost: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._fault = ""
        self._stop = False
        self._idle = True
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._folder: SpillFolder | None = None
        self._writer: threading.Thread | None = None
        if settings.disk_bytes:
            self._open_folder(worker, incarnation)

    def _open_folder(self, worker: WorkerId, incarnation: Incarnation) -> None:
        try:
            self._folder = SpillFolder(self._settings.disk_dir, worker, incarnation)
        except OSError as error:
            # A worker that answers without a disk is better than one that does not start.
            logger.error("no disk spill: %s", error)  # noqa: TRY400 - no trace
            self._fault = str(error)
            return
        self._writer = threading.Thread(target=self._write_all, name=f"relay-spill-{worker}", daemon=True)
        self._writer.start()

    # -- in and out ------------------------------------------------------------------------------------

    def put(self, segment: Segment, payloads: Sequence[Payload]) -> bool:
        """Keep a segment, in place of what was kept under its key. The payloads must not change afterwards.

        Returns:
            Whether it was taken. It may be lost later on.
        """
        lost: list[Segment] = []
        with self._lock:
            self._discard(segment.key)
            entry = _Entry(segment, Tier.HOST, segment.nbytes, payloads)
            if self._stop:
                taken = False
            elif segment.nbytes <= self._settings.host_bytes:
                self._place(entry)
                self._shrink_host(lost)
                taken = True
            else:
                taken = self._enqueue(entry) is None
            self._counts["taken"] += taken
        self._tell(lost)
        return taken

    def load(self, key: SegmentKey) -> tuple[Segment, Sequence[Payload]] | None:
        """A spilled segment and its verified bytes; None when it is not here, or its file is not what was
        written, which is counted. May read a disk."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            segment, payloads, path = entry.segment, entry.payloads, entry.path
        if path is None or self._folder is None:
            return segment, payloads
        try:
            payloads = self._folder.read(path, segment)
        except (SpillDamaged, OSError) as error:
            with self._lock:
                if self._entries.get(key) is not entry:
                    return None  # dropped meanwhile, and its file with it
                self._discard(key)
                self._lost[Lost.DAMAGED] += 1
            logger.warning("spilled segment %s is not used: %s", key, error)
            self._tell([segment])
            return None
        with self._lock:
            self._counts["read"] += 1
        return segment, payloads

    def drop(self, key: SegmentKey, *, only: Segment | None = None) -> Segment | None:
        """Forget a segment; what it was, if it was here. Not told to `on_lost`. only: unless another one has
        taken its place under the key."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or (only is not None and entry.segment is not only):
                return None
            return self._discard(key)

    def get(self, key: SegmentKey) -> Segment | None:
        """A segment that is here, without its bytes."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.segment

    def segments(self) -> list[Segment]:
        """All that is here."""
        with self._lock:
            return [entry.segment for entry in self._entries.values()]

    # -- facts and end ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """tiers: segments, bytes and budget_bytes of each; taken, written, read: segments so far; lost: by
        reason; fault: why the disk does not work now, "" when it does."""
        budgets = {
            Tier.HOST: self._settings.host_bytes,
            Tier.QUEUED: self._settings.queue_bytes if self._folder else 0,
            Tier.DISK: self._settings.disk_bytes if self._folder else 0,
        }
        with self._lock:
            tiers = {
                tier.value: {
                    "segments": len(self._order[tier]),
                    "bytes": self._used[tier],
                    "budget_bytes": budgets[tier],
                }
                for tier in Tier
            }
            counts = {name: self._counts[name] for name in ("taken", "written", "read")}
            lost = {str(why): count for why, count in self._lost.items()}
            return {"tiers": tiers, **counts, "lost": lost, "fault": self._fault}

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing is queued; False when it took longer."""
        deadline = time.monotonic() + timeout_s
        with self._wake:
            while self._order[Tier.QUEUED] or not self._idle:
                if not self._wake.wait(deadline - time.monotonic()):
                    return False
        return True

    def close(self) -> None:
        """Forget everything and remove the files. Idempotent."""
        with self._wake:
            self._stop = True
            for key in list(self._entries):
                self._discard(key)
            self._wake.notify_all()
        if self._writer is not None:
            self._writer.join(_JOIN_TIMEOUT_S)
        if self._folder is not None:
            self._folder.close()

    # -- inside, under the lock ------------------------------------------------------------------------

    def _place(self, entry: _Entry) -> None:
        key = entry.segment.key
        self._entries[key] = entry
        self._order[entry.tier][key] = None
        self._used[entry.tier] += entry.nbytes

    def _discard(self, key: SegmentKey) -> Segment | None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return None
        del self._order[entry.tier][key]
        self._used[entry.tier] -= entry.nbytes
        if entry.path is not None and self._folder is not None:
            self._folder.remove(entry.path)  # takes no time worth giving the lock up for
        return entry.segment

    def _oldest(self, tier: Tier) -> _Entry:
        return self._entries[next(iter(self._order[tier]))]

    def _shrink_host(self, lost: list[Segment]) -> None:
        while self._used[Tier.HOST] > self._settings.host_bytes:
            entry = self._oldest(Tier.HOST)
            self._discard(entry.segment.key)
            if self._enqueue(_Entry(entry.segment, Tier.HOST, entry.nbytes, entry.payloads)) is not None:
                lost.append(entry.segment)

    def _enqueue(self, entry: _Entry) -> Lost | None:
        """Put an entry into the queue to the disk, or say and count why not."""
        segment, why = entry.segment, None
        if self._folder is None:
            why = Lost.BUDGET if self._settings.host_bytes >= segment.nbytes else Lost.TOO_LARGE
        elif self._folder.nbytes(segment) > self._settings.disk_bytes:
            why = Lost.TOO_LARGE
        elif self._used[Tier.QUEUED] + segment.nbytes > self._settings.queue_bytes:
            why = Lost.QUEUE_FULL
        if why is not None:
            self._lost[why] += 1
            return why
        self._place(_Entry(segment, Tier.QUEUED, segment.nbytes, entry.payloads))
        self._wake.notify_all()
        return None

    # -- the writer's thread ---------------------------------------------------------------------------

    def _write_all(self) -> None:
        while True:
            with self._wake:
                self._idle = True
                self._wake.notify_all()
                while not self._order[Tier.QUEUED] and not self._stop:
                    self._wake.wait()
                if self._stop:
                    return
                self._idle = False
                entry = self._oldest(Tier.QUEUED)
            try:
                self._write(entry)
            except Exception:  # a bug must not end the thread: the queue would stay full for ever
                logger.exception("a segment could not be spilled")
                self._give_up(entry, Lost.DISK_ERROR)

    def _write(self, entry: _Entry) -> None:
        assert self._folder is not None  # this thread runs only with a folder
        nbytes = self._folder.nbytes(entry.segment)
        lost: list[Segment] = []
        with self._lock:
            # Room first: the budget holds at every instant.
            while self._used[Tier.DISK] + nbytes > self._settings.disk_bytes:
                oldest = self._oldest(Tier.DISK)
                self._discard(oldest.segment.key)
                self._lost[Lost.BUDGET] += 1
                lost.append(oldest.segment)
        self._tell(lost)
        try:
            self._before_write(nbytes)
            path = self._folder.write(entry.segment, entry.payloads)
        except OSError as error:
            self._report(error)
            self._give_up(entry, Lost.DISK_ERROR)
            return
        self._report(None)
        with self._lock:
            self._counts["written"] += 1
            if self._entries.get(entry.segment.key) is entry:
                self._discard(entry.segment.key)
                self._place(_Entry(entry.segment, Tier.DISK, nbytes, path=path))
                return
        self._folder.remove(path)  # dropped meanwhile

    def _give_up(self, entry: _Entry, why: Lost) -> None:
        with self._lock:
            if self._entries.get(entry.segment.key) is not entry:
                return
            self._discard(entry.segment.key)
            self._lost[why] += 1
        self._tell([entry.segment])

    def _report(self, error: OSError | None) -> None:
        """Say once that the disk fails, and once that it works again."""
        if error is not None and not self._fault:
            logger.warning("segments cannot be spilled to disk, and are lost: %s", error)
        elif error is None and self._fault:
            logger.info("segments can be spilled to disk again")
        self._fault = "" if error is None else str(error)

    def _tell(self, lost: Sequence[Segment]) -> None:
        if lost:
            self._on_lost(lost)
