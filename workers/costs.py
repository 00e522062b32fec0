"""What a prefill costs in floating point operations, and whether a span is worth a pull.

The model of methods.md section 0: every computed (row, layer) entry pays its projections and its MLP, and
attention over the keys that it sees; every row with logits pays the head. A multiply-add counts 2. Norms,
rotations, softmax, embeddings and the detection of run-time selections are left out: together below 1 %.

Imports no torch, and knows nothing of threads or tensors: shapes and numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.base import Positions, RectifyPlan, Select, SpanPlan, TopDeviation, TopMass

Ints = NDArray[np.int64]

EXPECTED_DEVIATING = 0.25
"""Share of tokens that `TopDeviation` is expected to select at its default thresholds, before it has run."""


@dataclass(frozen=True)
class ModelCosts:
    """The sizes of a model that its FLOPs depend on.

    Attributes:
        hidden, intermediate, vocab: widths of the residual stream, of the (gated) MLP and of the logits.
        heads, kv_heads, head_dim: of the attention.
        windows: sliding window of every layer in tokens, None where a layer sees everything; its length is L.
    """

    hidden: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @cached_property
    def entry_flops(self) -> int:
        """Of one row in one layer, attention apart: q, k, v and output projections, gate, up and down."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    @cached_property
    def key_flops(self) -> int:
        """Of one row against one key it sees, in one layer: the score and the value's share."""
        return 4 * self.heads * self.head_dim

    @cached_property
    def head_flops(self) -> int:
        """Of one row's logits."""
        return 2 * self.hidden * self.vocab

    @cached_property
    def layers_below(self) -> dict[int | None, Ints]:
        """Window -> [L + 1] how many of the first layers have it; index by a layer range's ends."""
        return {
            window: np.concatenate([[0], np.cumsum([w == window for w in self.windows])]).astype(np.int64)
            for window in dict.fromkeys(self.windows)
        }


def model_costs(model: Any) -> ModelCosts:
    """The sizes of a Hugging Face causal LM with gated MLPs (all families that `workers.model` admits)."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return ModelCosts(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        heads=heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        # Models whose layers differ keep the window on the layer (None where it sees everything).
        windows=tuple(
            getattr(layer.self_attn, "sliding_window", getattr(config, "sliding_window", None))
            for layer in model.model.layers
        ),
    )


def full_prefill_flops(costs: ModelCosts, tokens: int) -> float:
    """Of `tokens` prompt tokens in all layers, and the logits of the last."""
    return _run_flops(costs, 0, tokens, (0, costs.num_layers)) + costs.head_flops


def rows_flops(costs: ModelCosts, positions: Ints, enter: Ints, exit_: Ints) -> float:
    """Of rows at `positions`, each computed in its layers [enter, exit); without logits.

    Args:
        positions, enter, exit_: [rows] int64. Row i sees the keys up to positions[i], or the last
            `window` of them.
    """
    total = float((exit_ - enter).sum()) * costs.entry_flops
    for window, below in costs.layers_below.items():
        seen = positions + 1 if window is None else np.minimum(positions + 1, window)
        total += float((seen * (below[exit_] - below[enter])).sum()) * costs.key_flops
    return total


def plan_flops(costs: ModelCosts, plan: RectifyPlan, prefix_tokens: int = 0) -> float:
    """Of a whole plan, before anything is selected: selected tokens are taken to lie evenly in their span.

    Args:
        prefix_tokens: leading tokens that come from the exact prefix cache.
    """
    spans = sum(span_flops(costs, span_plan, prefix_tokens) for span_plan in plan.spans)
    return spans + _look_flops(costs, plan, prefix_tokens) + costs.head_flops


def _look_flops(costs: ModelCosts, plan: RectifyPlan, prefix_tokens: int) -> float:
    """What looking ahead adds: the fresh tokens' layers that are computed twice."""
    if plan.look is None:
        return 0.0
    band = (plan.look.back, plan.look.layers[-1] + 1)
    return sum(
        _run_flops(costs, max(s.span.start, prefix_tokens), s.span.stop, band)
        for s in plan.spans
        if s.source is None
    )


def span_flops(costs: ModelCosts, plan: SpanPlan, prefix_tokens: int = 0) -> float:
    """Of one span of a plan."""
    span, layers = plan.span, costs.num_layers
    if plan.source is None:
        return _run_flops(costs, max(span.start, prefix_tokens), span.stop, (0, layers))
    start, end = plan.band
    if start >= end:
        return 0.0
    cut = detection_cut(plan.select)
    if cut is None:
        return selected_share(plan.select, len(span)) * _run_flops(costs, span.start, span.stop, (start, end))
    every = _run_flops(costs, span.start, span.stop, (start, min(cut, end)))
    later = _run_flops(costs, span.start, span.stop, (max(cut, start), end)) if cut < end else 0.0
    return every + selected_share(plan.select, len(span)) * later


def detection_cut(select: Select) -> int | None:
    """First layer behind the detection of a run-time selection; None where the choice is made before."""
    return None if isinstance(select, TopMass | Positions) else select.layer + 1


def selected_share(select: Select, tokens: int) -> float:
    """Share of a span of `tokens` tokens that a selection takes (expected, where only the run will tell)."""
    if tokens == 0:
        return 0.0
    if isinstance(select, Positions):
        return sum(offset < tokens for offset in select.offsets) / tokens
    if isinstance(select, TopDeviation):
        return 1.0 if select.tau_diff < 0 else EXPECTED_DEVIATING
    return min(tokens, math.ceil(select.ratio * tokens)) / tokens


def _run_flops(costs: ModelCosts, start: int, stop: int, band: tuple[int, int]) -> float:
    """Of all tokens of [start, stop) in the layers of `band`."""
    rows = stop - start
    if rows <= 0 or band[0] >= band[1]:
        return 0.0
    total = float(rows * (band[1] - band[0])) * costs.entry_flops
    for window, count in Counter(costs.windows[band[0] : band[1]]).items():
        total += float(count * _keys_seen(start, stop, window)) * costs.key_flops
    return total


def _keys_seen(start: int, stop: int, window: int | None) -> int:
    """Sum of min(p + 1, window) over the positions p of [start, stop)."""
    bend = stop if window is None else min(max(window, start), stop)
    rising = (start + 1 + bend) * (bend - start) // 2
    return rising + (0 if window is None else window * (stop - bend))
