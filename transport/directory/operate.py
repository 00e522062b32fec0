"""What an operator does to a running directory: list, evict, pin, unpin, add and remove shards.

Everything is paged and has a deadline. Nothing here frees blocks: an eviction is a wish, which the owner
grants with its next heartbeat if nobody has leased the copy by then. This module does not know how shards are
started or ended.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from transport.directory import wire
from transport.directory.catalogue import Cursor, Filter, Listed, Page
from transport.directory.fleet import Calls, Fleet
from transport.directory.ring import Ring
from transport.directory.view import View
from transport.errors import ConfigError, DirectoryUnavailable, RelayError
from transport.settings import DirectorySettings
from transport.types import WorkerId

logger = logging.getLogger(__name__)

_PAGE: Final = 500
_WISHES_PER_CALL: Final = 500
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Evicted:
    """What an operator's eviction came to, in copies.

    Attributes:
        segments, nbytes: gone from the directory, their blocks with their owners again.
        busy: matched, but leased, pinned or still being written.
        left: unleased and still there at the deadline: their owner did not answer, or refused.
    """

    segments: int
    nbytes: int
    busy: int
    left: int


class DirectoryOperator:
    """An operator's hold on a directory. It owns and leases nothing itself.

    Args:
        fleet: the shards; see `of` for those that already run.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @classmethod
    def of(
        cls, shards: Mapping[str, Any] | Sequence[str], *, timeout_s: float = 5.0, calls: Calls | None = None
    ) -> DirectoryOperator:
        """An operator of running shards, with the settings that they were started with.

        Raises:
            DirectoryUnavailable: none of them answered within `timeout_s`.
        """
        scout = Fleet(shards, DirectorySettings(call_timeout_s=timeout_s), calls)
        told = scout.ask(dict.fromkeys(scout.shards, ()), "view")
        views = [v for v in (wire.unpack_view(a.result) for a in told.values()) if v.shards]
        if not views:
            raise DirectoryUnavailable(f"no directory shard answered within {timeout_s:g} s.")
        # A shard that was started for a resize that failed is in nobody's list.
        view = max(views, key=lambda v: v.epoch)
        asked = scout.ask(dict.fromkeys(view.shards, ()), "settings")
        if not asked:
            raise DirectoryUnavailable(f"no directory shard answered within {timeout_s:g} s.")
        settings = wire.SETTINGS.unpack(next(iter(asked.values())).result)
        return cls(Fleet(view.shards, settings, calls, epoch=view.epoch))

    @property
    def view(self) -> View:
        return self._fleet.view

    @property
    def settings(self) -> DirectorySettings:
        """Those that the shards were started with."""
        return self._fleet.settings

    def stats(self) -> dict[str, dict[str, float]]:
        """Every shard's own statistics, by its name; those that do not answer are missing."""
        self._fleet.refresh()
        asked = self._fleet.ask(dict.fromkeys(self._fleet.shards, ()), "stats", even_down=True)
        return {name: wire.expect(answer.result, dict) for name, answer in asked.items()}

    # -- listing -----------------------------------------------------------------------------------------

    def rows(self, chosen: Filter | None = None) -> Iterator[Listed]:
        """Matching copies in the order of their keys, page by page; replicas of one copy are one row.

        Raises:
            DirectoryUnavailable: a shard did not answer, so that rows would be missing.
        """
        chosen = chosen or Filter()
        self._fleet.refresh()
        # A shard that only stands by hears of no lease: only all replicas together know how long it idles.
        asked = replace(chosen, idle_s=0.0) if self._fleet.settings.replicas > 1 else chosen
        pages = [self._walk(name, "page", asked) for name in self._fleet.shards]
        merged = heapq.merge(*pages, key=lambda row: row.cursor)
        for _, same in itertools.groupby(merged, key=lambda row: row.cursor):
            row = _joined(list(same))
            if row.idle_s >= chosen.idle_s:
                yield row

    def _walk(self, name: str, method: str, chosen: Filter, *extra: Any) -> Iterator[Listed]:
        after: Cursor | None = None
        while True:
            page = self._page(name, method, chosen, *extra, after)
            yield from page.rows
            after = page.after
            if after is None:
                return

    def _page(self, name: str, method: str, chosen: Filter, *extra: Any) -> Page:
        asked = self._fleet.ask({name: (wire.FILTER.pack(chosen), *extra, _PAGE)}, method, even_down=True)
        if name not in asked:
            raise DirectoryUnavailable(
                f"{method}: directory shard {name} did not answer within "
                f"{self._fleet.settings.call_timeout_s:g} s. Try again: a dead shard restarts in seconds."
            )
        return wire.unpack_page(asked[name].result)

    # -- evicting ----------------------------------------------------------------------------------------

    def evict(self, chosen: Filter, *, timeout_s: float) -> Evicted:
        """Have the owners give up what matches and is in nobody's use; waits until they have.

        Args:
            timeout_s: an owner answers with its next heartbeat, so a few of these.

        Raises:
            DirectoryUnavailable: a shard did not answer.
        """
        deadline = time.monotonic() + timeout_s
        wanted: dict[Cursor, Listed] = {}
        busy = 0
        for row in self.rows(chosen):
            if row.busy:
                busy += 1
            else:
                wanted[row.cursor] = row
        left = dict(wanted)
        wished_at = 0.0
        while left and time.monotonic() < deadline:
            if time.monotonic() - wished_at > 2 * self._fleet.settings.heartbeat_s:
                self._wish(list(left.values()))  # again: a wish gets lost with a heartbeat's reply
                wished_at = time.monotonic()
            time.sleep(_POLL_S)
            there = {row.cursor for row in self.rows(replace(chosen, idle_s=0.0))}
            left = {at: row for at, row in left.items() if at in there}
        gone = [row for at, row in wanted.items() if at not in left]
        return Evicted(len(gone), sum(row.nbytes for row in gone), busy, len(left))

    def _wish(self, rows: Sequence[Listed]) -> None:
        """Tell the shards what to ask owners for, in bounded messages."""
        by_owner: dict[tuple[str, WorkerId], list[Listed]] = {}
        for row in rows:
            for name in self._fleet.replicas(row.key):
                by_owner.setdefault((name, row.owner), []).append(row)
        for (name, owner), found in by_owner.items():
            for at in range(0, len(found), _WISHES_PER_CALL):
                copies = wire.pack_copies([(x.key, x.variant) for x in found[at : at + _WISHES_PER_CALL]])
                self._fleet.ask({name: (owner, copies)}, "wish", even_down=True)

    # -- pinning -----------------------------------------------------------------------------------------

    def pin(self, chosen: Filter, *, name: str, ttl_s: float) -> list[Listed]:
        """Keep what matches now from eviction for `ttl_s` seconds (at most max_pin_s); a pin of the same name
        is prolonged. What is published later is not pinned. The rows as they are then.

        Raises:
            ConfigError: no name, or no duration. DirectoryUnavailable: a shard did not answer.
        """
        if not name or ttl_s <= 0:
            raise ConfigError("a pin needs a name and a duration of more than 0 s, so that it ends.")
        return self._everywhere("pin", chosen, name, float(ttl_s))

    def unpin(self, chosen: Filter, *, name: str = "") -> list[Listed]:
        """End the pins of that name ("": all) on what matches. The rows as they are then.

        Raises:
            DirectoryUnavailable: a shard did not answer.
        """
        return self._everywhere("unpin", chosen, name)

    def _everywhere(self, method: str, chosen: Filter, *extra: Any) -> list[Listed]:
        self._fleet.refresh()
        found: dict[Cursor, list[Listed]] = {}
        for shard in self._fleet.shards:
            for row in self._walk(shard, method, chosen, *extra):
                found.setdefault(row.cursor, []).append(row)
        return [_joined(same) for _, same in sorted(found.items())]

    # -- adding and removing shards ----------------------------------------------------------------------

    def resize(
        self,
        names: Sequence[str],
        *,
        start: Callable[[str], object],
        end: Callable[[str], object],
        drain_s: float | None = None,
    ) -> View:
        """Make the directory consist of these shards. Requests run on: keys that move are misses until their
        owners' next heartbeat; leases at shards that leave stay valid until these are ended.

        Args:
            names: all of them; the first one, which decides between two resizes at once, must stay.
            start: starts the shard of a name, which must outlive this operator; end: ends it, when nothing
                is leased there any more.
            drain_s: seconds after which a shard is ended all the same; None: what the longest lease takes.

        Raises:
            ConfigError: the names do not begin with the present first one, or are not distinct.
            DirectoryUnavailable: a shard of the new list does not answer. Nothing has changed then.
            RelayError: another resize came first.
        """
        self._learn()
        old = self._fleet.view
        if not names or len(set(names)) != len(names) or old.shards[0] != names[0]:
            raise ConfigError(f"a directory of {list(old.shards)} cannot become {list(names)}.")
        for name in names:
            if name not in old.shards:
                start(name)
        self._await(names)
        pinned = list(self.rows(Filter(pinned=True)))
        view = View(old.epoch + 1, tuple(names))
        self._switch(view, [n for n in old.shards if n not in names])
        self._move_pins(pinned, old, drain_s)
        leaving = [n for n in old.shards if n not in names]
        self._drain(leaving, drain_s)
        for name in leaving:
            end(name)
        return view

    def _learn(self) -> None:
        """Adopt the newest list that any shard knows."""
        self._fleet.ask(dict.fromkeys(self._fleet.shards, ()), "view", even_down=True)

    def _await(self, names: Sequence[str]) -> None:
        deadline = time.monotonic() + max(30.0, self._fleet.settings.call_timeout_s)
        silent = list(names)
        while silent:
            asked = self._fleet.ask(dict.fromkeys(silent, ()), "view", even_down=True)
            silent = [n for n in silent if n not in asked]
            if silent and time.monotonic() > deadline:
                raise DirectoryUnavailable(f"resize: shard(s) {', '.join(silent)} did not come up.")

    def _switch(self, view: View, leaving: Sequence[str]) -> None:
        """The first shard decides; from then on whoever calls it learns of the new list."""
        first = view.shards[0]
        message = (wire.pack_view(view),)
        asked = self._fleet.ask({first: message}, "set_view", even_down=True)
        if first not in asked:
            raise DirectoryUnavailable(f"resize: shard {first} did not answer; run the resize again.")
        decided = wire.unpack_view(asked[first].result)
        if decided != view:
            raise RelayError(
                f"resize: another one came first, to {len(decided.shards)} shards (epoch {decided.epoch})."
            )
        self._fleet.adopt(view)
        # One that misses this hears it from the first owner or reader that asks it.
        self._fleet.ask(dict.fromkeys([*view.shards[1:], *leaving], message), "set_view", even_down=True)

    def _move_pins(self, pinned: Sequence[Listed], old: View, drain_s: float | None) -> None:
        """Pin at the new shards what was pinned, as soon as owners have entered it there."""
        begin = time.monotonic()
        left = [(row, name, seconds) for row in pinned for name, seconds in row.pins.items()]
        before = Ring(old.shards)
        while left and time.monotonic() - begin < self._patience(drain_s):
            passed_s = time.monotonic() - begin
            left = [x for x in left if x[2] > passed_s and not self._pin_again(*x, passed_s, before)]
            time.sleep(_POLL_S if left else 0.0)
        for row, name, _ in left:
            logger.warning('pin "%s" of %s at %s was lost in the resize', name, row.key, row.owner)
        for name in set(old.shards) - set(self._fleet.shards):
            for _ in self._walk(name, "unpin", Filter(pinned=True), ""):
                pass

    def _pin_again(self, row: Listed, name: str, seconds: float, passed_s: float, before: Ring) -> bool:
        """Pin one copy at its present replicas; once all of them have it, end the pin where it was."""
        copies = wire.pack_copies([(row.key, row.variant)])
        now = self._fleet.replicas(row.key)
        message = (row.owner, copies, name, seconds - passed_s)
        asked = self._fleet.ask(dict.fromkeys(now, message), "pin_copies", even_down=True)
        if any(shard not in asked or not asked[shard].result for shard in now):
            return False
        was = [s for s in before.replicas(row.key, self._fleet.settings.replicas) if s not in now]
        self._fleet.ask(dict.fromkeys(was, (row.owner, copies, name, 0.0)), "pin_copies", even_down=True)
        return True

    def _drain(self, leaving: Sequence[str], drain_s: float | None) -> None:
        """Wait until owners have taken back everything at these shards, which they do once it is unleased."""
        deadline = time.monotonic() + self._patience(drain_s)
        left = list(leaving)
        while left and time.monotonic() < deadline:
            asked = self._fleet.ask(dict.fromkeys(left, ()), "stats", even_down=True)
            left = [n for n in left if n in asked and wire.expect(asked[n].result, dict)["segments"]]
            time.sleep(_POLL_S if left else 0.0)
        for name in left:
            logger.warning("directory shard %s is ended while segments are still leased there", name)

    def _patience(self, drain_s: float | None) -> float:
        settings = self._fleet.settings
        return settings.owner_timeout_s + settings.max_lease_s if drain_s is None else drain_s


def _joined(same: Sequence[Listed]) -> Listed:
    """Rows of one copy at its replicas as one: all leases, the latest use."""
    pins: dict[str, float] = {}
    for row in same:
        for name, left_s in row.pins.items():
            pins[name] = max(left_s, pins.get(name, 0.0))
    return replace(
        same[0],
        leases=sum(row.leases for row in same),
        pins=pins,
        idle_s=min(row.idle_s for row in same),
    )
