"""Placement is pure, so it is tested as a function."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.router import (
    Links,
    Read,
    Task,
    WorkerView,
    critical_path,
    place,
    route,
    route_pipeline,
    worker_models,
)
from transport.errors import PipelineError
from transport.types import WorkerId

_MODELS = st.sampled_from(["small", "medium", "large"])
_AGENTS = st.lists(_MODELS, min_size=1, max_size=9).map(
    lambda models: [(f"agent{i}", model) for i, model in enumerate(models)]
)
_NAMES = [WorkerId(f"w{i}") for i in range(6)]


@st.composite
def _views(draw: st.DrawFn) -> list[WorkerView]:
    """Workers of two models on two nodes, some dead, some busy; the first one is always of use."""
    count = draw(st.integers(1, len(_NAMES)))
    views = [
        WorkerView(
            name,
            draw(st.sampled_from(["m", "other"])),
            alive=draw(st.booleans()),
            node=draw(st.sampled_from(["n0", "n1"])),
            busy_s=draw(st.sampled_from([0.0, 0.0, 0.25, 3.0])),
            agents=draw(st.integers(0, 3)),
            prefill_s=draw(st.sampled_from([1e-3, 4e-3])),
        )
        for name in _NAMES[:count]
    ]
    return [replace(views[0], model="m", alive=True), *views[1:]]


@st.composite
def _tasks(draw: st.DrawFn) -> Task:
    holders = st.lists(st.sampled_from(_NAMES), max_size=2).map(tuple)
    reads = st.lists(st.builds(Read, st.integers(0, 2000), st.integers(0, 10**9), holders), max_size=3)
    return Task(
        agent="a",
        model="m",
        prefix_tokens=draw(st.integers(0, 500)),
        fresh_tokens=draw(st.integers(0, 500)),
        answer_tokens=draw(st.integers(0, 300)),
        reads=tuple(draw(reads)),
        homes=draw(st.lists(st.sampled_from(_NAMES), max_size=3, unique=True).map(tuple)),
    )


_AVOID = st.frozensets(st.sampled_from(_NAMES))


@given(task=_tasks(), views=_views(), avoid=_AVOID)
def test_the_choice_lives_hosts_the_model_and_is_the_same_again(
    task: Task, views: list[WorkerView], avoid: frozenset[WorkerId]
) -> None:
    choice = route(task, views, avoid=avoid)
    chosen = next(v for v in views if v.worker == choice.worker)
    assert chosen.alive
    assert chosen.model == "m"
    assert choice == route(task, views, avoid=avoid)
    assert choice.candidates[0].worker == choice.worker
    assert choice.expected_s == min(c.total_s for c in choice.candidates)


@given(task=_tasks(), views=_views(), avoid=_AVOID)
def test_no_busy_worker_of_the_critical_path_while_an_idle_one_is_there(
    task: Task, views: list[WorkerView], avoid: frozenset[WorkerId]
) -> None:
    choice = route(task, views, avoid=avoid)
    chosen = next(v for v in views if v.worker == choice.worker)
    idle = [v for v in views if v.alive and v.model == "m" and v.busy_s == 0 and v.worker not in avoid]
    assert not (idle and chosen.busy_s > 0 and chosen.worker in avoid)


@given(task=_tasks(), views=_views())
def test_idle_is_preferred_where_all_else_is_equal(task: Task, views: list[WorkerView]) -> None:
    alike = [replace(v, node="n0", prefill_s=1e-3) for v in views]
    choice = route(replace(task, reads=(), homes=()), alike)
    able = [v for v in alike if v.alive and v.model == "m"]
    chosen = next(v for v in able if v.worker == choice.worker)
    assert chosen.busy_s == min(v.busy_s for v in able)


@given(task=_tasks(), views=_views(), avoid=_AVOID, which=st.integers(0, 5), more_s=st.floats(0.01, 10))
def test_work_never_draws_an_agent_to_a_worker(
    task: Task, views: list[WorkerView], avoid: frozenset[WorkerId], which: int, more_s: float
) -> None:
    """Monotone: what was not chosen is not chosen when it has more to do either."""
    loaded = views[which % len(views)]
    before = route(task, views, avoid=avoid).worker
    after = route(
        task,
        [replace(v, busy_s=v.busy_s + more_s) if v is loaded else v for v in views],
        avoid=avoid,
    ).worker
    if before != loaded.worker:
        assert after != loaded.worker


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


def _chain(length: int, answer: int = 100) -> list[Task]:
    return [
        Task(
            agent=f"a{i}",
            model="m",
            fresh_tokens=50,
            answer_tokens=answer,
            after=tuple(f"a{j}" for j in range(i)),
            reads=tuple(Read(answer, answer * 10**5, source=f"a{j}") for j in range(i)),
        )
        for i in range(length)
    ]


@given(length=st.integers(1, 6), count=st.integers(1, 8))
def test_agents_of_a_chain_share_no_worker_while_there_are_others(length: int, count: int) -> None:
    views = [WorkerView(WorkerId(f"w{i}"), "m") for i in range(count)]
    chosen = route_pipeline(_chain(length), views)
    assert len({c.worker for c in chosen.values()}) == min(length, count)


def test_the_critical_path_is_the_longest_by_expected_tokens() -> None:
    tasks = [
        Task(agent="plan", model="m", answer_tokens=10),
        Task(agent="short", model="m", answer_tokens=10, after=("plan",)),
        Task(agent="long", model="m", answer_tokens=500, after=("plan",)),
        Task(agent="join", model="m", answer_tokens=10, after=("short", "long")),
    ]
    assert critical_path(tasks, 1e-3, 2e-2) == ("plan", "long", "join")
    shorter = [replace(t, answer_tokens=5) if t.agent == "long" else t for t in tasks]
    assert critical_path(shorter, 1e-3, 2e-2) == ("plan", "short", "join")


def test_an_agent_comes_back_to_its_prefix_unless_that_costs_more() -> None:
    task = Task(agent="a", model="m", prefix_tokens=500, fresh_tokens=50, homes=(WorkerId("w1"),))
    views = [WorkerView(WorkerId("w0"), "m"), WorkerView(WorkerId("w1"), "m", busy_s=0.4)]
    stays = route(task, views)
    assert stays.worker == "w1", "0.4 s of waiting cost less than 500 tokens at 1 ms"
    assert "prefix" in stays.reason
    goes = route(task, [views[0], replace(views[1], busy_s=0.6)])
    assert goes.worker == "w0"
    assert goes.expected_s == pytest.approx(0.55)
    assert [c.worker for c in goes.candidates] == ["w0", "w1"]


def test_an_agent_goes_where_its_segments_are_and_nodes_count() -> None:
    views = [
        WorkerView(WorkerId("w0"), "m", node="far"),
        WorkerView(WorkerId("w1"), "m", node="here"),
        WorkerView(WorkerId("w2"), "m", node="here", busy_s=1.0),
    ]
    task = Task(agent="a", model="m", reads=(Read(1000, 10**8, (WorkerId("w2"),)),))
    assert route(task, views).worker == "w1", "the holder is busy, its neighbour is near"
    assert route(task, [views[0], replace(views[2], busy_s=0.0), views[1]]).worker == "w2"
    fast = Links(between={("here", "far"): replace(Links().near, byte_s=1e-12)})
    assert route(task, views, fast).worker == "w0"


def test_what_only_dead_workers_hold_is_computed() -> None:
    views = [WorkerView(WorkerId("w0"), "m"), WorkerView(WorkerId("w1"), "m", alive=False)]
    choice = route(Task(agent="a", model="m", reads=(Read(1000, 1, (WorkerId("w1"),)),)), views)
    assert (choice.candidates[0].pull_s, choice.expected_s) == (0.0, pytest.approx(1.0))


def test_a_dead_worker_gets_no_agent() -> None:
    workers = [WorkerView(WorkerId("w0"), "m", alive=False), WorkerView(WorkerId("w1"), "m")]
    assert place([("a", "m"), ("b", "m")], workers) == {"a": "w1", "b": "w1"}


def test_a_model_that_nobody_hosts_is_an_error_with_advice() -> None:
    with pytest.raises(PipelineError, match=r"judge.*large.*hosted: small"):
        place([("judge", "large")], [WorkerView(WorkerId("w0"), "small")])


def test_more_models_than_workers_is_an_error_with_advice() -> None:
    with pytest.raises(PipelineError, match="Raise `workers`"):
        worker_models([("a", "x"), ("b", "y")], 1, "x")
