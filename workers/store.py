"""A worker's side of the relay: find, lease, pull and publish segments.

Sits between the engine's KV cache and the transport room. Segment bytes live in the worker's arena; a pulled
segment borrows landing blocks from the same arena until it has been scattered, and a segment that this worker
holds itself is pinned for that time.

    block:  allocated --sealed--> held --evicted--> free
                                   '--evicted while pinned--> doomed --last pin gone--> free

Knows nothing of prompts or methods.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from transport.arena import Arena
from transport.auto import AutoTransport
from transport.base import Answers, KVDirectory
from transport.errors import ArenaFull, RelayError
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    Lease,
    Located,
    Outcome,
    Owner,
    Segment,
    SegmentKey,
    Transfer,
    WorkerId,
)
from workers.layout import BlockViews, KVLayout
from workers.prefill import PulledSegment

log = logging.getLogger(__name__)

_NO_ANSWER: Final = "the directory shard of this key does not answer"
Blocks = tuple[BlockRef, ...]
"""Names one copy of a segment in the own arena: freed blocks never come back under the same generation."""
Life = tuple[WorkerId, Incarnation]
"""One life of a worker."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a wanted segment is not there. reason: an Outcome value, "not_found", "arena_full",
    "directory_down" or "transport_error"."""

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Acquired:
    """Segments in local memory, until `SegmentStore.release_bytes`, and their leases, until
    `SegmentStore.release`.

    Attributes:
        hits: what was pulled, by key.
        pulled: their bytes.
        transfers: every pull that was tried and told how it ended, in order.
        misses: keys that were wanted and are not there.
        lookup_s, lease_s, pull_s: where the time went.
        leases, landing, pins: what is to be given back; the store's own business.
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
    pins: list[Blocks] = field(default_factory=list[Blocks])


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
        self._pins: Counter[Blocks] = Counter()
        self._doomed: set[Blocks] = set()
        # Guards the three above and what an Acquired has to give back. Never held over a directory call: the
        # heartbeat calls `segments` under the client's own lock.
        self._lock = threading.Lock()
        self._publishing = threading.Lock()

    # -- reading -------------------------------------------------------------------------------------------

    def acquire(
        self,
        wanted: Mapping[SegmentKey, int],
        worth: Callable[[Mapping[SegmentKey, Located]], Collection[SegmentKey]] | None = None,
    ) -> Acquired:
        """Find, lease and pull segments. Never raises for a fault of the cluster: what could not be had is in
        `misses`, and the caller computes it.

        Args:
            wanted: key -> tokens needed.
            worth: given what was found, says which of it to lease and pull; what it leaves out is neither a
                hit nor a miss. None: all.
        """
        got = Acquired()
        if not wanted:
            return got
        try:
            found = self._lookup(wanted, got)
            usable = [k for k, located in found.items() if self._fits(k, located, wanted[k], got)]
            if worth is not None and usable:
                chosen = worth({k: found[k] for k in usable})
                usable = [k for k in usable if k in chosen]
            leases, asked_at = self._lease(usable, got)
            begin = time.perf_counter()
            lost: dict[Life, Outcome] = {}
            for key in usable:
                if key in leases:
                    self._fetch(key, leases[key], asked_at, got, lost)
            got.pull_s = time.perf_counter() - begin
        except BaseException:
            self.release(got)
            raise
        return got

    def find(self, keys: Sequence[SegmentKey]) -> Answers[Located]:
        """Which of `keys` are held by anyone, and where; nothing is leased. Never raises for a fault of the
        cluster: what could not be asked for is in `unanswered`."""
        try:
            return self._directory.lookup(list(keys), near=self.owner.worker)
        except RelayError as error:
            log.warning("%d keys were not looked up: %s", len(keys), error)
            return Answers(unanswered=keys)

    def release_bytes(self, got: Acquired) -> None:
        """Give back landing blocks and pins: the bytes in `got.pulled` must not be used after it. Local and
        cheap. Idempotent; never raises."""
        with self._lock:
            got.pulled.clear()
            landing, got.landing = got.landing, []
            pins, got.pins = got.pins, []
        self._free(landing)
        self._unpin(pins)

    def release(self, got: Acquired) -> None:
        """Give back the bytes, as `release_bytes` does, and the leases at the directory. Idempotent; never
        raises."""
        self.release_bytes(got)
        with self._lock:
            leases, got.leases = got.leases, []
        if not leases:
            return
        try:
            self._directory.release(leases)
        except Exception as error:  # noqa: BLE001 - leases expire by themselves; the request is done
            log.warning("%d leases are left to expire: %r", len(leases), error)

    def _lookup(self, wanted: Mapping[SegmentKey, int], got: Acquired) -> Answers[Located]:
        begin = time.perf_counter()
        detail = _NO_ANSWER
        try:
            found = self._directory.lookup(list(wanted), near=self.owner.worker)
        except RelayError as error:
            found, detail = Answers[Located](unanswered=wanted), str(error)
        got.lookup_s = time.perf_counter() - begin
        for key in wanted:
            if key in found.unanswered:
                got.misses[key] = Miss("directory_down", detail)
            elif key not in found:
                got.misses[key] = Miss("not_found", "no worker holds it")
        return found

    def _fits(self, key: SegmentKey, located: Located, tokens: int, got: Acquired) -> bool:
        segment = located.segment
        if segment.layout == self._layout.fingerprint and segment.num_tokens >= tokens:
            return True
        detail = (
            f"layout {segment.layout or '?'} against {self._layout.fingerprint}, {segment.num_tokens} tokens"
        )
        got.misses[key] = Miss(Outcome.LAYOUT_MISMATCH, detail)
        return False

    def _lease(self, keys: list[SegmentKey], got: Acquired) -> tuple[Answers[Lease], float]:
        # The clock starts before the request: the directory's own count can only end later.
        asked_at = time.monotonic()
        if not keys:
            return Answers[Lease](), asked_at
        begin = time.perf_counter()
        detail = _NO_ANSWER
        try:
            leases = self._directory.lease(keys, holder=self.owner.worker, ttl_s=self._lease_ttl_s)
        except RelayError as error:
            leases, detail = Answers[Lease](unanswered=keys), str(error)
        got.lease_s = time.perf_counter() - begin
        got.leases.extend(leases.values())
        for key in keys:
            if key in leases.unanswered:
                got.misses[key] = Miss("directory_down", detail)
            elif key not in leases:
                got.misses[key] = Miss(Outcome.LEASE_EXPIRED, "the directory granted no lease")
        return leases, asked_at

    def _fetch(
        self, key: SegmentKey, lease: Lease, asked_at: float, got: Acquired, lost: dict[Life, Outcome]
    ) -> None:
        """Bring one leased segment into local memory, or enter why not.

        Args:
            lost: owners that did not answer, and how the pull ended; they are not tried again.
        """
        located = lease.located
        segment, owner = located.segment, located.owner
        life = (owner.worker, owner.incarnation)
        if life in lost:
            got.misses[key] = Miss(lost[life], f"not tried: {owner.worker} did not answer just before")
            return
        if life == (self.owner.worker, self.owner.incarnation):
            transfer, blocks = self._pin(lease, got), [b.block for b in segment.blocks]
        else:
            transfer, blocks = self._pull(lease, asked_at, got)
        if transfer is None:
            return
        got.transfers.append((located, transfer))
        if transfer.outcome is not Outcome.PULLED:
            # Not reported to the directory: one reader's broken link is no proof that the owner is dead, and
            # a dropped owner stays fenced. Its silence, or whoever saw its process die, ends it.
            log.warning("pull from %s failed: %s (%s)", owner.worker, transfer.outcome, transfer.detail)
            got.misses[key] = Miss(transfer.outcome, transfer.detail)
            if transfer.outcome in (Outcome.TIMED_OUT, Outcome.PEER_GONE):
                lost[life] = transfer.outcome
            return
        views = tuple(self._layout.views(self._arena.payload(b)) for b in blocks)
        got.hits[key] = located
        got.pulled[key] = PulledSegment(views, segment.num_tokens, segment.start)

    def _pin(self, lease: Lease, got: Acquired) -> Transfer:
        """Keep a segment of this worker where it is: its lease may end, and `evict` run, while it is read."""
        segment, worker = lease.located.segment, lease.located.owner.worker
        outcome, detail = Outcome.PULLED, ""
        with self._lock:
            held = self._held.get(segment.key)
            if held is not None and held.blocks == segment.blocks:
                self._pins[segment.blocks] += 1
                got.pins.append(segment.blocks)
            else:
                outcome, detail = Outcome.STALE, f"{worker} no longer holds the leased blocks itself"
        return Transfer(worker, worker, "local", 0, len(segment.blocks), 0.0, outcome, detail)

    def _pull(self, lease: Lease, asked_at: float, got: Acquired) -> tuple[Transfer | None, list[BlockId]]:
        """Read a peer's segment into landing blocks. No Transfer when it did not come to a pull."""
        segment = lease.located.segment
        try:
            blocks = self._allocate(len(segment.blocks))
        except ArenaFull as error:
            got.misses[segment.key] = Miss("arena_full", str(error))
            return None, []
        ours = True
        try:
            transfer = self._transport.pull(
                lease,
                blocks,
                timeout_s=self._pull_timeout_s,
                lease_deadline=asked_at + lease.ttl_s,
            )
            # After a time-out the backend has quarantined them: late writes are real.
            ours = transfer.outcome not in (Outcome.PULLED, Outcome.TIMED_OUT)
            if transfer.outcome is Outcome.PULLED:
                got.landing.extend(blocks)
        except Exception as error:  # noqa: BLE001 - a fault of a backend costs this hit, not the request
            log.warning("pull of %s from %s broke: %r", segment.key, lease.located.owner.worker, error)
            got.misses[segment.key] = Miss("transport_error", repr(error))
            return None, []
        finally:
            if ours:
                self._free(blocks)
        return transfer, blocks

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
            except BaseException:
                self._free(blocks)
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
            self._directory.publish(self.owner, [segment])
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
            self._unpin([segment.blocks, *([] if worse is None else [worse.blocks])])

    def _retract(self, segment: Segment) -> None:
        try:
            self._directory.retract(self.owner, [segment])
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

    def _allocate(self, blocks: int) -> list[BlockId]:
        """Blocks from the arena, evicting this worker's least recently used unleased segments if need be."""
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
                segments = self._directory.evict(self.owner, nbytes=left * self._layout.block_nbytes)
            except RelayError as error:
                log.warning("nothing can be evicted while the directory is down: %s", error)
                return
            if not segments:
                break
            gone += len(segments)
            left -= sum(self._forget(s) for s in segments)
        log.info("evicted %d segments to make room for %d blocks", gone, blocks)

    def drop(self, segments: Iterable[Segment]) -> None:
        """Free what has left the directory at an operator's wish; what is being read here, afterwards."""
        for segment in segments:
            self._forget(segment)

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
        return self._free([b.block for b in segment.blocks])

    def _unpin(self, pins: Iterable[Blocks]) -> None:
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
            self._free([b.block for b in blocks])

    def _free(self, blocks: Iterable[BlockId]) -> int:
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
