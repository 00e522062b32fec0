"""Traces: off by default, stages in order, contexts in and out, and never a text."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from relay_cluster.telemetry import TelemetrySettings
from relay_cluster.tracing import Tracing, make_tracing
from tests.relay_cluster.test_recording import pull, reply
from transport.errors import ConfigError
from transport.types import Outcome
from workers.messages import Fallback

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
STAGES = {"wait": 0.2, "match": 0.1, "dispatch": 0.2}


def traced(
    settings: TelemetrySettings | None = None, parent: str = PARENT, **facts: Any
) -> dict[str, ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracing = make_tracing(settings or TelemetrySettings(), {}, exporter=exporter)
    arrived = time.perf_counter() - 2.4
    trace = tracing.start("POST /v1", {"traceparent": parent}, {"a": 1}, arrived=arrived)
    trace.answered(reply(**facts), STAGES, arrived=arrived, seconds=2.4)
    trace.end(200)
    trace.end(200)
    tracing.close()
    tracing.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_nothing_is_made_unless_it_is_asked_for() -> None:
    for environ in ({}, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}):
        tracing = make_tracing(TelemetrySettings(), environ)
        assert type(tracing) is Tracing
        trace = tracing.start("x", {"traceparent": PARENT})
        assert not trace.live
        assert trace.traceparent == PARENT, "but given on"
    assert tracing.start("x", {"traceparent": "00-nonsense\ninjected"}).traceparent == ""


def test_the_environment_turns_it_on() -> None:
    tracing = make_tracing(TelemetrySettings(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    assert tracing.start("x", {}).live
    # Nothing was ended, so closing sends nothing, and waits for nobody.
    tracing.close()


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "ftp://x", "http://", "nonsense"])
def test_an_endpoint_must_be_a_url(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        make_tracing(TelemetrySettings(otlp_endpoint=endpoint), {})


def test_stages_are_drawn_one_after_the_other() -> None:
    spans = traced()
    top = spans.pop("POST /v1")
    assert top.parent is not None
    assert f"{top.parent.trace_id:032x}-{top.parent.span_id:016x}" == PARENT[3:52]
    names = ["wait", "match", "dispatch", "queue", "lookup", "lease", "pull"]
    names += ["rotate", "rectify", "prefill", "first_token", "decode"]
    assert list(spans) == [f"relay.{name}" for name in names]
    assert {span.parent.span_id for span in spans.values() if span.parent} == {top.context.span_id}
    for earlier, later in itertools.pairwise(spans.values()):
        assert earlier.end_time == later.start_time
    took = {n: (s.end_time - s.start_time) / 1e9 for n, s in spans.items() if s.end_time and s.start_time}
    assert took["relay.pull"] == pytest.approx(0.2, abs=1e-6)
    assert took["relay.decode"] == pytest.approx(0.9, abs=1e-6)
    assert top.start_time is not None
    assert top.end_time is not None
    assert top.end_time - top.start_time >= 2.4e9


def test_facts_and_events_without_text() -> None:
    failed = (pull(), pull(Outcome.CORRUPT, nbytes=0))
    detail = "block 3 of w0 said: a secret"
    top = traced(transfers=failed, fallbacks=(Fallback("solver", "corrupt", detail, 40),))["POST /v1"]
    facts = dict(top.attributes or {})
    assert facts["a"] == 1
    assert facts["gen_ai.usage.input_tokens"] == 100
    assert facts["relay.outcome"] == "fallback"
    assert facts["http.response.status_code"] == 200
    events = [(event.name, dict(event.attributes or {})) for event in top.events]
    assert [name for name, _ in events] == ["relay.transfer", "relay.transfer", "relay.fallback"]
    assert [e["relay.outcome"] for _, e in events[:2]] == ["pulled", "corrupt"]
    assert "secret" not in str((facts, events))


def test_errors_are_marked() -> None:
    exporter = InMemorySpanExporter()
    tracing = make_tracing(TelemetrySettings(), {}, exporter=exporter)
    trace = tracing.start("POST /v1", {})
    trace.failed("worker_lost")
    trace.end(503)
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.parent is None, "a trace of its own"
    assert not span.status.is_ok
    assert (span.attributes or {})["error.type"] == "worker_lost"


def test_the_share_that_is_traced() -> None:
    none = TelemetrySettings(sample_ratio=0.0)
    assert traced(none, parent="") == {}
    assert "POST /v1" in traced(none), "whoever sends a sampled context has decided"
    assert traced(parent=PARENT[:-2] + "00") == {}, "or against it"
