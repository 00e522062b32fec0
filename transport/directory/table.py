"""The directory's decisions: who holds which segment, who leases it, what may be evicted.

A pure, single-threaded state machine: time is an argument (seconds of any monotonic clock), and there is no
I/O. It does not know of Ray, of torch, of shards, or of the bytes it describes.

    owner:    unknown --announce/publish--> live --silent, dropped or fenced--> unknown
    copy:     published --(leased <-> idle)--> evicted or retracted by its owner | dropped with its owner
    lease:    granted --renew*--> released | expired | dropped with its copy or its holder
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from transport.types import (
    Lease,
    LeaseId,
    Located,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

CopyId = tuple[SegmentKey, str]
"""(key, variant): names a copy among those of one owner."""


@dataclass(frozen=True, slots=True)
class Announced:
    """Reply to an announcement.

    Attributes:
        fenced_by: the newer incarnation that replaced the announcer, or None when it was accepted.
        known: False when the table held nothing of this life of the owner, which must then publish
            again all that it holds.
    """

    fenced_by: int | None
    known: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A copy that could be evicted.

    Attributes:
        idle_s: seconds since its last use, on the table's clock; comparable between tables.
        consumed: all its expected readers have read it; such copies go first.
    """

    key: SegmentKey
    variant: str
    nbytes: int
    idle_s: float
    consumed: bool = False


@dataclass(slots=True)
class _Copy:
    segment: Segment
    worker: WorkerId
    used_at: float
    leases: set[LeaseId] = field(default_factory=set)
    reads: int = 0

    @property
    def consumed(self) -> bool:
        return 0 < self.segment.consumers <= self.reads


@dataclass(slots=True)
class _OwnerState:
    owner: Owner
    seen_at: float
    copies: OrderedDict[CopyId, _Copy] = field(default_factory=OrderedDict)  # least recently used first
    consumed: OrderedDict[CopyId, None] = field(default_factory=OrderedDict)  # of these, in order of reading


@dataclass(slots=True)
class _LeaseState:
    copy: _Copy
    holder: WorkerId
    holder_incarnation: int | None
    expires_at: float


