"""Requests on real workers with the real model, in one process."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from tests.workers.rigs import QUESTION, Desk, desk, request
from transport.directory.local import LocalDirectory
from transport.errors import Cancelled, ConfigError, PipelineError, PromptTooLong
from workers.model import LoadedModel
from workers.settings import SamplingSettings

# The real model decodes about ten tokens a second on two cores.
pytestmark = pytest.mark.slow

SOLVE = "Solve this problem.\n{question}"
CHECK = "Problem:\n{question}\nSolution:\n{solver}\nIs the solution right?"


def _generate_plain(loaded: LoadedModel, ids: tuple[int, ...], count: int) -> list[int]:
    """Plain transformers, its own attention and cache."""
    loaded.model.set_attn_implementation("sdpa")
    try:
        out = loaded.model.generate(
            torch.tensor([ids], device=loaded.device), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
    finally:
        loaded.model.set_attn_implementation("relay_cluster")
    return out[0, len(ids) :].tolist()


def _ids(one: Desk, prompt: str, **values: str) -> tuple[int, ...]:
    return one.agent.render(request("x", prompt, **values)).token_ids


def test_full_prefill_gives_the_tokens_of_plain_transformers(
    pair: tuple[Desk, Desk], loaded: LoadedModel
) -> None:
    one, _ = pair
    reply = one.agent.generate(request("solver", SOLVE, max_new_tokens=24, question=QUESTION))
    assert list(reply.token_ids) == _generate_plain(loaded, _ids(one, SOLVE, question=QUESTION), 24)
    assert reply.fresh_tokens == reply.prompt_tokens


def test_exact_prefix_is_bit_identical_to_full_prefill(loaded: LoadedModel) -> None:
    """With the rows cut at the same places: a CPU matrix product of another height may differ in its last
    bit."""
    one = desk("w7", loaded, LocalDirectory(), max_rows_per_step=64)
    long = " ".join([QUESTION] * 4)
    full = request("a", SOLVE, question=long)
    expected = one.agent.score(full, ()).logits
    one.agent.generate(request("b", SOLVE, max_new_tokens=1, question=long))
    reused = request("c", SOLVE, "exact_prefix", max_new_tokens=1, question=long)
    cached = one.agent.score(replace(reused, prefix_limit=128), ()).logits
    assert torch.equal(expected, cached)
    reply = one.agent.generate(replace(reused, prefix_limit=128))
    assert (reply.prefix_tokens, reply.fresh_entries) == (128, (reply.prompt_tokens - 128) * 30)
    whole = one.agent.generate(reused)
    one.close()
    assert whole.prefix_tokens == whole.prompt_tokens - 1
    assert whole.token_ids == reply.token_ids


def test_a_relayed_prompt_adds_up(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=70, question=QUESTION))
    assert {p.slot for p in first.published} == {"question", None}
    streamed: list[str] = []
    second = two.agent.generate(
        request("critic", CHECK, "auto", question=QUESTION, solver=first.output),
        lambda token: streamed.append(token.text),
    )
    assert second.fresh_tokens + second.relayed_tokens == second.prompt_tokens
    assert second.relayed_tokens >= sum(p.tokens for p in first.published)
    assert second.relayed_entries == second.relayed_tokens * 30
    assert second.fresh_entries == (second.fresh_tokens - second.prefix_tokens) * 30
    assert second.reuse is not None
    assert second.reuse > 0.8
    assert [t.transfer.outcome for t in second.transfers] == ["pulled", "pulled"]
    for transfer in second.transfers:
        assert transfer.transfer.nbytes == transfer.transfer.blocks * one.arena.block_nbytes
        assert (transfer.transfer.source, transfer.transfer.destination) == ("w0", "w1")
    assert second.fallbacks == ()
    assert second.text.startswith("".join(streamed))
    stages = second.stages
    total = sum(getattr(stages, name) for name in stages.__slots__)
    assert total == pytest.approx(second.ttft_s, rel=0.05, abs=0.005)


def test_at_ratio_one_a_relayed_answer_is_the_full_one(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=40, question=QUESTION))
    method = "context_mass:ratio=1+start=0+end=30"
    values = {"question": QUESTION, "solver": first.output}
    full_reply = two.agent.generate(request("critic", CHECK, "full_prefill", publish=False, **values))
    ours_reply = two.agent.generate(request("critic", CHECK, method, publish=False, **values))
    assert (full_reply.relayed_tokens, full_reply.fresh_tokens) == (0, full_reply.prompt_tokens)
    assert ours_reply.relayed_tokens > 0
    assert ours_reply.token_ids == full_reply.token_ids
    full = two.agent.score(request("a", CHECK, question=QUESTION, solver=first.output), ())
    ours = two.agent.score(request("b", CHECK, method, question=QUESTION, solver=first.output), ())
    assert (full.logits - ours.logits).abs().max() < 1e-4


def test_the_same_segment_twice_is_pulled_once(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=30, question=QUESTION))
    twice = "{solver}\nAgain:\n{solver}\nSame?"
    reply = two.agent.generate(request("judge", twice, "auto", solver=first.output))
    assert len(reply.transfers) == 1
    assert reply.relayed_tokens == 2 * first.output.kv_tokens


def test_a_corrupted_block_ends_in_the_answer_of_full_prefill(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=40, question=QUESTION))
    for segment in one.agent.store.segments():
        one.arena.payload(segment.blocks[0].block)[1000] ^= 1
    values = {"question": QUESTION, "solver": first.output}
    reply = two.agent.generate(request("critic", CHECK, "auto", publish=False, **values))
    full = two.agent.generate(request("critic", CHECK, "full_prefill", publish=False, **values))
    assert {t.transfer.outcome for t in reply.transfers} == {"corrupt"}
    assert {f.reason for f in reply.fallbacks} == {"corrupt"}
    assert {f.slot for f in reply.fallbacks} == {"question", "solver"}
    assert reply.relayed_tokens == 0
    assert reply.token_ids == full.token_ids


def test_a_segment_that_was_evicted_is_computed_and_said(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=40, question=QUESTION))
    one.agent.store.evict(blocks=one.arena.num_blocks)
    assert one.agent.store.segments() == []
    reply = two.agent.generate(request("critic", CHECK, "auto", question=QUESTION, solver=first.output))
    assert [(f.slot, f.reason) for f in reply.fallbacks] == [("solver", "not_found")]
    assert reply.relayed_tokens == 0


def test_a_full_arena_costs_the_segment_but_not_the_answer(loaded: LoadedModel) -> None:
    tiny = desk("w9", loaded, LocalDirectory(), arena_blocks=1)
    reply = tiny.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=70, question=QUESTION))
    tiny.close()
    assert len(reply.token_ids) == 70
    assert any("not published" in note for note in reply.notes)


def test_four_requests_at_once_give_the_tokens_of_each_alone(pair: tuple[Desk, Desk]) -> None:
    one, _ = pair
    prompts = [f"{QUESTION} Think of case {i}." * (i + 1) for i in range(4)]

    def ask(text: str) -> tuple[int, ...]:
        return one.agent.generate(
            request("solver", SOLVE, "full_prefill", max_new_tokens=24, publish=False, question=text)
        ).token_ids

    begin = one.agent.engine.counters.weight_passes
    alone = [ask(p) for p in prompts]
    passes_alone = one.agent.engine.counters.weight_passes - begin
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, prompts))
    passes_together = one.agent.engine.counters.weight_passes - begin - passes_alone
    assert together == alone
    # 4 x 24 tokens: tokens per pass over the weights at least double.
    assert passes_together <= passes_alone / 2


def test_a_seed_gives_the_same_tokens_alone_and_in_company(pair: tuple[Desk, Desk]) -> None:
    one, _ = pair
    sampling = SamplingSettings(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=7)

    def ask(seed: int) -> tuple[int, ...]:
        drawn = SamplingSettings(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=seed)
        return one.agent.generate(
            request("s", SOLVE, sampling=drawn, publish=False, question=QUESTION)
        ).token_ids

    alone = ask(sampling.seed)
    with ThreadPoolExecutor(3) as pool:
        company = list(pool.map(ask, (7, 8, 7)))
    assert company[0] == company[2] == alone
    assert company[1] != alone


def test_a_cancelled_request_frees_its_blocks(pair: tuple[Desk, Desk]) -> None:
    one, _ = pair
    asked = request("s", SOLVE, max_new_tokens=2000, question=QUESTION)
    started = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(one.agent.generate, asked, lambda *_: started.set())
        assert started.wait(60)
        assert one.agent.pool.free_blocks < one.agent.pool.num_blocks
        assert one.agent.cancel(asked.id)
        with pytest.raises(Cancelled):
            future.result(timeout=60)
    assert one.agent.pool.free_blocks == one.agent.pool.num_blocks
    assert not one.agent.cancel(asked.id)


def test_a_long_prefill_does_not_hold_up_decoding(loaded: LoadedModel) -> None:
    """With a cap of 64 rows a step, another request's 400-token prompt takes several steps, and each of them
    also carries a decode row of the first request."""
    one = desk("w8", loaded, LocalDirectory(), max_rows_per_step=64)
    seen: list[float] = []
    first = threading.Event()

    def note(*_: object) -> None:
        seen.append(time.monotonic())
        first.set()

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(
            one.agent.generate, request("a", SOLVE, max_new_tokens=40, publish=False, question=QUESTION), note
        )
        assert first.wait(60)
        before = len(seen)
        long = one.agent.generate(
            request("b", SOLVE, max_new_tokens=1, publish=False, question=" ".join([QUESTION] * 8))
        )
        during = len(seen) - before
        running.result(timeout=120)
    one.close()
    assert during >= min(38, long.prompt_tokens // 64 - 1)


def test_prepare_puts_the_fixed_prefix_into_the_cache(pair: tuple[Desk, Desk]) -> None:
    one, _ = pair
    system = "You are a patient teacher who explains each step in plain words and checks the result twice."
    prepared = one.agent.prepare(system, SOLVE)
    reply = one.agent.generate(
        request("s", SOLVE, "auto", system=system, max_new_tokens=2, question=QUESTION)
    )
    assert reply.prefix_tokens == prepared > 10


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"question": "word " * 9000}, PromptTooLong, "context"),
        ({"method": "magic"}, ConfigError, "Known methods"),
        ({"other": "x"}, PipelineError, "question"),
    ],
)
def test_bad_requests_are_refused_with_advice(
    pair: tuple[Desk, Desk], change: dict[str, str], error: type[Exception], words: str
) -> None:
    values = {"question": QUESTION} | change
    if "other" in values:
        del values["question"]
    with pytest.raises(error, match=words):
        pair[0].agent.generate(request("s", SOLVE, **values))


def test_a_span_that_is_faster_to_compute_is_not_pulled(loaded: LoadedModel) -> None:
    """A link measured as slow is left alone: no transfer, no lease, no fallback, full prefill's tokens."""
    directory = LocalDirectory()
    one, two = desk("w0", loaded, directory), desk("w1", loaded, directory)
    always = desk("w2", loaded, directory, break_even=False)
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=40, question=QUESTION))
    values = {"question": QUESTION, "solver": first.output}
    full = two.agent.generate(request("critic", CHECK, publish=False, **values))
    for each in (two, always):
        for size in (1_000_000, 2_000_000, 4_000_000):
            each.agent.speeds.observe_pull("node", "inprocess", size, 20.0 + size / 1e9, time.monotonic())
            each.agent.speeds.observe_rotate(size // 10_000, size / 1e9)
            each.agent.speeds.observe_prefill(size * 1e6, size / 1e6)
    reply = two.agent.generate(request("critic", CHECK, "naive", publish=False, **values))
    assert reply.token_ids == full.token_ids
    assert (reply.relayed_tokens, reply.transfers, reply.fallbacks) == (0, (), ())
    assert [(s.slot, s.relayed, s.actual_relay_s) for s in reply.skipped] == [
        ("question", False, None),
        ("solver", False, None),
    ]
    for cost in reply.skipped:
        assert cost.predicted_pull_s is not None
        assert cost.predicted_prefill_s is not None
        assert cost.predicted_pull_s > 20 > cost.predicted_prefill_s > 0
    relayed = always.agent.generate(request("critic", CHECK, "naive", publish=False, **values))
    assert relayed.relayed_tokens > 0
    assert not relayed.skipped
    again = replace(request("critic", CHECK, "naive", publish=False, **values))
    keys = frozenset(t.key for t in relayed.transfers)
    assert two.agent.generate(replace(again, only_keys=keys)).relayed_tokens == relayed.relayed_tokens
    for each in (one, two, always):
        assert each.agent.pool.free_blocks == each.agent.pool.num_blocks
        each.close()
    assert directory.stats()["leases"] == 0


def test_predicted_and_actual_cost_of_a_relay_are_in_the_reply(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=40, question=QUESTION))
    values = {"question": QUESTION, "solver": first.output}
    for size in (1_000_000, 2_000_000, 4_000_000):
        two.agent.speeds.observe_pull("node", "inprocess", size, size / 1e9, time.monotonic())
    replies = [
        two.agent.generate(request("critic", CHECK, "auto:fast", publish=False, max_new_tokens=1, **values))
        for _ in range(4)
    ]
    # The first ones teach the worker what it takes; the last one was predicted.
    assert all(c.predicted_relay_s is None for c in replies[0].span_costs)
    last = replies[-1]
    assert [c.slot for c in last.span_costs] == ["question", "solver"]
    for cost in last.span_costs:
        assert cost.relayed
        assert cost.predicted_relay_s is not None
        assert cost.predicted_prefill_s is not None
        assert cost.actual_relay_s is not None
        assert 0 < cost.predicted_relay_s < cost.predicted_prefill_s
        assert cost.actual_relay_s > 0
    assert last.flop_ratio_predicted == pytest.approx(last.flop_ratio, rel=0.1)
    assert last.flop_ratio is not None
    assert 0 < last.flop_ratio < 0.8
