"""Prefill ahead on real workers: what comes of it is full prefill's, however the drafts came."""

from __future__ import annotations

import itertools
import random
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.workers.rigs import QUESTION, Desk, desk, request
from transport.directory.local import LocalDirectory
from transport.errors import Cancelled
from workers.ahead_choice import FORGET_S, Pace
from workers.budget import RideAlong
from workers.messages import Draft, Reply, Request
from workers.model import LoadedModel
from workers.segment import SlotValue

pytestmark = pytest.mark.slow

CHECK = "Problem:\n{question}\nSolution:\n{solver}\nIs the solution right? Answer {style}."
ROOM = 200


@pytest.fixture(scope="module")
def answer(loaded: LoadedModel) -> tuple[int, ...]:
    """What an upstream agent has written."""
    text = "Every week five sheep come to the seventeen, so after six weeks there are forty-seven. " * 8
    return tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"][:120])


@pytest.fixture
def one(pair: tuple[Desk, Desk]) -> Desk:
    return pair[0]


def critic(answer: tuple[int, ...], method: str = "full_prefill", **more: object) -> Request:
    asked = request(
        "critic", CHECK, method, max_new_tokens=8, question=QUESTION, style="briefly", publish=False
    )
    return replace(asked, values={**asked.values, "solver": SlotValue(token_ids=answer)}, **more)  # type: ignore[arg-type]


def draft(asked: Request, so_far: int) -> Draft:
    """The request when so many tokens of the solution are known."""
    ids = asked.values["solver"].token_ids
    assert ids is not None
    values = {**asked.values, "solver": SlotValue(token_ids=ids[:so_far])}
    return Draft(request=replace(asked, values=values), open_slots=frozenset({"solver"}), room_tokens=ROOM)


def plain(one: Desk, asked: Request) -> Reply:
    """The same request without anything prepared."""
    return one.agent.generate(replace(asked, id=f"{asked.id}-plain"))


def test_what_was_prepared_is_used_and_exact(one: Desk, answer: tuple[int, ...]) -> None:
    asked = critic(answer)
    expected = plain(one, asked)
    ready = [one.agent.prepare_ahead(draft(asked, n)) for n in (0, 30, 31, 120)]
    prompt = one.agent.render(asked).token_ids
    assert ready[0] > 0
    assert [b - a for a, b in itertools.pairwise(ready)] == [30, 1, 89]
    rows = one.agent.stats()["rows"]
    reply = one.agent.generate(asked)
    assert reply.token_ids == expected.token_ids
    assert reply.prepared_tokens == ready[-1] == reply.prefix_tokens
    # The rest of the prompt and the answer's tokens but the last one: nothing is computed twice.
    assert one.agent.stats()["rows"] - rows == len(prompt) - ready[-1] + len(reply.token_ids) - 1
    stats = one.agent.stats()
    assert (stats["preparations"], stats["prepared_tokens_wasted"]) == (0, 0)
    assert stats["prepared_tokens_used"] == ready[-1]


def test_logits_are_those_of_full_prefill(one: Desk, answer: tuple[int, ...]) -> None:
    asked = critic(answer, shadow_tokens=4)
    for n in range(0, 121, 7):
        one.agent.prepare_ahead(draft(asked, n))
    reply = one.agent.generate(asked)
    assert reply.prepared_tokens > 100
    check = one.agent.shadow(asked, reply.token_ids, timeout_s=60)
    assert check.logits_max_diff < 1e-3
    assert check.kl_mean < 1e-6


@pytest.mark.parametrize(
    "method", ["auto", *(pytest.param(m, marks=pytest.mark.long) for m in ("relay_caching", "full_prefill"))]
)
def test_whatever_the_request_s_method_the_prepared_part_is_exact(
    one: Desk, answer: tuple[int, ...], method: str
) -> None:
    asked = critic(answer, method)
    one.agent.prepare_ahead(draft(asked, 120))
    assert one.agent.generate(asked).token_ids == plain(one, critic(answer)).token_ids


@pytest.mark.long
def test_drafts_in_any_order_with_contradictions(one: Desk, answer: tuple[int, ...]) -> None:
    """Lost, late, repeated and wrong ones: an upstream agent that was started again writes something else."""
    expected = plain(one, critic(answer)).token_ids
    chance = random.Random(5)
    for _ in range(4):
        asked = critic(answer)
        for _ in range(8):
            n, text = chance.randrange(121), answer
            if chance.random() < 0.3:
                cut = chance.randrange(1, 100)
                text = (*answer[:cut], *(chance.randrange(300, 4000) for _ in range(120 - cut)))
            one.agent.prepare_ahead(draft(critic(text, id=asked.id), n))
        assert one.agent.generate(asked).token_ids == expected
    assert one.agent.stats()["prepared_tokens_wasted"] > 0


def test_another_prompt_than_the_drafts_costs_only_what_was_prepared(
    one: Desk, answer: tuple[int, ...]
) -> None:
    asked = replace(critic(answer), system="You are a strict examiner.")
    expected = plain(one, asked).token_ids
    one.agent.prepare_ahead(draft(critic(answer, id=asked.id), 120))
    reply = one.agent.generate(asked)
    assert reply.token_ids == expected
    assert reply.prepared_tokens < 30
    longer = critic(answer * 4)
    one.agent.prepare_ahead(draft(critic(answer, id=longer.id), 120))
    assert one.agent.generate(longer).prepared_tokens == 0, "more than the room that was kept for it"


