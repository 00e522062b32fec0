"""Calls about open segments as bytes; see `wire`, whose rules hold here as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from transport.directory import wire
from transport.directory.opening import BLOCKS_PER_NEWS, Advanced, News, Opened
from transport.types import SegmentKey

MAX_WATCH_S: Final = 30.0
"""A watch is answered after so long at the latest."""

_OPENED: Final = wire.Record(Opened, "key", "blocks", "final")
_NEWS: Final = wire.Record(News, "lease", "final")
_ADVANCED: Final = wire.Record(Advanced)
_UNSIGNED_63: Final = 1 << 63


def pack_opened(updates: Sequence[Opened]) -> list[Any]:
    """[keys, [[fields, blocks, final], ...]]."""
    items = [[_OPENED.pack(u), [wire.BLOCK.pack(b) for b in u.blocks], _pack_key(u.final)] for u in updates]
    return [wire.pack_keys([u.key for u in updates]), items]


def unpack_opened(value: Any) -> list[Opened]:
    """Raises MalformedMessage."""
    keys, items = wire.array(value, 2)
    found = wire.unpack_keys(keys)
    out: list[Opened] = []
    for key, item in zip(found, wire.array(items, len(found)), strict=True):
        fields, blocks, final = wire.array(item, 3)
        held = wire.BLOCK.unpack_all(wire.array(blocks))
        update = _OPENED.unpack(fields, key, held, _unpack_key(final))
        if not (0 <= update.first < _UNSIGNED_63 and 0 <= update.num_tokens < _UNSIGNED_63):
            raise wire.MalformedMessage(f"block {update.first} of an open segment")
        if (update.final is None) == (update.state == "closed"):
            raise wire.MalformedMessage("an open segment is closed with a key, and only then")
        out.append(update)
    return out


def pack_advanced(verdicts: Sequence[Advanced]) -> list[Any]:
    return [_ADVANCED.pack(v) for v in verdicts]


def unpack_advanced(value: Any, count: int) -> list[Advanced]:
    """Raises MalformedMessage."""
    return [_ADVANCED.unpack(x) for x in wire.array(value, count)]


def pack_watch(key: SegmentKey, life: int, after: int, holder: str, ttl_s: float, wait_s: float) -> list[Any]:
    return [wire.pack_keys([key]), int(life), after, holder, float(ttl_s), float(wait_s)]


def unpack_watch(arguments: Sequence[Any]) -> tuple[SegmentKey, int, int, str, float, float]:
    """Raises MalformedMessage."""
    keys, life, after, holder, ttl_s, wait_s = arguments
    seen = wire.expect(after, int)
    seconds = [wire.expect(ttl_s, float), wire.expect(wait_s, float)]
    if not 0 <= seen < _UNSIGNED_63 or not all(s >= 0 for s in seconds):
        raise wire.MalformedMessage(f"a watch behind block {seen}, for {seconds} seconds")
    return (
        unpack_key(keys),
        wire.expect(life, int),
        seen,
        wire.expect(holder, str),
        seconds[0],
        min(seconds[1], MAX_WATCH_S),
    )


def pack_news(news: News | None) -> list[Any] | None:
    if news is None:
        return None
    lease = None
    if news.lease is not None:
        key = news.lease.located.segment.key
        lease = wire.pack_leases({key: news.lease}, [key])
    return [_NEWS.pack(news), lease, _pack_key(news.final)]


def unpack_news(value: Any, key: SegmentKey, holder: Any) -> News | None:
    """Raises MalformedMessage."""
    if value is None:
        return None
    fields, lease, final = wire.array(value, 3)
    held = None if lease is None else wire.unpack_leases(lease, [key], holder).get(key)
    news = _NEWS.unpack(fields, held, _unpack_key(final))
    if held is not None and not 0 < len(held.located.segment.blocks) <= BLOCKS_PER_NEWS:
        raise wire.MalformedMessage(f"news of {len(held.located.segment.blocks)} blocks")
    return news


def unpack_key(value: Any) -> SegmentKey:
    """Exactly one. Raises MalformedMessage."""
    keys = wire.unpack_keys(value)
    if len(keys) != 1:
        raise wire.MalformedMessage(f"{len(keys)} keys where there is to be one")
    return keys[0]


def _pack_key(key: SegmentKey | None) -> list[Any] | None:
    return None if key is None else wire.KEY.pack(key)


def _unpack_key(value: Any) -> SegmentKey | None:
    return None if value is None else wire.KEY.unpack(value)
