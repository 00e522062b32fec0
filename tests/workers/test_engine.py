"""The ragged step equals `model(...)`, however sequences are cut and mixed."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from tests.workers import tiny
from workers.attention import MassSpan, group_rows
from workers.engine import Part

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", range(3))
def test_ragged_chunks_equal_the_plain_model(family: str, seed: int) -> None:
    model = tiny.build(family)
    sequences = [tiny.tokens(n, seed + n) for n in (37, 53, 1, 20)]
    expected = [tiny.reference_logits(model, ids) for ids in sequences]
    rig = tiny.Rig(model)
    chance = random.Random(seed)
    caches = [rig.pool.allocate(len(ids), timeout_s=1) for ids in sequences]
    done, got = [0] * len(sequences), [[] for _ in sequences]
    while any(d < len(ids) for d, ids in zip(done, sequences, strict=True)):
        parts, who = [], []
        for i, ids in enumerate(sequences):
            n = min(chance.randint(0, 19), len(ids) - done[i])
            if n:
                where = torch.arange(done[i], done[i] + n)
                parts.append(
                    Part(
                        cache=caches[i],
                        positions=where,
                        token_ids=torch.tensor(ids)[where],
                        logits_rows=tuple(range(n)),
                    )
                )
                who.append(i)
                done[i] += n
        for i, result in zip(who, rig.engine.step(parts) if parts else [], strict=True):
            got[i].append(result.logits)
    for logits, reference in zip(got, expected, strict=True):
        assert (torch.cat(logits) - reference).abs().max() < 1e-4


def test_any_rows_over_an_exact_cache_change_nothing(family: str) -> None:
    """Recomputing a sparse set of rows in a band of layers, from saved hidden states, gives what was
    there."""
    rig = tiny.Rig(tiny.build(family))
    ids = tiny.tokens(60)
    cache = rig.compute(ids)
    before = cache.kv[:, :, :, :60].clone()
    rows = torch.tensor([1, 2, 5, *range(20, 40), 44, 50])
    cache.kv[2:5, :, :, rows] = 7.0  # spoil what must be rebuilt
    rig.engine.step(
        [
            Part(
                cache=cache,
                positions=rows,
                token_ids=torch.tensor(ids)[rows],
                enter=torch.full_like(rows, 2),
                exit=torch.full_like(rows, 5),
                hidden=cache.checkpoint[rows],
            )
        ]
    )
    assert (cache.kv[:, :, :, :60] - before).abs().max() < 1e-4


def test_layers_without_rows_are_skipped() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    ids = tiny.tokens(20)
    cache = rig.compute(ids)
    before = rig.engine.counters.row_layers
    rows = torch.tensor([3, 4])
    rig.engine.step(
        [
            Part(
                cache=cache,
                positions=rows,
                token_ids=torch.tensor(ids)[rows],
                enter=torch.tensor([2, 2]),
                exit=torch.tensor([4, 3]),
                hidden=cache.checkpoint[rows],
            )
        ]
    )
    assert rig.engine.counters.row_layers - before == 3


def test_rows_that_enter_and_leave_return_their_hidden_state() -> None:
    rig = tiny.Rig(tiny.build("qwen3"), checkpoint_layer=3)
    ids = tiny.tokens(30)
    exact = rig.compute(ids)
    cache = rig.pool.allocate(30, timeout_s=1)
    result = rig.engine.step(
        [
            Part(
                cache=cache,
                positions=torch.arange(30),
                token_ids=torch.tensor(ids),
                exit=torch.full((30,), 3),
                keep_hidden=True,
            )
        ]
    )[0]
    assert result.hidden is not None
    assert (result.hidden - exact.checkpoint[:30]).abs().max() < 1e-5


@pytest.mark.parametrize("dense", [True, False])
def test_context_mass_is_the_attention_given_to_the_text_before(dense: bool) -> None:
    """Against the attention weights that transformers itself returns; decode rows and prefill rows alike."""
    model = tiny.build("llama")
    ids, start = tiny.tokens(50), 20
    with torch.no_grad():
        weights = model(torch.tensor(ids)[None], output_attentions=True).attentions
    expected = torch.stack([w[0, :, start:, 4:start].sum(-1).mean(0) for w in weights]).mean(0)
    rig = tiny.Rig(model)
    cache = rig.pool.allocate(50, timeout_s=1)
    cuts = [0, start, 50] if dense else [0, *range(start, 51)]
    for a, b in itertools.pairwise(cuts):
        rig.engine.step(
            [
                Part(
                    cache=cache,
                    positions=torch.arange(a, b),
                    token_ids=torch.tensor(ids[a:b]),
                    masses=(MassSpan(start, 50),),
                )
            ]
        )
    assert (cache.mass[start:50] - expected).abs().max() < 1e-5
    assert cache.mass[:start].abs().max() == 0


def test_rows_are_grouped_into_dense_runs_and_the_rest() -> None:
    positions = torch.tensor([0, 3, *range(10, 70), 80, 81, *range(90, 200, 2)])
    first, dense, *sparse = group_rows(positions)
    assert dense.dense
    assert (dense.first, dense.stop) == (10, 70)
    assert not first.dense
    assert first.positions.tolist() == [0, 3]
    assert [g.count for g in sparse] == [32, 25]
    assert torch.equal(torch.cat([g.positions for g in (first, dense, *sparse)]), positions)
    assert [g.rows.start for g in sparse] == [62, 94]
