"""What operators may do to a table: look at it page by page, wish evictions, pin. Pure, as the table itself.

Nothing here frees a block or ends a reader's lease: an eviction is a wish that the owner hears with its next
announcement, and a pin ends by itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from transport.directory.catalogue import PIN_PREFIX, Cursor, Filter, Listed, Page
from transport.directory.table import CopyId, Table, _Copy
from transport.types import WorkerId


class OperatedTable(Table):
    """A table with its operators' calls."""

    def page(self, chosen: Filter, now: float, *, after: Cursor | None = None, limit: int) -> Page:
        """Rows that the filter accepts, in the order of their cursors, behind `after`. Changes nothing."""
        self.tick(now)
        copies, last = self._select(chosen, now, after, limit)
        return Page(tuple(self._listed(copy, now) for copy in copies), last)

    def wish(self, worker: WorkerId, copies: Iterable[CopyId], now: float) -> int:
        """Ask `worker`, with its next announcement, to evict these copies if they are unleased then; how many
        of them it holds."""
        self.tick(now)
        state = self._owners.get(worker)
        if state is None:
            return 0
        known = [copy_id for copy_id in copies if copy_id in state.copies]
        state.wishes.update(dict.fromkeys(known))
        return len(known)

    def pin(
        self, chosen: Filter, now: float, *, name: str, ttl_s: float, after: Cursor | None = None, limit: int
    ) -> Page:
        """Keep a page of copies from eviction for `ttl_s` seconds; the same name again prolongs. The page
        shows what is pinned then; what exceeded the limit of pins is not."""
        self.tick(now)
        copies, last = self._select(chosen, now, after, limit)
        for copy in copies:
            self._leases.pin(copy, name, now, min(ttl_s, self._max_pin_s))
        return Page(tuple(self._listed(copy, now) for copy in copies), last)

    def pin_copies(
        self, worker: WorkerId, copies: Iterable[CopyId], now: float, *, name: str, ttl_s: float
    ) -> int:
        """Pin these very copies, or end their pins of that name where `ttl_s` is 0; how many are there."""
        self.tick(now)
        state = self._owners.get(worker)
        held = [] if state is None else [state.copies[c] for c in copies if c in state.copies]
        for copy in held:
            if ttl_s > 0:
                self._leases.pin(copy, name, now, min(ttl_s, self._max_pin_s))
            else:
                self._leases.unpin(copy, name)
        return len(held)

    def unpin(
        self, chosen: Filter, now: float, *, name: str, after: Cursor | None = None, limit: int
    ) -> Page:
        """End the pins of that name ("": of any) on a page of copies; shows them as they are then."""
        self.tick(now)
        copies, last = self._select(chosen, now, after, limit)
        for copy in copies:
            self._leases.unpin(copy, name)
        return Page(tuple(self._listed(copy, now) for copy in copies), last)

    # -- inside ----------------------------------------------------------------------------------------

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
        if chosen.leased and not any(not s.pin for s in self._leases.of(copy)):
            return False
        return not chosen.pinned or any(s.pin for s in self._leases.of(copy))

    def _listed(self, copy: _Copy, now: float) -> Listed:
        segment, owner = copy.segment, self._owners[copy.worker].owner
        states = list(self._leases.of(copy))
        return Listed(
            key=segment.key,
            variant=segment.variant,
            num_tokens=segment.num_tokens,
            nbytes=copy.nbytes,
            owner=owner.worker,
            node=owner.node,
            leases=sum(not s.pin for s in states),
            pins={s.holder.removeprefix(PIN_PREFIX): s.expires_at - now for s in states if s.pin},
            idle_s=now - copy.used_at,
            complete=segment.complete,
        )
