"""What a worker holds for the cluster: its published segments, their blocks, and who reads them here.

A segment that this worker itself reads is pinned: its blocks outlive an eviction until the last reader is
done. An evicted segment goes on into the spill, where there is one (see `spilling.py`), and whoever wants it
then asks this worker to promote it, which gives it new blocks.

    block:    allocated --sealed--> held --evicted--> free
                                     '--evicted while pinned--> doomed --last pin gone--> free
    segment:  published --evicted--> spilled --promoted--> published
                           '-> lost     '--out of room, damaged, published anew--> lost

Knows nothing of prompts or methods, nor how segments are found and pulled.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from transport.arena import Arena
from transport.base import KVDirectory
from transport.errors import ArenaFull, DirectoryUnavailable, RelayError
from transport.settings import SpillSettings
from transport.types import BlockId, BlockRef, Owner, Segment, SegmentKey
from workers.layout import BlockViews, KVLayout
from workers.spilling import NotSpilled, Spilling

log = logging.getLogger(__name__)

Blocks = tuple[BlockRef, ...]
"""Names one copy of a segment in the own arena: freed blocks never come back under the same generation."""


class Cause(StrEnum):
    """Why a segment left a tier against nobody's wish, for counting."""

    LRU = "lru"
    """The arena had no room, and it was the least recently used."""
    CONSUMED = "consumed"
    """The arena had no room, and all its expected readers had read it. It is not spilled."""
    OPERATOR = "operator"
    """A person wanted it gone."""
    SPILL = "spill"
    """The spill gave it up: no room, or its bytes are damaged."""


