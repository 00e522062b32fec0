"""What a reuse method may say: a plan for every token of a prompt, in which layers it is computed.

Pure and torch-free: a method sees spans, hits and the model's profile and returns a `RectifyPlan`; one
executor (`workers/prefill.py`) runs every plan. Ranges are half-open throughout: a band [a, b) computes
layers a .. b-1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, NamedTuple, Protocol

from transport.types import Located, SegmentKey


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens [start, stop) of a prompt.

    Attributes:
        slot: the slot that the text came from; None for template text.
        key: the segment that may hold its KV; None when it is always fresh.
    """

    start: int
    stop: int
    slot: str | None = None
    key: SegmentKey | None = None

    def __len__(self) -> int:
        return self.stop - self.start


SAFE_PRESETS: Mapping[str, str] = {"fast": "context_mass", "balanced": "context_mass"}
"""What the presets mean for a model whose profile does not say: the profile's own band, ratio and first."""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Layer bands and ratios that suit one model (`configs/profiles/*.yaml`).

    Attributes:
        model: name of the model that it was measured on.
        num_layers: its number of layers L.
        checkpoint_layer: layer whose input hidden states segments carry (the L_start of every method).
        detection_layer: L_det of `relay_caching`, inclusive.
        end_layer: L_end, exclusive: from here on entries are reused again.
        ratio: share of a span's tokens that `auto` recomputes.
        first_tokens: the first tokens of a span that `auto` always counts among those.
        measured: False for the generic profile of a model that nobody has profiled.
        presets: "fast", "balanced" (and perhaps "strict") -> the method text that `auto:<preset>` stands for.
    """

    model: str
    num_layers: int
    checkpoint_layer: int
    detection_layer: int
    end_layer: int
    ratio: float
    first_tokens: int
    measured: bool = True
    presets: Mapping[str, str] = field(default_factory=lambda: dict(SAFE_PRESETS))


MIN_PROBES = 4
"""Fewer probes say too little about the other tokens of a span."""
MAX_PROBES = 24
"""More of them do not make a mean much surer, however long the span; what they would cost goes to tokens that
are ranked."""


class Budget(NamedTuple):
    """How many tokens of a span are recomputed: `first` ones, `probes`, and the best `ranked` ones."""

    first: int
    probes: int
    ranked: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True, slots=True)
class TopMass:
    """Select by publish-time context mass: the first `first` tokens and then the largest masses, together
    `ratio` of the span's tokens, rounded up. Of these, the share `probes` (of the span's tokens) is not taken
    by mass but spread evenly over the rest, to see how tokens change that nobody had reason to recompute."""

    ratio: float
    first: int = 0
    probes: float = 0.0

    def budget(self, tokens: int) -> Budget:
        """For a span of `tokens` tokens. First tokens and probes count within `ratio`, so that it alone
        bounds the cost."""
        total = min(tokens, math.ceil(self.ratio * tokens))
        probes = min(MAX_PROBES, max(MIN_PROBES, round(self.probes * tokens))) if self.probes else 0
        if probes * 2 > total or total == tokens:
            probes = 0
        first = min(self.first, total - probes)
        return Budget(first, probes, total - probes - first)


@dataclass(frozen=True, slots=True)
class TopDeviation:
    """Select at run time at `layer` (RelayCaching): value deviation above `tau_diff` x its mean, or attention
    received from the last `suffix` prompt tokens above `tau_down` x its mean. A negative `tau_diff` selects
    all."""

    layer: int
    tau_diff: float
    tau_down: float
    suffix: int


@dataclass(frozen=True, slots=True)
class TopValueChange:
    """Select at run time at `layer` (CacheBlend): the tokens whose value vectors changed most, by the sum of
    squared differences over heads and channels; `ratio` of the tokens of all spans together, rounded up."""

    layer: int
    ratio: float


@dataclass(frozen=True, slots=True)
class Positions:
    """Select these offsets within the span, ascending."""

    offsets: Sequence[int]


Choice = TopDeviation | TopValueChange
"""Selections that only the run can make: all tokens are computed up to `layer`, the chosen ones go on."""
Select = TopMass | Positions | Choice


@dataclass(frozen=True, slots=True)
class SpanPlan:
    """What happens to one span.

    Attributes:
        span: which tokens.
        source: the hit whose KV is reused; None means computed in full (fresh).
        band: layers [start, stop) in which the selected tokens are recomputed. Rows join at band[0] from the
            segment's checkpoint, or at layer 0 from their embedding.
        select: which tokens of the span. All spans of a plan that select at run time do it alike.
        drift: factor with which the mean change of the probes is added to the entries that are not
            recomputed; 0 = they stay as they are (`workers/drift.py`).
        correction: name of the method whose correction is added to the reused KV; the executor gets it with
            the bytes (`workers.prefill.Correction`). None = used as it is.
    """

    span: Span
    source: Located | None = None
    band: tuple[int, int] = (0, 0)
    select: Select = Positions(())
    drift: float = 0.0
    correction: str | None = None

    @property
    def shift(self) -> int:
        """Positions that the stored keys must be rotated by."""
        return 0 if self.source is None else self.span.start - self.source.segment.start


@dataclass(frozen=True, slots=True)
class Look:
    """A look ahead at what the prompt's end reads, before `TopMass` selects.

    The fresh tokens are computed up to the last of `layers` over the relayed KV as it is, and again
    afterwards. Tokens then rank by their context mass times the square root of the attention that they get in
    `layers`.

    Attributes:
        layers: ascending; attention counts in these. suffix: how many of the prompt's last tokens give it.
        back: layer at which the fresh tokens start again: nothing below it depends on the selection.
    """

    layers: tuple[int, ...]
    suffix: int
    back: int

    def __post_init__(self) -> None:
        if self.layers[-1] < self.back:
            raise ValueError(
                f"a look that ends at layer {self.layers[-1]} has no states of layer {self.back}."
            )


@dataclass(frozen=True, slots=True)
class RectifyPlan:
    """A plan for a whole prompt.

    Attributes:
        spans: tile the prompt without gap or overlap.
        use_prefix_cache: whether the leading fresh tokens may come from the exact local prefix cache.
        look: how the run helps to rank what `TopMass` selects; None = by what the segments carry alone.
    """

    spans: tuple[SpanPlan, ...]
    use_prefix_cache: bool = True
    look: Look | None = None


class ReuseMethod(Protocol):
    """One way to reuse KV; a frozen dataclass whose fields are its parameters.

    Attributes:
        name: how users call it.
        exact: whether its output is full prefill's by construction.
        uses_segments: whether it wants directory look-ups at all.
        from_profile: parameter -> `ModelProfile` field that fills it where the user left it out (None).
        exhaustive: method text of the setting that recomputes everything, which must equal full prefill on
            any model; None where a method repairs nothing by design.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    uses_segments: ClassVar[bool]
    from_profile: ClassVar[Mapping[str, str]]
    exhaustive: ClassVar[str | None]

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        """Make a plan. `spans` tile the prompt; `hits` are leased segments. The last prompt token is never
        inside a span with a key (the prompt builder sees to that), so it is always computed."""
        ...


