"""The oracle of the kernels, against torch's attention with explicit masks and against its definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.workers.kernel_cases import FLOAT32_SUMS, TOLERANCES, Case, Inputs, assert_same, inputs
from workers.kernels import reference

NEG_INF = float("-inf")

CASES = (
    Case(),
    Case(order="tail"),
    Case(groups=1, kv_heads=4, dim=80, tokens=130, rows=33),
    Case(groups=8, kv_heads=1, window=10),
    Case(first=17, window=1, rows=40),
    Case(first=5, order="tail", rows=1),
    Case(dtype=torch.float16),
    Case(dtype=torch.bfloat16, window=20),
)


def visible(case: Case, given: Inputs) -> torch.Tensor:
    """[rows, tokens] bool, from the definition, one pair at a time."""
    seen = torch.zeros((case.rows, case.tokens), dtype=torch.bool)
    for i, position in enumerate(given.positions.tolist()):
        for j in range(case.tokens):
            at = case.first + j
            seen[i, j] = at <= position and (case.window is None or at > position - case.window)
    return seen


def scores(case: Case, given: Inputs) -> torch.Tensor:
    """[heads, rows, tokens] float64 scores, -inf where not visible."""
    keys = given.keys.double().repeat_interleave(case.groups, 0)
    product = given.query.double() @ keys.transpose(1, 2) * case.dim**-0.5
    if case.softcap is not None:
        product = case.softcap * torch.tanh(product / case.softcap)
    return product.masked_fill(~visible(case, given), NEG_INF)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attend_rows_is_torch_attention(case: Case) -> None:
    given = inputs(case)
    out, lse = reference.attend_rows(given.query, given.keys, given.values, given.positions, **case.options)
    seen = visible(case, given)
    sighted = seen.any(-1)
    assert sighted.any()
    expected = F.scaled_dot_product_attention(
        given.query.float()[None],
        given.keys.float().repeat_interleave(case.groups, 0)[None],
        given.values.float().repeat_interleave(case.groups, 0)[None],
        attn_mask=seen,
    )[0]
    assert_same(out[:, sighted], expected[:, sighted], TOLERANCES[case.dtype])
    assert out.dtype == case.dtype
    assert_same(lse, scores(case, given).logsumexp(-1), FLOAT32_SUMS)
    assert not out[:, ~sighted].any()
    assert (lse[:, ~sighted] == NEG_INF).all()


def test_softcap_bounds_the_scores_before_the_softmax() -> None:
    case = Case(softcap=3.0, order="tail")
    given = inputs(case, spread=8.0)
    out, lse = reference.attend_rows(given.query, given.keys, given.values, given.positions, **case.options)
    expected = scores(case, given)
    assert expected.max() <= 3.0
    assert_same(lse, expected.logsumexp(-1), FLOAT32_SUMS)
    values = given.values.double().repeat_interleave(case.groups, 0)
    assert_same(out, expected.softmax(-1) @ values, TOLERANCES[case.dtype])


@pytest.mark.parametrize(
    "case", [Case(rows=0), Case(tokens=0), Case(order="blind")], ids=["no rows", "no keys", "all blind"]
)
def test_nothing_to_see_gives_zeros(case: Case) -> None:
    given = inputs(case)
    out, lse = reference.attend_rows(given.query, given.keys, given.values, given.positions, **case.options)
    assert out.shape == given.query.shape
    assert not out.any()
    assert lse.shape == out.shape[:2]
    assert (lse == NEG_INF).all()
    mass = reference.context_mass(
        given.query, given.keys, lse, given.positions, start=0, stop=99, **case.options
    )
    assert mass.shape == (case.rows,)
    assert not mass.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_context_mass_is_a_sum_of_probabilities(case: Case) -> None:
    given = inputs(case)
    _, lse = reference.attend_rows(given.query, given.keys, given.values, given.positions, **case.options)
    start, stop = case.first + 4, case.first + 21
    mass = reference.context_mass(
        given.query, given.keys, lse, given.positions, start=start, stop=stop, **case.options
    )
    probabilities = scores(case, given).softmax(-1).nan_to_num(0.0)
    assert_same(mass, probabilities[..., 4:21].sum(-1).mean(0), FLOAT32_SUMS)


def test_context_mass_of_all_keys_is_one_and_splits_add_up() -> None:
    case = Case(first=11, order="tail")
    given = inputs(case)
    _, lse = reference.attend_rows(given.query, given.keys, given.values, given.positions, **case.options)

    def mass(start: int, stop: int) -> torch.Tensor:
        return reference.context_mass(
            given.query, given.keys, lse, given.positions, start=start, stop=stop, **case.options
        )

    assert_same(mass(-5, 999), torch.ones(case.rows), FLOAT32_SUMS)
    assert_same(mass(0, 30) + mass(30, 999), torch.ones(case.rows), FLOAT32_SUMS)
    assert not mass(0, 11).any()
    assert not mass(30, 30).any()


@pytest.mark.parametrize("layers_of_angles", [1, 3])
def test_relocate_rotates_pairs_of_halves_and_copies_the_rest(layers_of_angles: int) -> None:
    source = torch.randn(3, 2, 2, 5, 10)
    frequencies = torch.rand(layers_of_angles, 3)
    cos, sin = reference.rotation(frequencies, 29)
    cache = torch.full((3, 2, 2, 20, 10), 7.0)
    reference.relocate(source, cos, sin, cache[:, :, :, 6:11])
    for layer in range(3):
        angle = frequencies[layer % layers_of_angles].double() * 29
        for i in range(3):
            pair = torch.complex(source[layer, 0, ..., i].double(), source[layer, 0, ..., i + 3].double())
            turned = pair * torch.polar(torch.ones_like(angle[i]), angle[i])
            assert_same(cache[layer, 0, :, 6:11, i], turned.real, FLOAT32_SUMS)
            assert_same(cache[layer, 0, :, 6:11, i + 3], turned.imag, FLOAT32_SUMS)
    assert torch.equal(cache[:, 0, :, 6:11, 6:], source[:, 0, ..., 6:])
    assert torch.equal(cache[:, 1, :, 6:11], source[:, 1])
    assert (cache[:, :, :, :6] == 7.0).all()
    assert (cache[:, :, :, 11:] == 7.0).all()


def test_relocate_without_a_shift_copies_bits() -> None:
    source = torch.randn(2, 2, 3, 4, 8).to(torch.bfloat16)
    out = torch.zeros_like(source)
    reference.relocate(source, None, None, out)
    assert torch.equal(out, source)


def test_relocate_there_and_back_is_the_identity() -> None:
    source = torch.randn(2, 2, 3, 4, 8)
    frequencies = torch.rand(1, 4)
    there, back = torch.empty_like(source), torch.empty_like(source)
    reference.relocate(source, *reference.rotation(frequencies, 5000), there)
    reference.relocate(there, *reference.rotation(frequencies, -5000), back)
    assert (there[:, 0] - source[:, 0]).abs().max() > 0.1
    assert_same(back, source, FLOAT32_SUMS)


def test_value_deviation_of_known_vectors() -> None:
    a = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]])
    b = torch.tensor([[[3.0, 0.0], [1.0, -1.0], [0.0, -1.0], [1.0, 0.0]]])
    assert_same(reference.value_deviation(a, b), torch.tensor([0.0, 1.0, 2.0, 1.0]), FLOAT32_SUMS)
