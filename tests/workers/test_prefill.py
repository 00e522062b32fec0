"""Every method on every family: at ratio 1.0 and band [0, L) it is full prefill; and the parts add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers import tiny
from workers import kernels
from workers.methods import METHODS, parse_method
from workers.methods.base import Positions, SpanPlan, TopMass
from workers.selection import resolve_select

EXHAUSTIVE = {name: text for name in METHODS if (text := parse_method(name).exhaustive) is not None}

pytestmark = pytest.mark.usefixtures("one_thread")


def _prompt(rig: tiny.Rig) -> list[tuple[list[int], Any]]:
    """Two relayed spans at positions other than their own, one of them twice, fresh text between and
    around."""
    a, b = tiny.tokens(40, 1), tiny.tokens(23, 2)
    sa, sb = rig.segment(tiny.tokens(11, 3), a), rig.segment(tiny.tokens(30, 4), b)
    return [
        (tiny.tokens(17, 5), None),
        (a, sa),
        (b, sb),
        (tiny.tokens(3, 6), None),
        (a, sa),
        (tiny.tokens(12, 7), None),
    ]


def _full(rig: tiny.Rig, pieces: list[tuple[list[int], Any]]) -> torch.Tensor:
    ids = [i for piece, _ in pieces for i in piece]
    return tiny.reference_logits(rig.model, ids)[-1]


def test_every_method_that_repairs_anything_is_in_the_suite() -> None:
    assert {name for name in METHODS if name not in EXHAUSTIVE} == {"naive"}
    assert all(parse_method(text).name == name for name, text in EXHAUSTIVE.items())


@pytest.mark.parametrize("name", sorted(EXHAUSTIVE))
@pytest.mark.parametrize("max_rows", [1 << 20, 19])
def test_equals_full_prefill_when_everything_is_recomputed(family: str, name: str, max_rows: int) -> None:
    rig = tiny.Rig(tiny.build(family))
    pieces = _prompt(rig)
    logits, prefill = rig.run(parse_method(EXHAUSTIVE[name]), pieces, max_rows=max_rows)
    assert (logits - _full(rig, pieces)).abs().max() < 1e-4
    counts = prefill.counts
    assert counts.fresh + counts.rectified == prefill.num_tokens * rig.num_layers


def test_a_method_without_repair_differs_from_full_prefill() -> None:
    """The suite above can fail: without repair the logits are visibly other ones."""
    rig = tiny.Rig(tiny.build("llama"))
    pieces = _prompt(rig)
    logits, prefill = rig.run(parse_method("naive"), pieces)
    assert (logits - _full(rig, pieces)).abs().max() > 1e-2
    assert prefill.counts.reuse == 1.0


def test_rows_that_join_from_a_checkpoint_repair_the_layers_of_the_band(family: str) -> None:
    """Same left context, so the checkpoint is exact; the band's KV is spoilt and must come back."""
    rig = tiny.Rig(tiny.build(family))
    before, span, after = tiny.tokens(21, 1), tiny.tokens(40, 2), tiny.tokens(9, 3)
    located, pulled = rig.segment(before, span)
    for block in pulled.blocks:
        block.kv.body[rig.checkpoint_layer :] = 3.0
    pieces = [(before, None), (span, (located, pulled)), (after, None)]
    spoilt, _ = rig.run(parse_method("naive"), pieces)
    repaired, prefill = rig.run(parse_method(f"context_mass:ratio=1+end={tiny.LAYERS}"), pieces)
    full = _full(rig, pieces)
    assert (repaired - full).abs().max() < 1e-4 < (spoilt - full).abs().max()
    assert prefill.counts.rectified == 40 * (tiny.LAYERS - rig.checkpoint_layer)


@pytest.mark.parametrize("name", ["context_mass:ratio=0.3", "relay_caching"])
def test_chunks_give_the_same_as_one_pass(name: str) -> None:
    rig = tiny.Rig(tiny.build("gemma3"))
    pieces = _prompt(rig)
    whole, first = rig.run(parse_method(name), pieces)
    cut, second = rig.run(parse_method(name), pieces, max_rows=16)
    assert (whole - cut).abs().max() < 1e-4
    assert first.counts == second.counts


def test_relay_caching_selects_some_tokens_after_the_detection_layer() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    _, prefill = rig.run(parse_method("relay_caching"), _prompt(rig))
    relayed = 103
    detected = 2 * relayed  # layers 2 and 3 for all span tokens
    assert detected < prefill.counts.rectified < relayed * (tiny.LAYERS - 2)


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 300), to=st.integers(0, 300), family=st.sampled_from(sorted(tiny.FAMILIES)))
def test_keys_rotated_by_the_shift_equal_keys_made_there(start: int, to: int, family: str) -> None:
    """For an isolated token layer 0 does not depend on context, so equality is exact in theory."""
    model = _MODELS.setdefault(family, tiny.build(family))
    rig = _RIGS.setdefault(family, tiny.Rig(model))
    keys = []
    for where in (start, to):
        cache = rig.pool.allocate(400, timeout_s=1)
        cache.kv.zero_()
        rows = torch.arange(where, where + 5)
        part = tiny.Part(
            cache=cache, positions=rows, token_ids=torch.tensor([5, 6, 7, 8, 9]), exit=torch.ones_like(rows)
        )
        rig.engine.step([part])
        keys.append(cache.kv[:1, 0, :, where : where + 5].clone())
        rig.pool.free(cache)
    cos, sin = kernels.rotation(rig.shape.inv_freq[:1], to - start)
    moved = torch.empty_like(keys[0])
    kernels.rotate_keys(keys[0], cos, sin, moved)
    assert (moved - keys[1]).abs().max() < 1e-4 * max(1.0, float(keys[1].abs().max()))


_MODELS: dict[str, Any] = {}
_RIGS: dict[str, tiny.Rig] = {}


@given(
    ratio=st.floats(0, 1),
    first=st.integers(0, 20),
    mass=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
)
def test_top_mass_keeps_its_budget_and_takes_the_first_tokens(
    ratio: float, first: int, mass: list[float]
) -> None:
    chosen = resolve_select(TopMass(ratio, first), torch.tensor(mass))[0].tolist()
    budget = min(len(mass), -int(-(ratio * len(mass)) // 1))
    assert len(chosen) == budget
    assert chosen == sorted(set(chosen))
    assert set(range(min(first, budget))) <= set(chosen)


def test_positions_outside_a_span_are_ignored() -> None:
    assert resolve_select(Positions((0, 2, 99)), torch.zeros(5))[0].tolist() == [0, 2]


def test_a_plan_with_a_gap_or_a_relayed_last_token_is_refused() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    located, pulled = rig.segment(tiny.tokens(5), tiny.tokens(20, 1))
    with pytest.raises(ValueError, match="last prompt token"):
        rig.run(parse_method("naive"), [(tiny.tokens(4), None), (tiny.tokens(20, 1), (located, pulled))])


def test_a_band_must_start_at_zero_or_at_the_checkpoint() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = _prompt(rig)
    with pytest.raises(Exception, match="checkpoint"):
        rig.run(parse_method("context_mass:ratio=0.5+start=1"), pieces)


def test_shift_is_the_distance_from_where_the_keys_were_made() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    _, prefill = rig.run(parse_method("naive"), _prompt(rig))
    shifts = [s.shift for s in prefill.plan.spans if isinstance(s, SpanPlan) and s.source]
    assert shifts == [17 - 11, 57 - 30, 83 - 11]
