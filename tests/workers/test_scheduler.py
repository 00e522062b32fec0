"""Who gets rows in the next step, and that one request's trouble stays its own."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.workers import tiny
from transport.errors import DeadlineExceeded, RelayError
from workers.budget import Urgency
from workers.choosing import choose
from workers.methods import parse_method
from workers.methods.base import Span
from workers.prefill import Prefill
from workers.sampling import Sampler
from workers.scheduler import FailedEvent, FinishedEvent, Sequence, StepLoop, TokenEvent
from workers.settings import SamplingSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rig() -> tiny.Rig:
    rig = tiny.Rig(tiny.build("llama"))
    rig.model.set_attn_implementation("relay_cluster")
    return rig


@pytest.fixture
def loop(rig: tiny.Rig) -> Iterator[StepLoop]:
    loop = StepLoop(rig.engine, max_rows=32, checkpoint_layer=rig.checkpoint_layer)
    yield loop
    loop.stop()
    assert not [t for t in threading.enumerate() if t.name == "step-loop" and t.is_alive()]


def _sequence(rig: tiny.Rig, ids: list[int], **changes: Any) -> Sequence:
    plan = parse_method("full_prefill").plan([Span(0, len(ids))], {}, rig.profile())
    prefill = Prefill(plan, ids, rig.pool.allocate(len(ids) + 16, timeout_s=1), rig.shape)
    prefill.load({})
    values: dict[str, Any] = {
        "prefill": prefill,
        "sampler": Sampler(SamplingSettings()),
        "max_new_tokens": 5,
        "stop_ids": frozenset(),
        "deadline": time.monotonic() + 30,
    }
    return Sequence(**{**values, **changes})


def _events(sequence: Sequence) -> list[Any]:
    events: list[Any] = []
    while not events or isinstance(events[-1], TokenEvent):
        events.append(sequence.events.get(timeout=30))
    return events


def test_decode_rows_come_first_and_prefill_fills_the_rest_in_order(rig: tiny.Rig) -> None:
    first, second = _sequence(rig, tiny.tokens(50)), _sequence(rig, tiny.tokens(50, 1))
    decoding = _sequence(rig, tiny.tokens(4))
    decoding.prefill.logits, decoding.tokens = torch.zeros(tiny.VOCAB), [5]
    assert choose([first, second, decoding], 60) == [(decoding, 1, 0), (first, 50, 0), (second, 9, 0)]
    assert choose([first, second, decoding], 20) == [(decoding, 1, 0), (first, 19, 0)]
    # However many sequences decode, prefill goes on.
    assert choose([first, decoding], 1) == [(decoding, 1, 0), (first, 16, 0)]


def test_a_sequence_ends_at_its_limit_or_at_a_stop_token(rig: tiny.Rig, loop: StepLoop) -> None:
    sequence = _sequence(rig, tiny.tokens(40))
    loop.submit(sequence)
    events = _events(sequence)
    assert events[-1] == FinishedEvent("length")
    assert [e.first for e in events[:-1]] == [True, False, False, False, False]
    again = _sequence(rig, tiny.tokens(40), stop_ids=frozenset([sequence.tokens[2]]))
    loop.submit(again)
    assert _events(again)[-1] == FinishedEvent("stop")
    assert again.tokens == sequence.tokens[: len(again.tokens)]


def test_a_request_that_breaks_the_step_does_not_end_its_neighbours(rig: tiny.Rig, loop: StepLoop) -> None:
    alone = _sequence(rig, tiny.tokens(40))
    loop.submit(alone)
    _events(alone)
    good, bad = _sequence(rig, tiny.tokens(40)), _sequence(rig, [5, tiny.VOCAB + 7, 5])
    loop.call(lambda: (loop.submit(good), loop.submit(bad)))
    broken = _events(bad)[-1]
    assert isinstance(broken, FailedEvent)
    assert isinstance(broken.error, IndexError)
    assert _events(good)[-1] == FinishedEvent("length")
    assert good.tokens == alone.tokens


def test_a_deadline_that_has_passed_ends_the_sequence(rig: tiny.Rig, loop: StepLoop) -> None:
    late = _sequence(rig, tiny.tokens(10), deadline=time.monotonic() - 1)
    loop.submit(late)
    event = _events(late)[-1]
    assert isinstance(event, FailedEvent)
    assert isinstance(event.error, DeadlineExceeded)


def test_jobs_run_on_the_engine_thread_and_bring_their_errors_back(loop: StepLoop) -> None:
    assert loop.call(lambda: threading.current_thread().name) == "step-loop"
    assert loop.call(lambda: loop.call(lambda: 3)) == 3, "a job may call again without a deadlock"
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 / 0)


def test_a_job_that_is_running_is_waited_for(loop: StepLoop) -> None:
    """Whatever it writes to must not be freed before it ends, so the time-out does not abandon it."""
    entered = threading.Event()

    def slow() -> str:
        entered.set()
        time.sleep(0.3)
        return "done"

    assert loop.call(slow, timeout_s=0.05) == "done"
    assert entered.is_set()


def test_after_stop_nothing_is_taken(rig: tiny.Rig, loop: StepLoop) -> None:
    loop.stop()
    with pytest.raises(RelayError, match="shutting down"):
        loop.submit(_sequence(rig, tiny.tokens(4)))
    with pytest.raises(RelayError, match="shutting down"):
        loop.call(lambda: 1)


def test_prefill_ahead_rides_along_within_its_room(rig: tiny.Rig) -> None:
    now = _sequence(rig, tiny.tokens(9))
    now.prefill.logits, now.tokens = torch.zeros(tiny.VOCAB), [5]  # it decodes
    waiting = _sequence(rig, tiny.tokens(30))
    one, two = (_sequence(rig, tiny.tokens(60, n), urgency=Urgency.AHEAD) for n in (1, 2))
    idle = _sequence(rig, tiny.tokens(20), urgency=Urgency.IDLE)
    assert choose([now, one, two], 100) == [(now, 1, 0)], "without a room of its own it waits"
    assert choose([now, one, two], 100, ride=5) == [(now, 1, 0), (one, 5, 0)]
    assert choose([now, two, one], 100, ride=70) == [(now, 1, 0), (two, 60, 0), (one, 10, 0)]
    assert choose([now, one], 30, ride=70) == [(now, 1, 0), (one, 29, 0)], "nor beyond the cap of a step"
    assert choose([now, waiting, one], 100, ride=70) == [(now, 1, 0), (waiting, 30, 0)]
    assert choose([one, two, idle], 100) == [(one, 60, 0), (two, 40, 0)]
    assert choose([now, idle], 100, ride=70) == [(now, 1, 0)]
    assert choose([idle], 100) == [(idle, 20, 0)]


def _at_half_time(rig: tiny.Rig, happen: Callable[[], object]) -> list[int]:
    """Let something happen once, half-way through the first step of prefill ahead; rows of all its steps."""
    steps: list[int] = []
    step, once = rig.engine.step, [happen]

    def watched(parts: Any, give_up: Any = None) -> Any:
        if give_up is None:
            return step(parts)
        steps.append(sum(part.rows for part in parts))

        def asked(done: float) -> bool:
            if done >= 0.5 and once:
                once.pop()()
            return give_up(done)

        return step(parts, asked)

    rig.engine.step = watched  # type: ignore[method-assign]
    return steps


def _exact(rig: tiny.Rig, ids: list[int]) -> torch.Tensor:
    """Keys and values of a plain prefill: [layers, 2, heads, tokens, dim]."""
    loop = StepLoop(rig.engine, max_rows=64, checkpoint_layer=rig.checkpoint_layer)
    sequence = _sequence(rig, ids, max_new_tokens=1)
    loop.submit(sequence)
    _events(sequence)
    loop.stop()
    return sequence.prefill.cache.kv[:, :, :, : len(ids)].clone()


def test_a_step_of_prefill_ahead_is_given_up_for_a_request(rig: tiny.Rig, loop: StepLoop) -> None:
    ids = tiny.tokens(40)
    expected = _exact(rig, ids)
    ahead, request = _sequence(rig, ids, urgency=Urgency.AHEAD), _sequence(rig, tiny.tokens(9, 3))
    steps = _at_half_time(rig, lambda: loop.submit(request))
    loop.submit(ahead)
    assert len(_events(request)) == 6
    assert _events(ahead) == [FinishedEvent("prepared")]
    assert loop.steps_given_up == 1
    assert sum(steps) > 40, "what was given up is computed again"
    torch.testing.assert_close(ahead.prefill.cache.kv[:, :, :, :40], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "given_up"), [(8, 1), (32, 0)])
def test_its_own_request_waits_for_a_step_that_would_take_longer_to_repeat(
    rig: tiny.Rig, loop: StepLoop, rows: int, given_up: int
) -> None:
    """Half of a step of 8 rows is more than to compute them with the request's own; of 32 it is not."""
    ahead = _sequence(rig, tiny.tokens(rows), urgency=Urgency.AHEAD)
    _at_half_time(rig, ahead.cancelled.set)
    loop.submit(ahead)
    (event,) = _events(ahead)
    assert isinstance(event, FailedEvent if given_up else FinishedEvent)
    assert loop.steps_given_up == given_up


@pytest.mark.parametrize(("polite", "given_up"), [(True, 0), (False, 1)])
def test_prefill_ahead_is_given_up_for_a_request_s_work_on_the_engine(
    rig: tiny.Rig, loop: StepLoop, polite: bool, given_up: int
) -> None:
    done: list[int] = []
    ahead = _sequence(rig, tiny.tokens(30), urgency=Urgency.AHEAD)

    def ask() -> None:
        work = functools.partial(done.append, loop.steps_given_up)
        threading.Thread(target=loop.call, args=[work], kwargs={"polite": polite}).start()
        deadline = time.monotonic() + 30
        while not loop._jobs and time.monotonic() < deadline:
            time.sleep(0.001)  # until it is there

    _at_half_time(rig, ask)
    loop.submit(ahead)
    assert _events(ahead) == [FinishedEvent("prepared")]
    loop.call(lambda: None)
    assert len(done) == 1
    assert loop.steps_given_up == given_up
