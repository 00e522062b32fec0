"""One pull from several owners of the same bytes: each gives some of the blocks at the same time, and what
one of them does not give, or gives much too slowly, is asked of another.

    share     a run of blocks, and how many of its parts have come
    attempt   one owner's try at one share: an ordinary pull of those blocks, with a lease of its own, in a
              thread and in landing blocks of its own; every part that it has verified is copied to its place

The landing blocks are what makes it safe to turn to another owner at any time: whatever the first one still
sends, however late, never reaches a byte that has been handed over. They cost arena memory, as much as the
segment and for as long as the pull, and one copy within memory.

Knows nothing of backends; bytes of different making are never mixed (`same_bytes`).
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np

from transport.arena import HEADER_NBYTES, Arena
from transport.errors import ArenaFull
from transport.pulling import OnPart, ReadFailed, time_out
from transport.types import BlockId, Lease, Outcome, Owner, Segment, Transfer

logger = logging.getLogger(__name__)

SHARED_NBYTES: Final = 2 << 20
"""A smaller segment comes from one owner, and from the next one when that fails."""
_LOOK_S: Final = 0.02
_SLOW: Final = 1.5
"""An owner that has given all its blocks helps another one whose rest would take so many times as long as
reading all of that one's blocks again."""
_SLOW_AT_LEAST_S: Final = 0.2


class PullOne(Protocol):
    """A pull from one owner; see `transport.base.Transport.pull`."""

    def __call__(
        self,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        timeout_s: float,
        lease_deadline: float | None,
        on_part: OnPart | None,
    ) -> Transfer: ...


class _Enough(Exception):
    """Ends an attempt whose bytes are not needed any more."""


@dataclass(slots=True)
class _Share:
    """Blocks [first, stop) of the segment; parts: so many have been copied to their place. `lock` is held
    while one is."""

    first: int
    stop: int
    parts: int = 0
    attempts: list[_Attempt] = field(default_factory=list["_Attempt"])
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def running(self) -> list[_Attempt]:
        return [a for a in self.attempts if a.transfer is None]


@dataclass(slots=True)
class _Attempt:
    """lease: of these blocks alone; source: index of the owner; backend: over which it is asked; nbytes: that
    have been used; finished: it gave the last of its share; transfer: how it ended."""

    share: _Share
    lease: Lease
    source: int
    backend: str
    landing: list[BlockId]
    began: float
    nbytes: int = 0
    finished: bool = False
    transfer: Transfer | None = None


def same_bytes(a: Segment, b: Segment) -> bool:
    """Whether two copies are the same bit by bit: blocks of one may stand beside blocks of the other."""
    what = [(x.key, x.variant, x.layout, x.num_tokens, x.start, len(x.blocks)) for x in (a, b)]
    return what[0] == what[1] and all(
        (x.nbytes, x.checksums) == (y.nbytes, y.checksums) for x, y in zip(a.blocks, b.blocks, strict=True)
    )


def sources(lease: Lease) -> tuple[Lease, ...]:
    """The lease and those of its `others` that are of the same bytes."""
    own = lease.located.segment
    return (lease, *(x for x in lease.others if own.blocks and same_bytes(own, x.located.segment)))


