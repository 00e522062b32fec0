"""Hears of a pipeline's agents, and tells metrics and traces. See `executor.Observer`."""

from __future__ import annotations

import time
from collections.abc import Mapping

from relay_cluster.gate import Check, Edge, EdgeState
from relay_cluster.recording import Recorder
from relay_cluster.tracing import Tracing
from relay_cluster.turns import Turn


class RunObserver:
    """Records what pipelines do. Thread-safe.

    Args:
        recorder: gets the metrics.
        tracing: gets a span per agent, all of one trace; None: no traces.
        headers: W3C context that the trace continues.
    """

    def __init__(
        self, recorder: Recorder, tracing: Tracing | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        self._recorder = recorder
        self._tracing = tracing or Tracing()
        self._run = self._tracing.start("relay run", headers or {})

    def answered(self, turn: Turn, edge: Edge) -> None:
        """See executor.Observer."""
        reply = turn.reply
        seconds = turn.ttft_s + reply.decode_s
        stages = {"dispatch": max(0.0, turn.ttft_s - reply.ttft_s)}
        self._recorder.answered(reply, edge=edge, ttft_s=turn.ttft_s, seconds=seconds, stages=stages)
        self._recorder.counter("relay_request_retries_total").inc(turn.retries)
        facts = {"relay.pipeline": edge.pipeline, "relay.agent": edge.agent}
        arrived = time.perf_counter() - seconds
        trace = self._tracing.start(
            f"agent {edge.agent}", {"traceparent": self._run.traceparent}, facts, arrived=arrived
        )
        trace.answered(reply, stages, arrived=arrived, seconds=seconds)
        trace.end()

    def gated(
        self,
        edge: Edge,
        asked: str,
        before: EdgeState | None,
        after: EdgeState,
        found: Check | None,
        *,
        checked: bool,
    ) -> None:
        """See executor.Observer."""
        if checked:
            self._recorder.checked(edge, asked, found)
        fell = after.falls - (before.falls if before else 0)
        rose = after.recoveries - (before.recoveries if before else 0)
        self._recorder.gated(edge, asked, rung=after.rung, fell=fell, rose=rose)

    def close(self) -> None:
        """The run is over. Idempotent."""
        self._run.end()
        self._tracing.close()
