"""The order of requests, what is handed on, and what a death does; workers are played by a recorder.

(Real workers are in tests/e2e; here the executor's own decisions are checked without seconds of model time.)
"""

from __future__ import annotations

import threading
from typing import Any

import pytest

from relay_cluster.executor import Executor, OnToken, RunOptions
from relay_cluster.pipeline import Agent, Pipeline
from relay_cluster.turns import agent_report
from tests.replies import make_reply
from transport.errors import Cancelled, PromptTooLong, WorkerLost
from transport.types import WorkerId
from workers.messages import Comparison, Draft, Reply, Request
from workers.segment import SlotValue

DIAMOND = Pipeline(
    [
        Agent("plan", prompt="Plan: {q}"),
        Agent("left", prompt="{plan} left"),
        Agent("right", prompt="{plan} right", model="other"),
        Agent("join", prompt="{left} and {right}: {q}"),
    ]
)


class Recorder:
    """A cluster that answers at once and writes down what it was asked."""

    def __init__(self, deaths: int = 0, fault: Exception | None = None) -> None:
        self.asked: list[Request] = []
        self.cancelled: list[str] = []
        self._deaths = deaths
        self._fault = fault
        self._lock = threading.Lock()

    def worker_for(self, agent: str) -> WorkerId:
        return WorkerId(f"w-{agent}")

    def model_for(self, agent: str) -> str:
        return "other" if agent == "right" else "default"

    def generate(
        self, worker: WorkerId, request: Request, on_token: OnToken, stop: threading.Event
    ) -> tuple[Reply, float]:
        with self._lock:
            self.asked.append(request)
            if request.agent == "left" and self._deaths:
                self._deaths -= 1
                raise WorkerLost("killed")
        if request.agent == "left" and self._fault is not None:
            raise self._fault
        if request.agent == "right" and self._fault is not None:
            assert stop.wait(10), "the other agent's failure must end this one"
            raise Cancelled("stopped")
        facts = {
            "token_ids": (1, 2),
            "output": SlotValue(token_ids=(1, 2), kv_tokens=2),
            "notes": ("a note",),
        }
        model, text = self.model_for(request.agent), f"text of {request.agent}"
        return make_reply(worker, request, model=model, text=text, **facts), 0.5

    def compare(
        self, worker: WorkerId, request: Request, reply: Reply, base_method: str, repeats: int
    ) -> Comparison:
        raise WorkerLost("died while comparing")

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        return 0

    def cancel(self, worker: WorkerId, request_id: str) -> None:
        self.cancelled.append(request_id)


def _executor(workers: Recorder, **options: Any) -> Executor:
    values: dict[str, Any] = {
        "method": "auto",
        "compare": None,
        "repeats": 2,
        "max_new_tokens": 8,
        "seed": 1,
        "max_retries": 2,
    }
    return Executor(DIAMOND, workers, RunOptions(**{**values, **options}), "run", lambda *_: None)


def test_agents_run_after_those_they_wait_for_and_get_their_ids() -> None:
    workers = Recorder()
    turns, _ = _executor(workers).run({"q": "why?"})
    order = [r.agent for r in workers.asked]
    assert order[0] == "plan"
    assert set(order[1:3]) == {"left", "right"}
    assert order[3] == "join"
    join = turns["join"].request
    assert join.values["q"] == SlotValue(text="why?")
    assert join.values["left"] == SlotValue(token_ids=(1, 2), kv_tokens=2)


def test_token_ids_are_not_handed_to_another_model() -> None:
    turns, _ = _executor(Recorder()).run({"q": "why?"})
    assert turns["right"].request.values["plan"] == SlotValue(text="text of plan")
    assert turns["join"].request.values["right"] == SlotValue(text="text of right")


def test_a_request_says_how_many_agents_can_relay_its_answer() -> None:
    turns, _ = _executor(Recorder()).run({"q": "why?"})
    consumers = {name: turn.request.consumers for name, turn in turns.items()}
    assert consumers == {"plan": 1, "left": 1, "right": 0, "join": 0}, "another model cannot"
    alone = Pipeline([Agent("plan", prompt="{q}"), Agent("use", prompt="{plan} {plan}", reuse=False)])
    options = RunOptions(method="auto", compare=None, repeats=1, max_new_tokens=8, seed=1, max_retries=0)
    turns, _ = Executor(alone, Recorder(), options, "run", lambda *_: None).run({"q": "why?"})
    assert turns["plan"].request.consumers == 0


def test_a_request_whose_worker_died_is_asked_again_under_another_id() -> None:
    workers = Recorder(deaths=2)
    turns, _ = _executor(workers).run({"q": "why?"})
    assert turns["left"].retries == 2
    ids = [r.id for r in workers.asked if r.agent == "left"]
    assert len(set(ids)) == 3


@pytest.mark.parametrize("stream", ["relay", "auto"])
def test_readers_are_told_which_requests_to_follow(stream: str) -> None:
    """Those of the same model; of an agent that was asked again, the last one."""
    executor = _executor(Recorder(deaths=1), stream=stream)
    turns, _ = executor.run({"q": "why?"})
    opened = {name: turn.request.open_answer for name, turn in turns.items()}
    assert opened == {"plan": True, "left": True, "right": False, "join": False}
    assert executor._ahead is not None
    draft = executor._draft("join", executor._ahead.writing.so_far(["left", "right"]))
    told = {"left": turns["left"].request.id}
    assert (draft.follow, draft.may_follow) == ((told, {}) if stream == "relay" else ({}, told))
    assert turns["left"].request.id != executor.request_id("left")


@pytest.mark.parametrize("options", [{"stream": "exact"}, {"stream": "relay", "method": "full_prefill"}, {}])
def test_nothing_is_followed_that_will_not_be_relayed(options: dict[str, Any]) -> None:
    turns, _ = _executor(Recorder(), **options).run({"q": "why?"})
    assert not any(turn.request.open_answer for turn in turns.values())


def test_too_many_deaths_end_in_an_error_with_advice() -> None:
    with pytest.raises(WorkerLost, match=r'agent "left".*3 times.*max_retries'):
        _executor(Recorder(deaths=3)).run({"q": "why?"})


def test_one_failure_stops_the_others_at_once() -> None:
    workers = Recorder(fault=PromptTooLong("too long"))
    with pytest.raises(PromptTooLong):
        _executor(workers).run({"q": "why?"})
    assert [i.rpartition("-")[2] for i in workers.cancelled] in ([], ["right"])
    assert "join" not in [r.agent for r in workers.asked]


def test_a_failed_comparison_does_not_cost_the_report() -> None:
    executor = _executor(Recorder(), compare="full_prefill")
    turns, _ = executor.run({"q": "why?"})
    assert executor.compare(turns) == {}
    report = agent_report(turns["left"], None, executor.notes(turns["left"]))
    assert report.text == "text of left"
    assert report.notes[0] == "a note"
    assert "not compared with full_prefill" in report.notes[1]
