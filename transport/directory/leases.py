"""Who leases which copy, and until when. Pure: time is an argument. It does not know what a copy is.

    granted --renewed*--> released | expired | ended with its copy or with its holder

A pin is a lease of an operator: it keeps a copy from eviction, and is no load on its owner. Everything is
bounded: leases per holder, pins in all, and the memory of leases that are over.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from transport.directory.catalogue import PIN_PREFIX
from transport.types import Incarnation, LeaseId, WorkerId

_AGES_S: Final = (1.0, 10.0, 60.0)
_STALE_EXPIRIES: Final = 1024


class Leasable(Protocol):
    """What can be leased. leases: None when there are none: most have none, and a set weighs 216 bytes."""

    leases: set[LeaseId] | None

    @property
    def worker(self) -> WorkerId: ...
    @property
    def nbytes(self) -> int: ...


C = TypeVar("C", bound=Leasable)


@dataclass(slots=True)
class LeaseState(Generic[C]):
    """A live lease. holder_life: None where the holder had not announced itself when it was granted."""

    copy: C
    holder: WorkerId
    holder_life: Incarnation | None
    granted_at: float
    expires_at: float
    pin: bool


class LeaseBook(Generic[C]):
    """All live leases of one table.

    Args:
        prefix: makes lease ids unique over shards and restarts.
        max_leases: of one holder, and of all pins together.
    """

    def __init__(self, prefix: str, max_leases: int) -> None:
        self._prefix = prefix
        self._max_leases = max_leases
        self._leases: dict[LeaseId, LeaseState[C]] = {}
        self._held_by: dict[WorkerId, set[LeaseId]] = {}
        self._expiries: list[tuple[float, LeaseId]] = []  # one entry per lease, at its expiry or before
        self._load: Counter[WorkerId] = Counter()
        self._granted = 0
        self._pins = 0
        self._expired = 0
        self._refused = 0

    def grant(
        self, copy: C, holder: WorkerId, life: Incarnation | None, now: float, ttl_s: float
    ) -> LeaseId | None:
        """A reader's lease; None, and counted, when the holder has too many."""
        if len(self._held_by.get(holder, ())) >= self._max_leases:
            self._refused += 1
            return None
        self._load[copy.worker] += copy.nbytes
        return self._enter(LeaseState(copy, holder, life, now, now + ttl_s, pin=False))

    def pin(self, copy: C, name: str, now: float, ttl_s: float) -> LeaseId | None:
        """A pin, or a longer life for the one of that name; None, and counted, when there are too many."""
        holder = WorkerId(PIN_PREFIX + name)
        for lease_id in copy.leases or ():
            state = self._leases[lease_id]
            if state.pin and state.holder == holder:
                state.expires_at = max(state.expires_at, now + ttl_s)
                return lease_id
        if self._pins >= self._max_leases:
            self._refused += 1
            return None
        self._pins += 1
        return self._enter(LeaseState(copy, holder, None, now, now + ttl_s, pin=True))

    def unpin(self, copy: C, name: str) -> None:
        """End the pins of that name on a copy ("": all)."""
        for lease_id in tuple(copy.leases or ()):
            state = self._leases[lease_id]
            if state.pin and name in ("", state.holder.removeprefix(PIN_PREFIX)):
                self.end(lease_id)

    def renew(self, lease_id: LeaseId, until: float) -> bool:
        """Whether it is live; never shortens it."""
        state = self._leases.get(lease_id)
        if state is None:
            return False
        state.expires_at = max(state.expires_at, until)
        return True

    def copy_of(self, lease_id: LeaseId) -> C | None:
        """What a live lease is of."""
        state = self._leases.get(lease_id)
        return None if state is None else state.copy

    def end(self, lease_id: LeaseId) -> None:
        """Forget a lease; an unknown one is ignored."""
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
            return
        self._load[copy.worker] -= copy.nbytes
        if not self._load[copy.worker]:
            del self._load[copy.worker]

    def end_all(self, copy: C) -> None:
        """Forget every lease of a copy that goes."""
        for lease_id in tuple(copy.leases or ()):
            self.end(lease_id)

    def end_held(self, holder: WorkerId, up_to: int) -> None:
        """Forget what older lives of a holder had leased."""
        # A lease taken before the holder's first announcement has no life: it is of an older one.
        for lease_id in tuple(self._held_by.get(holder, ())):
            life = self._leases[lease_id].holder_life
            if life is None or life <= up_to:
                self.end(lease_id)

    def expire(self, now: float) -> None:
        """Reap the leases that have ended."""
        while self._expiries and self._expiries[0][0] <= now:
            _, lease_id = heapq.heappop(self._expiries)
            state = self._leases.get(lease_id)
            if state is None:
                continue
            if state.expires_at > now:  # renewed meanwhile
                heapq.heappush(self._expiries, (state.expires_at, lease_id))
                continue
            self.end(lease_id)
            self._expired += 1

    def of(self, copy: C) -> Iterator[LeaseState[C]]:
        """The leases and pins of a copy."""
        return (self._leases[i] for i in copy.leases or ())

    def load(self, worker: WorkerId) -> int:
        """Bytes that readers have leased of this owner's copies, once per lease."""
        return self._load.get(worker, 0)

    def stats(self, now: float) -> dict[str, float]:
        """leases (pins included), pins, expired_leases, refused_leases, and readers' leases by age in
        seconds: leases_age_le_<s>, and leases_age_gt_<the last>."""
        ages = [now - s.granted_at for s in self._leases.values() if not s.pin]
        by_age: dict[str, float] = {}
        low = -math.inf
        for high in _AGES_S:
            by_age[f"leases_age_le_{high:g}"] = sum(low < age <= high for age in ages)
            low = high
        by_age[f"leases_age_gt_{low:g}"] = sum(age > low for age in ages)
        return {
            "leases": len(self._leases),
            "pins": self._pins,
            "expired_leases": self._expired,
            "refused_leases": self._refused,
            **by_age,
        }

    def _enter(self, state: LeaseState[C]) -> LeaseId:
        self._granted += 1
        lease_id = LeaseId(f"{self._prefix}{self._granted}")
        self._leases[lease_id] = state
        self._held_by.setdefault(state.holder, set()).add(lease_id)
        if state.copy.leases is None:
            state.copy.leases = set()
        state.copy.leases.add(lease_id)
        heapq.heappush(self._expiries, (state.expires_at, lease_id))
        if len(self._expiries) > 2 * len(self._leases) + _STALE_EXPIRIES:
            # Most entries are of leases released long ago.
            self._expiries = [(s.expires_at, i) for i, s in self._leases.items()]
            heapq.heapify(self._expiries)
        return lease_id
