"""The quality gate: its state machine under any sequence of verdicts, and its place in a run."""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.console import gate_table, output
from relay_cluster.executor import Executor, OnToken, RunOptions
from relay_cluster.gate import (
    FULL,
    WINDOW,
    Check,
    Decision,
    Edge,
    EdgeState,
    Gate,
    QualitySettings,
    decide,
    first_state,
    ladder,
    observe,
)
from relay_cluster.pipeline import Agent, Pipeline
from relay_cluster.report import AgentReport, RowReport
from relay_cluster.turns import Turn, agent_report
from tests.relay_cluster.test_executor import Recorder
from transport.errors import ConfigError, DeadlineExceeded, PipelineError
from transport.types import WorkerId
from workers.messages import Reply, Request, ShadowCheck
from workers.methods import parse_reuse

EDGE = Edge("p", "m", "critic", ("solver",))
SETTINGS = QualitySettings(kl_budget=0.1, top1_budget=0.2, warmup=2, recover_after=3, sample_rate=0.25)
GOOD = Check(kl_mean=0.01, top1=1.0)
BAD = Check(kl_mean=1.0, top1=0.5)
CLOSE = Check(kl_mean=0.08, top1=1.0)

checks = st.one_of(
    st.none(),
    st.builds(
        Check,
        kl_mean=st.one_of(st.floats(0, 0.5), st.just(math.nan), st.just(math.inf)),
        top1=st.floats(0, 1),
    ),
)
methods = st.sampled_from(["auto:fast", "auto", "auto:strict", "naive", "context_mass:ratio=0.2", FULL])
settings_ = st.builds(
    QualitySettings,
    kl_budget=st.floats(0.001, 1),
    top1_budget=st.floats(0, 1),
    sample_rate=st.floats(0, 1),
    warmup=st.integers(0, 4),
    recover_after=st.integers(1, 4),
)


def _walk(state: EdgeState, settings: QualitySettings, *verdicts: Check | None) -> EdgeState:
    for verdict in verdicts:
        state, _ = decide(state, settings, seed=0, edge=EDGE)
        state = observe(state, settings, state.rung, verdict)
    return state


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("auto:fast", ("auto:fast", "auto", "auto:strict", FULL)),
        ("auto", ("auto", "auto:strict", FULL)),
        ("auto:balanced", ("auto:balanced", "auto:strict", FULL)),
        ("auto:strict", ("auto:strict", FULL)),
        ("naive", ("naive", "auto:strict", FULL)),
        (
            "context_mass:ratio=0.2+first=8",
            ("context_mass:ratio=0.2+first=8", "context_mass:ratio=0.4+first=8+heal=always", FULL),
        ),
        (
            "context_mass:ratio=0.7+heal=idle",
            ("context_mass:ratio=0.7+heal=idle", "context_mass:ratio=1+heal=idle", FULL),
        ),
        ("context_mass:ratio=1", ("context_mass:ratio=1", "auto:strict", FULL)),
        (FULL, (FULL,)),
        ("exact_prefix", ("exact_prefix",)),
    ],
)
def test_the_ladder_leads_from_the_method_to_full_prefill(method: str, expected: tuple[str, ...]) -> None:
    assert ladder(method) == expected
    for rung in expected:
        parse_reuse(rung)


def test_what_is_no_method_has_no_ladder() -> None:
    with pytest.raises(ConfigError, match="context_mass"):
        ladder("context_mas")


@given(methods, st.sampled_from([None, "judge"]), settings_, st.lists(checks, max_size=60))
def test_the_state_keeps_its_invariants(
    method: str, role: str | None, settings: QualitySettings, verdicts: list[Check | None]
) -> None:
    state = first_state(method, role)
    for verdict in verdicts:
        before, (state, decision) = state, decide(state, settings, seed=1, edge=EDGE)
        assert decision.method == before.method == state.ladder[decision.rung]
        assert state.requests == before.requests + 1
        if decision.probe is not None:
            assert decision.checked
            assert decision.method == FULL
            assert decision.probe == state.ladder[state.rung - 1]
        asked = state
        state = observe(state, settings, decision.rung, verdict)
        assert 0 <= state.rung < len(state.ladder)
        assert abs(state.rung - asked.rung) <= 1
        assert len(state.recent) <= WINDOW
        assert state.checks + state.skipped == asked.checks + asked.skipped + 1
        assert state.falls - state.recoveries == state.rung - first_state(method, role).rung
        if verdict is None:
            assert state == replace(asked, skipped=asked.skipped + 1), "no verdict changes nothing"
        if state.rung > asked.rung:
            assert not asked.probing
            assert state.reason.startswith("demoted")
        if state.rung < asked.rung:
            assert asked.good + 1 >= settings.recover_after


