"""No reuse at all: the oracle that every other method is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, RectifyPlan, Span, fresh


@dataclass(frozen=True, slots=True)
class FullPrefill:
    """Compute every token in every layer, without even the prefix cache."""

    name: ClassVar[str] = "full_prefill"
    exact: ClassVar[bool] = True
    uses_segments: ClassVar[bool] = False
    from_profile: ClassVar[Mapping[str, str]] = {}
    exhaustive: ClassVar[str | None] = "full_prefill"

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        return RectifyPlan(tuple(fresh(s) for s in spans), use_prefix_cache=False)
