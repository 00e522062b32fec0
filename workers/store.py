"""A worker's side of the relay: find, lease, pull and publish segments.

Sits between the engine's KV cache and the transport room. Segment bytes live in the worker's arena; a pulled
segment borrows landing blocks from the same arena until it has been scattered. Knows nothing of prompts or
methods.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from transport.arena import Arena
from transport.auto import AutoTransport
from transport.base import KVDirectory
from transport.errors import ArenaFull, DirectoryUnavailable
from transport.types import (
    BlockId,
    Lease,
    Located,
    Outcome,
    Owner,
    Segment,
    SegmentKey,
    Transfer,
)
from workers.layout import BlockViews, KVLayout
from workers.prefill import PulledSegment

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a wanted segment is not there. reason: an Outcome value, "not_found", "arena_full" or
    "directory_down"."""

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Acquired:
    """Segments in local memory, under lease until `SegmentStore.release`.

    Attributes:
        hits: what was pulled, by key.
        pulled: their bytes.
        transfers: every pull that was tried, in order.
        misses: keys that were wanted and are not there.
        lookup_s, lease_s, pull_s: where the time went.
    """

    hits: dict[SegmentKey, Located] = field(default_factory=dict[SegmentKey, Located])
    pulled: dict[SegmentKey, PulledSegment] = field(default_factory=dict[SegmentKey, PulledSegment])
    transfers: list[tuple[Located, Transfer]] = field(default_factory=list[tuple[Located, Transfer]])
    misses: dict[SegmentKey, Miss] = field(default_factory=dict[SegmentKey, Miss])
    lookup_s: float = 0.0
    lease_s: float = 0.0
    pull_s: float = 0.0
    leases: list[Lease] = field(default_factory=list[Lease])
    landing: list[BlockId] = field(default_factory=list[BlockId])


