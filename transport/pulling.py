"""What every backend's pull has in common: lease check -> read -> verify -> hand over -> report.

A backend supplies only `read`, which moves header + payload bytes, part by part, and says what has landed. It
keeps the next read in flight while it says so, and that is the time in which the bytes that have landed are
verified and handed over. This module does not know how bytes travel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

from transport.arena import Arena
from transport.helping import Helped
from transport.types import BlockId, BlockRef, Lease, Outcome, Transfer

logger = logging.getLogger(__name__)


class Landed(NamedTuple):
    """One part of the destination blocks into[first:stop] has been read, or can be by any thread.

    Attributes:
        fetch: reads them now; to be called once. None: they are there. Raises ReadFailed, and TimeoutError
            after the read's deadline; nothing else writes into the destination.
    """

    part: int
    first: int
    stop: int
    fetch: Callable[[], None] | None = None

    def fetched(self) -> Landed:
        """The same, there."""
        if self.fetch is None:
            return self
        self.fetch()
        return self._replace(fetch=None)


Reading = Generator[Landed, None, None]
"""A read in progress. It yields part 0 of all blocks in order, then part 1, and so on; closing it early ends
the read. Both raise ReadFailed. Once it has ended, nothing writes into the destination any more, or it has
ended in TIMED_OUT."""
Read = Callable[[Lease, Sequence[BlockId], float], Reading]
"""(lease, destination blocks, time.monotonic() deadline) -> what lands."""
OnPart = Callable[[int], None]
"""Called with the number of a part once all its bytes have been verified."""


class ReadFailed(Exception):
    """A read that did not land. Never leaves the transport room: it becomes a Transfer.

    After TIMED_OUT the backend has already quarantined the destination blocks.
    """

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail


def run_pull(
    backend: str,
    arena: Arena,
    lease: Lease,
    into: Sequence[BlockId],
    read: Read,
    *,
    timeout_s: float,
    lease_deadline: float | None,
    on_part: OnPart | None = None,
) -> Transfer:
    """Run one pull around a backend's `read`.

    Args:
        timeout_s: deadline of the read, in seconds from now.
        lease_deadline: time.monotonic() instant at which the lease ends, counted by the caller from before
            its lease request. None: `lease.ttl_s` from now.
        on_part: see `transport.base.Transport.pull`. What it raises ends the read and comes out of here.

    Raises:
        ValueError: `into` has another length than the segment, which is the caller's mistake.
    """
    segment = lease.located.segment
    if len(into) != len(segment.blocks):
        raise ValueError(f"{segment.key}: {len(segment.blocks)} blocks, but {len(into)} destinations")
    start = time.monotonic()
    ends = start + lease.ttl_s if lease_deadline is None else lease_deadline
    try:
        _check_before(arena, lease, start, ends)
        reading = read(lease, into, start + timeout_s)
        if arena.faults is not None:
            reading = arena.faults.disturb(arena, lease, into, reading, deadline=start + timeout_s, ends=ends)
        with closing(reading):
            for part in landed_parts(arena, lease, into, reading):
                _check_lease(lease, ends)
                if on_part is not None:
                    on_part(part)
        outcome, detail = Outcome.PULLED, ""
    except ReadFailed as failed:
        outcome, detail = failed.outcome, failed.detail
        logger.warning("pull of %s over %s: %s: %s", segment.key, backend, outcome.value, detail)
    transfer = Transfer(
        source=lease.located.owner.worker,
        destination=lease.holder,
        backend=backend,
        nbytes=segment.nbytes if outcome is Outcome.PULLED else 0,
        blocks=len(into),
        seconds=time.monotonic() - start,
        outcome=outcome,
        detail=detail,
    )
    if arena.faults is not None:
        arena.faults.ended(lease, transfer)
    return transfer


def time_out(arena: Arena, into: Sequence[BlockId], detail: str) -> ReadFailed:
    """For backends that cannot be written late (the reading thread itself writes): blocks are
    quarantined as the contract says, and set free at once."""
    arena.quarantine(into)
    arena.release_quarantine(into)
    return ReadFailed(Outcome.TIMED_OUT, detail)


def plan_steps(arena: Arena, blocks: int, step_bytes: int, most_blocks: int) -> list[Landed]:
    """In which steps a backend reads `blocks` blocks: part by part, and of each part as many blocks at once
    as make up `step_bytes`, at least one and at most `most_blocks`."""
    steps: list[Landed] = []
    for part in range(len(arena.parts)):
        start, stop = arena.part_range(part)
        at_once = min(most_blocks, max(1, step_bytes // (stop - start)))
        steps.extend(Landed(part, at, min(blocks, at + at_once)) for at in range(0, blocks, at_once))
    return steps


def check_headers(arena: Arena, lease: Lease, into: Sequence[BlockId]) -> None:
    """Judge headers that have landed.

    Raises:
        ReadFailed: STALE, CORRUPT or LAYOUT_MISMATCH.
    """
    owner = lease.located.owner
    refs = lease.located.segment.blocks
    for ref, verdict in zip(refs, arena.verify_headers(into, refs, owner.incarnation), strict=True):
        expect_pulled(verdict, ref, lease)


def _check_before(arena: Arena, lease: Lease, now: float, ends: float) -> None:
    owner = lease.located.owner
    if now >= ends:
        raise ReadFailed(
            Outcome.LEASE_EXPIRED, f"the lease of {lease.ttl_s:g} s ended {now - ends:.3f} s before the pull."
        )
    for ref in lease.located.segment.blocks:
        if not arena.fits(ref):
            raise ReadFailed(
                Outcome.LAYOUT_MISMATCH,
                f"blocks of {owner.worker} hold {ref.nbytes} bytes in {len(ref.checksums)} parts, ours "
                f"{arena.block_nbytes} in {len(arena.parts)}. Use one model, dtype and "
                "transport.block_tokens on both workers.",
            )


def _check_lease(lease: Lease, ends: float) -> None:
    late = time.monotonic() - ends
    if late > 0:
        raise ReadFailed(
            Outcome.LEASE_EXPIRED,
            f"the lease of {lease.ttl_s:g} s ended {late:.3f} s before the bytes were verified. "
            "Raise directory.lease_ttl_s.",
        )


def landed_parts(
    arena: Arena, lease: Lease, into: Sequence[BlockId], reading: Reading, *, verify: bool = True
) -> Iterator[int]:
    """Read, verify, and yield each part when all its blocks are the sealed ones.

    Args:
        verify: False: only read, for measuring.

    Raises:
        ReadFailed: they are not, or the read failed.
    """

    # A launch costs more than the sums of many blocks: on a device, a part is verified as a whole.
    piecewise = verify and not arena.on_device

    def settle(landed: Landed) -> None:
        here = landed.fetched()
        if piecewise:
            _verify(arena, lease, into, here)

    ready = 0
    try:
        with Helped() as helped:
            for landed in reading:
                if landed.stop < len(into):
                    if landed.fetch is not None or piecewise:
                        helped.add(partial(settle, landed))  # while the next step is fetched, or travels
                    continue
                settle(landed)
                helped.wait()
                if verify and not piecewise:
                    _verify(arena, lease, into, Landed(landed.part, 0, len(into)))
                yield landed.part
                ready += 1
    except TimeoutError as fault:  # of a `fetch`: nothing runs any more that could write
        raise time_out(arena, into, f"{lease.located.owner.worker}: {fault}") from fault
    if into and ready != len(arena.parts):
        raise RuntimeError(f"a backend read {ready} parts of {len(arena.parts)} and said that it was done")


def _verify(arena: Arena, lease: Lease, into: Sequence[BlockId], landed: Landed) -> None:
    here = slice(landed.first, landed.stop)
    blocks, refs = into[here], lease.located.segment.blocks[here]
    for ref, verdict in arena.verify_landed(blocks, refs, landed.part, lease.located.owner.incarnation):
        expect_pulled(verdict, ref, lease)


def expect_pulled(verdict: Outcome, ref: BlockRef, lease: Lease) -> None:
    """Raises ReadFailed: the verdict on a block is another."""
    if verdict is not Outcome.PULLED:
        raise ReadFailed(
            verdict,
            f"block {ref.block} of {lease.located.owner.worker} (generation {ref.generation}) "
            f"is {verdict.value} after the read.",
        )
