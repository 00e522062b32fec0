"""Healing ends in full prefill's cache: logits, keys, values, checkpoints and masses, on every family."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.workers import tiny
from tests.workers.rigs import QUESTION, Desk, request
from transport.errors import RelayError
from workers.attention import MassSpan
from workers.budget import Urgency
from workers.choosing import choose
from workers.compare import kl_divergence
from workers.engine import Part
from workers.heal import Heal, chunk_rows, first_stale
from workers.kv_cache import SequenceCache
from workers.methods import parse_method
from workers.methods.base import HealMode, RectifyPlan, Span, SpanPlan
from workers.prefill import Prefill
from workers.sampling import Sampler
from workers.scheduler import FinishedEvent, Sequence, StepLoop, TokenEvent, decoded_mass
from workers.segment import digest_tokens
from workers.settings import SamplingSettings

TOLERANCE = 1e-4
ANSWER = tiny.tokens(40, 99)
Piece = tuple[list[int], Any]


@pytest.fixture
def loops(one_thread: None) -> Iterator[list[StepLoop]]:
    started: list[StepLoop] = []
    yield started
    for loop in started:
        loop.stop()
    assert not [t for t in threading.enumerate() if t.name == "step-loop" and t.is_alive()]


def _composite(rig: tiny.Rig) -> list[Piece]:
    """Two relayed spans away from their own positions, one of them twice, fresh text between and around."""
    a, b = tiny.tokens(40, 1), tiny.tokens(23, 2)
    sa, sb = rig.segment(tiny.tokens(11, 3), a), rig.segment(tiny.tokens(30, 4), b)
    own = tiny.tokens(20, 8)
    return [
        (tiny.tokens(17, 5), None),
        (a, sa),
        (b, sb),
        (own, None),
        (a, sa),
        (tiny.tokens(12, 7), None),
    ]


def _sequence(
    rig: tiny.Rig, pieces: list[Piece], method: str = "naive", *, heal: dict[str, Any] | None, **changes: Any
) -> Sequence:
    """A relayed request as the agent would submit it; its fourth piece would be published from here."""
    ids, spans, hits, pulled = [], [], {}, {}
    for piece_ids, source in pieces:
        key = None if source is None else source[0].segment.key
        spans.append(Span(len(ids), len(ids) + len(piece_ids), "s" if source else None, key))
        ids.extend(piece_ids)
        if source is not None:
            hits[key], pulled[key] = source
    plan = parse_method(method).plan(spans, hits, rig.profile())
    cache = rig.pool.allocate(len(ids) + 64, timeout_s=5)
    published = (MassSpan(80, 100),)
    prefill = Prefill(plan, ids, cache, rig.shape, masses=published)
    prefill.load({i: pulled[s.source.segment.key] for i, s in enumerate(plan.spans) if s.source is not None})
    values: dict[str, Any] = {
        "prefill": prefill,
        "sampler": None,
        "max_new_tokens": 0,
        "stop_ids": frozenset(),
        "deadline": time.monotonic() + 60,
        "forced": tuple(ANSWER),
    }
    if heal is not None:
        options: dict[str, Any] = {"mode": HealMode.ALWAYS, "rows": 16, **heal}
        values["heal"] = Heal(
            cache,
            ids,
            first_stale(plan, ids),
            num_layers=rig.num_layers,
            checkpoint_layer=rig.checkpoint_layer,
            masses=(*published, decoded_mass(prefill)),
            **options,
        )
    return Sequence(**{**values, **changes})


def _loop(rig: tiny.Rig, loops: list[StepLoop], max_rows: int = 1 << 20) -> StepLoop:
    rig.model.set_attn_implementation("relay_cluster")
    loops.append(StepLoop(rig.engine, max_rows=max_rows, checkpoint_layer=rig.checkpoint_layer))
    return loops[-1]


def _wait(sequence: Sequence) -> list[Any]:
    events: list[Any] = []
    while not events or isinstance(events[-1], TokenEvent):
        events.append(sequence.events.get(timeout=60))
    assert isinstance(events[-1], FinishedEvent), events[-1]
    return events


def _ids(pieces: list[Piece]) -> list[int]:
    return [i for piece, _ in pieces for i in piece]


def _full_cache(rig: tiny.Rig, ids: list[int], prompt_tokens: int) -> SequenceCache:
    """Dense prefill of everything, recording what a publisher records."""
    rig.model.set_attn_implementation("relay_cluster")
    cache = rig.pool.allocate(len(ids), timeout_s=5)
    part = Part(
        cache=cache,
        positions=torch.arange(len(ids)),
        token_ids=torch.tensor(ids),
        checkpoint_layer=rig.checkpoint_layer,
        masses=(MassSpan(80, 100), MassSpan(prompt_tokens, 1 << 60)),
    )
    rig.engine.step([part])
    return cache


def _assert_exact(rig: tiny.Rig, cache: SequenceCache, ids: list[int], prompt_tokens: int) -> None:
    full, n = _full_cache(rig, ids, prompt_tokens), len(ids)
    assert (cache.kv[:, :, :, :n] - full.kv[:, :, :, :n]).abs().max() < TOLERANCE
    assert (cache.checkpoint[17:n] - full.checkpoint[17:n]).abs().max() < TOLERANCE
    assert (cache.mass[:n] - full.mass[:n]).abs().max() < TOLERANCE
    assert full.mass[80:100].max() > 0, "there is a mass to compare"
    assert full.mass[prompt_tokens:n].max() > 0
    rig.pool.free(full)


@pytest.mark.parametrize("rows", [7, 16, 64])
def test_healed_logits_and_cache_are_full_prefills(family: str, rows: int, loops: list[StepLoop]) -> None:
    rig = tiny.Rig(tiny.build(family))
    pieces = _composite(rig)
    ids = _ids(pieces)
    sequence = _sequence(rig, pieces, heal={"rows": rows})
    relayed = sequence.prefill.cache.kv[:, :, :, 17:80].clone()
    _loop(rig, loops).submit(sequence)
    _wait(sequence)
    heal = sequence.heal
    assert heal is not None
    at = heal.finished_at
    assert at is not None
    # Every decode step adds one stale entry to the 135 that the prompt has behind its first 17 tokens.
    assert at == -(-(len(ids) - 17 - 1) // (rows - 1))
    assert heal.entries == (len(ids) - 17 + at - 1) * rig.num_layers
    expected = tiny.reference_logits(rig.model, ids + ANSWER)[len(ids) - 1 :]
    gap = (sequence.scored - expected).abs().amax(-1)
    assert gap[at:].max() < TOLERANCE
    change = (sequence.prefill.cache.kv[:, :, :, 17:80] - relayed).abs().max()
    assert change > 1e-2, "before it was healed the difference shows: the test can fail"
    if family != "mistral":  # its window of 9 hardly reaches back over the fresh tokens
        assert gap[:at].max() > 1e-2
    _assert_exact(rig, sequence.prefill.cache, ids + ANSWER, len(ids))


@pytest.mark.parametrize(
    "method", ["context_mass:ratio=0.3", "relay_caching", f"context_mass:ratio=1+start=0+end={tiny.LAYERS}"]
)
def test_any_method_heals(method: str, loops: list[StepLoop]) -> None:
    rig = tiny.Rig(tiny.build("gemma3"))
    pieces = _composite(rig)
    ids = _ids(pieces)
    sequence = _sequence(rig, pieces, method, heal={})
    _loop(rig, loops, max_rows=50).submit(sequence)
    _wait(sequence)
    at = sequence.heal.finished_at if sequence.heal else None
    assert at is not None
    expected = tiny.reference_logits(rig.model, ids + ANSWER)[len(ids) - 1 :]
    assert (sequence.scored - expected)[at:].abs().max() < TOLERANCE
    _assert_exact(rig, sequence.prefill.cache, ids + ANSWER, len(ids))


def test_healing_does_not_change_logits_before_it_is_done_with_the_first(loops: list[StepLoop]) -> None:
    """The first token is the relay's own: healing starts behind it."""
    rig = tiny.Rig(tiny.build("llama"))
    pieces = _composite(rig)
    plain, healed = _sequence(rig, pieces, heal=None), _sequence(rig, pieces, heal={})
    loop = _loop(rig, loops)
    for sequence in (plain, healed):
        loop.submit(sequence)
        _wait(sequence)
    assert torch.equal(plain.scored[0], healed.scored[0])
    assert not torch.equal(plain.scored[1], healed.scored[1])


