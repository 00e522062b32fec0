"""What vLLM and SGLang do: the longest common token prefix from the local cache, the rest computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, RectifyPlan, Span, fresh


@dataclass(frozen=True, slots=True)
class ExactPrefix:
    """Reuse only what is identical from token 0 on; exact by construction."""

    name: ClassVar[str] = "exact_prefix"
    exact: ClassVar[bool] = True
    uses_segments: ClassVar[bool] = False
    from_profile: ClassVar[Mapping[str, str]] = {}
    exhaustive: ClassVar[str | None] = "exact_prefix"

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        return RectifyPlan(tuple(fresh(s) for s in spans))
