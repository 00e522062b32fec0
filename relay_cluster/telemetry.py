"""Knobs of metrics and traces. Defaults live here and nowhere else. Imports are cheap on purpose (see
`workers/settings.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """What is told about requests, and to whom.

    Attributes:
        otlp_endpoint: OTLP/HTTP endpoint that traces go to ("http://127.0.0.1:4318"); null: none, unless
            OTEL_EXPORTER_OTLP_ENDPOINT is set.
        sample_ratio: share of requests that are traced, where the caller has not decided.
        service_name: of the traces; OTEL_SERVICE_NAME wins.
        agent_labels: whether metrics have the names of pipelines and agents that clients send. "auto": unless
            API keys are asked for, since /metrics is for everybody who reaches it, and names may tell whose
            they are.
    """

    otlp_endpoint: str | None = None
    sample_ratio: Annotated[float, Ge(0), Le(1)] = 1.0
    service_name: str = "relay"
    agent_labels: Literal["auto", "on", "off"] = "auto"
