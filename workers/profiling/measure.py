"""What is measured: deviation curves of decode KV, and rows of method texts over calibration cases.

A case is a downstream prompt under full prefill (`lab.Reference`). Knows neither texts nor the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from transport.types import Incarnation, Located, NodeId, Owner, Segment, SegmentKey, WorkerId
from workers.compare import agreement
from workers.costs import ModelCosts, full_prefill_flops, plan_flops
from workers.methods import parse_reuse
from workers.methods.base import ModelProfile, Span
from workers.profiling.choose import Errors, Row
from workers.profiling.lab import Lab, Outcome, Reference
from workers.profiling.statistics import (
    FIRST_TOKENS,
    TOP_SHARES,
    head_ratio,
    mean_of,
    percentile,
    spearman,
    tail_ratio,
    top_share,
)
from workers.profiling.tasks import Kind

Step = Callable[[], None]
"""Called after each measured case."""

LONG_SPAN = 1024
LONG_FRESH = 64
_LONG_PREFIX = 64
_LAST_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Case:
    """A downstream prompt of one kind. task: index of the calibration task."""

    task: int
    kind: Kind
    reference: Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """How far decode KV is from full prefill's after the change of context, over all relayed spans.

    Attributes:
        spans, tokens: how many were measured.
        value, key, hidden: [L] mean 1 - cos of values, of keys at their new position, of layer inputs.
        value_composite: [L] as `value`, over the spans of composite prompts; empty without them.
        correlation: [L][L] Spearman rank correlation, between layers, of the tokens' value deviations.
        top_share: share of tokens -> part of the value deviation that the most deviating of them hold.
        first_ratio: n -> mean value deviation of a span's first n tokens over the span's mean.
        last_ratio: of its last 32 tokens.
        mass_correlation: [L] Spearman correlation of the published context mass with the value deviation.
        mass_correlation_mean: with the deviation averaged over layers.
        position_correlation_mean: as a control, of a token's closeness to the span's start with the same.
    """

    spans: int
    tokens: int
    value: tuple[float, ...]
    key: tuple[float, ...]
    hidden: tuple[float, ...]
    value_composite: tuple[float, ...]
    correlation: tuple[tuple[float, ...], ...]
    top_share: dict[float, float]
    first_ratio: dict[int, float]
    last_ratio: float
    mass_correlation: tuple[float, ...]
    mass_correlation_mean: float
    position_correlation_mean: float


def curves(cases: Sequence[Case]) -> Curves:
    """Deviation statistics over the spans of all cases."""
    tables = [d.numpy().astype(np.float64) for c in cases for d in c.reference.deviations]
    composite = [d.numpy() for c in cases if c.kind == "composite" for d in c.reference.deviations]
    masses = [m.numpy().astype(np.float64) for c in cases for m in c.reference.masses]
    values = [t[0] for t in tables]
    per_layer = [spearman(m[None], v)[0] for m, v in zip(masses, values, strict=True)]
    overall = [v.mean(0, keepdims=True) for v in values]
    nearness = [-np.arange(v.shape[1], dtype=np.float64)[None] for v in values]
    return Curves(
        spans=len(values),
        tokens=sum(v.shape[1] for v in values),
        value=_floats(mean_of(values)),
        key=_floats(mean_of([t[1] for t in tables])),
        hidden=_floats(mean_of([t[2] for t in tables])),
        value_composite=_floats(mean_of([t[0] for t in composite])) if composite else (),
        correlation=tuple(_floats(row) for row in np.mean([spearman(v, v) for v in values], axis=0)),
        top_share={s: float(np.mean([top_share(v, s) for v in values])) for s in TOP_SHARES},
        first_ratio={n: float(np.mean([head_ratio(v, n) for v in values])) for n in FIRST_TOKENS},
        last_ratio=float(np.mean([tail_ratio(v, _LAST_TOKENS) for v in values])),
        mass_correlation=_floats(np.mean(per_layer, axis=0)),
        mass_correlation_mean=_mean_correlation([m[None] for m in masses], overall),
        position_correlation_mean=_mean_correlation(nearness, overall),
    )


def _mean_correlation(signals: Sequence[np.ndarray], truths: Sequence[np.ndarray]) -> float:
    return float(np.mean([spearman(a, b)[0, 0] for a, b in zip(signals, truths, strict=True)]))


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


@dataclass(frozen=True, slots=True)
class _Sample:
    """A method text on one case."""

    kl_first: float
    kl_mean: float
    top1: float
    first_mismatch: bool
    outcome: tuple[int, int, float, float, float]


def measure(
    lab: Lab, cases: Sequence[Case], texts: Sequence[str], profile: ModelProfile, step: Step = lambda: None
) -> list[Row]:
    """One row per method text, over all cases.

    Raises:
        ConfigError: a text does not parse, or cannot be run from the prompt alone.
    """
    samples: dict[tuple[str, Kind], list[_Sample]] = {}
    for case in cases:
        for outcome in lab.run(case.reference, texts, profile):
            samples.setdefault((outcome.text, case.kind), []).append(_sample(case.reference, outcome))
        step()
    return [
        _row(text, samples.get((text, "single"), []), samples.get((text, "composite"), [])) for text in texts
    ]


def _sample(reference: Reference, outcome: Outcome) -> _Sample:
    found = agreement(reference.logits, outcome.logits)
    full = outcome.flops_full
    return _Sample(
        kl_first=found.kl[0],
        kl_mean=found.kl_mean,
        top1=found.top1,
        first_mismatch=not found.same[0],
        outcome=(
            outcome.start,
            outcome.end,
            outcome.reuse,
            outcome.flops_predicted / full,
            outcome.flops / full,
        ),
    )


def _row(text: str, single: Sequence[_Sample], composite: Sequence[_Sample]) -> Row:
    first = (*single, *composite)[0]
    return Row(
        text=text,
        start=first.outcome[0],
        end=first.outcome[1],
        single=_errors(single),
        composite=_errors(composite) if composite else None,
    )


def _errors(samples: Sequence[_Sample]) -> Errors:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    kl = [s.kl_mean for s in samples]
    return Errors(
        cases=len(samples),
        kl_first=mean([s.kl_first for s in samples]),
        kl_first_p90=percentile([s.kl_first for s in samples], 0.9),
        kl_mean=mean(kl),
        kl_p90=percentile(kl, 0.9),
        kl_worst=max(kl),
        top1=mean([s.top1 for s in samples]),
        first_mismatch=mean([float(s.first_mismatch) for s in samples]),
        reuse=mean([s.outcome[2] for s in samples]),
        flops_predicted=mean([s.outcome[3] for s in samples]),
        flops=mean([s.outcome[4] for s in samples]),
        kl_cases=tuple(kl),
    )


def long_flops(costs: ModelCosts, text: str, profile: ModelProfile, spans: int = 1) -> float:
    """Predicted FLOPs of a long prompt as a share of full prefill's: `LONG_SPAN` tokens in `spans` relayed
    spans, `LONG_FRESH` fresh tokens behind them, a role's 64 tokens before them in the prefix cache."""
    size = LONG_SPAN // spans
    pieces = [Span(0, _LONG_PREFIX)]
    hits: dict[SegmentKey, Located] = {}
    owner = Owner(WorkerId("upstream"), Incarnation(1), NodeId("profiler"))
    for i in range(spans):
        key = SegmentKey("profiler", i.to_bytes(1, "big"))
        pieces.append(Span(pieces[-1].stop, pieces[-1].stop + size, "s", key))
        hits[key] = Located(Segment(key, size, 0, ()), owner)
    pieces.append(Span(pieces[-1].stop, pieces[-1].stop + LONG_FRESH))
    plan = parse_reuse(text, profile).method.plan(pieces, hits, profile)
    prefix = _LONG_PREFIX if plan.use_prefix_cache else 0
    return plan_flops(costs, plan, prefix) / full_prefill_flops(costs, pieces[-1].stop)


def span_tokens(cases: Sequence[Case]) -> list[int]:
    """Tokens of every relayed span of the cases."""
    return [int(m.shape[0]) for c in cases for m in c.reference.masses]
