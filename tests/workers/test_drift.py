"""Drift: entries that are not recomputed follow the mean change of probes, seen from the span's start."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers import tiny
from workers.drift import span_drift
from workers.methods import parse_method
from workers.methods.base import TopMass
from workers.selection import resolve_select

pytestmark = pytest.mark.usefixtures("one_thread")


def _turned(vector: torch.Tensor, inv_freq: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`vector` [heads, dim] rotated to every offset: [heads, offsets, dim]; written with complex numbers."""
    half = inv_freq.shape[-1]
    pairs = torch.complex(vector[:, :half], vector[:, half : 2 * half])[:, None]
    out = pairs * torch.exp(1j * offsets[:, None] * inv_freq.double()[None]).to(pairs.dtype)
    return torch.cat((out.real, out.imag, vector[:, None, 2 * half :].expand(-1, len(offsets), -1)), -1)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(8, 40),
    start=st.integers(0, 30),
    factor=st.floats(0, 1),
    half=st.sampled_from([2, 4]),
    seed=st.integers(0, 1000),
)
def test_an_offset_that_is_the_same_everywhere_is_found_from_the_probes(
    tokens: int, start: int, factor: float, half: int, seed: int
) -> None:
    """All keys lack one vector, seen from the span's start, and all values another: what is not recomputed
    gets `factor` of it, what is recomputed and what lies outside stays."""
    rig = tiny.Rig(tiny.build("llama"))
    torch.manual_seed(seed)
    cache = rig.pool.allocate(80, timeout_s=1)
    cache.kv.normal_()
    before = cache.kv.clone()
    inv_freq = torch.rand(1, half)
    selected = torch.randperm(tokens)[: tokens // 2].sort().values
    probes = selected[::2]
    drift = span_drift(start, tokens, selected, probes, (1, 4), factor, inv_freq)
    heads, dim = rig.layout.num_kv_heads, rig.layout.head_dim
    lack_k, lack_v = torch.randn(heads, dim), torch.randn(heads, dim)
    offset = _turned(lack_k, inv_freq[0], torch.arange(tokens))
    layer, at = 2, start + probes
    drift.follow(
        cache,
        layer,
        cache.keys(layer)[:, at] + offset[:, probes],
        cache.values(layer)[:, at] + lack_v[:, None],
    )
    expected = before.clone()
    rest = torch.tensor([i for i in range(tokens) if i not in set(selected.tolist())])
    expected[layer, 0][:, start + rest] += factor * offset[:, rest]
    expected[layer, 1][:, start + rest] += factor * lack_v[:, None]
    assert (cache.kv - expected).abs().max() < 1e-4
    rig.pool.free(cache)


@given(
    ratio=st.floats(0, 1),
    probes=st.floats(0, 0.5),
    mass=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=80),
)
def test_probes_are_spread_within_the_budget(ratio: float, probes: float, mass: list[float]) -> None:
    select = TopMass(ratio, 4, probes)
    chosen, spread = resolve_select(select, torch.tensor(mass))
    assert len(chosen) == len(resolve_select(TopMass(ratio, 4), torch.tensor(mass))[0])
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert set(spread.tolist()) <= set(chosen.tolist())
    assert len(set(spread.tolist())) == len(spread)
    assert 2 * len(spread) <= len(chosen)


METHOD = "context_mass:ratio=0.5+first=2+probes=0.2+drift=1"


@pytest.mark.parametrize("max_rows", [7, 16, 33])
def test_chunks_do_not_change_what_the_span_follows(family: str, max_rows: int) -> None:
    rig = tiny.Rig(tiny.build(family))
    pieces = rig.two_spans()
    whole, _ = rig.run(parse_method(METHOD), pieces)
    cut, prefill = rig.run(parse_method(METHOD), pieces, max_rows=max_rows)
    assert (whole - cut).abs().max() < 1e-4
    assert all(r.drift is not None for r in prefill._relayed.values())


def test_a_part_that_is_run_twice_leaves_what_one_run_leaves(family: str) -> None:
    """By the second run the probes' entries are written, so that their change is nothing but rounding."""
    rig = tiny.Rig(tiny.build(family))
    rig.model.set_attn_implementation("relay_cluster")
    _, still = rig.run(parse_method(METHOD.replace("drift=1", "drift=0")), rig.two_spans(), max_rows=33)
    _, once = rig.run(parse_method(METHOD), rig.two_spans(), max_rows=33)
    _, twice = rig.run(parse_method(METHOD), rig.two_spans(), max_rows=33, times=2)
    assert (once.cache.kv - twice.cache.kv)[..., :100, :].abs().max() < 1e-5
    assert (once.cache.kv - still.cache.kv)[..., :100, :].abs().max() > 1e-2, "there is a drift"


def test_drift_changes_what_is_reused_and_costs_no_rows() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = rig.two_spans()
    without, still = rig.run(parse_method(METHOD.replace("drift=1", "drift=0")), pieces)
    logits, moved = rig.run(parse_method(METHOD), pieces)
    assert moved.counts.rectified == still.counts.rectified
    assert (logits - without).abs().max() > 1e-3
    everything = METHOD.replace("ratio=0.5", "ratio=1+start=0+end=99")
    exact, _ = rig.run(parse_method("full_prefill"), pieces)
    logits, _ = rig.run(parse_method(everything), pieces)
    assert (logits - exact).abs().max() < 1e-4