class SegmentStore:
    """Publishes to and pulls from the cluster on behalf of one worker. Thread-safe."""

    def __init__(
        self,
        owner: Owner,
        layout: KVLayout,
        arena: Arena,
        transport: AutoTransport,
        directory: KVDirectory,
        *,
        lease_ttl_s: float,
        pull_timeout_s: float,
    ) -> None:
        self.owner = owner
        self._layout = layout
        self._arena = arena
        self._transport = transport
        self._directory = directory
        self._lease_ttl_s = lease_ttl_s
        self._pull_timeout_s = pull_timeout_s
        self._held: dict[SegmentKey, Segment] = {}
        self._lock = threading.Lock()
        self._publishing = threading.Lock()

    # -- reading -------------------------------------------------------------------------------------------

    def acquire(self, wanted: Mapping[SegmentKey, int]) -> Acquired:
        """Find, lease and pull segments. Never raises for a fault of the cluster: what could not be had is in
        `misses`, and the caller computes it.

        Args:
            wanted: key -> tokens needed.
        """
        got = Acquired()
        if not wanted:
            return got
        begin = time.perf_counter()
        found = self._directory.lookup(list(wanted), near=self.owner.worker)
        got.lookup_s = time.perf_counter() - begin
        for key in wanted:
            if key not in found:
                got.misses[key] = Miss("not_found", "no worker holds it")
        usable = [k for k, located in found.items() if self._fits(k, located, wanted[k], got)]
        leases, asked_at = self._lease(usable, got)
        begin = time.perf_counter()
        for key in usable:
            if key in leases:
                self._fetch(key, leases[key], asked_at, got)
            else:
                got.misses.setdefault(key, Miss(Outcome.LEASE_EXPIRED, "the directory granted no lease"))
        got.pull_s = time.perf_counter() - begin
        return got

    def release(self, got: Acquired) -> None:
        """Give back leases and landing blocks. Idempotent; the bytes in `got.pulled` must not be used after
        it."""
        got.pulled.clear()
        if got.landing:
            self._arena.free(got.landing)
            got.landing = []
        if got.leases:
            leases, got.leases = got.leases, []
            self._directory.release(leases)

    def _fits(self, key: SegmentKey, located: Located, tokens: int, got: Acquired) -> bool:
        segment = located.segment
        if segment.layout == self._layout.fingerprint and segment.num_tokens >= tokens:
            return True
        detail = (
            f"layout {segment.layout or '?'} against {self._layout.fingerprint}, {segment.num_tokens} tokens"
        )
        got.misses[key] = Miss(Outcome.LAYOUT_MISMATCH, detail)
        return False

    def _lease(self, keys: list[SegmentKey], got: Acquired) -> tuple[dict[SegmentKey, Lease], float]:
        # The clock starts before the request: the directory's own count can only end later.
        asked_at = time.monotonic()
        if not keys:
            return {}, asked_at
        begin = time.perf_counter()
        try:
            leases = self._directory.lease(keys, holder=self.owner.worker, ttl_s=self._lease_ttl_s)
        except DirectoryUnavailable as error:
            leases = {}
            got.misses.update({k: Miss("directory_down", str(error)) for k in keys})
        got.lease_s = time.perf_counter() - begin
        got.leases.extend(leases.values())
        return leases, asked_at

    def _fetch(self, key: SegmentKey, lease: Lease, asked_at: float, got: Acquired) -> None:
        located = lease.located
        segment, owner = located.segment, located.owner
        if (owner.worker, owner.incarnation) == (self.owner.worker, self.owner.incarnation):
            blocks = [b.block for b in segment.blocks]
            transfer = Transfer(owner.worker, owner.worker, "local", 0, len(blocks), 0.0, Outcome.PULLED)
        else:
            try:
                blocks = self._allocate(len(segment.blocks))
            except ArenaFull as error:
                got.misses[key] = Miss("arena_full", str(error))
                return
            transfer = self._transport.pull(
                lease,
                blocks,
                timeout_s=self._pull_timeout_s,
                lease_deadline=asked_at + lease.ttl_s,
            )
            if transfer.outcome is Outcome.PULLED:
                got.landing.extend(blocks)
            elif transfer.outcome is not Outcome.TIMED_OUT:
                # After a time-out the backend has quarantined them: late writes are real.
                self._arena.free(blocks)
        got.transfers.append((located, transfer))
        if transfer.outcome is not Outcome.PULLED:
            # Not reported to the directory: one reader's broken link is no proof that the owner is dead, and
            # a dropped owner stays fenced. Its silence, or whoever saw its process die, ends it.
            log.warning("pull from %s failed: %s (%s)", owner.worker, transfer.outcome, transfer.detail)
            got.misses[key] = Miss(transfer.outcome, transfer.detail)
            return
        views = tuple(self._layout.views(self._arena.payload(b)) for b in blocks)
        got.hits[key] = located
        got.pulled[key] = PulledSegment(views, segment.num_tokens, segment.start)

    # -- writing -------------------------------------------------------------------------------------------

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
        key that this worker holds already changes nothing.

        Args:
            fill: writes KV, checkpoint and mass of all tokens into the given blocks, and zeros behind them.
            start: position of the first token.

        Raises:
            ArenaFull: no room even after eviction; nothing was published.
            DirectoryUnavailable: no shard took it; nothing was published.
            WorkerLost: a newer life of this worker has taken its name; nothing was published.
        """
        # One publish at a time: two requests that computed the same tokens must not both enter them.
        with self._publishing:
            if key in self._held:
                return self._held[key]
            blocks = self._allocate(self._layout.blocks_for(num_tokens))
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
                self._directory.publish(self.owner, [segment])
            except BaseException:
                self._arena.free(blocks)
                raise
            with self._lock:
                self._held[key] = segment
            return segment

    def segments(self) -> list[Segment]:
        """All that this worker holds: what a restarted directory shard must hear again."""
        with self._lock:
            return list(self._held.values())

    def _allocate(self, blocks: int) -> list[BlockId]:
        """Blocks from the arena, evicting this worker's least recently used unleased segments if need be."""
        try:
            return self._arena.allocate(blocks)
        except ArenaFull:
            self.evict(blocks)
            return self._arena.allocate(blocks)

    def evict(self, blocks: int) -> None:
        """Give up least recently used unleased segments of this worker, `blocks` blocks or all there are."""
        try:
            gone = self._directory.evict(self.owner, nbytes=blocks * self._layout.block_nbytes)
        except DirectoryUnavailable as error:
            log.warning("nothing can be evicted while the directory is down: %s", error)
            return
        for segment in gone:
            with self._lock:
                known = self._held.pop(segment.key, None)
            if known is not None:
                self._arena.free([b.block for b in known.blocks])
        log.info("evicted %d segments to make room for %d blocks", len(gone), blocks)
