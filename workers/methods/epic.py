"""`epic` (EPIC, arXiv 2410.15332): the first tokens of every span carry most of the deviation, so recompute
them, in all layers.

The first tokens of a segment were attention sinks of its own when it was made; at a new place they are not.
Rows start from the embedding, so the method works for any segment, with or without a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.errors import ConfigError
from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, Positions, RectifyPlan, Span, rectify_hits


@dataclass(frozen=True, slots=True)
class Epic:
    """Recompute the first `k` tokens of every relayed span in all layers."""

    name: ClassVar[str] = "epic"
    exact: ClassVar[bool] = False
    uses_segments: ClassVar[bool] = True
    from_profile: ClassVar[Mapping[str, str]] = {}
    exhaustive: ClassVar[str | None] = "epic:k=1000000"

    k: int = 16

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"epic: k={self.k} must not be negative.")

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        longest = max((len(s) for s in spans), default=0)
        select = Positions(range(min(self.k, longest)))
        return rectify_hits(spans, hits, (0, profile.num_layers), select)
