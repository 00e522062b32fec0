"""How long calls took, by name, in fixed buckets: what a histogram needs, and no more. Thread-safe.

Facts only: who records them, and under which name, is decided elsewhere.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import Final, NamedTuple

BOUNDS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Upper bounds of the buckets, in seconds; one more holds what took longer."""


class Durations(NamedTuple):
    """Calls of one name. counts: in each bucket, the last one without bound. seconds: of all together."""

    counts: tuple[int, ...]
    seconds: float


class Latencies:
    """Durations by name."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, list[int]] = {}
        self._seconds: dict[str, float] = {}

    def observe(self, name: str, seconds: float) -> None:
        """Count a call that took so long."""
        at = bisect_left(BOUNDS_S, seconds)
        with self._lock:
            counts = self._counts.setdefault(name, [0] * (len(BOUNDS_S) + 1))
            counts[at] += 1
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def snapshot(self) -> dict[str, Durations]:
        """All of them, taken at one instant."""
        with self._lock:
            return {name: Durations(tuple(c), self._seconds[name]) for name, c in self._counts.items()}
