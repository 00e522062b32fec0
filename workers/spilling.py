"""Between a worker's arena, its spill and the directory: copies evicted segments out, and back in.

A spilled segment stays in the directory, marked as such, so that readers find it and can ask for it; nobody
can lease it. It names the blocks that it had, whose generations are over: a reader that took it for one in
the arena would find it stale.

Knows nothing of why segments are evicted, nor who wants them back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from transport.arena import Arena
from transport.base import KVDirectory
from transport.errors import RelayError
from transport.settings import SpillSettings
from transport.spill import Spill
from transport.spill_files import Payload
from transport.types import BlockId, BlockRef, Owner, Segment, SegmentKey

log = logging.getLogger(__name__)


class NotSpilled(Exception):
    """A segment cannot come back. reason: "not_here", or "damaged". Never leaves the worker."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Spilling:
    """Spills and brings back for one worker. Thread-safe.

    Args:
        settings: with no budget at all nothing is ever taken.
        on_lost: told of segments that the spill gave up by itself, after the directory was.
    """

    def __init__(
        self,
        owner: Owner,
        arena: Arena,
        directory: KVDirectory,
        settings: SpillSettings,
        on_lost: Callable[[Sequence[Segment]], None],
    ) -> None:
        self._owner = owner
        self._arena = arena
        self._directory = directory
        self._on_lost = on_lost
        self._spill = Spill(settings, owner.worker, owner.incarnation, self._lost, self._before_write)
        self._off = not settings.host_bytes and not settings.disk_bytes

    def get(self, key: SegmentKey) -> Segment | None:
        """A spilled segment, without its bytes."""
        return self._spill.get(key)

    def segments(self) -> list[Segment]:
        """All that is spilled."""
        return self._spill.segments()

    def copy_out(self, segment: Segment) -> Segment | None:
        """Copy a segment that is being evicted, and whose blocks are still in use, into the spill; None when
        it is not taken. Waits for no disk."""
        if self._off:
            return None
        spilled = replace(segment, spilled=True)
        payloads = [_read(self._arena.payload(b.block)) for b in segment.blocks]
        return spilled if self._spill.put(spilled, payloads) else None

    def enter(self, segments: Sequence[Segment], is_held: Callable[[SegmentKey], bool]) -> None:
        """Tell the directory what `copy_out` has taken. is_held: whether a key is in the arena by now."""
        if not segments:
            return
        try:
            self._directory.publish(self._owner, segments)
        except RelayError as error:
            # Nobody could find them.
            log.warning("%d spilled segments are given up: %s", len(segments), error)
            for segment in segments:
                self.drop(segment.key)
            return
        for segment in segments:
            if is_held(segment.key):  # published again meanwhile
                self._spill.drop(segment.key, only=segment)
            if self._spill.get(segment.key) is not segment:
                self._retract(segment)

    def copy_in(self, key: SegmentKey, allocate: Callable[[int], list[BlockId]]) -> Segment:
        """A spilled segment in new blocks, not yet entered in the directory. It stays here until `promoted`.

        Raises:
            NotSpilled: it is not here, or its bytes are not those that were published; the directory does
                not list it any more then.
            ArenaFull: from `allocate`.
        """
        loaded = self._spill.load(key)
        if loaded is None:
            self._forget_stray(key)
            raise NotSpilled("not_here", "it is not in the spill")
        spilled, payloads = loaded
        blocks = allocate(len(payloads))
        try:
            triples = zip(blocks, payloads, spilled.blocks, strict=True)
            refs = tuple(self._fill(block, payload, old) for block, payload, old in triples)
        except BaseException as error:
            self._arena.free(blocks)
            if isinstance(error, NotSpilled):
                self.drop(key)
            raise
        return replace(spilled, blocks=refs, spilled=False)

    def promoted(self, segment: Segment) -> None:
        """Forget the spilled form of a segment that `copy_in` has made and that is in the directory now."""
        spilled = self._spill.get(segment.key)
        # It may have been evicted, and so spilled, again.
        if spilled is not None and spilled.blocks != segment.blocks:
            self._spill.drop(segment.key, only=spilled)

    def drop(self, key: SegmentKey) -> bool:
        """Forget a segment, here and in the directory; whether it was here."""
        spilled = self._spill.drop(key)
        if spilled is not None:
            self._retract(spilled)
        return spilled is not None

    def stats(self) -> dict[str, Any]:
        """See `Spill.stats`."""
        spill = self._spill.stats()
        return {
            "tiers": spill["tiers"],
            "spills": spill["taken"],
            "disk_writes": spill["written"],
            "disk_reads": spill["read"],
            "disk_fault": spill["fault"],
            "lost": spill["lost"],
        }

    def flush(self, timeout_s: float) -> bool:
        """See `Spill.flush`."""
        return self._spill.flush(timeout_s)

    def close(self) -> None:
        """Forget everything and remove the files. Idempotent."""
        self._spill.close()

    # -- inside --------------------------------------------------------------------------------------------

    def _fill(self, block: BlockId, payload: Payload, old: BlockRef) -> BlockRef:
        """Write and seal a block, whose bytes must be those that were published as `old`."""
        _write(self._arena.payload(block), payload)
        ref = self._arena.seal(block)
        if ref != replace(old, block=ref.block, generation=ref.generation):
            raise NotSpilled("damaged", f"what was block {old.block} has changed")
        return ref

    def _before_write(self, nbytes: int) -> None:
        if self._arena.faults is not None:
            self._arena.faults.before_write(nbytes)

    def _lost(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self._retract(segment)
        self._on_lost(segments)

    def _forget_stray(self, key: SegmentKey) -> None:
        """The directory lists as spilled what is not: an answer of it was lost."""
        try:
            found = self._directory.lookup([key], near=self._owner.worker).get(key)
        except RelayError:
            return
        if found is not None and found.segment.spilled and found.owner.worker == self._owner.worker:
            self._retract(found.segment)

    def _retract(self, segment: Segment) -> None:
        try:
            self._directory.retract(self._owner, [segment])
        except Exception as error:  # noqa: BLE001 - best effort: who asks for it is told that it is not here
            log.warning("%s may stay in the directory as spilled: %r", segment.key, error)


def _read(payload: torch.Tensor) -> Payload:
    """A copy of a block's bytes, [block_nbytes], in ordinary memory."""
    return payload.cpu().numpy().copy()


def _write(payload: torch.Tensor, data: Payload) -> None:
    """Write `data` into a block's bytes, [block_nbytes]."""
    if payload.device.type == "cpu":
        # numpy: torch would share the copy out to threads, which then stay in the engine's way.
        payload.numpy()[:] = data
    else:
        payload.copy_(torch.from_numpy(data))