@given(settings_, st.lists(checks, max_size=40), st.integers(0, 5))
def test_the_same_seed_and_verdicts_give_the_same_decisions(
    settings: QualitySettings, verdicts: list[Check | None], seed: int
) -> None:
    def play() -> list[Decision]:
        gate, out = Gate(settings, seed=seed), []
        for verdict in verdicts:
            decision = gate.decide(EDGE, "auto")
            out.append(decision)
            if decision.checked:
                gate.observe(EDGE, "auto", decision, verdict)
        return out

    assert play() == play()


@given(methods, settings_, st.integers(1, 60))
def test_good_checks_never_demote_and_bad_ones_end_at_full_prefill(
    method: str, settings: QualitySettings, count: int
) -> None:
    best = Check(kl_mean=0.0, top1=1.0)
    assert _walk(first_state(method, None), settings, *[best] * count).rung == 0
    worst = Check(kl_mean=10 * settings.kl_budget, top1=0.0)
    state = _walk(first_state(method, None), settings, *[worst] * count)
    assert state.rung == min(count, len(state.ladder) - 1)
    assert state.recoveries == 0, "a probe that fails brings nothing back"


def test_demotion_by_either_budget_and_by_numbers_that_are_none() -> None:
    start = first_state("auto", None)
    for verdict in (
        Check(kl_mean=0.11, top1=1.0),
        Check(kl_mean=0.0, top1=0.7),
        Check(kl_mean=math.nan, top1=1.0),
    ):
        state = _walk(start, SETTINGS, verdict)
        assert state.method == "auto:strict"
    assert "KL" in _walk(start, SETTINGS, Check(kl_mean=0.11, top1=1.0)).reason
    assert "30% other top tokens exceed 20%" in _walk(start, SETTINGS, Check(kl_mean=0.0, top1=0.7)).reason


def test_one_outlier_among_good_checks_is_forgiven_a_trend_is_not() -> None:
    start = first_state("auto", None)
    high = Check(kl_mean=0.3, top1=1.0)
    assert _walk(start, SETTINGS, GOOD, GOOD, GOOD, high).rung == 0
    assert _walk(start, SETTINGS, GOOD, GOOD, GOOD, high, high).rung == 1


def test_recovery_needs_good_checks_in_a_row_and_ever_more_after_each_fall() -> None:
    state = _walk(first_state("naive", None), SETTINGS, BAD, GOOD, GOOD)
    assert state.rung == 1
    # Within the budget, but near it: that neither demotes nor counts.
    assert _walk(state, SETTINGS, CLOSE, GOOD, GOOD).rung == 1
    state = _walk(state, SETTINGS, GOOD)
    assert (state.rung, state.recoveries, state.on_rung) == (0, 1, 0)
    state = _walk(state, SETTINGS, BAD, *[GOOD] * 5)
    assert state.rung == 1, "after the second fall three are not enough"
    assert _walk(state, SETTINGS, GOOD).rung == 0


def test_on_the_last_rung_probes_of_the_rung_before_lead_back() -> None:
    settings = replace(SETTINGS, warmup=100)
    state = _walk(first_state("auto:strict", None), settings, BAD)
    assert state.method == FULL
    state, decision = decide(state, settings, seed=0, edge=EDGE)
    assert decision == Decision(method=FULL, rung=1, checked=True, probe="auto:strict")
    assert _walk(state, settings, BAD, BAD).falls == 1, "a bad probe is no further fall"
    assert _walk(state, settings, GOOD, BAD, GOOD, GOOD).rung == 1
    assert _walk(state, settings, GOOD, GOOD, GOOD).rung == 0


def test_judges_and_aggregators_start_stricter_and_may_earn_the_rest() -> None:
    for role in ("judge", "aggregator"):
        assert first_state("auto", role).method == "auto:strict"
        assert first_state(FULL, role).method == FULL
    assert _walk(first_state("auto", "judge"), SETTINGS, GOOD, GOOD, GOOD).method == "auto"
    assert first_state("auto", None).rung == 0
    with pytest.raises(ConfigError, match="critic"):
        Gate(SETTINGS).decide(EDGE, "auto", "critic")


def test_sampling_checks_the_warm_up_and_then_its_share() -> None:
    state, checked = first_state("auto", None), []
    for _ in range(2000):
        state, decision = decide(state, SETTINGS, seed=3, edge=EDGE)
        checked.append(decision.checked)
    assert checked[:2] == [True, True]
    assert sum(checked[2:]) == pytest.approx(0.25 * 1998, rel=0.15)
    other = replace(EDGE, agent="judge")
    state, others = first_state("auto", None), []
    for _ in range(2000):
        state, decision = decide(state, SETTINGS, seed=3, edge=other)
        others.append(decision.checked)
    assert others != checked, "every edge is sampled for itself"
    assert not any(
        decide(replace(state, on_rung=9), replace(SETTINGS, sample_rate=0.0), seed=s, edge=EDGE)[1].checked
        for s in range(50)
    )


def test_a_verdict_on_a_rung_that_was_left_moves_nothing() -> None:
    gate = Gate(SETTINGS)
    first, second = gate.decide(EDGE, "auto"), gate.decide(EDGE, "auto")
    assert gate.observe(EDGE, "auto", first, BAD).rung == 1
    assert gate.observe(EDGE, "auto", second, BAD).rung == 1
    assert gate.decide(EDGE, "naive").method == "naive", "another method has a state of its own"


