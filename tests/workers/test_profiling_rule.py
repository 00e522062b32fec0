"""The profiler's arithmetic: statistics against their definitions, and the rule that chooses presets."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from transport.errors import RelayError
from workers.profiling import choose
from workers.profiling.choose import Errors, Limits, Row, Rule
from workers.profiling.statistics import head_ratio, mean_of, ranks, spearman, tail_ratio, top_share

# -- statistics --


def test_ranks_share_the_mean_among_equals() -> None:
    assert ranks(np.array([10.0, 30.0, 10.0, 20.0])).tolist() == [0.5, 3.0, 0.5, 2.0]


TABLES = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(3, 20)), elements=st.integers(0, 9).map(float)
)


@given(TABLES)
def test_rank_correlation_is_symmetric_and_ignores_monotone_changes(values: np.ndarray) -> None:
    table = spearman(values, values)
    assert np.allclose(table, table.T)
    assert np.allclose(table, spearman(np.exp(values), 3 * values - 5))
    assert np.allclose(spearman(-values, values), -table)
    varied = values.max(-1) > values.min(-1)
    assert np.allclose(np.diag(table), np.where(varied, 1.0, 0.0))


def test_rank_correlation_is_the_textbooks() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)), without ties."""
    a, b = np.array([[1.0, 2, 3, 4, 5]]), np.array([[2.0, 1, 4, 3, 5]])
    assert math.isclose(spearman(a, b)[0, 0], 1 - 6 * 4 / (5 * 24))


def test_sparsity_and_position() -> None:
    deviation = np.array([[0.0] * 18 + [3.0, 1.0], [8.0] + [0.0] * 19])
    assert top_share(deviation, 0.05) == pytest.approx((0.75 + 1.0) / 2)
    assert top_share(deviation, 0.1) == pytest.approx(1.0)
    assert head_ratio(deviation, 1) == pytest.approx((0 + 8) / 2 / 0.3)
    assert tail_ratio(deviation, 2) == pytest.approx((4 + 0) / 4 / 0.3)
    assert top_share(np.zeros((2, 5)), 0.1) == 0.0
    assert head_ratio(np.zeros((2, 5)), 2) == 1.0


def test_the_mean_is_over_tokens_not_spans() -> None:
    assert mean_of([np.zeros((1, 3)), np.ones((1, 1))]).tolist() == [0.25]


# -- the rule --


def errors(kl: float, flops: float = 0.5) -> Errors:
    return Errors(
        cases=1,
        kl_first=kl,
        kl_first_p90=kl,
        kl_mean=kl,
        kl_p90=kl,
        kl_worst=kl,
        top1=1.0,
        first_mismatch=0.0,
        reuse=0.5,
        flops_predicted=flops,
        flops=flops,
    )


def row(
    kl: float,
    flops: float = 0.5,
    *,
    start: int = 4,
    end: int = 30,
    composite: float | None = None,
    text: str = "",
) -> Row:
    return Row(
        text=text or f"m:{kl}-{flops}-{start}",
        start=start,
        end=end,
        single=errors(kl, flops),
        composite=None if composite is None else errors(composite, flops),
    )


RULE = Rule(target_single=0.004, target_composite=0.008, share=0.25, margin=0.5, paired_margin=0.5)


def test_l_start_is_the_latest_checkpoint_before_the_error_rises() -> None:
    sweep = [row(kl, start=n) for n, kl in ((6, 0.003), (1, 0.0001), (4, 0.0009), (2, 0.0005), (8, 0.0002))]
    assert choose.choose_start(sweep, RULE) == 4, "8 is good by accident: 6 before it is not"
    assert choose.choose_start([row(0.02, start=1)], RULE) == 0


def test_l_start_looks_at_composites_too() -> None:
    sweep = [row(0.0, start=2, composite=0.001), row(0.0, start=4, composite=0.003)]
    assert choose.choose_start(sweep, RULE) == 2


