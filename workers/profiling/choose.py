"""The rule: measured rows in, a profile's layers and presets out. Pure; knows no model and no clock.

1. L_start: the latest checkpoint such that it and every earlier one, with every span token recomputed in all
   layers above, stay within `share` of the target errors. Everything below it may be reused untouched.
2. L_end: the earliest end such that it and every later one add no more than `share` of the target errors to
   what recomputing up to the last layer leaves.
3. L_det: the layer from L_start on whose token deviations rank most like those of the layers up to L_end,
   among the first few (`detection_window`), since a detecting method recomputes all tokens up to it.
4. Presets: of the rows that fit one checkpoint layer (they start there or at layer 0), `balanced` is the
   cheapest whose errors stay within (1 - margin) of the targets, `fast` the cheapest whose errors stay within
   (1 - paired_margin) of `relay_caching`'s own, at that layer, in the same run; where none does,
   `relay_caching` itself. Where nothing keeps the targets, `balanced` is the most faithful row. Of several
   checkpoint layers one that keeps the targets (or comes closest) wins, then the cheaper `balanced`, then
   the cheaper `fast`.

Errors are mean KL over teacher-forced tokens, on single spans and on composites; both must hold. A row's cost
is the mean of its FLOPs, as shares of full prefill's, on the two kinds of prompts that its errors come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from transport.errors import RelayError


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is asked of a profile.

    Attributes:
        target_single, target_composite: mean KL (nats per token) that `balanced` must keep, on prompts with
            one relayed span and with several.
        share: part of a target that the choice of a layer may use up by itself.
        margin: part of the targets that `balanced` must leave free, for the scatter between calibration and
            use. paired_margin: the same for `fast`, whose limit was measured on the very same prompts, so
            that most of the scatter is common to both.
        detection_window: L_det is at most this share of the layers above L_start (at least two layers).
    """

    target_single: float = 0.005
    target_composite: float = 0.012
    share: float = 0.25
    margin: float = 0.15
    paired_margin: float = 0.05
    detection_window: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """One method text on all cases of one kind.

    Attributes:
        cases: how many prompts.
        kl_first, kl_first_p90: KL(full prefill || method) of the first token, nats: mean, 90th percentile.
        kl_mean, kl_p90, kl_worst: the prompts' mean KL over their teacher-forced tokens: mean, 90th
            percentile and maximum over prompts.
        top1: share of tokens with the same most likely token.
        first_mismatch: share of prompts whose first token would be another one.
        reuse: share of the spans' (token, layer) entries that were not recomputed.
        flops_predicted, flops: FLOPs as a share of full prefill's, from the plan, and as computed.
        kl_cases: mean KL of each prompt, in the order of the cases.
    """

    cases: int
    kl_first: float
    kl_first_p90: float
    kl_mean: float
    kl_p90: float
    kl_worst: float
    top1: float
    first_mismatch: float
    reuse: float
    flops_predicted: float
    flops: float
    kl_cases: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method text, measured.

    Attributes:
        text: as users write it.
        start, end: layers [start, end) of its band; (0, 0) when it recomputes nothing.
        single, composite: errors on prompts with one relayed span, and with several (None: not measured).
    """

    text: str
    start: int
    end: int
    single: Errors
    composite: Errors | None = None

    @property
    def kinds(self) -> tuple[Errors, ...]:
        return (self.single,) if self.composite is None else (self.single, self.composite)

    @property
    def cost(self) -> float:
        """FLOPs as a share of full prefill's: mean over the kinds of prompts."""
        return sum(e.flops for e in self.kinds) / len(self.kinds)


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest allowed mean KL. composite is not asked of rows that have no composites."""

    single: float
    composite: float

    def excess(self, row: Row) -> float:
        """Error over limit of the worse kind of prompts; within the limits when at most 1."""
        pairs = [(row.single.kl_mean, self.single)]
        if row.composite is not None:
            pairs.append((row.composite.kl_mean, self.composite))
        return max(_over(error, limit) for error, limit in pairs)

    def hold(self, row: Row) -> bool:
        return self.excess(row) <= 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A preset's row, and whether it keeps its limits (else it is the most faithful one there is)."""

    row: Row
    met: bool


@dataclass(frozen=True, slots=True)
class Chosen:
    """checkpoint_layer: what segments must carry for both presets to run."""

    checkpoint_layer: int
    fast: Choice
    balanced: Choice


def _over(error: float, limit: float) -> float:
    if limit > 0:
        return error / limit
    return 0.0 if error <= 0 else math.inf


