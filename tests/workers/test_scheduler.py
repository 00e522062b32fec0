"""Who gets rows in the next step, and that one request's trouble stays its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.workers import tiny
from transport.errors import DeadlineExceeded, RelayError
from workers.methods import parse_method
from workers.methods.base import Span
from workers.prefill import Prefill
from workers.sampling import Sampler
from workers.scheduler import FailedEvent, FinishedEvent, Sequence, StepLoop, TokenEvent, choose
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
