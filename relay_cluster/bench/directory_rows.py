"""Rows of `relay bench directory`. Plain; the benchmark is in `directory.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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

    @property
    def method(self) -> str:
        """What tables and pictures call this row."""
        return self.op

    @property
    def params(self) -> str:
        return ""


DIRECTORY_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("batch", lambda r: f"{r.batch:,}"),
    ("clients", lambda r: str(r.clients)),
    ("calls", lambda r: f"{r.calls:,}"),
    ("keys/s", lambda r: f"{r.keys_per_s:,.0f}"),
    ("p50", lambda r: f"{r.p50_ms:.2f} ms"),
    ("p99", lambda r: f"{r.p99_ms:.2f} ms"),
    ("segments", lambda r: f"{r.segments:,}"),
    ("bytes/segment", lambda r: f"{r.bytes_per_segment:,.0f}"),
    ("message", lambda r: "-" if r.message_bytes is None else f"{r.message_bytes:,} B"),
)