def test_l_end_is_the_earliest_end_that_adds_little() -> None:
    sweep = [row(kl, end=n) for n, kl in ((30, 0.002), (29, 0.0021), (28, 0.0029), (26, 0.0031), (24, 0.002))]
    assert choose.choose_end(sweep, RULE, 30) == 28, "24 is good by accident: 26 above it is not"
    assert choose.choose_end([row(0.5, end=30)], RULE, 30) == 30


def test_l_end_needs_the_row_to_compare_with() -> None:
    with pytest.raises(RelayError, match="end=30"):
        choose.choose_end([row(0.1, end=29)], RULE, 30)


def test_l_det_has_the_best_mean_correlation_with_the_layers_behind() -> None:
    matrix = np.full((10, 10), 0.2)
    matrix[4, 5:8] = 0.6
    matrix[6, 7] = 1.0
    wide = dataclasses.replace(RULE, detection_window=0.3)
    assert choose.choose_detection(matrix.tolist(), 3, 8, wide) == (6, 1.0)
    narrow = dataclasses.replace(RULE, detection_window=0.1)
    assert choose.choose_detection(matrix.tolist(), 3, 8, narrow) == (4, pytest.approx(0.6)), "6 is too late"
    assert choose.choose_detection(matrix.tolist(), 7, 8, wide) == (7, 0.0), "a band of one layer"


@given(start=st.integers(0, 8), width=st.integers(1, 8), window=st.floats(0, 1), seed=st.integers(0, 99))
def test_l_det_always_lies_in_the_band(start: int, width: int, window: float, seed: int) -> None:
    matrix = np.random.default_rng(seed).uniform(-1, 1, (17, 17)).tolist()
    rule = dataclasses.replace(RULE, detection_window=window)
    layer, _ = choose.choose_detection(matrix, start, start + width, rule)
    assert start <= layer < start + width


def test_presets_are_the_cheapest_within_their_limits() -> None:
    reference = row(0.006, 0.6, text="relay_caching")
    rows = [
        reference,
        row(0.0001, 0.9, text="best"),
        row(0.0019, 0.7, text="balanced"),  # limit 0.004 / 2
        row(0.0021, 0.5, text="not quite"),
        row(0.0029, 0.4, text="fast"),  # limit 0.006 / 2
        row(0.0035, 0.3, text="too fast"),
        row(0.0, 0.1, start=6, text="another checkpoint"),
    ]
    chosen = choose.choose_presets(rows, {4: reference}, RULE)
    assert (chosen.fast.row.text, chosen.balanced.row.text) == ("fast", "balanced")
    assert (chosen.checkpoint_layer, chosen.balanced.met) == (4, True)


def test_rows_from_the_embedding_fit_any_checkpoint() -> None:
    reference = row(0.006, 0.6)
    chosen = choose.choose_presets([row(0.001, 0.2, start=0, text="epic")], {4: reference}, RULE)
    assert chosen.balanced.row.text == "epic"
    assert chosen.checkpoint_layer == 4


def test_the_checkpoint_with_the_cheaper_balanced_preset_wins() -> None:
    references = {2: row(0.006, 0.8, start=2), 4: row(0.006, 0.7, start=4)}
    rows = [
        *references.values(),
        row(0.001, 0.5, start=2),
        row(0.001, 0.6, start=4),
        row(0.001, 0.1, start=6),
    ]
    assert choose.choose_presets(rows, references, RULE).checkpoint_layer == 2


def test_an_unmet_target_is_said_and_the_most_faithful_row_taken() -> None:
    reference = row(0.006, 0.6)
    chosen = choose.choose_presets([row(0.005, 0.9, text="closest")], {4: reference}, RULE)
    assert (chosen.balanced.row.text, chosen.balanced.met) == ("closest", False)
    assert chosen.fast.row is reference, "it is no worse than itself"


def test_where_the_target_is_out_of_reach_the_closer_checkpoint_wins() -> None:
    references = {2: row(0.006, 0.8, start=2), 4: row(0.007, 0.5, start=4)}
    rows = [*references.values(), row(0.003, 0.9, start=2, text="closer"), row(0.0035, 0.1, start=4)]
    chosen = choose.choose_presets(rows, references, RULE)
    assert (chosen.checkpoint_layer, chosen.balanced.row.text, chosen.balanced.met) == (2, "closer", False)