def test_heals_while_others_decode_and_prefill(loops: list[StepLoop]) -> None:
    rig = tiny.Rig(tiny.build("qwen3"))
    rig.model.set_attn_implementation("relay_cluster")
    pieces = _composite(rig)
    ids = _ids(pieces)
    loop = _loop(rig, loops, max_rows=48)
    others = [_plain(rig, tiny.tokens(30 + 20 * i, 50 + i)) for i in range(3)]
    alone = [_plain(rig, tiny.tokens(30 + 20 * i, 50 + i)) for i in range(3)]
    healing = [_sequence(rig, pieces, heal={}) for _ in range(2)]
    loop.call(lambda: [loop.submit(s) for s in (*others, *healing)])
    for sequence in (*others, *healing):
        _wait(sequence)
    for sequence in alone:
        loop.submit(sequence)
        _wait(sequence)
    assert [s.tokens for s in others] == [s.tokens for s in alone]
    expected = tiny.reference_logits(rig.model, ids + ANSWER)[len(ids) - 1 :]
    for sequence in healing:
        at = sequence.heal.finished_at if sequence.heal else None
        assert at is not None
        assert (sequence.scored - expected)[at:].abs().max() < TOLERANCE
        _assert_exact(rig, sequence.prefill.cache, ids + ANSWER, len(ids))


