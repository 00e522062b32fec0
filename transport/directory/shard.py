"""The Ray shell of one directory shard: a named actor that restarts empty. It decides nothing.

Every reply tells the shard's own incarnation, so that owners notice a restart and publish again what they
hold, and the epoch of the membership it knows, so that callers notice a resize. Tensors never pass through
here. It does not know which keys are its own.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import ray
import ray.exceptions
import ray.util

from transport.directory import wire, wire_open
from transport.directory.opening import News, OpenTable
from transport.directory.view import View
from transport.settings import DirectorySettings
from transport.types import LeaseId, WorkerId

logger = logging.getLogger(__name__)

MAX_PAGE: Final = 1_000
"""Rows of one page of an operator's call; a larger limit is cut to it."""
MAX_COPIES: Final = 4
"""Owners' copies of one segment that one lease names at most."""


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class Shard:
    """One table behind calls in bytes, on this process's monotonic clock. Run as a Ray actor by
    `create_shards`; usable as a plain object in tests, which may bring a clock of their own."""

    def __init__(
        self,
        name: str,
        settings: DirectorySettings,
        clock: Callable[[], float] = time.monotonic,
        first: Sequence[str] = (),
    ) -> None:
        """first: the shards that the directory starts with; none for one added later, which is told."""
        self.name = name
        self.incarnation = time.time_ns()
        self.view = View(0, tuple(first))
        self._settings = settings
        self._clock = clock
        self._table = OpenTable(
            max_open=settings.max_open,
            max_open_blocks=settings.max_open_blocks,
            owner_timeout_s=settings.owner_timeout_s,
            lease_prefix=f"{name}:{self.incarnation}:",
            max_lease_s=settings.max_lease_s,
            max_pin_s=settings.max_pin_s,
            max_leases=settings.max_leases,
        )
        self._methods: Mapping[str, Callable[..., Any]] = {
            "announce": self._announce,
            "publish": self._publish,
            "lookup": self._lookup,
            "lease": self._lease,
            "renew": self._renew,
            "release": self._release,
            "candidates": self._candidates,
            "evict_copies": self._evict_copies,
            "retire": self._retire,
            "retract": self._retract,
            "drop_owner": self._drop_owner,
            "advance": self._advance,
            "watch": self._watch,
            "unwatch": self._unwatch,
            "page": self._page,
            "wish": self._wish,
            "pin": self._pin,
            "unpin": self._unpin,
            "pin_copies": self._pin_copies,
            "stats": self._stats,
            "settings": self._tell_settings,
            "view": self._view,
            "set_view": self._set_view,
        }
        self._arity = {name: _arity(call) for name, call in self._methods.items()}
        self._resident_at_start = resident_bytes()

    def serve(self, method: str, request: bytes) -> bytes:
        """Answer one call; see `wire`.

        Raises:
            MalformedMessage: bytes that are no such call. KeyError: no such method.
        """
        epoch, arguments = wire.unpack_request(request)
        wire.array(arguments, self._arity[method])
        if epoch < self.view.epoch and method in wire.PLACED:
            # Who splits keys by an older list of shards would enter or miss them at the wrong one.
            return self._reply(wire.MOVED, self.view, None)
        result = self._methods[method](*arguments)
        return self._reply(wire.OK, self.view if epoch < self.view.epoch else None, result)

    def _reply(self, status: int, view: View | None, result: Any) -> bytes:
        return wire.pack_reply(wire.Reply(status, self.view.epoch, self.incarnation, view, result))

    # -- one method per call: unpack, ask the table, pack -----------------------------------------------

    def _announce(self, owner: Any) -> Any:
        told, clock_ms = wire.unpack_announcing(owner)
        return wire.pack_announced(self._table.announce(told, self._clock(), clock_ms=clock_ms))

    def _publish(self, owner: Any, segments: Any) -> Any:
        told, clock_ms = wire.unpack_announcing(owner)
        held = wire.unpack_segments(segments, packed=True)
        return wire.pack_announced(self._table.publish(told, held, self._clock(), clock_ms=clock_ms))

    def _lookup(self, keys: Any, near: Any) -> Any:
        wanted = wire.unpack_keys(keys)
        reader = None if near is None else WorkerId(wire.expect(near, str))
        return wire.pack_located(self._table.lookup(wanted, self._clock(), near=reader), wanted)

    def _lease(self, keys: Any, holder: Any, ttl_s: Any, copies: Any = 1) -> Any:
        wanted = wire.unpack_keys(keys)
        granted = self._table.lease(
            wanted,
            self._clock(),
            holder=WorkerId(wire.expect(holder, str)),
            ttl_s=_seconds(ttl_s),
            copies=min(wire.expect(copies, int), MAX_COPIES),
        )
        return wire.pack_shared(granted, wanted)

    def _renew(self, leases: Any, ttl_s: Any) -> Any:
        ids = [LeaseId(wire.expect(x, str)) for x in wire.array(leases)]
        held = self._table.renew(ids, self._clock(), ttl_s=_seconds(ttl_s))
        return [held[i] for i in ids]

    def _release(self, leases: Any, read: Any) -> None:
        ids = [LeaseId(wire.expect(x, str)) for x in wire.array(leases)]
        self._table.release(ids, self._clock(), read=wire.expect(read, bool))

    def _candidates(self, owner: Any, nbytes: Any) -> Any:
        offers = self._table.candidates(wire.OWNER.unpack(owner), wire.expect(nbytes, int), self._clock())
        return wire.pack_candidates(offers)

    def _evict_copies(self, owner: Any, copies: Any) -> Any:
        named = wire.unpack_copies(copies)
        return wire.pack_segments(self._table.evict_copies(wire.OWNER.unpack(owner), named, self._clock()))

    def _retire(self, owner: Any, copies: Any) -> Any:
        return self._table.retire(wire.OWNER.unpack(owner), wire.unpack_copies(copies), self._clock())

    def _retract(self, owner: Any, segments: Any) -> None:
        held = wire.unpack_segments(segments, packed=True)
        self._table.retract(wire.OWNER.unpack(owner), held, self._clock())

    def _drop_owner(self, worker: Any, incarnation: Any) -> None:
        name = WorkerId(wire.expect(worker, str))
        self._table.drop_owner(name, wire.expect(incarnation, int), self._clock())

    def _advance(self, owner: Any, updates: Any) -> Any:
        told, clock_ms = wire.unpack_announcing(owner)
        opened = wire_open.unpack_opened(updates)
        return wire_open.pack_advanced(self._table.advance(told, opened, self._clock(), clock_ms=clock_ms))

    def _watch(self, key: Any, life: Any, after: Any, holder: Any, ttl_s: Any, wait_s: Any) -> Any:
        """What there is now; how it is waited for is the business of whoever runs this (`watching`)."""
        wanted, seen, behind, who, ttl, _ = wire_open.unpack_watch((key, life, after, holder, ttl_s, wait_s))
        news = self._table.watch(
            wanted, life=seen, after=behind, holder=WorkerId(who), now=self._clock(), ttl_s=ttl
        )
        return wire_open.pack_news(news)

    def _refused(self) -> bytes:
        """The reply to one watch too many."""
        return self._reply(wire.OK, None, wire_open.pack_news(News(state="refused")))

    def _unwatch(self, keys: Any, holder: Any) -> int:
        """Nobody waits at a plain object."""
        wire_open.unpack_key(keys)
        wire.expect(holder, str)
        return 0

    def _page(self, chosen: Any, after: Any, limit: Any) -> Any:
        rows, where = wire.FILTER.unpack(chosen), wire.unpack_cursor(after)
        return wire.pack_page(self._table.page(rows, self._clock(), after=where, limit=_limit(limit)))

    def _wish(self, worker: Any, copies: Any) -> int:
        owner = WorkerId(wire.expect(worker, str))
        return self._table.wish(owner, wire.unpack_copies(copies), self._clock())

    def _pin(self, chosen: Any, name: Any, ttl_s: Any, after: Any, limit: Any) -> Any:
        page = self._table.pin(
            wire.FILTER.unpack(chosen),
            self._clock(),
            name=wire.expect(name, str),
            ttl_s=_seconds(ttl_s),
            after=wire.unpack_cursor(after),
            limit=_limit(limit),
        )
        return wire.pack_page(page)

    def _unpin(self, chosen: Any, name: Any, after: Any, limit: Any) -> Any:
        page = self._table.unpin(
            wire.FILTER.unpack(chosen),
            self._clock(),
            name=wire.expect(name, str),
            after=wire.unpack_cursor(after),
            limit=_limit(limit),
        )
        return wire.pack_page(page)

    def _pin_copies(self, worker: Any, copies: Any, name: Any, ttl_s: Any) -> int:
        return self._table.pin_copies(
            WorkerId(wire.expect(worker, str)),
            wire.unpack_copies(copies),
            self._clock(),
            name=wire.expect(name, str),
            ttl_s=_seconds(ttl_s),
        )

    def _stats(self) -> dict[str, float]:
        grown = max(0, resident_bytes() - self._resident_at_start)
        return {**self._table.stats(self._clock()), "memory_bytes": grown, "watches": 0}

    def _tell_settings(self) -> Any:
        return wire.SETTINGS.pack(self._settings)

    def _view(self) -> Any:
        return wire.pack_view(self.view)

    def _set_view(self, view: Any) -> Any:
        told = wire.unpack_view(view)
        if told.epoch > self.view.epoch:
            self.view = told
        return wire.pack_view(self.view)


