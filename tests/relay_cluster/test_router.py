"""Placement is pure, so it is tested as a function."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.router import WorkerView, place, worker_models
from transport.errors import PipelineError
from transport.types import WorkerId

_MODELS = st.sampled_from(["small", "medium", "large"])
_AGENTS = st.lists(_MODELS, min_size=1, max_size=9).map(
    lambda models: [(f"agent{i}", model) for i, model in enumerate(models)]
)


@given(agents=_AGENTS, count=st.integers(3, 12))
def test_every_model_gets_a_worker_and_no_worker_is_left_without(
    agents: list[tuple[str, str]], count: int
) -> None:
    models = worker_models(agents, count, "small")
    assert len(models) == count
    assert set(models) == {model for _, model in agents}


@given(agents=_AGENTS, count=st.integers(3, 12))
def test_agents_go_to_workers_of_their_model_as_evenly_as_can_be(
    agents: list[tuple[str, str]], count: int
) -> None:
    workers = [
        WorkerView(WorkerId(f"w{i}"), model) for i, model in enumerate(worker_models(agents, count, "small"))
    ]
    placed = place(agents, workers)
    hosted = {w.worker: w.model for w in workers}
    assert placed.keys() == {name for name, _ in agents}
    for name, model in agents:
        assert hosted[placed[name]] == model
    for model in {model for _, model in agents}:
        load = Counter({w.worker: 0 for w in workers if w.model == model})
        load.update(placed[name] for name, wanted in agents if wanted == model)
        assert max(load.values()) - min(load.values()) <= 1
    assert place(agents, workers) == placed


def test_a_dead_worker_gets_no_agent() -> None:
    workers = [WorkerView(WorkerId("w0"), "m", alive=False), WorkerView(WorkerId("w1"), "m")]
    assert place([("a", "m"), ("b", "m")], workers) == {"a": "w1", "b": "w1"}


def test_a_model_that_nobody_hosts_is_an_error_with_advice() -> None:
    with pytest.raises(PipelineError, match=r"judge.*large.*hosted: small"):
        place([("judge", "large")], [WorkerView(WorkerId("w0"), "small")])


def test_more_models_than_workers_is_an_error_with_advice() -> None:
    with pytest.raises(PipelineError, match="Raise `workers`"):
        worker_models([("a", "x"), ("b", "y")], 1, "x")
