"""`kvcomm` (KVCOMM, arXiv 2510.12872): correct reused KV by the offsets that earlier prompts showed.

An *anchor* is a segment that once stood in this slot of this agent's template and was prefilled in full
there: its stored KV (the base), and true KV minus base (the offset). A span is near enough to the anchors or
it is not (the entropy gate below); if it is, its KV becomes base + weighted offsets and nothing is
recomputed; if not, it is computed in full, which makes it an anchor (`workers/anchors.py` holds them).

Behaviour of the published code that is kept: the gate, the weights, the parameters' names and defaults, layer
0 untouched. Corrections: every span is judged alone, not the whole prompt by its first stranger; an anchor
without this agent's offset is no match; counts live on the anchor. The fixed text behind a slot needs no
offsets here: it is short, and it is always computed, over the corrected KV.

Pure: it judges distances; it does not see a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from transport.errors import ConfigError
from transport.types import Located, SegmentKey
from workers.methods.base import ModelProfile, RectifyPlan, Span, SpanPlan

MIN_ANCHORS = 2
"""Fewer anchors than this say nothing about how near is near."""
HEAD_MASS = 0.9
"""The anchors that together hold this share of the gate's probability count as used."""
OFFSET_BITS = (8, 32)


@dataclass(frozen=True, slots=True)
class AnchorCandidate:
    """What the planner knows of an anchor that is long enough for a span and has this agent's offset.

    Attributes:
        source: names the anchor.
        distance: L2 norm, over layers, heads, tokens and channels, of the span's values minus the anchor's
            first ones.
        relative: `distance` divided by the L2 norm of the span's values.
    """

    source: str
    distance: float
    relative: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says of one span.

    Attributes:
        sharable: whether the anchors may correct it; otherwise it is computed, and becomes an anchor.
        entropy: of softmax(-distance), in bits; limit: what it was compared with.
        head: sources of the nearest anchors, which count as used.
    """

    sharable: bool
    entropy: float = 0.0
    limit: float = 0.0
    head: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class KVComm:
    """Correct spans that resemble known ones; compute the others.

    Attributes:
        threshold: a span is a stranger when the entropy of softmax(-distance) over n anchors exceeds
            threshold * log2(n). 0 computes every span.
        max_anchor_num: anchors kept per slot of an agent's template.
        window_size: of so many oldest anchors the least used one is given up.
        bits: 32 keeps offsets as they are, 8 in int8 with scales per channel (keys) and token (values).
        temperature: of the softmax over anchors that gives the weights of their offsets.
        prior: shrinks the correction as that many further anchors with no offset would; 0 = off, as
            published. The mean of a few anchors' offsets adds more noise than it explains.
        max_distance: absolute gate, as the relative distance of the nearest anchor; None = off, as published.
            The entropy alone rewards one *clearly nearest* anchor, however far away it is.
    """

    name: ClassVar[str] = "kvcomm"
    exact: ClassVar[bool] = False
    uses_segments: ClassVar[bool] = True
    from_profile: ClassVar[Mapping[str, str]] = {}
    exhaustive: ClassVar[str | None] = "kvcomm:threshold=0"

    threshold: float = 0.3
    max_anchor_num: int = 20
    window_size: int = 5
    bits: int = 32
    temperature: float = 1.0
    prior: float = 0.0
    max_distance: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"kvcomm: threshold={self.threshold} is not between 0 and 1.")
        for name in ("max_anchor_num", "window_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"kvcomm: {name}={getattr(self, name)} must be at least 1.")
        if self.bits not in OFFSET_BITS:
            raise ConfigError(f"kvcomm: bits={self.bits} is not one of {OFFSET_BITS}.")
        if not self.temperature > 0:
            raise ConfigError(f"kvcomm: temperature={self.temperature} must be above 0.")
        if not self.prior >= 0:
            raise ConfigError(f"kvcomm: prior={self.prior} must not be negative.")
        if self.max_distance is not None and not self.max_distance >= 0:
            raise ConfigError(f"kvcomm: max_distance={self.max_distance} must not be negative.")

    def judge(self, candidates: Sequence[AnchorCandidate]) -> Verdict:
        """The gate of the published code: sharable when one anchor, or few, are clearly the nearest."""
        if len(candidates) < MIN_ANCHORS or self.threshold == 0:
            return Verdict(sharable=False)
        nearest = min(candidates, key=lambda c: c.distance)
        weights = [math.exp(nearest.distance - c.distance) for c in candidates]
        total = math.fsum(weights)
        shares = [w / total for w in weights]
        entropy = -math.fsum(p * math.log2(p) for p in shares if p > 0)
        limit = self.threshold * math.log2(len(candidates))
        near = self.max_distance is None or nearest.relative <= self.max_distance
        # At threshold 1 the limit is the entropy's maximum, which rounding may overstep.
        if not near or entropy > limit + 1e-9:
            return Verdict(False, entropy, limit)
        return Verdict(True, entropy, limit, _head(candidates, shares))

    def plan(
        self,
        spans: Sequence[Span],
        hits: Mapping[SegmentKey, Located],
        profile: ModelProfile,
        candidates: Mapping[Span, Sequence[AnchorCandidate]] | None = None,
    ) -> RectifyPlan:
        """See ReuseMethod. `candidates`: the anchors of every span that is a hit; without them all spans are
        computed."""
        known = candidates or {}
        return RectifyPlan(
            tuple(
                SpanPlan(s, hits[s.key], correction=self.name)
                if s.key is not None and s.key in hits and self.judge(known.get(s, ())).sharable
                else SpanPlan(s)
                for s in spans
            )
        )


def _head(candidates: Sequence[AnchorCandidate], shares: Sequence[float]) -> tuple[str, ...]:
    """Most probable anchors first, until they hold HEAD_MASS together. (The published code takes *all* of
    them when the first alone holds more; we take the first.)"""
    ranked = sorted(zip(shares, candidates, strict=True), key=lambda item: -item[0])
    head: list[str] = []
    mass = 0.0
    for share, candidate in ranked:
        if mass >= HEAD_MASS:
            break
        head.append(candidate.source)
        mass += share
    return tuple(head)