def _arity(call: Callable[..., Any]) -> int:
    """How many arguments a call takes. Ray adds a keyword of its own to the methods of an actor."""
    parameters = inspect.signature(call).parameters.values()
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _seconds(value: Any) -> float:
    """A time to live. One that is no number would never end, and keep those behind it from ending.

    Raises:
        MalformedMessage: not a number of 0 or more.
    """
    seconds = wire.expect(value, float)
    if not seconds >= 0:
        raise wire.MalformedMessage(f"{seconds} seconds in a directory message")
    return seconds


def _limit(value: Any) -> int:
    return max(1, min(wire.expect(value, int), MAX_PAGE))


_NAME: Final = re.compile(r"(relay-directory[\w-]*?)-(\d+)")
DEFAULT_PREFIX: Final = "relay-directory"


def shard_name(prefix: str, index: int) -> str:
    """Actor name of the shard with this index, from 0."""
    return f"{prefix}-{index}"


def create_shard(
    name: str,
    settings: DirectorySettings,
    *,
    first: Sequence[str] = (),
    detached: bool = False,
    options: dict[str, Any] | None = None,
) -> Any:
    """Start (or find) one shard actor in the current Ray namespace and return its handle.

    Args:
        first: see Shard.
        detached: outlive the driver that starts it.
        options: further actor options, for example scheduling.
    """
    from transport.directory.watching import WATCH, WatchedShard  # which is a Shard

    remote: Any = ray.remote  # its stubs do not know concurrency groups
    # Some threads more than may wait: those that are refused need one as well.
    actor: Any = remote(concurrency_groups={WATCH: settings.max_watches + 8})(WatchedShard)
    chosen: dict[str, Any] = {
        "name": name,
        "get_if_exists": True,
        "lifetime": "detached" if detached else None,
        "max_restarts": -1,
        # A retried publish could revive what its owner has evicted meanwhile; callers decide themselves.
        "max_task_retries": 0,
        "num_cpus": 0,
        **(options or {}),
    }
    return actor.options(**chosen).remote(name, settings, first=tuple(first))