# -- in a run ------------------------------------------------------------------------------------------------

CHAIN = Pipeline(
    [Agent("solver", prompt="{q}"), Agent("critic", prompt="{solver} ok?", role="judge")],
    name="chain",
    quality=replace(SETTINGS, recover_after=2),
)


class Watched(Recorder):
    """Answers at once; verdicts come from a list, or fail where that holds an error."""

    def __init__(self, verdicts: list[float | Exception]) -> None:
        super().__init__()
        self._verdicts = verdicts
        self.shadows: list[tuple[Request, str | None]] = []

    def generate(
        self, worker: WorkerId, request: Request, on_token: OnToken, stop: threading.Event
    ) -> tuple[Reply, float]:
        reply, ttft_s = super().generate(worker, request, on_token, stop)
        relayed = 0 if request.agent == "solver" or request.method == FULL else 20
        return replace(reply, relayed_tokens=relayed), ttft_s

    def shadow(
        self,
        worker: WorkerId,
        request: Request,
        answer: tuple[int, ...],
        probe: str | None,
        timeout_s: float,
    ) -> ShadowCheck:
        assert answer
        self.shadows.append((request, probe))
        verdict = self._verdicts.pop(0)
        if isinstance(verdict, Exception):
            raise verdict
        return ShadowCheck(
            method=probe or request.method,
            tokens=8,
            kl_first=verdict,
            kl_mean=verdict,
            top1=1.0,
            value_errors=((3, 0.01), (5, 0.02)),
        )


def _run(workers: Watched, gate: Gate | None, run: int) -> tuple[dict[str, Turn], dict[str, AgentReport]]:
    options = RunOptions(method="auto", compare=None, repeats=1, max_new_tokens=4, seed=0, max_retries=0)
    executor = Executor(CHAIN, workers, options, f"r{run}", lambda *_: None, gate)
    turns, _ = executor.run({"q": "?"})
    gates = executor.check(turns)
    return turns, {n: agent_report(t, None, executor.notes(t), gates.get(n)) for n, t in turns.items()}


def test_a_run_is_checked_afterwards_and_the_next_one_uses_what_the_gate_says() -> None:
    assert CHAIN.quality is not None
    gate, workers = Gate(CHAIN.quality), Watched([5.0, DeadlineExceeded("busy"), 0.0, 0.0])
    seen = []
    for run in range(5):
        turns, reports = _run(workers, gate, run)
        seen.append(turns["critic"].request.method)
        found = reports["critic"].gate
        assert found is not None
        assert (found.edge, found.asked) == ("solver -> critic", "auto")
        assert found.ladder[found.rung] == turns["critic"].request.method
        solver = reports["solver"].gate
        assert solver is not None
        assert (solver.kl_mean, solver.rung) == (None, 0), "nothing was relayed: there is no verdict"
        if run == 0:
            assert (found.kl_mean, found.top1, found.value_error) == (5.0, 1.0, 0.02)
            assert (found.rung, found.next_rung) == (1, 2)
            assert found.reason.startswith("demoted")
        if run == 1:
            assert (found.kl_mean, found.skipped) == (None, 1)
            assert any("busy" in note for note in reports["critic"].notes)
    # A judge starts at auto:strict, falls, and two good probes bring it back.
    assert seen[:2] == ["auto:strict", FULL]
    assert [probe for _, probe in workers.shadows][:2] == [None, "auto:strict"]
    sampled = {request.shadow_tokens for request, _ in workers.shadows}
    assert sampled == {16}
    assert [request.publish_inputs for request, _ in workers.shadows][:2] == [True, False]


def test_without_a_budget_nothing_is_kept_or_checked() -> None:
    workers = Watched([])
    turns, reports = _run(workers, None, 0)
    assert workers.shadows == []
    assert {t.request.shadow_tokens for t in turns.values()} == {0}
    assert reports["critic"].gate is None
    assert gate_table(RowReport(agents=tuple(reports.values()), wall_s=1.0)) is None


def test_the_table_names_edge_method_verdict_and_what_comes_next() -> None:
    assert CHAIN.quality is not None
    _, reports = _run(Watched([5.0]), Gate(CHAIN.quality), 0)
    table = gate_table(RowReport(agents=tuple(reports.values()), wall_s=1.0))
    assert table is not None
    console = output()
    with console.capture() as capture:
        console.print(table)
    text = capture.get()
    for word in ("solver -> critic", "auto:strict", "5.0000", "0.0200", "full_prefill (demoted: KL 5"):
        assert word in " ".join(text.split())


def test_an_unknown_role_is_refused_where_it_is_written() -> None:
    with pytest.raises(PipelineError, match='Did you mean "judge"'):
        Pipeline([Agent("a", prompt="{q}", role="jugde")])  # pyright: ignore[reportArgumentType]
