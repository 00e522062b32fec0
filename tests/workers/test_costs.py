"""The FLOP model: by hand, against the engine's own parts, and against the parameters of real modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers import tiny
from workers.costs import ModelCosts, full_prefill_flops, model_costs, plan_flops, rows_flops, span_flops
from workers.methods import METHODS, parse_method
from workers.methods.base import Positions, RectifyPlan, Span, SpanPlan, TopDeviation, TopMass, TopValueChange

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelCosts(hidden=4, intermediate=6, vocab=10, heads=2, kv_heads=1, head_dim=2, windows=(None, 2))


def _pieces(rig: tiny.Rig) -> list[tuple[list[int], Any]]:
    a, b = tiny.tokens(40, 1), tiny.tokens(23, 2)
    return [
        (tiny.tokens(17, 5), None),
        (a, rig.segment(tiny.tokens(11, 3), a)),
        (b, rig.segment(tiny.tokens(30, 4), b)),
        (tiny.tokens(12, 7), None),
    ]


def test_a_small_model_by_hand() -> None:
    # q 4x4, k 4x2, v 4x2, o 4x4, gate and up 4x6, down 6x4: 48 + 72 multiply-adds.
    assert SMALL.entry_flops == 2 * 120
    # Scores and values of 2 heads of 2 channels.
    assert SMALL.key_flops == 16
    assert SMALL.head_flops == 80
    # 3 tokens: keys seen 1 + 2 + 3 in layer 0, 1 + 2 + 2 behind the window of layer 1.
    assert full_prefill_flops(SMALL, 3) == 6 * 240 + (6 + 5) * 16 + 80
    # Row 2 in both layers, row 0 in the second only.
    rows = rows_flops(SMALL, np.array([0, 2]), np.array([1, 0]), np.array([2, 2]))
    assert rows == 3 * 240 + (1 + 3 + 2) * 16


def test_sizes_agree_with_the_modules(family: str) -> None:
    model = tiny.build(family)
    costs = model_costs(model)
    matrices = sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)
    assert costs.entry_flops == 2 * matrices
    assert costs.head_flops == 2 * model.get_output_embeddings().weight.numel()
    assert costs.num_layers == tiny.LAYERS


def test_windows_are_those_that_attention_is_called_with(family: str) -> None:
    model = tiny.build(family)
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * tiny.LAYERS
    window = getattr(config, "sliding_window", None)
    expected = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    assert model_costs(model).windows == expected
    assert (9 in expected) == (family in ("mistral", "gemma2", "gemma3"))


@given(
    start=st.integers(0, 30),
    length=st.integers(0, 30),
    a=st.integers(0, 3),
    b=st.integers(0, 3),
    windows=st.lists(st.sampled_from([None, 1, 5, 40]), min_size=3, max_size=3),
)
def test_a_run_of_tokens_costs_what_its_rows_cost(
    start: int, length: int, a: int, b: int, windows: list[int | None]
) -> None:
    """The closed form of the planner against the sum over rows of the executor."""
    costs = ModelCosts(
        hidden=8, intermediate=16, vocab=50, heads=2, kv_heads=1, head_dim=4, windows=tuple(windows)
    )
    positions = np.arange(start, start + length)
    by_hand = sum(
        costs.entry_flops + costs.key_flops * min(int(p) + 1, w or 1 << 60)
        for p in positions
        for w in windows[a:b]
    )
    enter, exit_ = np.full_like(positions, min(a, b)), np.full_like(positions, b)
    assert rows_flops(costs, positions, enter, exit_) == by_hand
    located: Any = object()
    plan = SpanPlan(Span(start, start + length), located, (a, b), TopMass(1.0))
    assert span_flops(costs, plan) == pytest.approx(by_hand)


def test_full_prefill_has_ratio_one(family: str) -> None:
    rig = tiny.Rig(tiny.build(family))
    _, prefill = rig.run(parse_method("full_prefill"), _pieces(rig), max_rows=19)
    assert prefill.flop_ratio_predicted == prefill.flop_ratio == 1


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("max_rows", [1 << 20, 16])
def test_actual_flops_are_those_of_the_engines_parts(family: str, name: str, max_rows: int) -> None:
    """Counted again from the rows, layers and visible keys of what the engine was given."""
    rig = tiny.Rig(tiny.build(family))
    seen: list[Any] = []
    step = rig.engine.step
    rig.engine.step = lambda parts: (seen.extend(parts), step(parts))[1]  # type: ignore[method-assign]
    pieces = _pieces(rig)
    seen.clear()
    _, prefill = rig.run(parse_method(name), pieces, max_rows=max_rows)
    costs = model_costs(rig.model)
    counted = 0.0
    for part in seen:
        for position, enter, exit_ in zip(
            part.positions.tolist(), part.enter.tolist(), part.exit.tolist(), strict=True
        ):
            for window in costs.windows[enter:exit_]:
                keys = min(position + 1, window or position + 1)
                counted += costs.entry_flops + keys * costs.key_flops
        counted += len(part.logits_rows) * costs.head_flops
    assert prefill.actual_flops == pytest.approx(counted)
    assert prefill.flop_ratio == pytest.approx(counted / full_prefill_flops(costs, prefill.num_tokens))


def test_naive_costs_the_fresh_rows() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = _pieces(rig)
    _, prefill = rig.run(parse_method("naive"), pieces)
    costs = model_costs(rig.model)
    fresh = np.array([*range(17), *range(80, 92)])
    rows = rows_flops(costs, fresh, np.zeros_like(fresh), np.full_like(fresh, tiny.LAYERS))
    assert prefill.actual_flops == prefill.predicted_flops == rows + costs.head_flops
    whole = full_prefill_flops(costs, 92)
    assert prefill.flop_ratio == pytest.approx((rows + costs.head_flops) / whole)
    assert abs(prefill.flop_ratio - 29 / 92) < 0.05


@pytest.mark.parametrize("text", ["epic:k=8", "context_mass:ratio=0.3", "cacheblend:r=0.3", "relay_caching"])
def test_the_prediction_is_near(text: str) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    _, prefill = rig.run(parse_method(text), _pieces(rig))
    assert prefill.predicted_flops == pytest.approx(prefill.actual_flops, rel=0.15)


def test_a_cached_prefix_costs_nothing() -> None:
    plan = RectifyPlan((SpanPlan(Span(0, 10)),))
    whole, part = plan_flops(SMALL, plan), plan_flops(SMALL, plan, prefix_tokens=4)
    assert whole - part == full_prefill_flops(SMALL, 4) - SMALL.head_flops


@pytest.mark.parametrize(
    "select",
    [Positions(()), TopMass(0.0), TopMass(0.5), TopValueChange(0, 0.5), TopDeviation(0, 1.5, 1.5, 10)],
)
def test_a_span_never_costs_more_than_its_band_in_full(select: Any) -> None:
    located: Any = object()
    all_of_it = span_flops(SMALL, SpanPlan(Span(5, 15), located, (0, 2), TopMass(1.0)))
    assert 0 <= span_flops(SMALL, SpanPlan(Span(5, 15), located, (0, 2), select)) <= all_of_it
