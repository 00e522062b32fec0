"""What full prefill of a prompt would take, told by what recent prefills took.

A prefill's work is counted in tokens of full prefill: FLOPs computed / full prefill's FLOPs x prompt tokens.
Seconds against work are a line (Theil-Sen, so that single slow requests do not bend it). Attention's growth
with length is left out: for prompts much longer than those measured the estimate is too low, never too high,
and beyond twice the largest measured work there is none. Knows nothing of HTTP.
"""

from __future__ import annotations

import statistics
from collections import deque
from itertools import combinations

from workers.messages import Reply

_KEPT = 32
"""Measurements of each worker; 496 pairs."""
_LEAST = 3
"""Fewer measurements than this predict nothing."""
_REACH = 2.0
"""Longest prompt that is predicted, in largest measured works."""


class PrefillLine:
    """Seconds against work of the last prefills."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def observe(self, work: float, seconds: float) -> None:
        """A prefill of `work` tokens took so long. Nothing computed tells nothing."""
        if work > 0 and seconds > 0:
            self._points.append((work, seconds))

    def predict(self, work: float) -> float | None:
        """Seconds for `work`; None where too little, or too little of this size, was measured."""
        points = self._points
        if len(points) < _LEAST or work > _REACH * max(w for w, _ in points):
            return None
        slopes = [(t2 - t1) / (w2 - w1) for (w1, t1), (w2, t2) in combinations(points, 2) if w1 != w2]
        slope = statistics.median(slopes) if slopes else 0.0
        fixed = statistics.median(t - slope * w for w, t in points)
        if slope <= 0 or fixed < 0:
            return work * statistics.median(t / w for w, t in points)
        return fixed + slope * work


class PrefillSpeeds:
    """A line for each worker, and one for each model, for workers of which little is known."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], PrefillLine] = {}

    def observe(self, reply: Reply) -> None:
        """Learn from a finished request."""
        if reply.flop_ratio is None:
            return
        seconds = reply.stages.prefill_s + reply.stages.rectify_s
        for key in self._keys(reply):
            self._lines.setdefault(key, PrefillLine()).observe(
                reply.flop_ratio * reply.prompt_tokens, seconds
            )

    def full_prefill_s(self, reply: Reply) -> float | None:
        """Seconds that the request's worker would have computed for, had nothing been reused."""
        for key in self._keys(reply):
            line = self._lines.get(key)
            found = None if line is None else line.predict(float(reply.prompt_tokens))
            if found is not None:
                return found
        return None

    @staticmethod
    def _keys(reply: Reply) -> tuple[tuple[str, str], ...]:
        return (reply.model, reply.worker), (reply.model, "")