class Table:
    """One shard's state.

    Args:
        owner_timeout_s: an owner silent for longer is dropped.
        lease_prefix: makes lease ids unique over shards and restarts.
    """

    def __init__(self, *, owner_timeout_s: float, lease_prefix: str = "") -> None:
        self._owner_timeout_s = owner_timeout_s
        self._lease_prefix = lease_prefix
        self._owners: dict[WorkerId, _OwnerState] = {}
        self._fences: dict[WorkerId, int] = {}  # incarnations up to this one are refused
        self._segments: dict[SegmentKey, dict[tuple[str, WorkerId], _Copy]] = {}
        self._leases: dict[LeaseId, _LeaseState] = {}
        self._expiries: list[tuple[float, LeaseId]] = []
        self._granted = 0
        self._nbytes = 0
        self._dropped_owners = 0
        self._expired_leases = 0

    # -- owners ----------------------------------------------------------------------------------------

    def announce(self, owner: Owner, now: float) -> Announced:
        """Heartbeat. A newer incarnation drops all that the older one held."""
        self.tick(now)
        return self._admit(owner, now)

    def drop_owner(self, worker: WorkerId, incarnation: int, now: float) -> None:
        """Forget a dead owner. Its incarnation is fenced, so that a late publish does not revive it."""
        self.tick(now)
        self._fences[worker] = max(incarnation, self._fences.get(worker, incarnation))
        state = self._owners.get(worker)
        if state is not None and state.owner.incarnation <= incarnation:
            self._forget_owner(worker)
        self._drop_held_leases(worker, incarnation)

    # -- segments --------------------------------------------------------------------------------------

    def publish(self, owner: Owner, segments: Sequence[Segment], now: float) -> Announced:
        """Enter segments; counts as a heartbeat and as a use. Same (key, variant, owner) replaces."""
        self.tick(now)
        admitted = self._admit(owner, now)
        if admitted.fenced_by is not None:
            return admitted
        state = self._owners[owner.worker]
        for segment in segments:
            self._enter(state, segment, now)
        return admitted

    def lookup(
        self, keys: Iterable[SegmentKey], now: float, *, near: WorkerId | None = None
    ) -> dict[SegmentKey, Located]:
        """The best complete copy of each key: an exact one before a rectified one, then one in an arena
        before a spilled one, then the nearest. Changes nothing: no lease, no LRU."""
        self.tick(now)
        node = self._node(near)
        found = {key: self._choose(key, near, node) for key in dict.fromkeys(keys)}
        return {key: self._located(copy) for key, copy in found.items() if copy is not None}

    def lease(
        self, keys: Iterable[SegmentKey], now: float, *, holder: WorkerId, ttl_s: float
    ) -> dict[SegmentKey, Lease]:
        """Pin the best complete copy of each key, as `lookup` finds it, but never a spilled one; absent keys
        are omitted."""
        self.tick(now)
        node = self._node(holder)
        state = self._owners.get(holder)
        incarnation = None if state is None else int(state.owner.incarnation)
        out: dict[SegmentKey, Lease] = {}
        for key in dict.fromkeys(keys):
            copy = self._choose(key, holder, node, to_lease=True)
            if copy is None:
                continue
            self._granted += 1
            lease_id = LeaseId(f"{self._lease_prefix}{self._granted}")
            self._leases[lease_id] = _LeaseState(copy, holder, incarnation, now + ttl_s)
            heapq.heappush(self._expiries, (now + ttl_s, lease_id))
            copy.leases.add(lease_id)
            self._touch(copy, now)
            out[key] = Lease(lease_id, self._located(copy), holder, ttl_s)
        return out

    def renew(self, leases: Iterable[LeaseId], now: float, *, ttl_s: float) -> dict[LeaseId, bool]:
        """Extend live leases to `now + ttl_s`; never shortens one."""
        self.tick(now)
        out: dict[LeaseId, bool] = {}
        for lease_id in leases:
            state = self._leases.get(lease_id)
            out[lease_id] = state is not None
            if state is not None and now + ttl_s > state.expires_at:
                state.expires_at = now + ttl_s
                heapq.heappush(self._expiries, (state.expires_at, lease_id))
        return out

    def release(self, leases: Iterable[LeaseId], now: float, *, read: bool = False) -> None:
        """Unpin. Unknown leases are ignored. read: the holders have the bytes; each counts as one read."""
        self.tick(now)
        for lease_id in leases:
            state = self._leases.get(lease_id)
            if read and state is not None:
                state.copy.reads += 1
                self._note_consumed(state.copy)
            self._end_lease(lease_id)

    # -- eviction --------------------------------------------------------------------------------------

    def candidates(self, owner: Owner, nbytes: int, now: float) -> list[Candidate]:
        """Unleased, complete copies in `owner`'s arena that cover `nbytes`: those that all expected readers
        have read, then the least recently used."""
        self.tick(now)
        out: list[Candidate] = []
        covered = 0
        for copy in self._by_use(owner):
            if covered >= nbytes:
                break
            segment = copy.segment
            if copy.leases or not segment.complete or segment.spilled:
                continue
            idle_s = now - copy.used_at
            out.append(Candidate(segment.key, segment.variant, segment.nbytes, idle_s, copy.consumed))
            covered += segment.nbytes
        return out

    def evict_copies(self, owner: Owner, copies: Iterable[CopyId], now: float) -> tuple[Segment, ...]:
        """Remove those of `copies` that are still unleased; what is returned is out of the table, and tells
        how often it was read."""
        self.tick(now)
        held = self._live_copies(owner)
        out: list[Segment] = []
        for copy_id in copies:
            copy = held.get(copy_id)
            if copy is not None and not copy.leases and copy.segment.complete:
                self._remove(copy)
                out.append(replace(copy.segment, reads=copy.reads) if copy.reads else copy.segment)
        return tuple(out)

    def retract(self, owner: Owner, segments: Iterable[Segment], now: float) -> None:
        """Remove these very copies, leased or not: their owner frees the blocks. A copy of other blocks under
        the same name stays, so that a late call cannot take back what was published after it."""
        self.tick(now)
        held = self._live_copies(owner)
        for segment in segments:
            copy = held.get((segment.key, segment.variant))
            if copy is not None and copy.segment.blocks == segment.blocks:
                self._remove(copy)

    def evict(self, owner: Owner, nbytes: int, now: float) -> tuple[Segment, ...]:
        """Remove unleased copies in the order of `candidates`, until `nbytes` are covered or none is left."""
        chosen = [(c.key, c.variant) for c in self.candidates(owner, nbytes, now)]
        return self.evict_copies(owner, chosen, now)

    # -- time ------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Reap what time has ended: leases past their expiry, owners silent for too long."""
        while self._expiries and self._expiries[0][0] <= now:
            _, lease_id = heapq.heappop(self._expiries)
            state = self._leases.get(lease_id)
            if state is not None and state.expires_at <= now:
                self._end_lease(lease_id)
                self._expired_leases += 1
        silent = [w for w, s in self._owners.items() if now - s.seen_at > self._owner_timeout_s]
        for worker in silent:
            self._forget_owner(worker)
            self._dropped_owners += 1

    def stats(self, now: float) -> dict[str, float]:
        """segments (copies), keys, leases, owners, bytes, dropped_owners, expired_leases."""
        self.tick(now)
        return {
            "segments": sum(len(s.copies) for s in self._owners.values()),
            "keys": len(self._segments),
            "leases": len(self._leases),
            "owners": len(self._owners),
            "bytes": self._nbytes,
            "dropped_owners": self._dropped_owners,
            "expired_leases": self._expired_leases,
        }

    # -- inside ----------------------------------------------------------------------------------------

    def _admit(self, owner: Owner, now: float) -> Announced:
        fence = self._fences.get(owner.worker)
        if fence is not None and owner.incarnation <= fence:
            return Announced(fenced_by=fence, known=False)
        state = self._owners.get(owner.worker)
        if state is not None and owner.incarnation < state.owner.incarnation:
            return Announced(fenced_by=int(state.owner.incarnation), known=False)
        if state is not None and owner.incarnation == state.owner.incarnation:
            state.owner = owner  # addresses may have changed
            state.seen_at = now
            return Announced(fenced_by=None, known=True)
        if state is not None:
            self._forget_owner(owner.worker)
        # Every older life is fenced for good, even when this one is later dropped for its silence.
        self._fences[owner.worker] = owner.incarnation - 1
        self._drop_held_leases(owner.worker, owner.incarnation - 1)
        self._owners[owner.worker] = _OwnerState(owner, now)
        return Announced(fenced_by=None, known=False)

    def _enter(self, state: _OwnerState, segment: Segment, now: float) -> None:
        copy_id = (segment.key, segment.variant)
        old = state.copies.get(copy_id)
        if old is not None and segment.spilled and not old.segment.spilled:
            return  # overtaken: a newer copy lies in the arena
        if (
            old is not None
            and old.segment.blocks == segment.blocks
            and old.segment.spilled == segment.spilled
        ):
            old.segment = segment  # the same blocks: leases stay good
            self._touch(old, now)
            self._note_consumed(old)
            return
        if old is not None:
            self._remove(old)
        copy = _Copy(segment, state.owner.worker, now, reads=segment.reads)
        state.copies[copy_id] = copy
        self._note_consumed(copy)
        self._segments.setdefault(segment.key, {})[(segment.variant, copy.worker)] = copy
        self._nbytes += segment.nbytes

    def _remove(self, copy: _Copy) -> None:
        key, variant = copy.segment.key, copy.segment.variant
        for lease_id in tuple(copy.leases):
            self._end_lease(lease_id)
        owner = self._owners[copy.worker]
        del owner.copies[(key, variant)]
        owner.consumed.pop((key, variant), None)
        copies = self._segments[key]
        del copies[(variant, copy.worker)]
        if not copies:
            del self._segments[key]
        self._nbytes -= copy.segment.nbytes

    def _forget_owner(self, worker: WorkerId) -> None:
        for copy in tuple(self._owners[worker].copies.values()):
            self._remove(copy)
        del self._owners[worker]

    def _drop_held_leases(self, holder: WorkerId, up_to: int) -> None:
        # A lease taken before the holder's first announcement has no incarnation: it is of an older life.
        gone = [
            lease_id
            for lease_id, s in self._leases.items()
            if s.holder == holder and (s.holder_incarnation is None or s.holder_incarnation <= up_to)
        ]
        for lease_id in gone:
            self._end_lease(lease_id)

    def _end_lease(self, lease_id: LeaseId) -> None:
        state = self._leases.pop(lease_id, None)
        if state is not None:
            state.copy.leases.discard(lease_id)

    def _touch(self, copy: _Copy, now: float) -> None:
        copy.used_at = now
        self._owners[copy.worker].copies.move_to_end((copy.segment.key, copy.segment.variant))

    def _note_consumed(self, copy: _Copy) -> None:
        consumed, copy_id = self._owners[copy.worker].consumed, (copy.segment.key, copy.segment.variant)
        if copy.consumed:
            consumed[copy_id] = None
        else:
            consumed.pop(copy_id, None)  # its producer expects more readers than it did

    def _by_use(self, owner: Owner) -> Iterator[_Copy]:
        """Copies of a live owner, those that are worth least first."""
        held = self._live_copies(owner)
        if held:
            yield from (held[copy_id] for copy_id in self._owners[owner.worker].consumed)
        yield from (copy for copy in held.values() if not copy.consumed)

    def _live_copies(self, owner: Owner) -> OrderedDict[CopyId, _Copy]:
        state = self._owners.get(owner.worker)
        if state is None or state.owner.incarnation != owner.incarnation:
            return OrderedDict()
        return state.copies

    def _node(self, worker: WorkerId | None) -> NodeId | None:
        state = None if worker is None else self._owners.get(worker)
        return None if state is None else state.owner.node

    def _choose(
        self, key: SegmentKey, near: WorkerId | None, node: NodeId | None, *, to_lease: bool = False
    ) -> _Copy | None:
        best: tuple[bool, bool, int, float, str, str] | None = None
        chosen: _Copy | None = None
        for (variant, worker), copy in self._segments.get(key, {}).items():
            spilled = copy.segment.spilled
            if not copy.segment.complete or (to_lease and spilled):
                continue
            same_node = node is not None and self._owners[worker].owner.node == node
            distance = 0 if worker == near else 1 if same_node else 2
            rank = (copy.segment.rectified, spilled, distance, -copy.used_at, variant, worker)
            if best is None or rank < best:
                best, chosen = rank, copy
        return chosen

    def _located(self, copy: _Copy) -> Located:
        return Located(copy.segment, self._owners[copy.worker].owner)
