"""A pipeline's agents and its gate, told to metrics and traces."""

from __future__ import annotations

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from relay_cluster.gate import Check, Edge, EdgeState
from relay_cluster.observing import RunObserver
from relay_cluster.pipeline import Agent
from relay_cluster.recording import Recorder
from relay_cluster.telemetry import TelemetrySettings
from relay_cluster.tracing import make_tracing
from relay_cluster.turns import Turn
from tests.relay_cluster.test_recording import reply, value
from workers.messages import Request

EDGE = Edge("pair", "m", "critic", ("solver",))
LABELS = {"model": "m", "pipeline": "pair", "agent_edge": "solver -> critic"}


def turn(agent: str, *, retries: int = 0) -> Turn:
    return Turn(Agent(agent, prompt="{solver}"), Request(id="r", agent=agent), reply(), 1.3, retries)


def test_agents_of_a_run_are_one_trace() -> None:
    recorder, exporter = Recorder(["m"]), InMemorySpanExporter()
    tracing = make_tracing(TelemetrySettings(), {}, exporter=exporter)
    outside = f"00-{'a' * 32}-{'b' * 16}-01"
    observer = RunObserver(recorder, tracing, {"traceparent": outside})
    observer.answered(turn("solver"), Edge("pair", "m", "solver", ("q",)))
    observer.answered(turn("critic", retries=2), EDGE)
    observer.close()
    observer.close()
    spans = {span.name: span for span in exporter.get_finished_spans() if not span.name.startswith("relay.")}
    assert spans.keys() == {"relay run", "agent solver", "agent critic"}
    run = spans["relay run"]
    for name in ("agent solver", "agent critic"):
        parent = spans[name].parent
        assert parent is not None
        assert (parent.trace_id, parent.span_id) == (run.context.trace_id, run.context.span_id)
    assert f"{run.context.trace_id:032x}" == "a" * 32
    facts = dict(spans["agent critic"].attributes or {})
    assert (facts["relay.pipeline"], facts["relay.agent"]) == ("pair", "critic")
    assert value(recorder, "relay_request_retries_total") == 2
    how = {**LABELS, "method": "context_mass"}
    assert value(recorder, "relay_time_to_first_token_seconds_sum", **how, outcome="relayed") == 1.3
    dispatch = value(recorder, "relay_stage_seconds_sum", model="m", stage="dispatch")
    assert dispatch is not None
    assert abs(dispatch - 2 * 0.3) < 1e-9


def test_the_gate_counts_moves_once() -> None:
    recorder = Recorder(["m"])
    observer = RunObserver(recorder)
    start = EdgeState(ladder=("auto", "full_prefill"))
    fallen = EdgeState(ladder=start.ladder, rung=1, falls=1)
    observer.gated(EDGE, "auto", start, fallen, Check(kl_mean=0.5, top1=0.2), checked=True)
    observer.gated(EDGE, "auto", fallen, fallen, None, checked=False)
    labels = {**LABELS, "method": "auto"}
    assert value(recorder, "relay_quality_demotions_total", **labels) == 1
    assert value(recorder, "relay_quality_rung", **labels) == 1
    assert value(recorder, "relay_quality_checks_total", **labels, outcome="judged") == 1
    assert value(recorder, "relay_quality_checks_total", **labels, outcome="skipped") is None, "not checked"
