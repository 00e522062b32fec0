"""Consistent hashing of segment keys over named shards.

Fixed virtual nodes and BLAKE2b: every process computes the same ring, and adding a shard moves only about
1/n of the keys. This module does not know whether a shard is alive.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

from transport.errors import ConfigError
from transport.types import SegmentKey

VIRTUAL_NODES: Final = 128
"""Points of one shard on the ring; more points, a more even share (128: within about 15 %)."""


def _point(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big")


class Ring:
    """Maps a key to one of the shard names.

    Raises:
        ConfigError: no shard, or a name twice.
    """

    def __init__(self, shards: Sequence[str]) -> None:
        if not shards or len(set(shards)) != len(shards):
            raise ConfigError(f"the directory needs shards with distinct names, got {list(shards)}.")
        points = sorted(
            (_point(f"{name}#{i}".encode()), name) for name in shards for i in range(VIRTUAL_NODES)
        )
        self._points = [p for p, _ in points]
        self._names = [n for _, n in points]
        self.shards = tuple(shards)

    def shard(self, key: SegmentKey) -> str:
        """The shard that is responsible for `key`."""
        return self._names[bisect.bisect_right(self._points, self._place(key)) % len(self._names)]

    @staticmethod
    def _place(key: SegmentKey) -> int:
        # The space is part of the hash, so that one popular prompt of many tenants does not meet one shard.
        return _point(key.space.encode() + b"\0" + key.digest)

    def replicas(self, key: SegmentKey, count: int) -> tuple[str, ...]:
        """The first `count` distinct shards from the key on, the responsible one first; fewer where there are
        not so many."""
        at = bisect.bisect_right(self._points, self._place(key))
        if count == 1:
            return (self._names[at % len(self._names)],)
        out: dict[str, None] = {}
        for step in range(len(self._names)):
            out.setdefault(self._names[(at + step) % len(self._names)])
            if len(out) == min(count, len(self.shards)):
                break
        return tuple(out)

    def split(self, keys: Iterable[SegmentKey]) -> dict[str, list[SegmentKey]]:
        """Group keys by their shard, keeping their order."""
        out: dict[str, list[SegmentKey]] = {}
        for key in keys:
            out.setdefault(self.shard(key), []).append(key)
        return out