class SharedPull:
    """See the module. For one use.

    Args:
        pull: from one owner, over whatever backend; chosen: the backend that it takes.
        leases: of the same bytes, best owner first.
        into: destination blocks, as for `Transport.pull`.
        deadline: time.monotonic() instant at which the pull must end; ends: at which the leases do.
        on_part: see `Transport.pull`.

    Attributes:
        moved: shares that went to another owner.

    Raises:
        ArenaFull: no room for landing blocks.
    """

    def __init__(
        self,
        arena: Arena,
        pull: PullOne,
        chosen: Callable[[Owner], str],
        leases: Sequence[Lease],
        into: Sequence[BlockId],
        *,
        deadline: float,
        ends: float,
        on_part: OnPart | None,
    ) -> None:
        self._arena = arena
        self._pull = pull
        self._chosen = chosen
        self._leases = leases
        self._into = into
        self._deadline = deadline
        self._ends = ends
        self._on_part = on_part
        self._changed = threading.Condition()
        self._closed = False
        self._result: Transfer | None = None
        self._failed: dict[int, Transfer] = {}
        self.moved = 0
        owners = len(leases) if lease_nbytes(leases[0]) >= SHARED_NBYTES else 1
        self._shares = _divide(len(into), owners)
        # All at once, so that nothing has begun when there is no room.
        self._spare = arena.allocate(len(into))

    def run(self) -> Transfer:
        """Pull. Never raises for a remote fault; what `on_part` raises ends it and comes out."""
        start = time.monotonic()
        outcome, detail = Outcome.PULLED, ""
        try:
            with self._changed:
                for source, share in enumerate(self._shares):
                    landing = self._spare[share.first : share.stop]
                    self._begin(share, source, landing)
            self._follow()
        except ReadFailed as failed:
            outcome, detail = failed.outcome, failed.detail
        finally:
            self._close()
        if outcome is Outcome.TIMED_OUT:
            # Nobody but us writes into the destination, and we have stopped.
            time_out(self._arena, self._into, detail)
        self._result = self._told(outcome, detail, time.monotonic() - start)
        if self._arena.faults is not None:
            self._arena.faults.ended(self._leases[0], self._result)
        return self._result

    # -- the pulling thread ------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Hand over what has come of all shares, and see to those that do not get on.

        Raises:
            ReadFailed: no owner is left that could give the rest, or the time is over.
        """
        every = len(self._arena.parts)
        handed = 0
        while handed < every:
            with self._changed:
                landed = min(share.parts for share in self._shares)
                if landed == handed:
                    self._help()
                    self._changed.wait(_LOOK_S)
                    continue
            for part in range(handed, landed):
                if self._on_part is not None:
                    self._on_part(part)
            handed = landed

    def _help(self) -> None:
        """The caller holds `_changed`."""
        now = time.monotonic()
        if now >= self._deadline:
            raise ReadFailed(Outcome.TIMED_OUT, f"{self._names()} did not deliver within the deadline.")
        for share in self._shares:
            if share.parts == len(self._arena.parts):
                continue
            running = share.running
            if not running:
                self._move(share)
            elif len(running) == 1 and (helper := self._helper(share, running[0], now)) is not None:
                self._begin_elsewhere(share, helper)

    def _move(self, share: _Share) -> None:
        """Ask another owner for a share that its owner has not given."""
        left = [i for i in range(len(self._leases)) if i not in self._failed]
        if not left:
            last = share.attempts[-1].transfer
            assert last is not None  # none runs
            raise ReadFailed(last.outcome, last.detail)
        if not self._begin_elsewhere(share, left[0]):
            raise ReadFailed(Outcome.TIMED_OUT, "no room in the arena to ask another owner for the rest.")

    def _begin_elsewhere(self, share: _Share, source: int) -> bool:
        try:
            landing = self._arena.allocate(share.stop - share.first)
        except ArenaFull:
            return False
        before = self._leases[share.attempts[-1].source].located.owner.worker
        owner = self._leases[source].located.owner.worker
        rest = len(self._arena.parts) - share.parts
        logger.warning(
            "%d blocks of %s: %d parts are missing from %s, now asked of %s",
            *(len(landing), self._leases[0].located.segment.key, rest, before, owner),
        )
        self.moved += 1
        self._begin(share, source, landing)
        return True

    def _helper(self, share: _Share, attempt: _Attempt, now: float) -> int | None:
        """An owner that has given all that was asked of it and would give this share much sooner."""
        elapsed = now - attempt.began
        if elapsed < _SLOW_AT_LEAST_S:
            return None
        for other in self._shares:
            for done in other.attempts:
                ended = done.transfer
                if ended is None or done.source == attempt.source or done.source in self._failed:
                    continue
                blocks = share.stop - share.first
                again_s = ended.seconds * blocks / max(1, other.stop - other.first)
                rest = len(self._arena.parts) - share.parts
                rest_s = elapsed * rest / share.parts if share.parts else float("inf")
                if ended.outcome is Outcome.PULLED and rest_s > _SLOW * again_s:
                    return done.source
        return None

    def _close(self) -> None:
        """After it nobody writes into the destination any more."""
        with self._changed:
            self._closed = True
        for share in self._shares:
            with share.lock:
                pass  # whoever was copying has finished

    def _told(self, outcome: Outcome, detail: str, seconds: float) -> Transfer:
        first = self._leases[0]
        with self._changed:
            shares = tuple(_share_told(a, first) for share in self._shares for a in share.attempts)
        backends = dict.fromkeys(t.backend for t in shares if t.nbytes)
        return Transfer(
            source=first.located.owner.worker,
            destination=first.holder,
            backend="+".join(backends) or "none",
            nbytes=lease_nbytes(first) if outcome is Outcome.PULLED else 0,
            blocks=len(self._into),
            seconds=seconds,
            outcome=outcome,
            detail=detail,
            shares=shares,
        )

    def _names(self) -> str:
        return " and ".join(lease.located.owner.worker for lease in self._leases)

    # -- threads of the attempts -------------------------------------------------------------------------

    def _begin(self, share: _Share, source: int, landing: list[BlockId]) -> None:
        """The caller holds `_changed`."""
        lease = self._leases[source]
        own = lease.part(share.first, share.stop)
        backend = self._chosen(lease.located.owner)
        attempt = _Attempt(share, own, source, backend, landing, time.monotonic())
        share.attempts.append(attempt)
        name = f"relay-share-{lease.located.owner.worker}"
        threading.Thread(target=self._attempt, args=(attempt,), name=name, daemon=True).start()

    def _attempt(self, attempt: _Attempt) -> None:
        """One attempt from beginning to end. Never raises."""
        try:
            transfer = self._pull(
                attempt.lease,
                attempt.landing,
                timeout_s=self._deadline - time.monotonic(),
                lease_deadline=self._ends,
                on_part=lambda part: self._landed(attempt, part),
            )
        except _Enough:
            transfer = _ended(attempt, Outcome.PULLED, "")
        except Exception as error:  # noqa: BLE001 - a fault of a backend costs this attempt, not the pull
            logger.warning("an attempt at %s broke: %r", attempt.lease.located.segment.key, error)
            transfer = _ended(attempt, Outcome.PEER_GONE, repr(error))
        if transfer.outcome is not Outcome.TIMED_OUT:  # else the backend has quarantined them
            try:
                self._arena.free(attempt.landing)
            except ValueError as error:
                logger.warning("landing blocks were not given back: %s", error)
        with self._changed:
            attempt.transfer = transfer
            if transfer.outcome is not Outcome.PULLED:
                self._failed[attempt.source] = transfer
            self._changed.notify_all()
            closed = self._closed
        if closed and self._result is not None and self._arena.faults is not None:
            # The last word on this pull is not how its slowest owner ended.
            self._arena.faults.ended(self._leases[0], self._result)

    def _landed(self, attempt: _Attempt, part: int) -> None:
        """A part of a share is here and verified: copy it to its place, unless it is there already."""
        share, every = attempt.share, len(self._arena.parts)
        with share.lock:
            if self._closed:
                raise _Enough
            if part == share.parts:
                start, stop = self._arena.part_range(part)
                start = max(start, HEADER_NBYTES)  # the header of the destination stays its own
                for here, place in zip(attempt.landing, self._into[share.first : share.stop], strict=True):
                    _copy(self._arena, here, place, start, stop)
                with self._changed:
                    attempt.nbytes += (stop - start) * len(attempt.landing)
                    share.parts += 1
                    attempt.finished = share.parts == every
                    self._changed.notify_all()
            if share.parts == every and part + 1 < every:
                raise _Enough


def lease_nbytes(lease: Lease) -> int:
    """Payload bytes of what is leased."""
    return lease.located.segment.nbytes


def _divide(blocks: int, owners: int) -> list[_Share]:
    """Equal runs of blocks, one for each owner that gets any."""
    owners = max(1, min(owners, blocks))
    bounds = [blocks * i // owners for i in range(owners + 1)]
    return [_Share(a, b) for a, b in itertools.pairwise(bounds)]


def _copy(arena: Arena, here: BlockId, place: BlockId, start: int, stop: int) -> None:
    view = arena.landing(place, start, stop)
    # numpy lets other threads run while it copies
    np.copyto(np.frombuffer(view, dtype=np.uint8), np.frombuffer(arena.outgoing(here, start, stop), np.uint8))
    arena.landed(place, view, start)


def _ended(attempt: _Attempt, outcome: Outcome, detail: str) -> Transfer:
    return Transfer(
        source=attempt.lease.located.owner.worker,
        destination=attempt.lease.holder,
        backend=attempt.backend,
        nbytes=attempt.nbytes,
        blocks=len(attempt.landing),
        seconds=time.monotonic() - attempt.began,
        outcome=outcome,
        detail=detail,
    )


def _share_told(attempt: _Attempt, first: Lease) -> Transfer:
    """What an owner gave; `nbytes` are those of its bytes that were used."""
    if attempt.transfer is None:
        if attempt.finished:  # its thread has yet to say so
            return replace(_ended(attempt, Outcome.PULLED, ""), destination=first.holder)
        return _ended(attempt, Outcome.TIMED_OUT, "given up: another owner was quicker")
    return replace(attempt.transfer, nbytes=attempt.nbytes, destination=first.holder)