class _BreaksOnce:
    """A decoder layer in front of which every step of several parts breaks once."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.broken = 0

    def forward(self, hidden: torch.Tensor, rotary: Any, attend: Any) -> torch.Tensor:
        if len(attend.parts) + len(attend.singles) > 1:
            self.broken += 1
            raise MemoryError
        return self._layer.forward(hidden, rotary, attend)


@pytest.mark.parametrize("method", ["naive", "context_mass:ratio=0.5+first=2+probes=0.2+drift=1"])
@pytest.mark.parametrize("heal", [None, {"rows": 16}])
def test_a_step_that_breaks_and_is_run_again_leaves_what_one_run_leaves(
    method: str, heal: dict[str, Any] | None, loops: list[StepLoop]
) -> None:
    """Layers before the one that breaks are computed twice: entries, drift, checkpoints and masses."""
    rig = tiny.Rig(tiny.build("llama"))
    pieces = _composite(rig)
    ids = _ids(pieces)
    alone, disturbed = (_sequence(rig, pieces, method, heal=heal) for _ in range(2))
    loop = _loop(rig, loops, max_rows=60)
    loop.submit(alone)
    _wait(alone)
    breaks = rig.engine._layers[4] = _BreaksOnce(rig.engine._layers[4])
    neighbour = _plain(rig, tiny.tokens(30), tokens=60)
    loop.call(lambda: (loop.submit(neighbour), loop.submit(disturbed)))
    _wait(disturbed)
    assert breaks.broken >= 3
    assert (disturbed.scored - alone.scored).abs().max() < TOLERANCE
    expected, got, n = alone.prefill.cache, disturbed.prefill.cache, len(ids) + len(ANSWER)
    assert (got.kv[:, :, :, :n] - expected.kv[:, :, :, :n]).abs().max() < TOLERANCE
    assert (got.checkpoint[140:n] - expected.checkpoint[140:n]).abs().max() < TOLERANCE
    assert (got.mass[:n] - expected.mass[:n]).abs().max() < TOLERANCE
    assert expected.mass[80:100].max() > 0, "there is a mass to compare"
    if heal is not None:
        _assert_exact(rig, got, ids + ANSWER, len(ids))


def _plain(rig: tiny.Rig, ids: list[int], tokens: int = 30) -> Sequence:
    plan = parse_method("full_prefill").plan([Span(0, len(ids))], {}, rig.profile())
    prefill = Prefill(plan, ids, rig.pool.allocate(len(ids) + tokens, timeout_s=1), rig.shape)
    prefill.load({})
    return Sequence(
        prefill,
        Sampler(SamplingSettings()),
        max_new_tokens=tokens,
        stop_ids=frozenset(),
        deadline=time.monotonic() + 60,
    )


def _answering(rig: tiny.Rig, pieces: list[Piece], tokens: int, **heal: Any) -> Sequence:
    return _sequence(
        rig,
        pieces,
        heal=heal,
        sampler=Sampler(SamplingSettings()),
        max_new_tokens=tokens,
        forced=(),
    )


def test_decoded_tokens_are_drawn_from_exact_logits_once_healed(loops: list[StepLoop]) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = _composite(rig)
    ids = _ids(pieces)
    sequence = _answering(rig, pieces, 40, rows=30)
    _loop(rig, loops).submit(sequence)
    _wait(sequence)
    at = sequence.heal.finished_at if sequence.heal else None
    assert at is not None
    assert 0 < at < 10
    expected = tiny.reference_logits(rig.model, ids + sequence.tokens)[len(ids) - 1 :]
    assert sequence.tokens[at:] == expected.argmax(-1).tolist()[at:40]
    # The last token is drawn but never fed.
    _assert_exact(rig, sequence.prefill.cache, ids + sequence.tokens[:-1], len(ids))


@pytest.mark.parametrize("finish_rows", [0, 10, 1000])
def test_a_short_answer_is_healed_behind_its_end_if_little_is_left(
    finish_rows: int, loops: list[StepLoop]
) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = _composite(rig)
    ids = _ids(pieces)
    sequence = _answering(rig, pieces, 4, rows=16, finish_rows=finish_rows)
    _loop(rig, loops).submit(sequence)
    events = _wait(sequence)
    assert len(events) == 5
    assert events[-1] == FinishedEvent("length")
    heal = sequence.heal
    assert heal is not None
    if finish_rows < 1000:
        assert heal.finished_at is None
        assert sequence.stale == len(ids) + 3 - 17 - 3 * 16
        return
    assert heal.finished_at == 4
    _assert_exact(rig, sequence.prefill.cache, ids + sequence.tokens[:3], len(ids))


def test_a_deadline_during_the_last_healing_does_not_cost_the_answer(loops: list[StepLoop]) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    sequence = _answering(rig, _composite(rig), 2, rows=2, finish_rows=1000)
    loop = _loop(rig, loops, max_rows=16)
    loop.submit(sequence)
    until = time.monotonic() + 30
    while not sequence.ending:
        assert time.monotonic() < until, "the answer did not end"
        time.sleep(0.001)
    sequence.deadline = 0.0
    assert _wait(sequence)[-1] == FinishedEvent("length")
    assert len(sequence.tokens) == 2


def test_decode_comes_first_then_healing_then_prefill() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    rig.model.set_attn_implementation("relay_cluster")
    pieces = _composite(rig)
    always = _answering(rig, pieces, 9, rows=64)
    idle = _answering(rig, pieces, 9, rows=64, mode=HealMode.IDLE)
    for sequence in (always, idle):
        sequence.prefill.logits = torch.zeros(tiny.VOCAB)
        sequence.tokens = [5]
    waiting = _plain(rig, tiny.tokens(200))
    assert choose([waiting, always], 1000) == [(always, 1, 64), (waiting, 200, 0)]
    assert choose([waiting, always], 101) == [(always, 1, 50), (waiting, 50, 0)]
    assert choose([waiting, always, idle], 1000) == [(always, 1, 64), (idle, 1, 0), (waiting, 200, 0)]
    assert choose([always, idle], 1000) == [(always, 1, 64), (idle, 1, 64)]
    assert choose([always, idle], 50) == [(always, 1, 48), (idle, 1, 0)]
    assert choose([waiting, idle], 1000) == [(idle, 1, 0), (waiting, 200, 0)]
    # What was asked for in idle room only does not hold others up beyond what they may be.
    assert choose([always, idle], 1000, ride=5) == [(always, 1, 64), (idle, 1, 5)]
    assert choose([always, idle], 1000, ride=0) == [(always, 1, 64), (idle, 1, 0)]
    assert choose([idle], 1000, ride=0) == [(idle, 1, 64)], "there are no others"
    # However little room there is, every decode row is there.
    assert choose([always, idle, waiting], 1) == [(always, 1, 0), (idle, 1, 0), (waiting, 16, 0)]
    # Nobody waits for the rest of an answer that is out: it takes the room there is.
    always.ending = "stop"
    assert choose([always], 100) == [(always, 0, 100)]
    assert choose([always, idle], 100) == [(always, 0, 64), (idle, 1, 35)]


def test_background_sequences_only_run_when_nobody_else_does() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    rig.model.set_attn_implementation("relay_cluster")
    shadow, other = _plain(rig, tiny.tokens(60)), _plain(rig, tiny.tokens(10))
    shadow.urgency = Urgency.IDLE
    assert choose([shadow, other], 100) == [(other, 10, 0)]
    assert choose([shadow], 100) == [(shadow, 60, 0)]


def test_what_was_made_under_the_same_context_at_the_same_place_is_not_stale() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    before, text, after = tiny.tokens(20, 1), tiny.tokens(30, 2), tiny.tokens(8, 3)
    located, _ = rig.segment(before, text)
    ids = before + text + after

    def plan(variant: str, start: int = 20) -> RectifyPlan:
        segment = replace(located.segment, variant=variant, start=start)
        spans = Span(0, 20), Span(20, 50, "s", segment.key), Span(50, 58)
        source = replace(located, segment=segment)
        return RectifyPlan((SpanPlan(spans[0]), SpanPlan(spans[1], source), SpanPlan(spans[2])))

    own = digest_tokens(before).hex()
    assert first_stale(plan(own), ids) is None
    assert first_stale(plan(f"{own}~naive"), ids) == 20
    assert first_stale(plan(own, start=21), ids) == 20
    assert first_stale(plan(digest_tokens(before[1:]).hex()), ids) == 20
    heal = Heal(rig.pool.allocate(64, timeout_s=1), ids, None, mode=HealMode.ALWAYS, rows=8, num_layers=6)
    assert (heal.stale(3), heal.finished_at) == (0, 0)


@pytest.mark.parametrize("within", [1, 5, 24])
@pytest.mark.parametrize("stale", [1, 23, 24, 25, 700, 2048])
def test_healing_ends_within_the_steps_asked_for(stale: int, within: int) -> None:
    rows, left, steps = chunk_rows(2, within, stale), stale, 0
    while left > 0:
        left -= rows
        steps += 1
        left += left > 0
    assert steps <= within
    assert chunk_rows(4096, within, stale) == 4096
    assert chunk_rows(7, 0, stale) == 7, "no number of steps: any will do"


# -- the real model ------------------------------------------------------------------------------------------

SOLVE = "Solve this problem.\n{question}"
CHECK = "Solution:\n{solver}\nProblem:\n{question}\nIs the solution right?"


@pytest.mark.long
@pytest.mark.slow
def test_the_real_model_answers_and_publishes_as_if_nothing_had_been_relayed(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=70, question=QUESTION))
    healing = request(
        "critic", CHECK, "naive:heal=always", max_new_tokens=40, question=QUESTION, solver=first.output
    )
    full = replace(healing, id="full", method="full_prefill", publish=False)
    forced = one.agent.generate(full).token_ids
    healed = two.agent.score(replace(healing, publish=False), forced)
    expected = two.agent.score(full, forced)
    plain = two.agent.score(replace(healing, method="naive", publish=False), forced)
    at = healed.healed_at_token
    assert at is not None
    assert at < 6
    assert (healed.logits - expected.logits)[at:].abs().max() < 1e-3
    assert float(kl_divergence(expected.logits, healed.logits)[at:].max()) < 1e-6
    assert float(kl_divergence(expected.logits, plain.logits)[at:].max()) > 1e-4
    assert (plain.healed_at_token, expected.healed_at_token) == (None, None)

    reply = two.agent.generate(healing)
    assert reply.healed_at_token == at
    assert reply.healed_entries > reply.relayed_entries
    assert two.agent.stats()["healed_entries"] >= reply.healed_entries
    (answer,) = (s for s in two.agent.store.segments() if s.start == reply.prompt_tokens)
    assert "~" not in answer.variant, "its KV is exact: it is published as such"


@pytest.mark.slow
def test_strict_heals_within_its_steps_and_a_short_answer_behind_its_end(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=70, question=QUESTION))
    # Chunks of two rows would take ten times as long: the number of steps makes them larger.
    asked = request(
        "critic", CHECK, "auto:strict+heal_rows=2", max_new_tokens=30, question=QUESTION, solver=first.output
    )
    reply = two.agent.generate(asked)
    assert reply.healed_at_token is not None
    assert reply.healed_at_token <= 24
    again = two.agent.generate(replace(asked, id="again", method=reply.resolved_method))
    assert (again.healed_at_token, again.healed_entries) == (reply.healed_at_token, reply.healed_entries)
    short = replace(
        asked,
        id="short",
        method="naive:heal=always+heal_rows=2",
        sampling=SamplingSettings(max_new_tokens=20),
    )
    reply = two.agent.generate(short)
    assert reply.healed_at_token == len(reply.token_ids)


@pytest.mark.slow
def test_a_shadow_run_judges_the_first_tokens_and_the_values(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    first = one.agent.generate(request("solver", SOLVE, "auto", max_new_tokens=70, question=QUESTION))
    asked = replace(
        request("critic", CHECK, "naive", max_new_tokens=16, question=QUESTION, solver=first.output),
        shadow_tokens=8,
    )
    reply = two.agent.generate(asked)
    assert two.agent.stats()["evidence_bytes"] > 0
    check = two.agent.shadow(asked, reply.token_ids, timeout_s=60)
    assert two.agent.stats()["evidence_bytes"] == 0
    assert (check.method, check.tokens) == ("naive", 8)
    assert 1e-5 < check.kl_mean < 1
    assert [layer for layer, _ in check.value_errors] == [two.agent.profile.detection_layer, 29]
    assert all(1e-4 < error < 0.5 for _, error in check.value_errors)
    with pytest.raises(RelayError, match="nothing is kept"):
        two.agent.shadow(asked, reply.token_ids, timeout_s=60)

    # What is computed in full agrees with itself; a probe then judges what might be relayed instead.
    full = replace(asked, id="full", method="full_prefill", publish_inputs=False)
    reply = two.agent.generate(full)
    probed = two.agent.shadow(full, reply.token_ids, timeout_s=60, probe="naive")
    assert probed.method == "naive"
    assert 1e-5 < probed.kl_mean < 1
    full = replace(full, id="again")
    check = two.agent.shadow(full, two.agent.generate(full).token_ids, timeout_s=60)
    assert check.kl_mean < 1e-6
    assert check.top1 == 1
    late = replace(asked, id="late")
    reply = two.agent.generate(late)
    with pytest.raises(RelayError):
        two.agent.shadow(late, reply.token_ids, timeout_s=0.01)
