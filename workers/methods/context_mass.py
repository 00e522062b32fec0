"""`context_mass` (ours, methods.md section 4): repair the tokens that looked at the text before it.

A token's KV changes with the prefix only as far as the token attended to the prefix. The upstream agent
recorded that attention mass while it decoded, so the set to repair is known when the segment is published: no
detection layers and no pass over all tokens. Where a prompt relays much more than it computes, a look ahead
(`Look`) adds what its end reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from transport.errors import ConfigError
from transport.types import Located, SegmentKey
from workers.methods.base import Look, ModelProfile, RectifyPlan, Span, TopMass, rectify_hits


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
        look: rank tokens also by the attention that they get from so many of the prompt's last tokens; 0 =
            do not look. It costs the fresh tokens' way to `look_layer`, so it is done only where half of the
            tokens to recompute are a matter of rank (not first tokens or probes).
        look_ratio: `ratio` where it looks, and knows better; None = the same.
        look_layer: last layer whose attention counts, not below `start`; None = three fifths of the way.
        look_from: look only where so many tokens are relayed for each that is computed behind the first of
            them: else more would be spent on looking than a better choice saves.
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
    look: int = 0
    look_ratio: float | None = None
    look_layer: int | None = None
    look_from: float = 10.0

    def __post_init__(self) -> None:
        for name in ("probes", "drift", "drift_one"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"context_mass: {name}={value} is not between 0 and 1.")
        for name in ("ratio", "look_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"context_mass: {name}={value} is not between 0 and 1.")
        for name in ("first", "start", "end", "look", "look_layer", "look_from"):
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
        relayed = [s for s in spans if s.key is not None and s.key in hits]
        drift = self.drift if len(relayed) > 1 else self.drift_one
        look = None
        looking = select if self.look_ratio is None else replace(select, ratio=self.look_ratio)
        if self._looks(spans, relayed, looking):
            look, select = self._look(start, profile.num_layers), looking
        return rectify_hits(spans, hits, (start, end), select, drift=drift if self.probes else 0.0, look=look)

    def _looks(self, spans: Sequence[Span], relayed: Sequence[Span], select: TopMass) -> bool:
        """Whether looking ahead pays."""
        if not self.look or not relayed or select.ratio >= 1:
            return False
        tokens = sum(len(s) for s in relayed)
        fresh = spans[-1].stop - relayed[0].start - tokens
        budgets = [select.budget(len(s)) for s in relayed]
        ranked = sum(b.ranked for b in budgets)
        return tokens >= self.look_from * fresh and 2 * ranked >= sum(b.total for b in budgets) > 0

    def _look(self, start: int, num_layers: int) -> Look:
        last = max(start, 3 * num_layers // 5) if self.look_layer is None else self.look_layer
        # Below `start` there is no state yet from which the fresh tokens could start again.
        if not start <= last < num_layers - 1:
            raise ConfigError(
                f"context_mass: look_layer={last} must lie between start={start} and the last but one of the "
                f"model's {num_layers} layers."
            )
        # Neighbouring layers say much the same; three of them make the ranking steadier than one.
        return Look(tuple(layer for layer in (last - 4, last - 2, last) if layer >= 0), self.look, start)
