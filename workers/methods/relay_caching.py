"""`relay_caching` (RelayCaching, arXiv 2603.13289; our reading, methods.md section 2).

Shallow layers are reused, layers [L_start, L_det] are recomputed for all span tokens from the checkpoint,
then the deviating and the influential tokens go on to L_end, above which entries are reused again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.errors import ConfigError
from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, RectifyPlan, Span, TopDeviation, rectify_hits


@dataclass(frozen=True, slots=True)
class RelayCaching:
    """Select at run time, at the detection layer.

    Attributes:
        tau_diff: a token deviates when 1 - cos(v_reused, v_full) exceeds this times the mean; negative
            selects every token.
        tau_down: a token has influence when the attention it receives exceeds this times the mean.
        suffix: number of last prompt tokens whose attention counts as influence.
        start, det, end: L_start, L_det (inclusive), L_end (exclusive); None = from the model's profile.
    """

    name: ClassVar[str] = "relay_caching"
    exact: ClassVar[bool] = False
    uses_segments: ClassVar[bool] = True
    from_profile: ClassVar[Mapping[str, str]] = {
        "start": "checkpoint_layer",
        "det": "detection_layer",
        "end": "end_layer",
    }
    exhaustive: ClassVar[str | None] = "relay_caching:tau_diff=-1+start=0+det=1+end=1000000"

    tau_diff: float = 1.5
    tau_down: float = 1.45
    suffix: int = 10
    start: int | None = None
    det: int | None = None
    end: int | None = None

    def __post_init__(self) -> None:
        if self.suffix < 1:
            raise ConfigError(f"relay_caching: suffix={self.suffix} must be at least 1.")
        for name in ("start", "det", "end"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"relay_caching: {name}={value} must not be negative.")

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        start = profile.checkpoint_layer if self.start is None else self.start
        end = profile.end_layer if self.end is None else min(self.end, profile.num_layers)
        det = profile.detection_layer if self.det is None else self.det
        if not start <= det < end:
            raise ConfigError(f"relay_caching: needs start <= det < end, got {start}, {det}, {end}.")
        select = TopDeviation(det, self.tau_diff, self.tau_down, self.suffix)
        return rectify_hits(spans, hits, (start, end), select)
