"""The directory's decisions: who holds which segment, who leases it, what may be evicted.

A pure, single-threaded state machine: time is an argument (seconds of any monotonic clock), and there is no
I/O. It does not know of Ray, of torch, of shards, or of the bytes it describes.

    owner:    unknown --announce/publish--> live --silent, dropped or fenced--> unknown
    copy:     published --(leased <-> idle)--> evicted or retracted by its owner | dropped with its owner
    lease:    granted --renew*--> released | expired | dropped with its copy or its holder
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from transport.directory.catalogue import PIN_PREFIX, Cursor, Filter, Listed, Page
from transport.types import (
    Incarnation,
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

_FENCES: Final = 65_536
_WISHES_PER_REPLY: Final = 256
_AGES_S: Final = (1.0, 10.0, 60.0)


@dataclass(frozen=True, slots=True)
class Announced:
    """Reply to an announcement.

    Attributes:
        fenced_by: the newer incarnation that replaced the announcer, or None when it was accepted.
        known: False when the table held nothing of this life of the owner, which must then publish
            again all that it holds.
        wishes: copies that an operator wants evicted; the owner does it, if they are still unleased.
    """

    fenced_by: int | None
    known: bool
    wishes: tuple[CopyId, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A copy that could be evicted.

    Attributes:
        idle_s: seconds since its last use, on the table's clock; comparable between tables.
    """

    key: SegmentKey
    variant: str
    nbytes: int
    idle_s: float


@dataclass(slots=True)
class _Copy:
    segment: Segment
    worker: WorkerId
    used_at: float
    nbytes: int
    leases: set[LeaseId] | None = None  # None when empty: most copies have none, and a set weighs 216 bytes


@dataclass(slots=True)
class _OwnerState:
    owner: Owner
    seen_at: float
    copies: OrderedDict[CopyId, _Copy] = field(default_factory=OrderedDict)  # least recently used first
    leased_bytes: int = 0  # of its copies, once per reader's lease: how busy it is serving
    wishes: dict[CopyId, None] = field(default_factory=dict[CopyId, None])


@dataclass(slots=True)
class _LeaseState:
    copy: _Copy
    holder: WorkerId
    holder_incarnation: int | None
    granted_at: float
    expires_at: float
    pin: bool


