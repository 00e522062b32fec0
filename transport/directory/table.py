"""The directory's decisions: who holds which segment, who leases it, what may be evicted.

A pure, single-threaded state machine: time is an argument (seconds of any monotonic clock), and there is no
I/O. It does not know of Ray, of torch, of shards, or of the bytes it describes.

    owner:    unknown --announce/publish--> live --silent, dropped or fenced--> unknown
    copy:     published --(leased <-> idle)--> evicted or retracted by its owner | dropped with its owner
    lease:    granted --renew*--> released | expired | dropped with its copy or its holder

With its announcement an owner tells its pull key; each lease of its copies gets a token made with that key
(see `transport.tokens`), and neither lookups nor leases ever tell the key itself.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from transport.directory.granting import Granter, blocks_digest
from transport.directory.leases import LeaseBook
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

_FENCES: Final = 65_536
_WISHES_PER_REPLY: Final = 256


@dataclass(frozen=True, slots=True)
class Announced:
    """Reply to an announcement.

    Attributes:
        fenced_by: the newer incarnation that replaced the announcer, or None when it was accepted.
        known: False when the table held nothing of this life of the owner, which must then publish
            again all that it holds.
        wishes: copies that an operator wants evicted; the owner does it, if they are still unleased.
        owners: that announce themselves here, from which they tell how often to do it.
    """

    fenced_by: int | None
    known: bool
    wishes: tuple[CopyId, ...] = ()
    owners: int = 1


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
    nbytes: int
    leases: set[LeaseId] | None = None
    reads: int = 0
    blocks_digest: bytes | None = None  # for tokens; made with the first lease

    @property
    def consumed(self) -> bool:
        return 0 < self.segment.consumers <= self.reads


@dataclass(slots=True)
class _OwnerState:
    owner: Owner  # as leases tell it: without its key
    shown: Owner  # as lookups do: without addresses as well
    seen_at: float
    granter: Granter | None = None
    copies: OrderedDict[CopyId, _Copy] = field(default_factory=OrderedDict)  # least recently used first
    wishes: dict[CopyId, None] = field(default_factory=dict[CopyId, None])
    consumed: OrderedDict[CopyId, None] = field(default_factory=OrderedDict)  # of these, in order of reading


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
        self._max_lease_s = max_lease_s
        self._max_pin_s = max_pin_s
        self._owners: OrderedDict[WorkerId, _OwnerState] = OrderedDict()  # longest silent first
        # Incarnations up to this one are refused. Bounded: a fence that is forgotten raises the floor, below
        # which nobody unknown is admitted, so that forgetting never lets a fenced life back in.
        self._fences: OrderedDict[WorkerId, int] = OrderedDict()
        self._floor: int | None = None
        self._segments: dict[SegmentKey, list[_Copy]] = {}
        self._leases: LeaseBook[_Copy] = LeaseBook(lease_prefix, max_leases)
        self._nbytes = 0
        self._dropped_owners = 0

    # -- owners ----------------------------------------------------------------------------------------

    def announce(self, owner: Owner, now: float, *, clock_ms: int | None = None) -> Announced:
        """Heartbeat. A newer incarnation drops all that the older one held. clock_ms: the owner's own clock
        when it spoke; without it, and without its key, its copies are leased without tokens."""
        self.tick(now)
        admitted = self._admit(owner, now, clock_ms)
        if admitted.fenced_by is not None:
            return admitted
        wishes = self._owners[owner.worker].wishes
        told = tuple(wishes)[:_WISHES_PER_REPLY]
        for copy_id in told:
            del wishes[copy_id]  # one that gets lost on the way is wished again by the operator
        return Announced(None, admitted.known, told, len(self._owners))

    def drop_owner(self, worker: WorkerId, incarnation: int, now: float) -> None:
        """Forget a dead owner. Its incarnation is fenced, so that a late publish does not revive it."""
        self.tick(now)
        self._fence(worker, incarnation)
        state = self._owners.get(worker)
        if state is not None and state.owner.incarnation <= incarnation:
            self._forget_owner(worker)
        self._leases.end_held(worker, incarnation)

    # -- segments --------------------------------------------------------------------------------------

    def publish(
        self, owner: Owner, segments: Sequence[Segment], now: float, *, clock_ms: int | None = None
    ) -> Announced:
        """Enter segments; counts as a heartbeat and as a use. Same (key, variant, owner) replaces."""
        self.tick(now)
        admitted = self._admit(owner, now, clock_ms)
        if admitted.fenced_by is not None:
            return admitted
        state = self._owners[owner.worker]
        for segment in segments:
            self._enter(state, segment, now)
        return admitted

    def lookup(
        self, keys: Iterable[SegmentKey], now: float, *, near: WorkerId | None = None
    ) -> dict[SegmentKey, Located]:
        """The best complete copy of each key: exact before rectified, then in an arena before spilled, then
        the nearest, then that of the owner with the fewest leased bytes. Changes nothing: no lease, no
        LRU. Owners come without addresses: who may read is told with a lease where to."""
        self.tick(now)
        node = self._node(near)
        found = {key: self._choose(key, near, node) for key in dict.fromkeys(keys)}
        return {key: self._shown(copy) for key, copy in found.items() if copy is not None}

    def lease(
        self, keys: Iterable[SegmentKey], now: float, *, holder: WorkerId, ttl_s: float, copies: int = 1
    ) -> dict[SegmentKey, Lease]:
        """Lease the best complete copy of each key, as `lookup` finds it, never a spilled one; absent keys
        are omitted, and so is what exceeds the holder's limit. copies: lease so many copies of the best one's
        variant; but one that the holder has itself needs no other."""
        self.tick(now)
        node = self._node(holder)
        ttl_s = min(ttl_s, self._max_lease_s)
        life = self._owners[holder].owner.incarnation if holder in self._owners else None
        out: dict[SegmentKey, Lease] = {}
        for key in dict.fromkeys(keys):
            copy = self._choose(key, holder, node, to_lease=True)
            if copy is None:
                continue
            lease_id = self._leases.grant(copy, holder, life, now, ttl_s)
            if lease_id is None:
                continue
            self._touch(copy, now)
            others: list[Lease] = []
            for twin in self._twins(copy, holder, node)[: copies - 1]:
                twin_id = self._leases.grant(twin, holder, life, now, ttl_s)
                if twin_id is not None:
                    self._touch(twin, now)
                    others.append(self._lease_of(twin, twin_id, holder, now, ttl_s))
            lease = self._lease_of(copy, lease_id, holder, now, ttl_s)
            out[key] = replace(lease, others=tuple(others)) if others else lease
        return out

    def _twins(self, copy: _Copy, holder: WorkerId, node: NodeId | None) -> list[_Copy]:
        """Other owners' copies of the same variant, which can be read beside it; best first."""
        copies = self._segments[copy.segment.key]
        if len(copies) == 1 or copy.worker == holder:
            return []
        variant = copy.segment.variant
        twins = [
            c
            for c in copies
            if c is not copy
            and c.worker != holder
            and c.segment.variant == variant
            and c.segment.complete
            and not c.segment.spilled
        ]
        return sorted(twins, key=lambda c: self._rank(c, holder, node))

    def renew(self, leases: Iterable[LeaseId], now: float, *, ttl_s: float) -> dict[LeaseId, bool]:
        """Extend live leases to `now + ttl_s`; never shortens one."""
        self.tick(now)
        ttl_s = min(ttl_s, self._max_lease_s)
        return {lease_id: self._leases.renew(lease_id, now + ttl_s) for lease_id in leases}

    def release(self, leases: Iterable[LeaseId], now: float, *, read: bool = False) -> None:
        """Unpin. Unknown leases are ignored. read: the holders have the bytes; each counts as one read, of
        every copy of that variant, whichever the bytes came from."""
        self.tick(now)
        for lease_id in leases:
            copy = self._leases.copy_of(lease_id) if read else None
            if copy is not None:
                self._count_read(copy)
            self._leases.end(lease_id)

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
            out.append(Candidate(segment.key, segment.variant, copy.nbytes, idle_s, copy.consumed))
            covered += copy.nbytes
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
        """Remove unleased copies in the order of `candidates`, until `nbytes` are covered or none is left."""
        chosen = [(c.key, c.variant) for c in self.candidates(owner, nbytes, now)]
        return self.evict_copies(owner, chosen, now)

    # -- time ------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Reap what time has ended: leases past their expiry, owners silent for too long."""
        self._leases.expire(now)
        while self._owners:
            worker, state = next(iter(self._owners.items()))
            if now - state.seen_at <= self._owner_timeout_s:
                break
            self._forget_owner(worker)
            self._dropped_owners += 1

    def stats(self, now: float) -> dict[str, float]:
        """segments (copies), keys, owners, bytes, fences, wishes, dropped_owners, and LeaseBook's."""
        self.tick(now)
        return {
            "segments": sum(len(s.copies) for s in self._owners.values()),
            "keys": len(self._segments),
            "owners": len(self._owners),
            "bytes": self._nbytes,
            "fences": len(self._fences),
            "wishes": sum(len(s.wishes) for s in self._owners.values()),
            "dropped_owners": self._dropped_owners,
            **self._leases.stats(now),
        }

    # -- inside ----------------------------------------------------------------------------------------

    def _admit(self, owner: Owner, now: float, clock_ms: int | None) -> Announced:
        verdict = self._judge(replace(owner, pull_key=None), now)
        key = owner.pull_key
        if verdict.fenced_by is None and key is not None and clock_ms is not None:
            state = self._owners[owner.worker]
            if state.granter is None:
                state.granter = Granter(owner.incarnation, key, clock_ms, now)
            else:
                state.granter.heard(key, clock_ms, now)
        return verdict

    def _judge(self, owner: Owner, now: float) -> Announced:
        fence = self._fences.get(owner.worker, self._floor)
        if fence is not None and owner.incarnation <= fence:
            return Announced(fenced_by=fence, known=False)
        state = self._owners.get(owner.worker)
        if state is not None and owner.incarnation < state.owner.incarnation:
            return Announced(fenced_by=int(state.owner.incarnation), known=False)
        if state is not None and owner.incarnation == state.owner.incarnation:
            if state.owner != owner:  # addresses may have changed
                state.owner, state.shown = owner, replace(owner, addresses={})
            state.seen_at = now
            self._owners.move_to_end(owner.worker)
            return Announced(fenced_by=None, known=True)
        if state is not None:
            self._forget_owner(owner.worker)
        # Every older life is fenced for good, even when this one is later dropped for its silence.
        self._owners[owner.worker] = _OwnerState(owner, replace(owner, addresses={}), now)
        self._fence(owner.worker, owner.incarnation - 1)
        self._leases.end_held(owner.worker, owner.incarnation - 1)
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
        if old is not None and segment.spilled and not old.segment.spilled:
            return  # overtaken: a newer copy lies in the arena
        same = old is not None and old.segment.spilled == segment.spilled
        if old is not None and same and old.segment.blocks == segment.blocks:
            old.segment = segment  # the same blocks: leases stay good
            self._touch(old, now)
            self._note_consumed(old)
            return
        if old is not None:
            self._remove(old)
        copy = _Copy(segment, state.owner.worker, now, segment.nbytes, reads=segment.reads)
        state.copies[copy_id] = copy
        self._note_consumed(copy)
        self._segments.setdefault(segment.key, []).append(copy)
        self._nbytes += copy.nbytes

    def _remove(self, copy: _Copy) -> None:
        key, variant = copy.segment.key, copy.segment.variant
        self._leases.end_all(copy)
        state = self._owners[copy.worker]
        del state.copies[(key, variant)]
        state.consumed.pop((key, variant), None)
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

    def _count_read(self, read: _Copy) -> None:
        for copy in self._segments[read.segment.key]:
            if copy.segment.variant == read.segment.variant:
                copy.reads += 1
                self._note_consumed(copy)

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

    def _choose(
        self, key: SegmentKey, near: WorkerId | None, node: NodeId | None, *, to_lease: bool = False
    ) -> _Copy | None:
        copies = self._segments.get(key)
        if copies is None:
            return None
        ranked = [c for c in copies if c.segment.complete and not (to_lease and c.segment.spilled)]
        if len(ranked) == 1:
            return ranked[0]
        return min(ranked, key=lambda c: self._rank(c, near, node), default=None)

    def _rank(
        self, copy: _Copy, near: WorkerId | None, node: NodeId | None
    ) -> tuple[bool, bool, int, int, float, str, str]:
        state = self._owners[copy.worker]
        same_node = node is not None and state.owner.node == node
        distance = 0 if copy.worker == near else 1 if same_node else 2
        segment = copy.segment
        return (
            segment.rectified,
            segment.spilled,
            distance,
            self._leases.load(copy.worker),
            -copy.used_at,
            segment.variant,
            copy.worker,
        )

    def _located(self, copy: _Copy) -> Located:
        return Located(copy.segment, self._owners[copy.worker].owner)

    def _shown(self, copy: _Copy) -> Located:
        return Located(copy.segment, self._owners[copy.worker].shown)

    def _lease_of(self, copy: _Copy, lease_id: LeaseId, holder: WorkerId, now: float, ttl_s: float) -> Lease:
        token = self._token(copy, holder, now, ttl_s)
        return Lease(lease_id, self._located(copy), holder, ttl_s, token=token)

    def _token(self, copy: _Copy, holder: WorkerId, now: float, ttl_s: float) -> bytes:
        granter = self._owners[copy.worker].granter
        if granter is None:
            return b""
        if copy.blocks_digest is None:
            copy.blocks_digest = blocks_digest(copy.segment)
        return granter.token(copy.segment, copy.blocks_digest, holder, now, ttl_s)
