"""What every backend's pull has in common: lease check -> read -> verify -> commit -> report.

A backend supplies only `read`, which moves header + payload bytes or raises `ReadFailed`. This module does
not know how bytes travel.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from transport.arena import Arena
from transport.types import BlockId, Lease, Outcome, Transfer

logger = logging.getLogger(__name__)

Read = Callable[[Lease, Sequence[BlockId], float], None]
"""(lease, destination blocks, time.monotonic() deadline) -> None, or ReadFailed."""


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
) -> Transfer:
    """Run one pull around a backend's `read`.

    Args:
        timeout_s: deadline of the read, in seconds from now.
        lease_deadline: time.monotonic() instant at which the lease ends, counted by the caller from before
            its lease request. None: `lease.ttl_s` from now.

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
        if arena.faults is not None:
            arena.faults.before_read(arena, lease, into, deadline=start + timeout_s)
        read(lease, into, start + timeout_s)
        if arena.faults is not None:
            arena.faults.after_read(arena, lease, into, ends=ends)
        _verify(arena, lease, into)
        _check_after(lease, ends)
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


def _check_before(arena: Arena, lease: Lease, now: float, ends: float) -> None:
    if now >= ends:
        raise ReadFailed(
            Outcome.LEASE_EXPIRED, f"the lease of {lease.ttl_s:g} s ended {now - ends:.3f} s before the pull."
        )
    for ref in lease.located.segment.blocks:
        if ref.nbytes != arena.block_nbytes:
            raise ReadFailed(
                Outcome.LAYOUT_MISMATCH,
                f"blocks of {lease.located.owner.worker} hold {ref.nbytes} bytes, ours {arena.block_nbytes}. "
                "Use one model, dtype and transport.block_tokens on both workers.",
            )


def _check_after(lease: Lease, ends: float) -> None:
    late = time.monotonic() - ends
    if late > 0:
        raise ReadFailed(
            Outcome.LEASE_EXPIRED,
            f"the lease of {lease.ttl_s:g} s ended {late:.3f} s before the bytes were verified. "
            "Raise directory.lease_ttl_s.",
        )


def _verify(arena: Arena, lease: Lease, into: Sequence[BlockId]) -> None:
    owner = lease.located.owner
    for block, ref in zip(into, lease.located.segment.blocks, strict=True):
        verdict = arena.verify(block, ref, owner.incarnation)
        if verdict is not Outcome.PULLED:
            raise ReadFailed(
                verdict,
                f"block {ref.block} of {owner.worker} (generation {ref.generation}) "
                f"is {verdict.value} after the read.",
            )