class Table:
    """One shard's state.

    Args:
        owner_timeout_s: an owner silent for longer is dropped.
        lease_prefix: makes lease ids unique over shards and restarts.
        max_lease_s, max_pin_s: a longer lease or pin is granted for so long.
        max_leases: of one holder, and of all pins together; further ones are refused and counted.
    """

    def __init__(
        self,
        *,
        owner_timeout_s: float,
        lease_prefix: str = "",
        max_lease_s: float = math.inf,
        max_pin_s: float = math.inf,
        max_leases: int = 1 << 20,
    ) -> None:
        self._owner_timeout_s = owner_timeout_s
        self._lease_prefix = lease_prefix
        self._max_lease_s = max_lease_s
        self._max_pin_s = max_pin_s
        self._max_leases = max_leases
        self._owners: OrderedDict[WorkerId, _OwnerState] = OrderedDict()  # longest silent first
        # Incarnations up to this one are refused. Bounded: a fence that is forgotten raises the floor, below
        # which nobody unknown is admitted, so that forgetting never lets a fenced life back in.
        self._fences: OrderedDict[WorkerId, int] = OrderedDict()
        self._floor: int | None = None
        self._segments: dict[SegmentKey, list[_Copy]] = {}
        self._leases: dict[LeaseId, _LeaseState] = {}
        self._held_by: dict[WorkerId, set[LeaseId]] = {}
        self._expiries: list[tuple[float, LeaseId]] = []  # one entry per lease, at its expiry or before
        self._pins = 0
        self._refused = 0
        self._granted = 0
        self._nbytes = 0
        self._dropped_owners = 0
        self._expired_leases = 0

    # -- owners ----------------------------------------------------------------------------------------

    def announce(self, owner: Owner, now: float) -> Announced:
        """Heartbeat. A newer incarnation drops all that the older one held."""
        self.tick(now)
        admitted = self._admit(owner, now)
        if admitted.fenced_by is not None or not self._owners[owner.worker].wishes:
            return admitted
        wishes = self._owners[owner.worker].wishes
        told = tuple(wishes)[:_WISHES_PER_REPLY]
        for copy_id in told:
            del wishes[copy_id]  # one that gets lost on the way is wished again by the operator
        return Announced(None, admitted.known, told)

    def drop_owner(self, worker: WorkerId, incarnation: int, now: float) -> None:
        """Forget a dead owner. Its incarnation is fenced, so that a late publish does not revive it."""
        self.tick(now)
        self._fence(worker, incarnation)
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
        """The best complete copy of each key: an exact one before a rectified one, then the nearest, then that
        of the owner with the fewest leased bytes. Changes nothing: no lease, no LRU."""
        self.tick(now)
        node = self._node(near)
        found = {key: self._choose(key, near, node) for key in dict.fromkeys(keys)}
        return {key: self._located(copy) for key, copy in found.items() if copy is not None}

    def lease(
        self, keys: Iterable[SegmentKey], now: float, *, holder: WorkerId, ttl_s: float
    ) -> dict[SegmentKey, Lease]:
        """Lease the best complete copy of each key, as `lookup` finds it; absent keys are omitted, and so is
        what exceeds the holder's limit."""
        self.tick(now)
        node = self._node(holder)
        ttl_s = min(ttl_s, self._max_lease_s)
        out: dict[SegmentKey, Lease] = {}
        for key in dict.fromkeys(keys):
            copy = self._choose(key, holder, node)
            if copy is None:
                continue
            if len(self._held_by.get(holder, ())) >= self._max_leases:
                self._refused += 1
                continue
            lease_id = self._grant(copy, holder, now, ttl_s, pin=False)
            self._touch(copy, now)
            out[key] = Lease(lease_id, self._located(copy), holder, ttl_s)
        return out

    def renew(self, leases: Iterable[LeaseId], now: float, *, ttl_s: float) -> dict[LeaseId, bool]:
        """Extend live leases to `now + ttl_s`; never shortens one."""
        self.tick(now)
        ttl_s = min(ttl_s, self._max_lease_s)
        out: dict[LeaseId, bool] = {}
        for lease_id in leases:
            state = self._leases.get(lease_id)
            out[lease_id] = state is not None
            if state is not None:
                state.expires_at = max(state.expires_at, now + ttl_s)
        return out

    def release(self, leases: Iterable[LeaseId], now: float) -> None:
        """Unpin. Unknown leases are ignored."""
        self.tick(now)
        for lease_id in leases:
            self._end_lease(lease_id)

    # -- eviction --------------------------------------------------------------------------------------

    def candidates(self, owner: Owner, nbytes: int, now: float) -> list[Candidate]:
        """Unleased, complete copies of `owner`, least recently used first, covering `nbytes`."""
        self.tick(now)
        out: list[Candidate] = []
        covered = 0
        for (key, variant), copy in self._live_copies(owner).items():
            if covered >= nbytes:
                break
            if copy.leases or not copy.segment.complete:
                continue
            out.append(Candidate(key, variant, copy.nbytes, now - copy.used_at))
            covered += copy.nbytes
        return out

    def evict_copies(self, owner: Owner, copies: Iterable[CopyId], now: float) -> tuple[Segment, ...]:
        """Remove those of `copies` that are still unleased; what is returned is out of the table."""
        self.tick(now)
        held = self._live_copies(owner)
        out: list[Segment] = []
        for copy_id in copies:
            copy = held.get(copy_id)
            if copy is not None and not copy.leases and copy.segment.complete:
                self._remove(copy)
                out.append(copy.segment)
        return tuple(out)

    def retire(self, owner: Owner, copies: Sequence[CopyId], now: float) -> list[int]:
        """Remove those of `copies` that are unleased; which of them (by index) stay because they are leased.
        Where another table has given a copy up, or has it now, this one agrees or says that it cannot."""
        self.tick(now)
        held = self._live_copies(owner)
        kept: list[int] = []
        for at, copy_id in enumerate(copies):
            copy = held.get(copy_id)
            if copy is None:
                continue
            if copy.leases:
                kept.append(at)
            else:
                self._remove(copy)
        return kept

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
        """Remove the least recently used unleased copies until `nbytes` are covered or none is left."""
        chosen = [(c.key, c.variant) for c in self.candidates(owner, nbytes, now)]
        return self.evict_copies(owner, chosen, now)

    # -- operators -------------------------------------------------------------------------------------

    def page(self, chosen: Filter, now: float, *, after: Cursor | None = None, limit: int) -> Page:
        """Rows that the filter accepts, in the order of their cursors, behind `after`. Changes nothing."""
        self.tick(now)
        copies, last = self._select(chosen, now, after, limit)
        return Page(tuple(self._listed(copy, now) for copy in copies), last)

    def wish(self, chosen: Filter, now: float, *, after: Cursor | None = None, limit: int) -> Page:
        """Ask the owners, with their next announcement, to evict what is unleased and complete of a page.
        What comes back is the whole page, so that the caller sees what is leased and stays."""
        self.tick(now)
        copies, last = self._select(chosen, now, after, limit)
        for copy in copies:
            if not copy.leases and copy.segment.complete:
                self._owners[copy.worker].wishes[(copy.segment.key, copy.segment.variant)] = None
        return Page(tuple(self._listed(copy, now) for copy in copies), last)

    def pin(
        self, chosen: Filter, now: float, *, name: str, ttl_s: float, after: Cursor | None = None, limit: int
    ) -> Page:
        """Keep a page of copies from eviction for `ttl_s` seconds; the same name again prolongs. The page
        shows what is pinned then; what exceeded the limit of pins is not."""
        self.tick(now)
        holder = WorkerId(PIN_PREFIX + name)
        ttl_s = min(ttl_s, self._max_pin_s)
        copies, last = self._select(chosen, now, after, limit)
        for copy in copies:
            old = next((s for s in self._states(copy) if s.pin and s.holder == holder), None)
            if old is not None:
                old.expires_at = max(old.expires_at, now + ttl_s)
            elif self._pins < self._max_leases:
                self._grant(copy, holder, now, ttl_s, pin=True)
            else:
                self._refused += 1
        return Page(tuple(self._listed(copy, now) for copy in copies), last)

    def unpin(
        self, chosen: Filter, now: float, *, name: str, after: Cursor | None = None, limit: int
    ) -> Page:
        """End the pins of that name ("": of any) on a page of copies; shows them as they are then."""
        self.tick(now)
        copies, last = self._select(chosen, now, after, limit)
        for copy in copies:
            for lease_id in tuple(copy.leases or ()):
                state = self._leases[lease_id]
                if state.pin and name in ("", state.holder.removeprefix(PIN_PREFIX)):
                    self._end_lease(lease_id)
        return Page(tuple(self._listed(copy, now) for copy in copies), last)

    # -- time ------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Reap what time has ended: leases past their expiry, owners silent for too long."""
        while self._expiries and self._expiries[0][0] <= now:
            _, lease_id = heapq.heappop(self._expiries)
            state = self._leases.get(lease_id)
            if state is None:
                continue
            if state.expires_at > now:  # renewed meanwhile
                heapq.heappush(self._expiries, (state.expires_at, lease_id))
                continue
            self._end_lease(lease_id)
            self._expired_leases += 1
        while self._owners:
            worker, state = next(iter(self._owners.items()))
            if now - state.seen_at <= self._owner_timeout_s:
                break
            self._forget_owner(worker)
            self._dropped_owners += 1

    def stats(self, now: float) -> dict[str, float]:
        """segments (copies), keys, leases (pins included), pins, owners, bytes, fences, wishes,
        dropped_owners, expired_leases, refused_leases, and readers' leases by age in seconds:
        leases_age_le_<s> and leases_age_gt_<the last>."""
        self.tick(now)
        ages = [now - s.granted_at for s in self._leases.values() if not s.pin]
        by_age: dict[str, float] = {}
        low = -math.inf
        for high in _AGES_S:
            by_age[f"leases_age_le_{high:g}"] = sum(low < age <= high for age in ages)
            low = high
        by_age[f"leases_age_gt_{low:g}"] = sum(age > low for age in ages)
        return {
            "segments": sum(len(s.copies) for s in self._owners.values()),
            "keys": len(self._segments),
            "leases": len(self._leases),
            "pins": self._pins,
            "owners": len(self._owners),
            "bytes": self._nbytes,
            "fences": len(self._fences),
            "wishes": sum(len(s.wishes) for s in self._owners.values()),
            "dropped_owners": self._dropped_owners,
            "expired_leases": self._expired_leases,
            "refused_leases": self._refused,
            **by_age,
        }

    # -- inside ----------------------------------------------------------------------------------------

    def _admit(self, owner: Owner, now: float) -> Announced:
        fence = self._fences.get(owner.worker, self._floor)
        if fence is not None and owner.incarnation <= fence:
            return Announced(fenced_by=fence, known=False)
        state = self._owners.get(owner.worker)
        if state is not None and owner.incarnation < state.owner.incarnation:
            return Announced(fenced_by=int(state.owner.incarnation), known=False)
        if state is not None and owner.incarnation == state.owner.incarnation:
            state.owner = owner  # addresses may have changed
            state.seen_at = now
            self._owners.move_to_end(owner.worker)
            return Announced(fenced_by=None, known=True)
        if state is not None:
            self._forget_owner(owner.worker)
        # Every older life is fenced for good, even when this one is later dropped for its silence.
        self._owners[owner.worker] = _OwnerState(owner, now)
        self._fence(owner.worker, owner.incarnation - 1)
        self._drop_held_leases(owner.worker, owner.incarnation - 1)
        return Announced(fenced_by=None, known=False)

    def _fence(self, worker: WorkerId, incarnation: int) -> None:
        self._fences[worker] = max(incarnation, self._fences.get(worker, incarnation))
        self._fences.move_to_end(worker)
        while len(self._fences) > max(_FENCES, len(self._owners)):
            oldest, fence = self._fences.popitem(last=False)
            if oldest in self._owners:
                self._fences[oldest] = fence
            else:
                self._floor = fence if self._floor is None else max(self._floor, fence)

    def _enter(self, state: _OwnerState, segment: Segment, now: float) -> None:
        copy_id = (segment.key, segment.variant)
        old = state.copies.get(copy_id)
        if old is not None and old.segment.blocks == segment.blocks:
            old.segment = segment  # the same blocks: leases stay good
            self._touch(old, now)
            return
        if old is not None:
            self._remove(old)
        copy = _Copy(segment, state.owner.worker, now, segment.nbytes)
        state.copies[copy_id] = copy
        self._segments.setdefault(segment.key, []).append(copy)
        self._nbytes += copy.nbytes

    def _remove(self, copy: _Copy) -> None:
        key, variant = copy.segment.key, copy.segment.variant
        for lease_id in tuple(copy.leases or ()):
            self._end_lease(lease_id)
        state = self._owners[copy.worker]
        del state.copies[(key, variant)]
        state.wishes.pop((key, variant), None)
        copies = [c for c in self._segments[key] if c is not copy]
        if copies:
            self._segments[key] = copies
        else:
            del self._segments[key]
        self._nbytes -= copy.nbytes

    def _forget_owner(self, worker: WorkerId) -> None:
        for copy in tuple(self._owners[worker].copies.values()):
            self._remove(copy)
        del self._owners[worker]

    def _drop_held_leases(self, holder: WorkerId, up_to: int) -> None:
        # A lease taken before the holder's first announcement has no incarnation: it is of an older life.
        for lease_id in tuple(self._held_by.get(holder, ())):
            life = self._leases[lease_id].holder_incarnation
            if life is None or life <= up_to:
                self._end_lease(lease_id)

    def _grant(self, copy: _Copy, holder: WorkerId, now: float, ttl_s: float, *, pin: bool) -> LeaseId:
        self._granted += 1
        lease_id = LeaseId(f"{self._lease_prefix}{self._granted}")
        life: Incarnation | None = None
        if holder in self._owners:
            life = self._owners[holder].owner.incarnation
        self._leases[lease_id] = _LeaseState(copy, holder, life, now, now + ttl_s, pin)
        self._held_by.setdefault(holder, set()).add(lease_id)
        if pin:
            self._pins += 1
        else:
            self._owners[copy.worker].leased_bytes += copy.nbytes
        if copy.leases is None:
            copy.leases = set()
        copy.leases.add(lease_id)
        heapq.heappush(self._expiries, (now + ttl_s, lease_id))
        if len(self._expiries) > 2 * len(self._leases) + 1024:  # most are of leases released long ago
            self._expiries = [(s.expires_at, i) for i, s in self._leases.items()]
            heapq.heapify(self._expiries)
        return lease_id

    def _end_lease(self, lease_id: LeaseId) -> None:
        state = self._leases.pop(lease_id, None)
        if state is None:
            return
        held = self._held_by[state.holder]
        held.remove(lease_id)
        if not held:
            del self._held_by[state.holder]
        copy = state.copy
        if copy.leases is not None:
            copy.leases.discard(lease_id)
            copy.leases = copy.leases or None
        if state.pin:
            self._pins -= 1
        else:
            self._owners[copy.worker].leased_bytes -= copy.nbytes

    def _touch(self, copy: _Copy, now: float) -> None:
        copy.used_at = now
        self._owners[copy.worker].copies.move_to_end((copy.segment.key, copy.segment.variant))

    def _live_copies(self, owner: Owner) -> OrderedDict[CopyId, _Copy]:
        state = self._owners.get(owner.worker)
        if state is None or state.owner.incarnation != owner.incarnation:
            return OrderedDict()
        return state.copies

    def _node(self, worker: WorkerId | None) -> NodeId | None:
        state = None if worker is None else self._owners.get(worker)
        return None if state is None else state.owner.node

    def _choose(self, key: SegmentKey, near: WorkerId | None, node: NodeId | None) -> _Copy | None:
        copies = self._segments.get(key)
        if copies is None:
            return None
        if len(copies) == 1:
            return copies[0] if copies[0].segment.complete else None
        ranked = [c for c in copies if c.segment.complete]
        return min(ranked, key=lambda c: self._rank(c, near, node), default=None)

    def _rank(
        self, copy: _Copy, near: WorkerId | None, node: NodeId | None
    ) -> tuple[bool, int, int, float, str, str]:
        state = self._owners[copy.worker]
        same_node = node is not None and state.owner.node == node
        distance = 0 if copy.worker == near else 1 if same_node else 2
        segment = copy.segment
        return segment.rectified, distance, state.leased_bytes, -copy.used_at, segment.variant, copy.worker

    def _located(self, copy: _Copy) -> Located:
        return Located(copy.segment, self._owners[copy.worker].owner)

    def _states(self, copy: _Copy) -> Iterator[_LeaseState]:
        return (self._leases[i] for i in copy.leases or ())

    def _select(
        self, chosen: Filter, now: float, after: Cursor | None, limit: int
    ) -> tuple[list[_Copy], Cursor | None]:
        """Up to `limit` copies behind `after`, in order, and the cursor of the last where there are more."""
        found = [
            ((key.space, key.digest, copy.segment.variant, str(copy.worker)), copy)
            for key, copies in self._segments.items()
            if chosen.names(key)
            for copy in copies
            if self._accepts(chosen, copy, now)
        ]
        behind = found if after is None else [x for x in found if x[0] > after]
        first = heapq.nsmallest(limit + 1, behind, key=lambda x: x[0])
        return [copy for _, copy in first[:limit]], first[limit - 1][0] if len(first) > limit else None

    def _accepts(self, chosen: Filter, copy: _Copy, now: float) -> bool:
        if chosen.owner not in ("", copy.worker) or now - copy.used_at < chosen.idle_s:
            return False
        if chosen.kind and (chosen.kind == "rectified") != copy.segment.rectified:
            return False
        if chosen.leased and not any(not s.pin for s in self._states(copy)):
            return False
        return not chosen.pinned or any(s.pin for s in self._states(copy))

    def _listed(self, copy: _Copy, now: float) -> Listed:
        segment, owner = copy.segment, self._owners[copy.worker].owner
        states = list(self._states(copy))
        return Listed(
            key=segment.key,
            variant=segment.variant,
            num_tokens=segment.num_tokens,
            nbytes=copy.nbytes,
            owner=owner.worker,
            node=owner.node,
            leases=sum(not s.pin for s in states),
            pinned_s=max((s.expires_at - now for s in states if s.pin), default=0.0),
            idle_s=now - copy.used_at,
            complete=segment.complete,
        )