def test_no_request_waits_for_what_is_only_prepared(loaded: LoadedModel, answer: tuple[int, ...]) -> None:
    """Neither for memory nor for a slot."""
    one = desk("w5", loaded, LocalDirectory(), cache_tokens=1024, max_sequences=2)
    try:
        others = [critic(answer) for _ in range(4)]
        ready = [one.agent.prepare_ahead(draft(asked, 50)) for asked in others]
        assert ready[0] > 0
        assert ready[-1] == 0, "no more than fit, and nobody waited"
        assert one.agent.stats()["preparations_refused"] >= 1
        big = replace(critic(answer * 5), sampling=replace(others[0].sampling, max_new_tokens=2))
        begin = time.monotonic()
        one.agent.generate(big)
        assert time.monotonic() - begin < one.agent.settings.request_timeout_s / 4
        assert one.agent.stats()["preparations_dropped"] >= 1
        assert one.agent.generate(others[0]).token_ids == plain(one, critic(answer)).token_ids
        for asked in others:
            one.agent.cancel(asked.id)
        assert one.agent.stats()["preparations"] == 0
        assert one.agent.pool.free_blocks == one.agent.pool.num_blocks
    finally:
        one.close()


def test_a_cancelled_request_s_preparation_is_given_back(one: Desk, answer: tuple[int, ...]) -> None:
    asked = critic(answer)
    one.agent.prepare_ahead(draft(asked, 60))
    assert one.agent.cancel(asked.id)
    assert one.agent.pool.free_blocks == one.agent.pool.num_blocks
    assert one.agent.prepare_ahead(draft(asked, 120)) == 0, "a draft that comes late prepares nothing"
    with pytest.raises(Cancelled):
        one.agent.generate(asked)


@pytest.mark.long
def test_a_request_that_comes_in_the_middle_takes_what_is_there(one: Desk, answer: tuple[int, ...]) -> None:
    expected = plain(one, critic(answer)).token_ids
    for wait_s in (0.0, 0.05, 0.2):
        asked = critic(answer)
        thread = threading.Thread(target=one.agent.prepare_ahead, args=[draft(asked, 120)])
        thread.start()
        time.sleep(wait_s)  # anywhere: every one of them must come out the same
        assert one.agent.generate(asked).token_ids == expected
        thread.join(60)
        assert not thread.is_alive()
    assert one.agent.stats()["preparations"] == 0


def beside(one: Desk, asked: Request, other: Request) -> list[tuple[int, int]]:
    """(decode rows, rows that rode along) of every step while `other` is answered and `asked` prepared."""
    seen: list[tuple[int, int]] = []
    busy = threading.Event()

    def prepare() -> None:
        busy.wait(60)
        one.agent.prepare_ahead(draft(asked, 120))

    thread = threading.Thread(target=prepare)
    thread.start()
    step = one.agent.engine.step

    def watched(parts: list, *more: Any) -> list:  # type: ignore[type-arg]
        decoding = [p for p in parts if p.logits_rows and len(p.positions) == 1]
        if decoding and len(parts) <= 2:
            seen.append((1, sum(len(p.positions) for p in parts if p is not decoding[0])))
        return step(parts, *more)

    one.agent.engine.step = watched  # type: ignore[method-assign]
    with torch.inference_mode():
        one.agent.generate(other, on_token=lambda _: busy.set())
    thread.join(60)
    assert not thread.is_alive()
    return seen


def test_with_no_share_prepared_rows_stand_back_behind_others(
    one: Desk, answer: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody decodes nothing is prepared; the request is answered all the same."""
    monkeypatch.setattr(one.agent._loop, "_ride", RideAlong(0.0, 128))
    asked = critic(answer)
    assert not any(rode for _, rode in beside(one, asked, critic(answer[:40])))
    assert one.agent.generate(asked).prepared_tokens > 100


def test_with_a_share_some_of_them_ride_along(one: Desk, answer: tuple[int, ...]) -> None:
    expected = plain(one, critic(answer)).token_ids
    asked = critic(answer)
    other = critic(answer[:40])
    rode = [extra for _, extra in beside(one, asked, other)]
    assert sum(rode) > 0, "nothing rode along"
    assert 0 in rode, "no step has shown what one takes alone"
    reply = one.agent.generate(asked)
    assert reply.token_ids == expected
    assert reply.prepared_tokens > 100


def test_a_worker_without_time_leaves_the_rest_to_the_relay(one: Desk, answer: tuple[int, ...]) -> None:
    """And says so. Where nothing can be relayed all of it is computed ahead, however long that takes."""
    preparing = one.agent._preparing
    for method, grows in (("auto", False), ("exact_prefix", True)):
        asked = critic(answer, method)
        ready = [one.agent.prepare_ahead(replace(draft(asked, 40), room_tokens=120))]
        preparing._pace.took(1000, 1e6, time.monotonic() + 1e4)  # in what follows it is known to be slow
        ready.append(one.agent.prepare_ahead(replace(draft(asked, 80), room_tokens=80)))
        preparing._pace = Pace()
        assert (ready[1] > ready[0]) is grows
        reply = one.agent.generate(asked)
        assert reply.prepared_tokens == ready[1]
        assert reply.ahead.startswith("exact: the request" if grows else "relay: this worker has no time")
    assert one.agent.generate(critic(answer)).ahead == ""


def test_a_rate_is_forgotten_so_that_a_worker_can_recover() -> None:
    pace = Pace()
    pace.took(64, 2.0, now=100.0)
    assert pace.rate(100.5) == 32
    pace.took(2, 2.0, now=101.0)
    assert pace.rate(101.5) == 32, "a few tokens tell no rate"
    assert pace.rate(100.0 + FORGET_S + 1) is None
