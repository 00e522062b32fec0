"""What a worker holds for the cluster: its published segments, their blocks, and who reads them here.

A segment that this worker itself reads is pinned: its blocks outlive an eviction until the last reader is
done.

    block:  allocated --sealed--> held --evicted--> free
                                   '--evicted while pinned--> doomed --last pin gone--> free

Knows nothing of prompts or methods, nor how segments are found and pulled.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from transport.arena import Arena
from transport.base import KVDirectory
from transport.errors import ArenaFull, RelayError
from transport.types import BlockId, BlockRef, Owner, Segment, SegmentKey
from workers.layout import BlockViews, KVLayout

log = logging.getLogger(__name__)

Blocks = tuple[BlockRef, ...]
"""Names one copy of a segment in the own arena: freed blocks never come back under the same generation."""


class Holding:
    """The writing half of one worker's store. Thread-safe."""

    def __init__(self, owner: Owner, layout: KVLayout, arena: Arena, directory: KVDirectory) -> None:
        self._owner = owner
        self._layout = layout
        self._arena = arena
        self._directory = directory
        self._held: dict[SegmentKey, Segment] = {}
        self._pins: Counter[Blocks] = Counter()
        self._doomed: set[Blocks] = set()
        # Guards the three above. Never held over a directory call: the heartbeat calls `segments` under the
        # client's own lock.
        self._lock = threading.Lock()
        self._publishing = threading.Lock()

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
    ) -> Segment:
        """Let `fill` write the segment's blocks, seal them, then enter them in the directory. Publishing a
        key that this worker holds already changes nothing, unless what it holds was made over rectified KV
        and the new one was not: then the new one takes its place.

        Args:
            fill: writes KV, checkpoint and mass of all tokens into the given blocks, and zeros behind them.
            start: position of the first token.

        Raises:
            ArenaFull: no room even after eviction; nothing was published.
            DirectoryUnavailable: no shard took it; what may have been entered all the same is retracted.
            WorkerLost: a newer life of this worker has taken its name; nothing was published.
        """
        # One publish at a time: two requests that computed the same tokens must not both enter them.
        with self._publishing:
            with self._lock:
                held = self._held.get(key)
            if held is not None and (not held.rectified or "~" in variant):
                return held
            blocks = self.allocate(self._layout.blocks_for(num_tokens))
            try:
                fill([self._layout.views(self._arena.payload(b)) for b in blocks])
                segment = Segment(
                    key=key,
                    num_tokens=num_tokens,
                    start=start,
                    blocks=tuple(self._arena.seal(b) for b in blocks),
                    variant=variant,
                    layout=self._layout.fingerprint,
                    producer=producer,
                )
            except BaseException:
                self.free(blocks)
                raise
            self._enter(segment)
            return segment

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
            self._forget(held)

    def segments(self) -> list[Segment]:
        """All that this worker holds: what a restarted directory shard must hear again."""
        with self._lock:
            return list(self._held.values())

    # -- room ----------------------------------------------------------------------------------------------

    def allocate(self, blocks: int) -> list[BlockId]:
        """Blocks from the arena, evicting this worker's least recently used unleased segments if need be.

        Raises:
            ArenaFull: no room even after eviction.
        """
        try:
            return self._arena.allocate(blocks)
        except ArenaFull:
            self.evict(blocks)
            return self._arena.allocate(blocks)

    def evict(self, blocks: int) -> None:
        """Give up least recently used unleased segments of this worker, `blocks` blocks or all there are. The
        blocks of one that is being read here are free only after its last reader, and do not count."""
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
            left -= sum(self._forget(s) for s in segments)
        log.info("evicted %d segments to make room for %d blocks", gone, blocks)

    def _forget(self, segment: Segment) -> int:
        """Stop holding what has left the directory; the number of blocks that this has freed."""
        with self._lock:
            held = self._held.get(segment.key)
            if held is None or held.blocks != segment.blocks:
                return 0  # a copy of an earlier publish, whose blocks are free already
            del self._held[segment.key]
            if self._pins[segment.blocks]:
                self._doomed.add(segment.blocks)
                return 0
        return self.free([b.block for b in segment.blocks])

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
