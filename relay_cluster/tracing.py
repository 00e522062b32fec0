"""OpenTelemetry traces: a span per request and a child for each stage of its way to the first token. Off
unless an endpoint is named (`telemetry.otlp_endpoint`, or OpenTelemetry's own environment variables).

    client's traceparent -> request span -> stages; our traceparent -> response, worker's log

Spans of stages are made afterwards, from the durations that the worker reports, one after the other. No span
has text of a prompt or an answer, nor a tenant. The library is imported only where traces are on.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from relay_cluster.recording import outcome
from relay_cluster.telemetry import TelemetrySettings
from transport.errors import ConfigError
from workers.messages import Reply

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

FLUSH_TIMEOUT_S: Final = 5.0
EXPORT_TIMEOUT_S: Final = 5.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_PATH = "/v1/traces"


class Trace:
    """One request's span; this one is of nobody, and does nothing.

    Attributes:
        traceparent: W3C context to give on; that of the caller where traces are off.
    """

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    @property
    def live(self) -> bool:
        """Whether it is recorded, and its context goes back to the client."""
        return False

    def answered(self, reply: Reply, stages: Mapping[str, float], *, arrived: float, seconds: float) -> None:
        """How it was answered.

        Args:
            stages: seconds of what came before the worker, in order.
            arrived: time.perf_counter() at which the first of them began. seconds: to the end of the answer.
        """

    def failed(self, code: str) -> None:
        """It ended in an error."""

    def end(self, status: int | None = None) -> None:
        """It is over. Idempotent. status: of HTTP."""


NO_TRACE: Final = Trace()


class Tracing:
    """Makes the traces of one process; this one makes none.

    `start` is how a request's begins, `close` sends what is left.
    """

    def start(
        self,
        name: str,
        headers: Mapping[str, str],
        attributes: Mapping[str, Any] | None = None,
        *,
        arrived: float | None = None,
    ) -> Trace:
        """A request's trace.

        Args:
            headers: W3C context of the caller, by lower-case names.
            arrived: time.perf_counter() at which it began; None: now.
        """
        parent = headers.get("traceparent", "").strip()
        return Trace(parent if _PARENT.fullmatch(parent) else "")

    def close(self) -> None:
        """Send what is left, for FLUSH_TIMEOUT_S at most. Idempotent."""


def make_tracing(
    settings: TelemetrySettings,
    environ: Mapping[str, str] = os.environ,
    *,
    exporter: SpanExporter | None = None,
) -> Tracing:
    """Tracing as settings and environment want it.

    Args:
        exporter: takes the spans instead of an OTLP endpoint, in tests.

    Raises:
        ConfigError: traces are on and OpenTelemetry is not installed, or the endpoint is no URL.
    """
    wanted = settings.otlp_endpoint is not None or any(environ.get(name) for name in _ENDPOINTS)
    off = (
        environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        or environ.get("OTEL_TRACES_EXPORTER") == "none"
    )
    if exporter is None and (off or not wanted):
        return Tracing()
    try:
        return _Exporting(settings, exporter or _otlp(settings))
    except ImportError as error:
        raise ConfigError(
            f"traces are on (telemetry.otlp_endpoint or OTEL_EXPORTER_OTLP_ENDPOINT), but {error.name} is "
            "not installed. Run: pip install 'relay-cluster[trace]'"
        ) from None


def _otlp(settings: TelemetrySettings) -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    if settings.otlp_endpoint is None:
        return OTLPSpanExporter()  # from its own variables
    url = urlsplit(settings.otlp_endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ConfigError(
            f'telemetry.otlp_endpoint "{settings.otlp_endpoint}" is no URL; for example http://127.0.0.1:4318'
        )
    endpoint = settings.otlp_endpoint.rstrip("/") + (_PATH if url.path in ("", "/") else "")
    return OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)


class _Exporting(Tracing):
    def __init__(self, settings: TelemetrySettings, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME") or settings.service_name
        # Not the process's global one: whoever embeds us may have their own.
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            resource=Resource.create({"service.name": name}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("relay_cluster")
        self._context = TraceContextTextMapPropagator()
        self._closed = False

    def start(
        self,
        name: str,
        headers: Mapping[str, str],
        attributes: Mapping[str, Any] | None = None,
        *,
        arrived: float | None = None,
    ) -> Trace:
        from opentelemetry.trace import SpanKind

        carried = {k: headers[k] for k in ("traceparent", "tracestate") if k in headers}
        parent = self._context.extract(carried)
        begin_ns = None if arrived is None else _wall_ns(arrived)
        facts = dict(attributes or {})
        span = self._tracer.start_span(name, parent, SpanKind.SERVER, facts, start_time=begin_ns)
        return _Recorded(self, span)

    def traceparent(self, span: Any) -> str:
        """W3C context of a span."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._context.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent", "")

    def stage(self, span: Any, name: str, begin_ns: int, end_ns: int) -> None:
        """A child that is over already."""
        from opentelemetry.trace import set_span_in_context

        child = self._tracer.start_span(f"relay.{name}", set_span_in_context(span), start_time=begin_ns)
        child.end(end_ns)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._provider.force_flush(int(FLUSH_TIMEOUT_S * 1000))
            self._provider.shutdown()


