"""Answers of a given length, answers together, and answers taken as given: tokens and KV of decoding."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.workers.rigs import QUESTION, Desk, desk, request
from transport.directory.local import LocalDirectory
from transport.errors import CacheTooSmall
from workers.model import LoadedModel
from workers.sampling import Sampler
from workers.settings import SamplingSettings

SOLVE = "Solve this problem.\n{question}"


@pytest.fixture(scope="module")
def one(loaded: LoadedModel) -> Iterator[Desk]:
    with desk("w0", loaded, LocalDirectory()) as opened:
        yield opened
        agent = opened.agent
        assert agent.pool.free_blocks == agent.pool.num_blocks, "a request kept its cache"


def test_withheld_tokens_are_not_drawn_before_the_least_length() -> None:
    logits = torch.tensor([0.0, 5.0, 3.0, 4.0])
    sampler = Sampler(SamplingSettings(min_new_tokens=2), withheld={1, 3})
    assert [sampler.sample(logits) for _ in range(4)] == [2, 2, 1, 1]
    assert logits.tolist() == [0, 5, 3, 4], "the caller's logits were changed"


def test_without_a_least_length_nothing_is_withheld() -> None:
    assert Sampler(SamplingSettings(), withheld={1}).sample(torch.tensor([0.0, 5.0])) == 1


@pytest.mark.slow
def test_an_answer_has_at_least_the_asked_length(one: Desk) -> None:
    asked = "What is the capital of France? Answer in one short sentence."
    short = request("a", asked, max_new_tokens=40, publish=False)
    stopped = one.agent.generate(short)
    assert stopped.finish_reason == "stop"
    least = len(stopped.token_ids) + 5
    sampling = SamplingSettings(max_new_tokens=least, min_new_tokens=least)
    reply = one.agent.generate(replace(short, id="b", sampling=sampling))
    assert (len(reply.token_ids), reply.finish_reason) == (least, "length")
    # No control token within: all but the last have KV that can be relayed.
    assert reply.output.kv_tokens == least - 1


@pytest.mark.slow
def test_a_replayed_answer_has_the_kv_of_the_decoded_one(one: Desk) -> None:
    agent = one.agent
    asked = request("a", SOLVE, max_new_tokens=40, question=QUESTION)
    decoded = agent.generate(asked)
    key = next(p.key for p in decoded.published if p.slot is None)

    def stored() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        segment = next(s for s in agent.store.segments() if s.key == key)
        views = [agent.loaded.layout.views(one.arena.payload(b.block)) for b in segment.blocks]
        n = segment.num_tokens
        return (
            torch.cat([v.kv.body for v in views], 3)[:, :, :, :n].clone(),
            torch.cat([v.checkpoint for v in views])[:n].clone(),
            torch.cat([v.mass for v in views])[:n].clone(),
        )

    before = stored()
    one.clear()
    again = agent.replay(replace(asked, id="b"), decoded.token_ids)
    assert {p.key for p in again.published} == {p.key for p in decoded.published}
    assert (again.output, again.text) == (decoded.output, decoded.text)
    for was, now in zip(before, stored(), strict=True):
        assert (was - now).abs().max() < 1e-4
    one.clear()


@pytest.mark.slow
def test_answers_together_are_those_of_each_alone_and_the_same_again(one: Desk) -> None:
    texts = [f"{QUESTION} Think of case {i}." for i in range(3)]
    asked = [request("s", SOLVE, max_new_tokens=16, publish=False, question=t) for t in texts]
    alone = [one.agent.generate(r).token_ids for r in asked]

    def together() -> list[tuple[int, ...]]:
        return [r.token_ids for r in one.agent.generate_all(replace(r, id=f"{r.id}-t") for r in asked)]

    passes = one.agent.engine.counters.weight_passes
    assert together() == alone
    # One pass for the prompts, one for each later token, shared by all.
    assert one.agent.engine.counters.weight_passes - passes <= 17
    assert together() == alone


@pytest.mark.slow
def test_batches_and_other_requests_wait_for_each_other_and_end(loaded: LoadedModel) -> None:
    """The cache holds little more than a batch, and another request has some of it when the batch comes: the
    batch waits until that one is through. A second batch waits for the first."""
    asked = [
        request("s", SOLVE, max_new_tokens=12, publish=False, question=f"{i}. {QUESTION}") for i in range(3)
    ]
    other = request("o", SOLVE, max_new_tokens=40, publish=False, question=QUESTION)
    with desk("w1", loaded, LocalDirectory(), cache_tokens=64 * 7, max_sequences=4) as one:
        size = loaded.layout.blocks_for
        batch = sum(size(len(one.agent.render(r)) + 12) for r in asked)
        alone = size(len(one.agent.render(other)) + 40)
        assert batch <= one.agent.pool.num_blocks < batch + alone, "they do not fit together"
        started = threading.Event()
        with ThreadPoolExecutor(3) as threads:
            single = threads.submit(one.agent.generate, other, lambda *_: started.set())
            assert started.wait(60)
            batches = [
                threads.submit(one.agent.generate_all, [replace(r, id=f"{r.id}-{i}") for r in asked])
                for i in range(2)
            ]
            assert len(single.result(timeout=100).token_ids) == 40
            first, second = ([r.token_ids for r in b.result(timeout=100)] for b in batches)
        assert first == second
        assert one.agent.pool.free_blocks == one.agent.pool.num_blocks


@pytest.mark.slow
def test_more_than_fits_at_once_is_refused_at_once(one: Desk) -> None:
    asked = [request("s", SOLVE, max_new_tokens=1500, publish=False, question=QUESTION) for _ in range(3)]
    with pytest.raises(CacheTooSmall, match="Ask for fewer"):
        one.agent.generate_all(asked)
