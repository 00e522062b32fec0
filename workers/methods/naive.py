"""Rotate and use: no repair. The upper bound of speed and the lower bound of fidelity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, RectifyPlan, Span, SpanPlan


@dataclass(frozen=True, slots=True)
class Naive:
    """Reuse every hit as it is, re-rotated to its new position."""

    name: ClassVar[str] = "naive"
    exact: ClassVar[bool] = False
    uses_segments: ClassVar[bool] = True
    from_profile: ClassVar[Mapping[str, str]] = {}
    exhaustive: ClassVar[str | None] = None

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        return RectifyPlan(tuple(SpanPlan(s, hits.get(s.key) if s.key else None) for s in spans))