class Holding:
    """The writing half of one worker's store. Thread-safe.

    Args:
        spill: tiers behind the arena; None: what is evicted is lost.
    """

    def __init__(
        self,
        owner: Owner,
        layout: KVLayout,
        arena: Arena,
        directory: KVDirectory,
        spill: SpillSettings | None = None,
    ) -> None:
        self._owner = owner
        self._layout = layout
        self._arena = arena
        self._directory = directory
        self._held: dict[SegmentKey, Segment] = {}
        self._pins: Counter[Blocks] = Counter()
        self._doomed: set[Blocks] = set()
        self._evictions: Counter[Cause] = Counter()
        self._backpressure = 0
        self._promotions = 0
        self._not_promoted: Counter[str] = Counter()
        # Guards all of the above. Never held over a call to the directory or the spill: the heartbeat calls
        # `segments` under the client's own lock.
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._adopted = 0
        self._open_blocks = 0
        self._copies: dict[SegmentKey, Segment] = {}
        settings = spill or SpillSettings()
        self._promote_timeout_s = settings.promote_timeout_s
        self._spilling = Spilling(owner, arena, directory, settings, self._spill_lost)

    # -- publishing ----------------------------------------------------------------------------------------

    def publish(
        self,
        key: SegmentKey,
        fill: Callable[[Sequence[BlockViews]], None],
        *,
        start: int,
        num_tokens: int,
        producer: str,
        variant: str = "",
        consumers: int = 0,
        first: Blocks = (),
    ) -> Segment:
        """Let `fill` write the segment's blocks, seal them, then enter them in the directory. Publishing a
        key that this worker holds already changes nothing but the number of expected readers, unless what it
        holds was made over rectified KV and the new one was not: then the new one takes its place.

        Args:
            fill: writes KV, checkpoint and mass of all tokens into the given blocks, and zeros behind them.
            start: position of the first token.
            consumers: readers that are expected; 0: unknown.
            first: sealed blocks with which the segment begins, and which `fill` is not given; they are this
                method's to hold or to free, however it ends.

        Raises:
            ArenaFull: no room even after eviction; nothing was published.
            DirectoryUnavailable: no shard took it; what may have been entered all the same is retracted.
            WorkerLost: a newer life of this worker has taken its name; nothing was published.
        """
        # One publish at a time: two requests that computed the same tokens must not both enter them.
        with self._publishing:
            held = self._better(key, variant)
            if held is not None:
                self.free([b.block for b in first])
                return self._expect(held, consumers)
            blocks = [b.block for b in first]
            try:
                rest = self._room_to_publish(self._layout.blocks_for(num_tokens) - len(first))
                blocks += rest
                payloads = [self._arena.payload(b) for b in rest]
                for payload in payloads:
                    self._layout.clear_gaps(payload)
                if rest:
                    fill([self._layout.views(payload) for payload in payloads])
                segment = Segment(
                    key=key,
                    num_tokens=num_tokens,
                    start=start,
                    blocks=(*first, *(self._arena.seal_all(rest) if rest else ())),
                    variant=variant,
                    layout=self._layout.fingerprint,
                    producer=producer,
                    consumers=consumers,
                )
            except BaseException:
                self.free(blocks)
                raise
            self._spilling.drop(key)
            self._enter(segment)
            return segment

    def _better(self, key: SegmentKey, variant: str) -> Segment | None:
        """What is held and at least as good as a new `variant`; a spilled one that is better comes back."""
        with self._lock:
            held = self._held.get(key)
        if held is None and "~" in variant:
            spilled = self._spilling.get(key)
            if spilled is not None and not spilled.rectified:
                held = self._bring_back(key)
        return held if held is not None and (not held.rectified or "~" in variant) else None

    def _room_to_publish(self, blocks: int) -> list[BlockId]:
        try:
            return self.allocate(blocks)
        except ArenaFull:
            with self._lock:
                self._backpressure += 1
            raise

    def _expect(self, held: Segment, consumers: int) -> Segment:
        """Expect more readers of what is held already."""
        if not consumers or not held.consumers:
            return held  # not known to whom else it matters
        more = replace(held, consumers=held.consumers + consumers)
        with self._lock:
            if self._held.get(held.key) is not held:
                return held
            self._held[held.key] = more
        try:
            self._directory.publish(self._owner, [more])
        except RelayError as error:
            log.warning("the directory does not hear of more readers of %s: %s", held.key, error)
        with self._lock:
            evicted = self._held.get(held.key) is not more
        if evicted:
            self._retract(more)
        return more

    def _enter(self, segment: Segment) -> None:
        # Held before it is published, so that a shard that restarts in between hears of it again; pinned,
        # so that whoever evicts what that shard heard does not free blocks that are being published.
        with self._lock:
            worse = self._held.get(segment.key)
            self._held[segment.key] = segment
            self._pins[segment.blocks] += 1
        try:
            self._directory.publish(self._owner, [segment])
            with self._lock:
                evicted = self._held.get(segment.key) is not segment
            if evicted:
                self._retract(segment)
                self._spilling.drop(segment.key)
        except BaseException:
            with self._lock:
                self._held.pop(segment.key, None)
                self._doomed.add(segment.blocks)
            # A shard that did not answer in time may have entered it all the same.
            self._retract(segment)
            raise
        finally:
            if worse is not None:
                self._retract(worse)
                with self._lock:
                    self._pins[worse.blocks] += 1
                    self._doomed.add(worse.blocks)
            self.unpin([segment.blocks, *([] if worse is None else [worse.blocks])])

    def _retract(self, segment: Segment) -> None:
        try:
            self._directory.retract(self._owner, [segment])
        except Exception as error:  # noqa: BLE001 - best effort: a copy that stays behind reads as stale
            log.warning("%s may stay in the directory without its blocks: %r", segment.key, error)

    def withdraw(self, key: SegmentKey) -> None:
        """Take back what this worker has published under `key`, if anything; readers that hold a lease find
        it stale. Never raises."""
        with self._lock:
            held = self._held.get(key)
        if held is not None:
            self._retract(held)
            self._forget(held, None)
        self._spilling.drop(key)

    def segments(self) -> list[Segment]:
        """All that this worker holds, spilled or not: what a restarted directory shard must hear again."""
        spilled = self._spilling.segments()
        with self._lock:
            return [*self._held.values(), *(s for s in spilled if s.key not in self._held)]

    # -- copies ------------------------------------------------------------------------------------------

    def adopt(self, segment: Segment, blocks: Sequence[BlockId]) -> Segment | None:
        """Hold blocks into which another owner's segment has been pulled, pinned for whoever pulled it until
        `unpin`; `enter_copy` tells the directory. It counts as read by all its readers already, so that it is
        evicted before everything else, and never spilled: it costs only room that nobody needs.

        Returns:
            The copy; None when this worker holds something under that key, and the blocks stay the caller's.
        """
        if self._spilling.get(segment.key) is not None:
            return None
        refs = tuple(
            # The payload was verified against these checksums.
            replace(ref, block=block, generation=self._arena.generation(block))
            for block, ref in zip(blocks, segment.blocks, strict=True)
        )
        copy = replace(segment, blocks=refs, consumers=1, reads=1)
        with self._lock:
            if segment.key in self._held:
                return None
            self._held[segment.key] = copy
            self._pins[refs] += 1
            self._adopted += 1
            self._copies = {k: s for k, s in self._copies.items() if self._held.get(k) is s}
            self._copies[segment.key] = copy
        return copy

    def withdraw_copies(self, keys: Iterable[SegmentKey]) -> None:
        """Take back those of `keys` that are only copies: who measures a pull wants to pull again."""
        for key in keys:
            with self._lock:
                copy = self._copies.pop(key, None)
                held = copy is not None and self._held.get(key) is copy
            if held:
                self.withdraw(key)

    def enter_copy(self, copy: Segment) -> None:
        """Tell the directory of an adopted copy, or stop holding it where that fails. Never raises for a
        fault of the cluster."""
        if not self.pin(copy):
            return  # evicted or replaced already
        try:
            self._directory.publish(self._owner, [copy])
        except RelayError as error:
            log.warning("a copy of %s is not offered to others: %s", copy.key, error)
            with self._lock:
                if self._held.get(copy.key) is copy:
                    del self._held[copy.key]
                    self._doomed.add(copy.blocks)
        with self._lock:
            gone = self._held.get(copy.key) is not copy
        if gone:
            self._retract(copy)
        self.unpin([copy.blocks])

    # -- room ----------------------------------------------------------------------------------------------

    def allocate(self, blocks: int) -> list[BlockId]:
        """Blocks from the arena; evicts segments of this worker if need be.

        Raises:
            ArenaFull: no room even after eviction.
        """
        try:
            return self._arena.allocate(blocks)
        except ArenaFull:
            self.evict(blocks)
            return self._arena.allocate(blocks)

    def evict(self, blocks: int) -> None:
        """Give up unleased segments of this worker, `blocks` blocks or all there are: those that all expected
        readers have read, then the least recently used. The blocks of one that is being read here are free
        only after its last reader, and do not count."""
        gone, left = 0, blocks
        while left > 0:
            try:
                segments = self._directory.evict(self._owner, nbytes=left * self._layout.block_nbytes)
            except RelayError as error:
                log.warning("nothing can be evicted while the directory is down: %s", error)
                return
            if not segments:
                break
            gone += len(segments)
            left -= self.drop(segments)
        log.info("evicted %d segments to make room for %d blocks", gone, blocks)

    def drop(self, segments: Sequence[Segment], *, operator: bool = False) -> int:
        """Stop holding what has left the directory, which is spilled if it may be wanted again.

        Args:
            operator: a person wanted them gone: they are not spilled.

        Returns:
            The number of blocks that this has freed.
        """
        freed = 0
        spilled: list[Segment] = []
        for segment in segments:
            cause = Cause.OPERATOR if operator else Cause.CONSUMED if segment.consumed else Cause.LRU
            count, copy = self._forget(segment, cause)
            freed += count
            spilled += [] if copy is None else [copy]
        self._spilling.enter(spilled, self._holds)
        return freed

    def _forget(self, segment: Segment, cause: Cause | None) -> tuple[int, Segment | None]:
        """(blocks freed, what was spilled)."""
        if segment.spilled:
            if self._spilling.drop(segment.key):
                self._count(cause)
            return 0, None
        with self._lock:
            held = self._held.get(segment.key)
            if held is None or held.blocks != segment.blocks:
                return 0, None  # a copy of an earlier publish, whose blocks are free already
            del self._held[segment.key]
        self._count(cause)
        # Its blocks stay in use, and so unchanged, until they are copied.
        copy = self._spilling.copy_out(segment) if cause is Cause.LRU else None
        with self._lock:
            if self._pins[segment.blocks]:
                self._doomed.add(segment.blocks)
                return 0, copy
        return self.free([b.block for b in segment.blocks]), copy

    def _count(self, cause: Cause | None) -> None:
        if cause is not None:
            with self._lock:
                self._evictions[cause] += 1

    def free(self, blocks: Iterable[BlockId]) -> int:
        """Return blocks to the arena; how many it took. Never raises: one that is not in use, because a
        backend has quarantined it or by a mistake of ours, is logged and left alone, and the others are
        freed."""
        freed = 0
        for block in blocks:
            try:
                self._arena.free([block])
                freed += 1
            except ValueError as error:
                log.warning("a block was not given back: %s", error)
        return freed

    def count_open(self, blocks: int) -> None:
        """So many blocks more (or fewer) are of answers that are written, here or elsewhere."""
        with self._lock:
            self._open_blocks += blocks

    # -- reading here --------------------------------------------------------------------------------------

    def pin(self, segment: Segment) -> bool:
        """Keep the blocks of this very copy until `unpin`, even when its lease ends or it is evicted. False
        when this worker does not hold it any more."""
        with self._lock:
            held = self._held.get(segment.key)
            if held is None or held.blocks != segment.blocks:
                return False
            self._pins[segment.blocks] += 1
            return True

    def unpin(self, pins: Iterable[Blocks]) -> None:
        """Undo `pin`, once for each entry; the last one frees the blocks of what was evicted meanwhile."""
        ready: list[Blocks] = []
        with self._lock:
            for blocks in pins:
                self._pins[blocks] -= 1
                if self._pins[blocks] > 0:
                    continue
                del self._pins[blocks]
                if blocks in self._doomed:
                    self._doomed.remove(blocks)
                    ready.append(blocks)
        for blocks in ready:
            self.free([b.block for b in blocks])

    # -- the spill -----------------------------------------------------------------------------------------

    def promote(self, keys: Sequence[SegmentKey]) -> frozenset[SegmentKey]:
        """Bring spilled segments back into the arena, for whoever is about to lease them. May read a disk,
        and may evict others. Never raises for a fault of the cluster or the disk.

        Returns:
            Those of `keys` that are in the arena now.
        """
        deadline = time.monotonic() + self._promote_timeout_s
        return frozenset(key for key in keys if self._promote(key, deadline))

    def flush(self, timeout_s: float) -> bool:
        """See `Spill.flush`."""
        return self._spilling.flush(timeout_s)

    def _promote(self, key: SegmentKey, deadline: float) -> bool:
        # A publish that goes on meanwhile waits for the engine.
        if not self._publishing.acquire(timeout=max(0.0, deadline - time.monotonic())):
            self._count_failure("busy")
            return False
        try:
            return self._holds(key) or self._bring_back(key) is not None
        finally:
            self._publishing.release()

    def _bring_back(self, key: SegmentKey) -> Segment | None:
        """Promote one segment; `_publishing` is held. None, and counted, when that cannot be done."""
        try:
            segment = self._spilling.copy_in(key, self.allocate)
            self._enter(segment)
        except NotSpilled as error:
            log.info("%s was not promoted: %s", key, error)
            self._count_failure(error.reason)
            return None
        except ArenaFull:
            self._count_failure("arena_full")
            return None
        except RelayError as error:
            log.warning("%s was not promoted: %s", key, error)
            self._count_failure("directory_down" if isinstance(error, DirectoryUnavailable) else "refused")
            return None
        self._spilling.promoted(segment)
        with self._lock:
            self._promotions += 1
        return segment

    def _holds(self, key: SegmentKey) -> bool:
        with self._lock:
            return key in self._held

    def _spill_lost(self, segments: Sequence[Segment]) -> None:
        for _ in segments:
            self._count(Cause.SPILL)

    def _count_failure(self, reason: str) -> None:
        with self._lock:
            self._not_promoted[reason] += 1

    # -- facts and end -------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """What is where, and what became of the rest; see docs/memory.md."""
        arena = self._arena.stats()
        spill = self._spilling.stats()
        with self._lock:
            held = sum(len(s.blocks) for s in self._held.values())
            doomed = sum(len(blocks) for blocks in self._doomed)
            tier = {
                "segments": len(self._held),
                "bytes": held * arena.block_nbytes,
                "budget_bytes": arena.nbytes,
            }
            return {
                **spill,
                "tiers": {"arena": tier, **spill["tiers"]},
                "pins": sum(self._pins.values()),
                "held_blocks": held,
                "doomed_blocks": doomed,
                "open_blocks": self._open_blocks,
                "landing_blocks": max(0, arena.used - held - doomed - self._open_blocks),
                "quarantined_blocks": arena.quarantined,
                "evictions": {cause.value: self._evictions[cause] for cause in Cause},
                "backpressure": self._backpressure,
                "promotions": self._promotions,
                "adopted": self._adopted,
                "not_promoted": dict(self._not_promoted),
            }

    def close(self) -> None:
        """Forget what is spilled and remove its files. Idempotent."""
        self._spilling.close()
