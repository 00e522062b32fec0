"""What the sampler draws, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transport.errors import RelayError
from workers.sampling import Sampler
from workers.settings import SamplingSettings


def draw(logits: torch.Tensor, count: int, **kwargs: float) -> list[int]:
    sampler = Sampler(SamplingSettings(**kwargs))  # type: ignore[arg-type]
    return [sampler.sample(logits) for _ in range(count)]


def test_temperature_zero_takes_the_largest() -> None:
    assert draw(torch.tensor([0.1, 3.0, 2.9]), 3) == [1, 1, 1]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert draw(logits, 20, temperature=1.0, seed=7) == draw(logits, 20, temperature=1.0, seed=7)
    assert draw(logits, 20, temperature=1.0, seed=7) != draw(logits, 20, temperature=1.0, seed=8)


def test_draws_do_not_depend_on_the_global_generator_or_on_batch_mates() -> None:
    logits = torch.zeros(100)
    alone = draw(logits, 10, temperature=1.0, seed=3)
    first, second = (Sampler(SamplingSettings(temperature=1.0, seed=s)) for s in (3, 4))
    together = []
    for _ in range(10):
        torch.rand(5)
        together.append(first.sample(logits))
        second.sample(logits)
    assert together == alone


def test_a_small_top_p_is_greedy() -> None:
    logits = torch.tensor([0.0, 1.0, 0.5, -1.0])
    assert set(draw(logits, 50, temperature=2.0, top_p=1e-6)) == {1}


def test_top_p_keeps_the_token_that_crosses_the_mass_and_none_after_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draw(logits, 400, temperature=1.0, top_p=0.6)) == {0, 1}


def test_frequencies_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    tokens = draw(logits, 4000, temperature=2.0)
    expected = torch.softmax(logits / 2.0, 0)
    for token in range(3):
        assert tokens.count(token) / 4000 == pytest.approx(float(expected[token]), abs=0.03)


def test_minus_infinity_forbids_a_token() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0])
    assert set(draw(logits, 100, temperature=5.0)) == {1, 3}


@pytest.mark.parametrize(
    "logits",
    [
        torch.tensor([0.0, math.nan]),
        torch.tensor([0.0, math.inf]),
        torch.full((3,), -math.inf),
        torch.zeros(0),
        torch.zeros(2, 3),
    ],
    ids=["nan", "inf", "all forbidden", "empty", "matrix"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_refused(logits: torch.Tensor, temperature: float) -> None:
    with pytest.raises(RelayError, match="logits"):
        Sampler(SamplingSettings(temperature=temperature)).sample(logits)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(1e-6, 100),
    st.floats(1e-6, 1),
    st.integers(0, 2**32),
)
def test_a_drawn_token_is_always_in_the_vocabulary_and_likely(
    values: list[float], temperature: float, top_p: float, seed: int
) -> None:
    logits = torch.tensor(values)
    (token,) = draw(logits, 1, temperature=temperature, top_p=top_p, seed=seed)
    assert 0 <= token < len(values)
    probabilities = torch.softmax((logits.double() - logits.max()) / temperature, 0)
    heavier = float(probabilities[probabilities > probabilities[token]].sum())
    assert heavier <= top_p + 1e-9
