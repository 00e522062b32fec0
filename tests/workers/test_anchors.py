"""Anchors: offsets learned from a dense prefill repair a reused span, within a byte budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers import tiny
from tests.workers.anchor_bench import BIG, SLOT, Bench
from workers import kernels
from workers.anchors import (
    KEY_GROUP,
    Anchor,
    AnchorPool,
    Context,
    Frame,
    frame_of_cache,
    frame_of_segment,
    store_keys,
    store_values,
)
from workers.methods.kvcomm import KVComm

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (4, 2, 8)
"""layers, kv_heads, head_dim of anchors that no model made."""
FREQS = 1.0 / 100 ** (torch.arange(4, dtype=torch.float32) / 4)[None]


def frame(tokens: int, seed: int) -> Frame:
    layers, heads, dim = SHAPE
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn((layers, heads, tokens, dim), generator=generator)
    return Frame(keys, torch.randn(keys.shape, generator=generator))


def entries(tokens: int, seed: int) -> torch.Tensor:
    """[layers, 2, kv_heads, tokens, head_dim] as in a cache."""
    made = frame(tokens, seed)
    return torch.stack((made.keys, made.values), dim=1)


def learned(
    pool: AnchorPool,
    seed: int,
    *,
    tokens: int = 6,
    context: Context = SLOT,
    bits: int = 32,
    exact: bool = True,
    start: int = 3,
) -> Anchor:
    match = pool.match(context, f"{seed:032x}", frame(tokens, seed))
    return pool.learn(match, entries(tokens, 1000 + seed), start, bits=bits, exact=exact)


def keep(pool: AnchorPool, anchor: Anchor, *, max_anchors: int = 20, window: int = 5) -> list[int] | None:
    """Insert; the seeds of what was given up."""
    gone = pool.insert(anchor, max_anchors=max_anchors, window=window)
    return None if gone is None else [int(a.source, 16) for a in gone]


def seeds(pool: AnchorPool, context: Context = SLOT) -> list[int]:
    return [int(a.source, 16) for a in pool.anchors(context)]


# -- what an anchor repairs --


def bench(family: str, before: int = 17) -> Bench:
    rig = tiny.Rig(tiny.build(family))
    pool = AnchorPool(BIG, rig.shape.inv_freq)
    return Bench(rig, pool, tiny.tokens(before, 5), tiny.tokens(70, 1), tiny.tokens(9, 7))


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-4), (8, 0.1)])
def test_an_anchor_of_this_very_prompt_gives_the_dense_kv(family: str, bits: int, tolerance: float) -> None:
    """Learned from the same segment, context and agent: nothing is approximated but the number format. In 8
    bits an entry is off by half a scale, 1/254 of the largest offset of its channel or token; the offsets
    here reach about 10."""
    b = bench(family)
    b.learn(bits)
    b.pool.insert(_other(b), max_anchors=20, window=5)
    dense = b.dense()
    kv, logits = b.corrected()
    assert (kv - dense).abs().max() < tolerance
    if bits == 32:
        full = tiny.reference_logits(b.rig.model, b.ids)[-1]
        assert (logits - full).abs().max() < 1e-4


def _other(b: Bench) -> Anchor:
    """An anchor of another segment in the same slot: it must not blur the one that fits exactly."""
    other = Bench(b.rig, b.pool, b.before, tiny.tokens(80, 21), b.after)
    return b.pool.learn(other.match(), other.dense(), other.span.start, bits=32, exact=True)


def test_without_the_anchor_the_same_span_is_off(family: str) -> None:
    """The test above can fail: uncorrected KV differs by far more than its tolerance."""
    b = bench(family)
    kv, _ = b.corrected()
    assert (kv - b.dense()).abs().max() > 0.5


def test_layer_zero_stays_as_it_is(family: str) -> None:
    b = bench(family)
    before, _ = b.corrected()
    b.pool.insert(_other(b), max_anchors=20, window=5)
    after, _ = b.corrected()
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1:], after[1:])


@settings(max_examples=25, deadline=None)
@given(at=st.integers(0, 300), to=st.integers(0, 300), family=st.sampled_from(sorted(tiny.FAMILIES)))
def test_an_anchor_of_one_position_serves_at_another(at: int, to: int, family: str) -> None:
    """Learned at `at`, used at `to`: the corrected keys are the true ones, rotated by the difference."""
    rig = _RIGS.setdefault(family, tiny.Rig(tiny.build(family)))
    freqs = rig.shape.inv_freq
    layers, heads, dim = rig.num_layers, rig.layout.num_kv_heads, rig.layout.head_dim
    generator = torch.Generator().manual_seed(at)
    true = torch.randn((layers, 2, heads, 7, dim), generator=generator)
    base = Frame(torch.randn((layers, heads, 7, dim)), torch.randn((layers, heads, 7, dim)))
    pool = AnchorPool(BIG, freqs)
    pool.insert(
        pool.learn(pool.match(SLOT, "a", base), true, at, bits=32, exact=True), max_anchors=20, window=5
    )
    kv = torch.stack((torch.empty_like(base.keys), base.values), dim=1)
    kernels.rotate_keys(base.keys, *kernels.rotation(freqs, to), kv[:, 0])
    pool.match(SLOT, "a", base).apply(kv, to)
    moved = torch.empty_like(true[:, 0])
    kernels.rotate_keys(true[:, 0], *kernels.rotation(freqs, to - at), moved)
    assert (kv[1:, 0] - moved[1:]).abs().max() < 1e-4
    assert (kv[1:, 1] - true[1:, 1]).abs().max() < 1e-5


_RIGS: dict[str, tiny.Rig] = {}


def test_a_frame_does_not_depend_on_where_the_segment_was_made(family: str) -> None:
    """Of an isolated token in layer 0, whose KV depends on its position only."""
    rig = tiny.Rig(tiny.build(family))
    frames = []
    for start in (4, 31):
        _, pulled = rig.segment(tiny.tokens(start, start), tiny.tokens(20, 1))
        frames.append(frame_of_segment(pulled, 20, rig.shape.inv_freq))
    assert (frames[0].keys[0] - frames[1].keys[0]).abs().max() < 1e-4
    assert (frames[0].keys[1:] - frames[1].keys[1:]).abs().max() > 1e-2


def test_a_segment_s_frame_is_that_of_its_cache() -> None:
    rig = tiny.Rig(tiny.build("gemma3"))
    before, ids = tiny.tokens(21, 1), tiny.tokens(40, 2)
    _, pulled = rig.segment(before, ids)
    cache = rig.compute([*before, *ids])
    of_cache = frame_of_cache(cache.kv[:, :, :, 21:51], 21, rig.shape.inv_freq)
    of_segment = frame_of_segment(pulled, 30, rig.shape.inv_freq)
    assert torch.equal(of_cache.keys, of_segment.keys)
    assert torch.equal(of_cache.values, of_segment.values)


# -- weights --


def _pool_of(count: int, *, tokens: int = 6) -> AnchorPool:
    pool = AnchorPool(BIG, FREQS)
    for seed in range(1, count + 1):
        keep(pool, learned(pool, seed, tokens=tokens))
    return pool


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 6),
    tokens=st.integers(1, 6),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    temperature=st.sampled_from([0.01, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_weights_add_up_to_one(count: int, tokens: int, scale: float, temperature: float, seed: int) -> None:
    match = _pool_of(count).match(SLOT, "new", frame(tokens, 500 + seed), temperature=temperature)
    weights = match.weights(match.value_gaps * scale)
    assert weights.shape == (count, tokens)
    assert bool((weights >= 0).all())
    assert torch.allclose(weights.sum(0), torch.ones(tokens), atol=1e-5)


def test_a_prior_counts_like_anchors_without_offset() -> None:
    """Four anchors as near as each other, and four that change nothing: half the correction."""
    pool = _pool_of(4)
    plain = pool.match(SLOT, "new", frame(6, 77))
    shrunk = pool.match(SLOT, "new", frame(6, 77), prior=4)
    even = torch.zeros_like(plain.value_gaps)
    assert torch.allclose(shrunk.weights(even), plain.weights(even) / 2)
    assert torch.allclose(shrunk.weights(even).sum(0), torch.full((6,), 0.5))
    # One that is clearly the nearest counts as one.
    one = even.index_fill(0, torch.tensor([1, 2, 3]), 1e4)
    assert torch.allclose(shrunk.weights(one).sum(0), torch.full((6,), 0.2))
    own = pool.match(SLOT, pool.anchors(SLOT)[0].source, frame(6, 77), prior=4)
    assert own.weights(even)[0].tolist() == [1] * 6


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(5)))
def test_the_order_of_anchors_does_not_matter(order: list[int]) -> None:
    pool = _pool_of(5)
    match = pool.match(SLOT, "new", frame(6, 77))
    shuffled = replace(
        match,
        anchors=tuple(match.anchors[i] for i in order),
        candidates=tuple(match.candidates[i] for i in order),
        value_gaps=match.value_gaps[order],
    )
    assert torch.allclose(
        shuffled.weights(shuffled.value_gaps), match.weights(match.value_gaps)[order], atol=1e-6
    )
    one, two = entries(6, 3), entries(6, 3)
    match.apply(one, 40)
    shuffled.apply(two, 40)
    assert torch.allclose(one, two, atol=1e-5)
    assert not torch.allclose(one, entries(6, 3), atol=1e-2)


def test_a_nearer_anchor_weighs_more() -> None:
    pool = _pool_of(3)
    near = pool.anchors(SLOT)[1]
    base = Frame(near.base.keys.read(6) + 0.01, near.base.values.read(6) + 0.01)
    match = pool.match(SLOT, "new", base)
    assert match.weights(match.value_gaps).argmax(0).tolist() == [1] * 6
    distances = [c.distance for c in match.candidates]
    assert distances.index(min(distances)) == 1
    expected = 0.01 * (match.frame.values.numel()) ** 0.5
    assert distances[1] == pytest.approx(expected, rel=1e-3)
    norm = float(torch.linalg.vector_norm(base.values))
    assert match.candidates[1].relative == pytest.approx(expected / norm, rel=1e-3)


def test_only_anchors_that_are_long_enough_match() -> None:
    pool = AnchorPool(BIG, FREQS)
    for seed, tokens in ((1, 5), (2, 6), (3, 9)):
        keep(pool, learned(pool, seed, tokens=tokens))
    assert [int(c.source, 16) for c in pool.match(SLOT, "new", frame(6, 9)).candidates] == [2, 3]
    assert pool.match(SLOT, "new", frame(10, 9)).candidates == ()


def test_an_anchor_of_another_agent_or_slot_is_no_match() -> None:
    pool = _pool_of(3)
    assert pool.match(Context("another template", "solver"), "new", frame(6, 9)).candidates == ()
    assert pool.match(Context("template", "question"), "new", frame(6, 9)).candidates == ()


# -- eight bits --


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 2 * KEY_GROUP + 3),
    outlier=st.sampled_from([0.0, 1e3]),
    seed=st.integers(0, 99),
    read=st.integers(1, 200),
)
def test_in_eight_bits_the_error_is_at_most_half_a_scale(
    tokens: int, outlier: float, seed: int, read: int
) -> None:
    x = frame(tokens, seed).keys * torch.logspace(-4, 2, SHAPE[2])
    x[:, :, 0] += outlier
    read = min(read, tokens)
    keys, values = store_keys(x, 8), store_values(x, 8)
    assert keys.scale is not None
    assert values.scale is not None
    spread = keys.scale.repeat_interleave(KEY_GROUP, dim=2)[:, :, :read]
    assert bool(((keys.read(read) - x[:, :, :read]).abs() <= spread * 0.5001 + 1e-30).all())
    assert bool(((values.read(read) - x[:, :, :read]).abs() <= values.scale[:, :, :read] * 0.5001).all())
    groups = x.abs().split(KEY_GROUP, dim=2)
    assert torch.allclose(keys.scale, torch.stack([g.amax(2) for g in groups], 2) / 127)
    assert torch.allclose(values.scale, x.abs().amax(3, keepdim=True) / 127)


def test_eight_bits_take_about_a_quarter_of_the_bytes() -> None:
    pool = AnchorPool(BIG, FREQS)
    full, small = (learned(pool, 1, tokens=256, bits=b) for b in (32, 8))
    assert small.nbytes < 0.42 * full.nbytes  # head_dim 8: a value scale per 8 numbers weighs much here
    assert store_keys(frame(256, 1).keys, 8).nbytes < 0.27 * frame(256, 1).keys.nbytes


# -- the pool --


def test_the_least_used_of_the_oldest_is_given_up() -> None:
    pool = AnchorPool(BIG, FREQS)
    for seed in range(1, 7):
        assert keep(pool, learned(pool, seed), max_anchors=6, window=3) == []
    _use(pool, 1, times=2)
    _use(pool, 2, times=1)
    _use(pool, 3, times=1)
    # Seeds 4 to 6 were never used, but only the three oldest are looked at; 2 and 3 tie, 2 is older.
    assert keep(pool, learned(pool, 7), max_anchors=6, window=3) == [2]
    assert keep(pool, learned(pool, 8), max_anchors=6, window=3) == [4]
    assert seeds(pool) == [1, 3, 5, 6, 7, 8]


def _use(pool: AnchorPool, seed: int, *, times: int) -> None:
    """Let the gate count an anchor as the nearest."""
    anchor = next(a for a in pool.anchors(SLOT) if int(a.source, 16) == seed)
    base = Frame(anchor.base.keys.read(6), anchor.base.values.read(6))
    before = pool.uses(anchor)
    for _ in range(times):
        pool.judged(pool.match(SLOT, "new", base), KVComm())
    assert pool.uses(anchor) == before + times


def test_a_full_slot_does_not_take_from_another() -> None:
    pool = AnchorPool(BIG, FREQS)
    other = Context("template", "question")
    for seed in (1, 2):
        keep(pool, learned(pool, seed, context=other), max_anchors=2)
    for seed in (3, 4, 5):
        keep(pool, learned(pool, seed), max_anchors=2)
    assert (seeds(pool, other), seeds(pool)) == ([1, 2], [4, 5])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.booleans()), max_size=25),
    room=st.integers(1, 100),
)
def test_the_byte_budget_is_never_exceeded(lengths: list[tuple[int, bool, bool]], room: int) -> None:
    one = learned(AnchorPool(BIG, FREQS), 1, tokens=1).nbytes
    pool = AnchorPool(room * one, FREQS)
    for seed, (tokens, eight, elsewhere) in enumerate(lengths):
        context = Context("template", "question") if elsewhere else SLOT
        anchor = learned(pool, seed, tokens=tokens, bits=8 if eight else 32, context=context)
        gone = pool.insert(anchor, max_anchors=6, window=3)
        assert (gone is None) == (anchor.nbytes > pool.max_bytes)
        if gone is not None:
            assert anchor in pool.anchors(context), "what was just learned is kept"
        held = [a for c in (SLOT, Context("template", "question")) for a in pool.anchors(c)]
        assert sum(a.nbytes for a in held) == pool.nbytes <= pool.max_bytes
        assert max(len(pool.anchors(SLOT)), len(held) - len(pool.anchors(SLOT))) <= 6
    assert pool.stats()["anchor_bytes"] == pool.nbytes


def test_a_base_in_two_slots_counts_once() -> None:
    pool = AnchorPool(BIG, FREQS)
    first = learned(pool, 1)
    keep(pool, first)
    second = learned(pool, 1, context=Context("another template", "solver"))
    keep(pool, second)
    assert second.base is first.base
    assert pool.nbytes == first.base.nbytes + first.offset.nbytes + second.offset.nbytes


def test_an_exact_anchor_replaces_a_guess_and_keeps_its_count() -> None:
    pool = AnchorPool(BIG, FREQS)
    guess = learned(pool, 1, exact=False)
    keep(pool, guess)
    keep(pool, learned(pool, 2))
    _use(pool, 1, times=3)
    assert pool.wants(SLOT, guess.source, exact=True)
    assert not pool.wants(SLOT, guess.source, exact=False)
    match = pool.match(SLOT, "new", frame(6, 3))
    better = learned(pool, 1, start=9)
    assert (guess.version, better.version) == (1, 2)
    assert keep(pool, better) == [1]
    assert pool.uses(better) == 3
    assert not pool.wants(SLOT, guess.source, exact=True)
    assert match.anchors[0] is guess, "a prompt keeps what it matched"
    assert pool.anchors(SLOT)[0] is better