class _Recorded(Trace):
    def __init__(self, tracing: _Exporting, span: Any) -> None:
        super().__init__(tracing.traceparent(span))
        self._tracing = tracing
        self._span = span
        self._ended = False

    @property
    def live(self) -> bool:
        return True

    def answered(self, reply: Reply, stages: Mapping[str, float], *, arrived: float, seconds: float) -> None:
        if not self._span.is_recording():
            return
        self._span.set_attributes(_attributes(reply))
        for pull in reply.transfers:
            moved = pull.transfer
            facts: dict[str, Any] = {
                "relay.source": moved.source,
                "relay.destination": moved.destination,
                "relay.backend": moved.backend,
                "relay.outcome": moved.outcome.value,
                "relay.bytes": moved.nbytes,
                "relay.seconds": moved.seconds,
            }
            self._span.add_event("relay.transfer", facts)
        for fallback in reply.fallbacks:
            self._span.add_event(
                "relay.fallback", {"relay.reason": fallback.reason, "relay.tokens": fallback.tokens}
            )
        at_ns = _wall_ns(arrived)
        inside = {name.removesuffix("_s"): getattr(reply.stages, name) for name in reply.stages.__slots__}
        for name, spent in {**stages, **inside, "decode": reply.decode_s}.items():
            end_ns = at_ns + int(spent * 1e9)
            self._tracing.stage(self._span, name, at_ns, end_ns)
            at_ns = end_ns
        self._span.set_attribute("relay.seconds", seconds)

    def failed(self, code: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_status(Status(StatusCode.ERROR))
        self._span.set_attribute("error.type", code)

    def end(self, status: int | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        if status is not None:
            self._span.set_attribute("http.response.status_code", status)
        self._span.end()


def _wall_ns(instant: float) -> int:
    """The time of day of a time.perf_counter()."""
    return time.time_ns() - int((time.perf_counter() - instant) * 1e9)


def _attributes(reply: Reply) -> dict[str, Any]:
    """Facts of an answer, under OpenTelemetry's names where it has some."""
    return {
        "gen_ai.request.model": reply.model,
        "gen_ai.usage.input_tokens": reply.prompt_tokens,
        "gen_ai.usage.output_tokens": len(reply.token_ids),
        "gen_ai.response.finish_reasons": [reply.finish_reason],
        "relay.request": reply.request_id,
        "relay.worker": reply.worker,
        "relay.node": reply.node,
        "relay.method": reply.resolved_method,
        "relay.outcome": outcome(reply),
        "relay.relayed_tokens": reply.relayed_tokens,
        "relay.prefix_tokens": reply.prefix_tokens,
        "relay.recomputed_entries": reply.recomputed_entries,
        "relay.relayed_entries": reply.relayed_entries,
        "relay.pull_hidden_s": reply.pull_hidden_s,
    }


__all__ = ["NO_TRACE", "Trace", "Tracing", "make_tracing"]