def test_the_margins_are_of_their_own_presets() -> None:
    reference = row(0.004, 0.9)
    rows = [row(0.0035, 0.2, text="near"), row(0.0019, 0.4, text="far")]
    rule = dataclasses.replace(RULE, paired_margin=0.1)
    chosen = choose.choose_presets(rows, {4: reference}, rule)
    assert (chosen.fast.row.text, chosen.balanced.row.text) == ("near", "far")


def test_a_single_span_alone_does_not_buy_a_preset() -> None:
    reference = row(0.006, 0.6, composite=0.02)
    rows = [
        row(0.001, 0.2, composite=0.5, text="bad composites"),
        row(0.001, 0.3, composite=0.003, text="good"),
    ]
    chosen = choose.choose_presets(rows, {4: reference}, RULE)
    assert (chosen.fast.row.text, chosen.balanced.row.text) == ("good", "good")


ROWS = st.lists(
    st.builds(
        row,
        st.floats(0, 0.02),
        st.floats(0.05, 1),
        start=st.sampled_from([0, 2, 4, 6]),
        composite=st.floats(0, 0.05),
    ),
    max_size=12,
)
REFERENCES = st.fixed_dictionaries(
    {
        n: st.builds(
            row, st.floats(0, 0.02), st.floats(0.05, 1), start=st.just(n), composite=st.floats(0, 0.05)
        )
        for n in (2, 4)
    }
)


@given(ROWS, REFERENCES, st.randoms(use_true_random=False))
def test_the_rule_keeps_its_promises(rows: list[Row], references: dict[int, Row], random: Any) -> None:
    chosen = choose.choose_presets(rows, references, RULE)
    layer = chosen.checkpoint_layer
    reference = references[layer]
    usable = [r for r in (*rows, reference) if r.start in (0, layer)]
    fast, balanced = chosen.fast.row, chosen.balanced.row
    assert fast in usable
    assert balanced in usable
    assert fast.single.kl_mean <= reference.single.kl_mean
    assert fast.composite is not None
    assert reference.composite is not None
    assert fast.composite.kl_mean <= reference.composite.kl_mean
    limits = choose.target_limits(RULE)
    assert chosen.balanced.met == limits.hold(balanced) == any(limits.hold(r) for r in usable)
    if chosen.balanced.met:
        assert all(r.cost >= balanced.cost for r in usable if limits.hold(r))
    shuffled = random.sample(rows, len(rows))
    again = choose.choose_presets(shuffled, dict(reversed(references.items())), RULE)
    assert (again.checkpoint_layer, again.balanced.row.cost) == (layer, balanced.cost)


@given(ROWS, REFERENCES, ROWS)
def test_more_candidates_never_make_balanced_dearer_or_worse(
    rows: list[Row], references: dict[int, Row], more: list[Row]
) -> None:
    few, many = (choose.choose_presets(r, references, RULE) for r in (rows, rows + more))
    assert many.balanced.met >= few.balanced.met
    if few.balanced.met:
        assert many.balanced.row.cost <= few.balanced.row.cost


@given(ROWS, REFERENCES, st.floats(1, 5))
def test_a_looser_target_is_never_dearer(rows: list[Row], references: dict[int, Row], factor: float) -> None:
    loose = dataclasses.replace(
        RULE, target_single=RULE.target_single * factor, target_composite=RULE.target_composite * factor
    )
    tight, wide = (choose.choose_presets(rows, references, r) for r in (RULE, loose))
    if tight.balanced.met:
        assert wide.balanced.met
        assert wide.balanced.row.cost <= tight.balanced.row.cost


def test_a_limit_of_nothing_is_held_only_by_exactness() -> None:
    assert Limits(0.0, 0.0).hold(row(0.0, composite=0.0))
    assert not Limits(0.0, 0.0).hold(row(1e-9, composite=0.0))
