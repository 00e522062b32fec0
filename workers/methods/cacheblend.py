"""`cacheblend` (CacheBlend, arXiv 2405.16444; methods.md section 1): compute the first two layers for all
span tokens, see whose values changed most, and compute only those in the layers behind.

The published code approximates the causal mask of the chosen rows; ours is exact by position, as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.errors import ConfigError
from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, RectifyPlan, Span, TopValueChange, rectify_hits

DETECTION_LAYER = 1


@dataclass(frozen=True, slots=True)
class CacheBlend:
    """Recompute the share `r` of all relayed tokens, chosen at layer 1 by the change of their values."""

    name: ClassVar[str] = "cacheblend"
    exact: ClassVar[bool] = False
    uses_segments: ClassVar[bool] = True
    from_profile: ClassVar[Mapping[str, str]] = {}
    exhaustive: ClassVar[str | None] = "cacheblend:r=1"

    r: float = 0.15

    def __post_init__(self) -> None:
        if not 0 <= self.r <= 1:
            raise ConfigError(f"cacheblend: r={self.r} is not between 0 and 1.")

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        select = TopValueChange(min(DETECTION_LAYER, profile.num_layers - 1), self.r)
        return rectify_hits(spans, hits, (0, profile.num_layers), select)