class HealMode(StrEnum):
    """When entries that a plan skipped are recomputed after the first token (`workers/heal.py`)."""

    OFF = "off"
    IDLE = "idle"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Reuse:
    """A method text, understood: how a prompt's KV is reused and whether it is healed afterwards.

    Attributes:
        method: makes the plan.
        heal: whether the cache becomes exact after the first token.
        heal_rows: rows that one healing chunk recomputes, at least.
        heal_steps: decode steps within which the prompt is to be healed: chunks are as large as that takes.
            0: any number, and chunks of `heal_rows`.
        text: the whole setting in words, every known parameter included; parses to the same again.
    """

    method: ReuseMethod
    heal: HealMode
    heal_rows: int
    heal_steps: int
    text: str


def fresh(span: Span) -> SpanPlan:
    """Compute the span in all layers."""
    return SpanPlan(span)


def rectify_hits(
    spans: Sequence[Span],
    hits: Mapping[SegmentKey, Located],
    band: tuple[int, int],
    select: Select,
    *,
    drift: float = 0.0,
    look: Look | None = None,
) -> RectifyPlan:
    """Reuse every hit and recompute `select` of it in the layers of `band`; everything else is fresh."""
    return RectifyPlan(
        tuple(
            SpanPlan(s, hits[s.key], band=band, select=select, drift=drift)
            if s.key is not None and s.key in hits
            else fresh(s)
            for s in spans
        ),
        look=look,
    )
