"""A worker's side of the relay: find, lease and pull segments; what it publishes and holds is `holding.py`.

Sits between the engine's KV cache and the transport room. Segment bytes live in the worker's arena; a pulled
segment borrows landing blocks from the same arena until it has been scattered, and a segment that this worker
holds itself is pinned for that time. Knows nothing of prompts or methods.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from transport.arena import Arena
from transport.auto import AutoTransport
from transport.base import Answers, KVDirectory
from transport.errors import ArenaFull, RelayError
from transport.settings import SpillSettings
from transport.types import (
    BlockId,
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
from workers.holding import Blocks, Holding
from workers.layout import BlockViews, KVLayout
from workers.prefill import PulledSegment

log = logging.getLogger(__name__)

_NO_ANSWER: Final = "the directory shard of this key does not answer"
Life = tuple[WorkerId, Incarnation]
"""One life of a worker."""
AskOwner = Callable[[Owner, Sequence[SegmentKey]], Collection[SegmentKey]]
"""Have the owner promote segments; those that are in its arena then. Bounded in time; raises RelayError."""


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a wanted segment is not there. reason: an Outcome value, "not_found", "arena_full",
    "directory_down", "transport_error" or "not_promoted"."""

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
    """Publishes to and pulls from the cluster on behalf of one worker. Thread-safe.

    Args:
        spill: tiers behind the arena.
        ask_owner: reaches the owner of a spilled segment; None: only this worker's own ones are promoted.
    """

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
        spill: SpillSettings | None = None,
        ask_owner: AskOwner | None = None,
    ) -> None:
        self.owner = owner
        self._layout = layout
        self._arena = arena
        self._transport = transport
        self._directory = directory
        self._lease_ttl_s = lease_ttl_s
        self._pull_timeout_s = pull_timeout_s
        self.holding = Holding(owner, layout, arena, directory, spill)
        self._ask_owner = ask_owner
        self._leased = 0
        self._allocate, self._free = self.holding.allocate, self.holding.free
        self._lock = threading.Lock()  # guards what an Acquired has to give back

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
            leases, asked_at = self._lease([k for k in usable if not found[k].segment.spilled], got)
            leases.update(self._lease_spilled([found[k] for k in usable if found[k].segment.spilled], got))
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
        self.holding.unpin(pins)

    def release(self, got: Acquired) -> None:
        """Give back the bytes, as `release_bytes` does, and the leases at the directory. Idempotent; never
        raises."""
        self.release_bytes(got)
        with self._lock:
            leases, got.leases = got.leases, []
            self._leased -= len(leases)
        if not leases:
            return
        read = [x for x in leases if x.located.segment.key in got.hits]
        rest = [x for x in leases if x.located.segment.key not in got.hits]
        try:
            if read:
                self._directory.release(read, read=True)
            if rest:
                self._directory.release(rest)
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

    def _lease_spilled(self, spilled: Sequence[Located], got: Acquired) -> dict[SegmentKey, Lease]:
        """Have segments brought back by their owners and lease them, one at a time: bringing back the next
        one may evict what nobody has leased."""
        leases: dict[SegmentKey, Lease] = {}
        silent: dict[Life, str] = {}
        for located in spilled:
            key = located.segment.key
            begin = time.perf_counter()
            why = self._promote(key, located.owner, silent)
            got.lease_s += time.perf_counter() - begin
            leases.update(self._lease([key], got)[0])  # or of another copy, which was not the best one
            if why and key in got.misses:
                got.misses[key] = Miss("not_promoted", f"{located.owner.worker}: {why}")
        return leases

    def _promote(self, key: SegmentKey, owner: Owner, silent: dict[Life, str]) -> str:
        """Have a segment's owner bring it back; why that did not come about, "" when it did.

        Args:
            silent: owners that did not answer, and why; they are not asked again.
        """
        life = (owner.worker, owner.incarnation)
        if life in silent:
            return silent[life]
        if life == (self.owner.worker, self.owner.incarnation):
            back: Collection[SegmentKey] = self.holding.promote([key])
        elif self._ask_owner is None:
            return "this worker cannot ask others to promote"
        else:
            try:
                back = self._ask_owner(owner, [key])
            except RelayError as error:
                silent[life] = str(error)
                return str(error)
        return "" if key in back else "its owner had no room for it, or has lost it"

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
        got.lease_s += time.perf_counter() - begin
        with self._lock:
            got.leases.extend(leases.values())
            self._leased += len(leases)
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
        if self.holding.pin(segment):
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

    # -- writing: see `Holding` ----------------------------------------------------------------------------

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
    ) -> Segment:
        """See `Holding.publish`."""
        return self.holding.publish(
            key,
            fill,
            start=start,
            num_tokens=num_tokens,
            producer=producer,
            variant=variant,
            consumers=consumers,
        )

    def withdraw(self, key: SegmentKey) -> None:
        """See `Holding.withdraw`."""
        self.holding.withdraw(key)

    def segments(self) -> list[Segment]:
        """See `Holding.segments`."""
        return self.holding.segments()

    def evict(self, blocks: int) -> None:
        """See `Holding.evict`."""
        self.holding.evict(blocks)

    def stats(self) -> dict[str, Any]:
        """See `Holding.stats`; and leases: those that this worker has now, as a reader."""
        with self._lock:
            leases = self._leased
        return {**self.holding.stats(), "leases": leases}

    def close(self) -> None:
        """See `Holding.close`."""
        self.holding.close()
