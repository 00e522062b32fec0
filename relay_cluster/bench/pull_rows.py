"""The row of `relay bench pull`. Plain; the benchmark is in `pull.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRow:
    """Pulls of one small segment by a worker from another one.

    Attributes:
        backend: that moved the bytes; blocks, bytes: of a segment.
        samples: timed pulls.
        seconds_p50, seconds_p90: from asking the directory to verified bytes in the worker's arena.
        lookup_s_p50, lease_s_p50, read_s_p50: parts of it; read: transfer and verification.
        call_s_p50, call_s_p90: of a Ray call that does nothing, from the same process and in turn.
        ratio: seconds_p50 / call_s_p50.
    """

    backend: str
    blocks: int
    bytes: int
    samples: int
    seconds_p50: float
    seconds_p90: float
    lookup_s_p50: float
    lease_s_p50: float
    read_s_p50: float
    call_s_p50: float
    call_s_p90: float
    ratio: float


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"


PULL_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("blocks", lambda r: str(r.blocks)),
    ("bytes", lambda r: f"{r.bytes:,}"),
    ("p50", lambda r: _us(r.seconds_p50)),
    ("p90", lambda r: _us(r.seconds_p90)),
    ("look-up", lambda r: _us(r.lookup_s_p50)),
    ("lease", lambda r: _us(r.lease_s_p50)),
    ("read", lambda r: _us(r.read_s_p50)),
    ("Ray call", lambda r: _us(r.call_s_p50)),
    ("ratio", lambda r: f"{r.ratio:.2f}x"),
)
