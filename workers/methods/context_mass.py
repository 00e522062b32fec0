"""`context_mass` (ours, methods.md section 4): repair the tokens that looked at the text before it.

A token's KV changes with the prefix only as far as the token attended to the prefix. The upstream agent
recorded that attention mass while it decoded, so the set to repair is known when the segment is published: no
detection layers and no pass over all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.errors import ConfigError
from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, RectifyPlan, Span, TopMass, rectify_hits


@dataclass(frozen=True, slots=True)
class ContextMass:
    """Recompute the share `ratio` of each span, in layers [start, end), from the checkpoint.

    Attributes (None = from the model's profile):
        ratio: share of a span's tokens, 0 to 1.
        first: how many of the span's first tokens are always among them (they carry most deviation).
        start: first recomputed layer; must be 0 or the segment's checkpoint layer.
        end: layer from which entries are reused again.
        probes: share of the span's tokens, within `ratio`, that is spread evenly instead of chosen by mass.
        drift: factor with which their mean change is added to what is not recomputed (`workers/drift.py`),
            in prompts with several relayed spans; drift_one: in prompts with one. (One span behind computed
            text changes less as a whole, so the mean of its probes says less.)
    """

    name: ClassVar[str] = "context_mass"
    exact: ClassVar[bool] = False
    uses_segments: ClassVar[bool] = True
    from_profile: ClassVar[Mapping[str, str]] = {
        "ratio": "ratio",
        "first": "first_tokens",
        "start": "checkpoint_layer",
        "end": "end_layer",
    }
    exhaustive: ClassVar[str | None] = "context_mass:ratio=1+start=0+end=1000000"

    ratio: float | None = None
    first: int | None = None
    start: int | None = None
    end: int | None = None
    probes: float = 0.0
    drift: float = 0.0
    drift_one: float = 0.0

    def __post_init__(self) -> None:
        for name in ("probes", "drift", "drift_one"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"context_mass: {name}={value} is not between 0 and 1.")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise ConfigError(f"context_mass: ratio={self.ratio} is not between 0 and 1.")
        for name in ("first", "start", "end"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"context_mass: {name}={value} must not be negative.")

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        start = profile.checkpoint_layer if self.start is None else self.start
        end = profile.end_layer if self.end is None else min(self.end, profile.num_layers)
        select = TopMass(
            ratio=profile.ratio if self.ratio is None else self.ratio,
            first=profile.first_tokens if self.first is None else self.first,
            probes=self.probes,
        )
        relayed = sum(s.key is not None and s.key in hits for s in spans)
        drift = self.drift if relayed > 1 else self.drift_one
        return rectify_hits(spans, hits, (start, end), select, drift=drift if self.probes else 0.0)
