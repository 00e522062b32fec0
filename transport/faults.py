"""Faults on purpose, so that the ways out of them can be tested on the real thing.

    settings (`transport.faults`)  every pull and call meets each fault with its own probability
    arm(spec)                      the next `times` pulls or calls meet this one for sure

Both are refused unless the environment has RELAY_TEST_MODE=1. A pull asks here around its read
(`pulling.py`), an arena before it allocates, a directory client around its calls (`directory/faulty.py`).
What the hooks do to landed bytes is what a broken network or a late reader would do; judging them is left to
the product's own checks. This module does not know how bytes travel, nor what becomes of a failed pull.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from transport.arena import HEADER_NBYTES, Arena
from transport.errors import ArenaFull, ConfigError
from transport.pulling import ReadFailed, Reading, time_out
from transport.settings import FaultSettings
from transport.types import BlockId, Lease, LeaseId, Outcome, Transfer

TEST_MODE_ENV: Final = "RELAY_TEST_MODE"
READ: Final = "read"
"""Name of the event of a read that begins; `ENDED`: of a pull that has ended."""
ENDED: Final = "ended"

_EVENTS_KEPT: Final = 1024
_LEASES_KEPT: Final = 256
_PAST_EXPIRY_S: Final = 0.005
_LONGEST_SLEEP_S: Final = 60.0


class FaultKind(StrEnum):
    """What can be made to go wrong inside a worker. Whoever kills or stops processes does so from outside."""

    DROP = "drop"
    """The read fails at once, over every backend."""
    HANG = "hang"
    """Nothing arrives before the pull's deadline."""
    DELAY = "delay"
    """The read begins late."""
    LINK_DOWN = "link_down"
    """Some of the read arrives, and then nothing more before the pull's deadline: a cable is out."""
    LINK_UP = "link_up"
    """Some of the read arrives, then nothing for a while, then the rest: the cable is in again."""
    CORRUPT = "corrupt"
    """Bytes of the landed payload flip between read and verify."""
    TRUNCATE = "truncate"
    """The tail of the read does not arrive."""
    STALE = "stale"
    """What landed is the block of somebody else, as if the owner had reused it while it was read."""
    LEASE_EXPIRY = "lease_expiry"
    """The reader is slowed down past the end of its lease."""
    REUSE = "reuse"
    """The owner frees and reuses the blocks of all that it has published, and the directory does not hear of
    it. Done by the owner's worker at once; see `workers/faults.py`."""
    ARENA_FULL = "arena_full"
    """An allocation of blocks fails. A pull tries twice, before and after evicting."""
    DISK_FULL = "disk_full"
    """A write to disk fails; for whoever spills (`before_write`)."""
    DIRECTORY_DROP = "directory_drop"
    """A directory call is lost on its way, or its reply is (`FaultSpec.reply`)."""
    DIRECTORY_DELAY = "directory_delay"
    """The reply of a directory call comes late."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSpec:
    """One fault to arm.

    Attributes:
        times: pulls, allocations or calls that it hits.
        delay_ms: of DELAY, LINK_UP and DIRECTORY_DELAY.
        nbytes: bytes that CORRUPT flips.
        calls: directory calls that DIRECTORY_DROP and DIRECTORY_DELAY wait for.
        reply: DIRECTORY_DROP loses the reply instead of the request: the shard has done what was asked.
        seed: of the choice of bytes.
    """

    kind: FaultKind
    times: int = 1
    delay_ms: float = 200.0
    nbytes: int = 1
    calls: tuple[str, ...] = ("lookup", "lease")
    reply: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class FaultEvent:
    """Something that the hooks saw or did.

    Attributes:
        at_s: time.monotonic(), which processes of one machine share.
        what: a FaultKind that hit, READ or ENDED.
        subject: the segment, or the directory call.
        outcome: of a pull that ENDED.
    """

    at_s: float
    what: str
    subject: str = ""
    outcome: str = ""


def in_test_mode() -> bool:
    """Whether faults may be injected at all."""
    return os.environ.get(TEST_MODE_ENV) == "1"


def require_test_mode(what: str) -> None:
    """Refuse to do harm outside of tests.

    Raises:
        ConfigError: the environment does not have RELAY_TEST_MODE=1.
    """
    if not in_test_mode():
        raise ConfigError(
            f"{what} injects faults, which only tests may do. Take it out of the configuration, or set "
            f"{TEST_MODE_ENV}=1 in the environment of every process of a cluster that nobody depends on."
        )


def make_faults(settings: FaultSettings) -> Faults | None:
    """A worker's faults; None outside of test mode.

    Raises:
        ConfigError: faults are configured outside of test mode.
    """
    if settings.enabled:
        require_test_mode("transport.faults")
    return Faults(settings) if in_test_mode() else None


class Faults:
    """Decides which pull or call meets which fault, and does it. Thread-safe.

    Args:
        settings: probabilities; by default nothing happens until `arm`.
        clock: time.monotonic(), in seconds.
    """

    def __init__(
        self, settings: FaultSettings | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings or FaultSettings()
        self._random = random.Random(f"faults-{self._settings.seed}")
        self._clock = clock
        self._lock = threading.Lock()
        self._armed: dict[FaultKind, tuple[FaultSpec, int]] = {}
        self._events: deque[FaultEvent] = deque(maxlen=_EVENTS_KEPT)
        # A dropped read stays dropped when the pull tries its next backend.
        self._dropped: OrderedDict[LeaseId, None] = OrderedDict()
        self._calm = threading.Event()

    # -- steering --------------------------------------------------------------------------------------

    def arm(self, spec: FaultSpec) -> None:
        """Let the next `spec.times` pulls or calls meet this fault; replaces an armed one of its kind.

        Raises:
            ConfigError: the environment does not have RELAY_TEST_MODE=1.
        """
        require_test_mode(f"arming {spec.kind}")
        with self._lock:
            self._armed[spec.kind] = (spec, spec.times)

    def clear(self) -> None:
        """Disarm everything, end waits under way, and forget events."""
        with self._lock:
            self._armed.clear()
            self._events.clear()
            self._dropped.clear()
            calm, self._calm = self._calm, threading.Event()
        calm.set()

    def events(self) -> tuple[FaultEvent, ...]:
        """What has happened since `clear`, oldest first; the last thousand or so."""
        with self._lock:
            return tuple(self._events)

    def take(self, kind: FaultKind, subject: str = "") -> FaultSpec | None:
        """Whether `kind` hits now, and how; counts as an event if it does.

        Args:
            subject: segment or directory call. An armed DIRECTORY_* fault waits for one of its `calls`.
        """
        with self._lock:
            spec = self._armed_now(kind, subject)
            if spec is None and self._chance(kind):
                spec = FaultSpec(kind=kind, delay_ms=self._settings.delay_ms)
            if spec is not None:
                self._events.append(FaultEvent(self._clock(), kind, subject))
            return spec

    # -- around a pull ---------------------------------------------------------------------------------

    def disturb(
        self,
        arena: Arena,
        lease: Lease,
        into: Sequence[BlockId],
        reading: Reading,
        *,
        deadline: float,
        ends: float,
    ) -> Reading:
        """A backend's read with its faults: before it begins, and after each piece that has landed.

        Args:
            deadline: time.monotonic() instant at which the read must end; ends: at which the lease does.

        Raises:
            ReadFailed: see `before_read` and `_between`.
        """
        with closing(reading):
            self.before_read(arena, lease, into, deadline=deadline)
            for step in reading:
                landed = step.fetched()
                # Parts are counted from the header on, and the last one has padding behind the payload.
                start, stop = (max(0, at - HEADER_NBYTES) for at in arena.part_range(landed.part))
                piece = into[landed.first : landed.stop]
                stop = min(stop, arena.block_nbytes)
                self.after_read(arena, lease, piece, ends=ends, start=start, stop=stop)
                yield landed
                self._between(arena, lease, into, reading, deadline=deadline)

    def before_read(self, arena: Arena, lease: Lease, into: Sequence[BlockId], *, deadline: float) -> None:
        """Before a backend's read: DROP, HANG, DELAY.

        Args:
            deadline: time.monotonic() instant at which the read must end.

        Raises:
            ReadFailed: the read is not to take place; TIMED_OUT blocks are quarantined, as a backend would.
        """
        name, peer = str(lease.located.segment.key), lease.located.owner.worker
        self._note(READ, name)
        if self._is_dropped(lease.id) or self.take(FaultKind.DROP, name):
            self._remember_dropped(lease.id)
            raise ReadFailed(Outcome.PEER_GONE, f"{peer}: the read was dropped (injected).")
        if self.take(FaultKind.HANG, name):
            self._sleep(deadline - time.monotonic())
            raise time_out(arena, into, f"{peer}: nothing arrived within the deadline (injected).")
        if spec := self.take(FaultKind.DELAY, name):
            self._sleep(spec.delay_ms / 1e3)

    def after_read(
        self,
        arena: Arena,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        ends: float,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        """After bytes have landed and before they are verified: CORRUPT, TRUNCATE, STALE, LEASE_EXPIRY.

        Args:
            into: the blocks concerned.
            ends: time.monotonic() instant at which the lease ends.
            start, stop: the payload bytes of each that have landed; by default all.
        """
        name = str(lease.located.segment.key)
        landed = range(start, arena.block_nbytes if stop is None else stop)
        if not into or not landed:
            return
        if spec := self.take(FaultKind.CORRUPT, name):
            chance = random.Random(f"{spec.seed}-{name}-{start}")
            at = chance.sample(landed, min(spec.nbytes, len(landed)))
            _flip(arena, chance.choice(into), at)
        if self.take(FaultKind.TRUNCATE, name):
            # What was there before differs from what should have come; inverted, it does for sure.
            _flip(arena, into[-1], landed[len(landed) // 2 :])
        # The header, which tells whose block it is, lands with the first bytes.
        if start == 0 and self.take(FaultKind.STALE, name):
            _become_another(arena, into[0])
        if self.take(FaultKind.LEASE_EXPIRY, name):
            self._sleep(ends - time.monotonic() + _PAST_EXPIRY_S)

    def _between(
        self, arena: Arena, lease: Lease, into: Sequence[BlockId], reading: Reading, *, deadline: float
    ) -> None:
        """After a piece has been handed on, and before the next one: LINK_DOWN, LINK_UP."""
        name, peer = str(lease.located.segment.key), lease.located.owner.worker
        if spec := self.take(FaultKind.LINK_UP, name):
            self._sleep(min(spec.delay_ms / 1e3, deadline - time.monotonic()))
        if self.take(FaultKind.LINK_DOWN, name):
            self._sleep(deadline - time.monotonic())
            reading.close()  # which may find by itself that it is late
            raise time_out(arena, into, f"{peer}: nothing more arrived within the deadline (injected).")

    def ended(self, lease: Lease, transfer: Transfer) -> None:
        """After the pull, however it ended."""
        self._note(ENDED, str(lease.located.segment.key), transfer.outcome)

    # -- elsewhere -------------------------------------------------------------------------------------

    def before_allocate(self, blocks: int) -> None:
        """Before an arena hands blocks out.

        Raises:
            ArenaFull: ARENA_FULL hits.
        """
        if blocks and self.take(FaultKind.ARENA_FULL):
            raise ArenaFull(f"no room for {blocks} blocks (injected).")

    def before_write(self, nbytes: int) -> None:
        """Before a spill file is written.

        Raises:
            OSError: (ENOSPC) DISK_FULL hits.
        """
        if nbytes and self.take(FaultKind.DISK_FULL):
            raise OSError(errno.ENOSPC, "No space left on device (injected)")

    # -- inside ----------------------------------------------------------------------------------------

    def _armed_now(self, kind: FaultKind, subject: str) -> FaultSpec | None:
        spec, left = self._armed.get(kind, (None, 0))
        if spec is None:
            return None
        if kind in (FaultKind.DIRECTORY_DROP, FaultKind.DIRECTORY_DELAY) and subject not in spec.calls:
            return None
        if left <= 1:
            del self._armed[kind]
        else:
            self._armed[kind] = (spec, left - 1)
        return spec

    def _chance(self, kind: FaultKind) -> bool:
        probability = self._settings.probability(kind)
        return probability > 0 and self._random.random() < probability

    def _note(self, what: str, subject: str, outcome: str = "") -> None:
        with self._lock:
            self._events.append(FaultEvent(self._clock(), what, subject, outcome))

    def _is_dropped(self, lease: LeaseId) -> bool:
        with self._lock:
            return lease in self._dropped

    def _remember_dropped(self, lease: LeaseId) -> None:
        with self._lock:
            self._dropped[lease] = None
            while len(self._dropped) > _LEASES_KEPT:
                self._dropped.popitem(last=False)

    def _sleep(self, seconds: float) -> None:
        with self._lock:
            calm = self._calm
        calm.wait(min(max(0.0, seconds), _LONGEST_SLEEP_S))


def _flip(arena: Arena, block: BlockId, at: Sequence[int]) -> None:
    """Invert payload bytes of a landed block."""
    view = arena.outgoing(block)
    for offset in at:
        view[HEADER_NBYTES + offset] ^= 0xFF
    arena.landed(block, view)


def _become_another(arena: Arena, block: BlockId) -> None:
    """Make a landed block what a reader finds whose owner has reused it: another header, other bytes."""
    view = arena.outgoing(block)
    header = bytearray(view[:HEADER_NBYTES])
    # Behind the magic number stand index, generation and incarnation: none of them is the leased one.
    for offset in range(8, 32):
        header[offset] ^= 0xFF
    view[:HEADER_NBYTES] = header
    arena.landed(block, view)
    _flip(arena, block, range(min(arena.block_nbytes, 4096)))
