"""A worker's part of fault injection: what a test may do to it from outside, and what it tells of it.

Test mode only (RELAY_TEST_MODE=1); see `transport/faults.py`. Everything here goes through the same calls as
the product itself: no state is edited behind a component's back.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from transport.arena import Arena
from transport.base import KVDirectory
from transport.errors import ArenaFull
from transport.faults import FaultEvent, FaultKind, Faults, FaultSpec, require_test_mode
from workers.store import SegmentStore

log = logging.getLogger(__name__)

_FLUSH_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class FaultFacts:
    """What a worker looks like from inside.

    Attributes:
        events: of its faults since they were last cleared.
        used_blocks, quarantined_blocks: of its arena.
        held_blocks: of the segments that it holds in the arena; at rest the used ones, and no others.
    """

    events: tuple[FaultEvent, ...]
    used_blocks: int
    quarantined_blocks: int
    held_blocks: int


def inject(
    faults: Faults | None, spec: FaultSpec | None, store: SegmentStore, arena: Arena, directory: KVDirectory
) -> None:
    """Arm a fault, or do it at once where the worker itself is to do it. None: disarm everything, give up all
    that was published, and take shards that answer again as up; so the next trial begins like the first.

    Raises:
        ConfigError: not in test mode.
    """
    require_test_mode("inject")
    assert faults is not None  # there is one in test mode
    if spec is None:
        faults.clear()
        for segment in store.segments():
            store.withdraw(segment.key)
        directory.stats()  # who answers is no longer left alone
    elif spec.kind is FaultKind.REUSE:
        reuse_blocks(store, arena, directory)
    elif spec.kind is FaultKind.DISK_FULL:
        faults.arm(spec)
        spill_all(store)
    else:
        faults.arm(spec)


def fault_facts(faults: Faults | None, store: SegmentStore, arena: Arena) -> FaultFacts:
    """What has happened, and what is held.

    Raises:
        ConfigError: not in test mode.
    """
    require_test_mode("fault_facts")
    assert faults is not None  # there is one in test mode
    stats = arena.stats()
    held = sum(len(segment.blocks) for segment in store.segments() if not segment.spilled)
    return FaultFacts(faults.events(), stats.used, stats.quarantined, held)


def spill_all(store: SegmentStore) -> None:
    """Make room, as for something as large as all that this worker holds: what may be wanted again goes to
    the spill, and this waits until it has been written or lost."""
    store.evict(sum(len(segment.blocks) for segment in store.segments()))
    if not store.holding.flush(_FLUSH_S):
        log.warning("the spill has not been written within %.0f s", _FLUSH_S)


def reuse_blocks(store: SegmentStore, arena: Arena, directory: KVDirectory) -> int:
    """Free and reuse the blocks of everything that this worker has published, and leave the directory in the
    belief that they are still there: what a producer does that frees on a timer. Returns the segments."""
    segments = store.segments()
    for segment in segments:
        store.withdraw(segment.key)
    blocks = [ref.block for segment in segments for ref in segment.blocks]
    try:
        again = arena.allocate(len(blocks))
    except ArenaFull as error:  # some are still being read here
        log.warning("the freed blocks are not overwritten: %s", error)
        again = []
    for block in again:
        payload = arena.payload(block)
        payload.copy_(payload.flip(0))  # other bytes, and no pattern that a check could know
        arena.seal(block)
    arena.free(again)
    # Behind the retractions, which went to the same shards before.
    directory.publish(store.owner, segments)
    return len(segments)
