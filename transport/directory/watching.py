"""The Ray shell of a shard that can be watched: a call that is answered when there is news, or in the end.

Watches wait on threads of their own, at most `max_watches` of them; further ones are refused at once. Whoever
watches and dies leaves its entry behind until its deadline. The table is still used by one thread at a time.
(An actor with asynchronous methods would need no threads, and took a quarter longer for every other call.) It
decides nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

import ray

from transport.directory import wire, wire_open
from transport.directory.shard import Shard
from transport.types import SegmentKey

WATCH = "watch"
"""Concurrency group of the calls that wait."""


class Watches:
    """Who waits for news of which open segment. Not thread-safe: its owner has a lock.

    Args:
        limit: entries at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_key: dict[SegmentKey, dict[threading.Event, str]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def enter(self, key: SegmentKey, holder: str) -> threading.Event | None:
        """An entry, which is set when there is news or it was dismissed; None when there are too many."""
        if self._count >= self._limit:
            return None
        self._count += 1
        entry = threading.Event()
        self._by_key.setdefault(key, {})[entry] = holder
        return entry

    def leave(self, key: SegmentKey, entry: threading.Event) -> bool:
        """End an entry; False when it had been dismissed."""
        waiting = self._by_key.get(key)
        if waiting is None or waiting.pop(entry, None) is None:
            return False
        self._count -= 1
        if not waiting:
            del self._by_key[key]
        return True

    def wake(self, keys: Iterable[SegmentKey]) -> None:
        """There is news of these."""
        for key in keys:
            for entry in self._by_key.get(key, ()):
                entry.set()

    def dismiss(self, key: SegmentKey, holder: str) -> int:
        """End all entries of that holder; how many."""
        mine = [entry for entry, who in self._by_key.get(key, {}).items() if who == holder]
        for entry in mine:
            self.leave(key, entry)
            entry.set()
        return len(mine)


class WatchedShard(Shard):
    """A shard with its watches. Run as a Ray actor by `create_shard`. Thread-safe."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lock = threading.RLock()
        self._watches = Watches(self._settings.max_watches)

    def serve(self, method: str, request: bytes) -> bytes:
        """See Shard; wakes whoever waits for what this has changed."""
        with self._lock:
            try:
                return super().serve(method, request)
            finally:
                self._watches.wake(self._table.take_changed())

    @ray.method(concurrency_group=WATCH)
    def watch(self, request: bytes) -> bytes:
        """As `serve("watch", request)`, but there is something to tell, or time is over.

        Raises:
            MalformedMessage: bytes that are no such call.
        """
        _, arguments = wire.unpack_request(request)
        wire.array(arguments, self._arity["watch"])
        key, _, _, holder, _, wait_s = wire_open.unpack_watch(arguments)
        deadline = time.monotonic() + wait_s
        while True:
            with self._lock:
                reply = self.serve("watch", request)
                if not _says_nothing(reply) or time.monotonic() >= deadline:
                    return reply
                entry = self._watches.enter(key, holder)
            if entry is None:
                return self._refused()
            entry.wait(max(0.0, deadline - time.monotonic()))
            with self._lock:
                if not self._watches.leave(key, entry):
                    return reply  # dismissed

    def _unwatch(self, keys: Any, holder: Any) -> int:
        return self._watches.dismiss(wire_open.unpack_key(keys), wire.expect(holder, str))

    def _stats(self) -> dict[str, float]:
        return {**super()._stats(), "watches": len(self._watches)}


def _says_nothing(reply: bytes) -> bool:
    told = wire.unpack_reply(reply)
    return told.status == wire.OK and told.result is None