def create_shards(
    settings: DirectorySettings,
    *,
    prefix: str = DEFAULT_PREFIX,
    detached: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Start (or find) the shard actors of a running Ray cluster, named "<prefix>-<i>".

    Returns:
        name -> actor handle, as `DirectoryClient` takes it.
    """
    names = [shard_name(prefix, i) for i in range(settings.shards)]
    return {
        name: create_shard(name, settings, first=names, detached=detached, options=options) for name in names
    }


def kill_shards(prefix: str) -> None:
    """End every shard actor of that prefix in the current namespace, whoever started it: a resize from
    another process adds some. Never raises for one that is gone."""
    for name in find_names().get(prefix, ()):
        try:
            ray.kill(ray.get_actor(name))
        except (ray.exceptions.RayError, ValueError) as fault:
            logger.warning("directory shard %s could not be ended: %s", name, fault)


def find_names() -> dict[str, tuple[str, ...]]:
    """Shard actors of the current namespace by their prefix: one entry per directory."""
    out: dict[str, list[tuple[int, str]]] = {}
    for name in ray.util.list_named_actors():
        match = _NAME.fullmatch(str(name))
        if match:
            out.setdefault(match[1], []).append((int(match[2]), match[0]))
    return {prefix: tuple(name for _, name in sorted(found)) for prefix, found in out.items()}


def find_shards(settings: DirectorySettings, *, prefix: str = DEFAULT_PREFIX) -> dict[str, Any]:
    """Handles of shards that `create_shards` has started, by name.

    Raises:
        ValueError: (from Ray) no actor of that name in this namespace.
    """
    names = [shard_name(prefix, i) for i in range(settings.shards)]
    return {name: ray.get_actor(name) for name in names}