def target_limits(rule: Rule) -> Limits:
    """What `balanced` must keep, margin included."""
    keep = 1 - rule.margin
    return Limits(rule.target_single * keep, rule.target_composite * keep)


def reference_limits(reference: Row, rule: Rule) -> Limits:
    """What `fast` must keep: the errors of `relay_caching`'s own row, margin included."""
    keep = 1 - rule.paired_margin
    composite = math.inf if reference.composite is None else reference.composite.kl_mean * keep
    return Limits(reference.single.kl_mean * keep, composite)


def choose_start(sweep: Sequence[Row], rule: Rule) -> int:
    """L_start, by step 1 of the rule; 0 (the embedding, exact for any segment) when even the earliest
    checkpoint of the sweep is too far off.

    Args:
        sweep: rows with all span tokens recomputed from `start` to the last layer.
    """
    limits = Limits(rule.target_single * rule.share, rule.target_composite * rule.share)
    chosen = 0
    for row in sorted(sweep, key=lambda r: r.start):
        if not limits.hold(row):
            break
        chosen = row.start
    return chosen


def choose_end(sweep: Sequence[Row], rule: Rule, num_layers: int) -> int:
    """L_end (exclusive), by step 2 of the rule.

    Args:
        sweep: rows with all span tokens recomputed from L_start to `end`, one of them to the last layer.

    Raises:
        RelayError: no row goes up to the last layer, so there is nothing to compare with.
    """
    ordered = sorted(sweep, key=lambda r: -r.end)
    if not ordered or ordered[0].end != num_layers:
        raise RelayError(f"the sweep over end layers lacks the row with end={num_layers}.")
    whole = ordered[0]
    composite = math.inf
    if whole.composite is not None:
        composite = whole.composite.kl_mean + rule.target_composite * rule.share
    limits = Limits(whole.single.kl_mean + rule.target_single * rule.share, composite)
    chosen = num_layers
    for row in ordered:
        if not limits.hold(row):
            break
        chosen = row.end
    return chosen


def choose_detection(
    correlation: Sequence[Sequence[float]], start: int, end: int, rule: Rule
) -> tuple[int, float]:
    """L_det (inclusive), by step 3 of the rule, and its mean rank correlation with the layers (L_det, end).

    Args:
        correlation: [L][L] rank correlation of token deviations between layers.
        start, end: L_start and L_end. A band of one layer detects in that layer, with correlation 0.
    """
    window = max(2, round(rule.detection_window * len(correlation)))
    best, value = start, 0.0
    for layer in range(start, min(start + window + 1, end - 1)):
        later = correlation[layer][layer + 1 : end]
        mean = sum(later) / len(later)
        if layer == start or mean > value:
            best, value = layer, mean
    return best, value


def cheapest(rows: Iterable[Row], limits: Limits) -> Row | None:
    """The row with the least FLOPs among those within the limits; of equals the more faithful."""
    return min((r for r in rows if limits.hold(r)), key=lambda r: _order(r, limits), default=None)


def choose_presets(rows: Sequence[Row], references: Mapping[int, Row], rule: Rule) -> Chosen:
    """Step 4 of the rule.

    Args:
        rows: every measured candidate.
        references: checkpoint layer -> `relay_caching` at its defaults for that layer; the layers that come
            into question. A reference is a candidate too.

    Raises:
        RelayError: no references.
    """
    if not references:
        raise RelayError("no relay_caching row was measured, and `fast` is defined by it.")
    options = [_presets_at(layer, rows, reference, rule) for layer, reference in references.items()]
    limits = target_limits(rule)
    return min(
        options,
        key=lambda c: (
            max(1.0, limits.excess(c.balanced.row)),
            c.balanced.row.cost,
            c.fast.row.cost,
            -c.checkpoint_layer,
        ),
    )


def _presets_at(layer: int, rows: Sequence[Row], reference: Row, rule: Rule) -> Chosen:
    usable = [r for r in (*rows, reference) if r.start in (0, layer)]
    fast = cheapest(usable, reference_limits(reference, rule))
    return Chosen(
        checkpoint_layer=layer,
        # Its own error is "no worse than its own", whatever the margin says.
        fast=Choice(fast or reference, True),
        balanced=_balanced(usable, target_limits(rule)),
    )


def _balanced(rows: Sequence[Row], limits: Limits) -> Choice:
    row = cheapest(rows, limits)
    if row is not None:
        return Choice(row, True)
    return Choice(min(rows, key=lambda r: (limits.excess(r), r.cost, r.text)), False)


def _order(row: Row, limits: Limits) -> tuple[float, float, str]:
    return (row.cost, limits.excess(row), row.text)
