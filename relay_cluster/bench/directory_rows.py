"""Rows of `relay bench directory`. Plain; the benchmark is in `directory.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryRow:
    """One call of the directory, from several clients at once.

    Attributes:
        op: "publish", "lookup", "lookup_miss", "lease", "renew", "release", "evict" or "list".
        batch: keys of one call.
        clients: processes that call at once.
        shards, replicas: of the directory.
        segments: copies entered while it was measured.
        calls, keys: done by all clients together.
        keys_per_s: keys / seconds, all clients together.
        p50_ms, p99_ms: time of one call as its client sees it.
        bytes_per_segment: memory that all shards have grown by since their start / segments.
        message_bytes: of one request and its reply, as packed; None where the calls differ in size.
    """

    op: str
    batch: int
    clients: int
    shards: int
    replicas: int
    segments: int
    calls: int
    keys: int
    keys_per_s: float
    p50_ms: float
    p99_ms: float
    bytes_per_segment: float
    message_bytes: int | None
