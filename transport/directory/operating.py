"""What operators may do to a table: look at it page by page, wish evictions, pin. Pure, as the table itself.

Nothing here frees a block or ends a reader's lease: an eviction is a wish that the owner hears with its next
announcement, and a pin ends by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Final

from transport.directory.catalogue import PIN_PREFIX, Cursor, Filter, Listed, Page
from transport.directory.table import CopyId, Table, _Copy
from transport.types import SegmentKey, WorkerId

_SCANNED_PER_PAGE: Final = 4_000
"""Keys that one page looks at: a filter that few of them pass must not keep readers waiting."""
_LAST: Final = "\U0010ffff"
"""Behind every variant and worker's name."""


def _place(key: SegmentKey) -> tuple[str, bytes]:
    return key.space, key.digest


def _cursor(copy: _Copy) -> Cursor:
    return (*_place(copy.segment.key), copy.segment.variant, copy.worker)


class OperatedTable(Table):
    """A table with its operators' calls."""

    # The keys in order, as they were when a listing began, until one ends: what is published meanwhile may
    # be missing from it, and sorting for every page would keep readers waiting.
    _order: list[SegmentKey] | None = None

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
        """Up to `limit` copies behind `after`, in order, and where the next page begins, if there is one."""
        if after is None or self._order is None:
            self._order = sorted(self._segments, key=_place)
        begin = 0 if after is None else bisect_left(self._order, after[:2], key=_place)
        found: list[_Copy] = []
        for at in range(begin, len(self._order)):
            key = self._order[at]
            for copy in sorted(self._segments.get(key, ()), key=_cursor):
                if (after is None or _cursor(copy) > after) and chosen.names(key):
                    if len(found) == limit:
                        return found, _cursor(found[-1])
                    if self._accepts(chosen, copy, now):
                        found.append(copy)
            if at - begin >= _SCANNED_PER_PAGE:
                return found, (*_place(key), _LAST, _LAST)
        self._order = None
        return found, None

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
