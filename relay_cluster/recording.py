"""What requests, pulls and checks came to, written into metrics as they happen.

    service, `relay run` -> Recorder -> registry -> /metrics, or a port or a file of `relay run`

Labels are bounded: names that programs choose (agents, pipelines, tenants) get so many series and no more,
what is no plain name is not repeated, and tenants appear as keyed hashes. Knows nothing of HTTP or Ray.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from relay_cluster.gate import Check, Edge
from relay_cluster.metrics import (
    FALLBACK_REASONS,
    OTHER,
    TABLE,
    Group,
    Kind,
    Metric,
)
from transport.types import Outcome
from workers.messages import Reply, SlotTransfer, SpanCost
from workers.methods import METHODS

MAX_EDGES: Final = 50
"""Pairs of pipeline and agent with series of their own."""
MAX_TENANTS: Final = 100
MAX_NODES: Final = 64
UNNAMED: Final = "unnamed"
_NAME = re.compile(r"[\w.:/@+ >*-]{1,128}", re.ASCII)
_LOCAL = "local"
"""Backend of a segment that its reader holds itself: nothing travels."""
_ELSEWHERE = frozenset({Group.WORKERS, Group.MEMORY, Group.DIRECTORY})
"""Asked for at a scrape: see `collecting.py`."""


class Bounded:
    """The first `limit` values of a label; later ones are "other". Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[tuple[str, ...]] = set()
        self._lock = threading.Lock()

    def __call__(self, *values: str) -> tuple[str, ...]:
        """The values as labels may have them; they count together."""
        if not all(not value or _NAME.fullmatch(value) for value in values):
            return (OTHER,) * len(values)
        with self._lock:
            if values not in self._known and len(self._known) >= self._limit:
                return (OTHER,) * len(values)
            self._known.add(values)
        return values


class Recorder:
    """The metrics of one service or one run. Thread-safe.

    Args:
        models: names that will be asked for; their counters exist from the beginning, at 0, so that the first
            event of each is seen as an increase.
        tenant_key: of the hash under which tenants appear.
    """

    def __init__(self, models: Collection[str] = (), *, tenant_key: bytes = b"") -> None:
        self.registry = CollectorRegistry()
        self._made = {m.name: _make(m, self.registry) for m in TABLE if m.group not in _ELSEWHERE}
        self._tenant_key = tenant_key
        self._edges = Bounded(MAX_EDGES)
        self._tenants = Bounded(MAX_TENANTS)
        self._nodes = Bounded(MAX_NODES)
        for model in models:
            self._begin(model)
        self.counter("relay_request_errors_total", "queue_full")
        self.counter("relay_request_errors_total", "overloaded")

    # -- single metrics ------------------------------------------------------------------------------------

    def counter(self, name: str, *labels: str) -> Counter:
        """The counter of a name in the table, with values of its labels."""
        return cast("Counter", self._one(name, labels))

    def gauge(self, name: str, *labels: str) -> Gauge:
        """The same for a gauge."""
        return cast("Gauge", self._one(name, labels))

    def histogram(self, name: str, *labels: str) -> Histogram:
        """The same for a histogram."""
        return cast("Histogram", self._one(name, labels))

    def _one(self, name: str, labels: tuple[str, ...]) -> Any:
        made = self._made[name]
        return made.labels(*labels) if labels else made

    def collect_also(self, collector: Collector) -> None:
        """Let a scrape ask for more."""
        self.registry.register(collector)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format. May ask workers, with a deadline."""
        return generate_latest(cast("CollectorRegistry", _WithoutCreated(self.registry)))

    def tenant(self, name: str) -> str:
        """How a tenant appears in labels; "" where no keys are asked for."""
        return "" if not name else tenant_hash(name, self._tenant_key)

    # -- requests ------------------------------------------------------------------------------------------

    def answered(
        self,
        reply: Reply,
        *,
        edge: Edge,
        ttft_s: float,
        seconds: float,
        stages: Mapping[str, float],
        tenant: str | None = None,
    ) -> None:
        """A request has been answered.

        Args:
            edge: whose request it was. Its model is one of ours; the other names are bounded here.
            ttft_s, seconds: from its arrival to its first token, and to its end.
            stages: parts of ttft_s outside the worker.
            tenant: whose it was; None where there are none.
        """
        model, method = edge.model, method_name(reply)
        place = self.edge(edge)
        self.histogram("relay_time_to_first_token_seconds", *place, method, outcome(reply)).observe(ttft_s)
        self.histogram("relay_request_seconds", *place, method).observe(seconds)
        if reply.full_prefill_s is not None and reply.relayed_tokens:
            dense_s = max(0.0, ttft_s - reply.ttft_s) + reply.full_prefill_s
            self.histogram("relay_full_prefill_estimate_seconds", *place, method).observe(dense_s)
        inside = {name.removesuffix("_s"): getattr(reply.stages, name) for name in reply.stages.__slots__}
        for stage, spent in {**stages, **inside}.items():
            self.histogram("relay_stage_seconds", model, stage).observe(spent)
        answer = len(reply.token_ids)
        self.counter("relay_answer_tokens_total", model).inc(answer)
        if answer > 1 and reply.decode_s > 0:
            per_token_s = reply.decode_s / (answer - 1)
            self.histogram("relay_time_per_output_token_seconds", model).observe(per_token_s)
        self._reuse(reply, place, method)
        self._pulls(reply, model)
        if tenant is not None:
            (known,) = self._tenants(self.tenant(tenant))
            self.counter("relay_tenant_tokens_total", known, "prompt").inc(reply.prompt_tokens)
            self.counter("relay_tenant_tokens_total", known, "answer").inc(answer)

    def admitted(self, tenant: str) -> None:
        """A request with a known key has come in."""
        self.counter("relay_tenant_requests_total", *self._tenants(self.tenant(tenant))).inc()

    def edge(self, edge: Edge) -> tuple[str, str, str]:
        """Labels model, pipeline and agent_edge. An edge without a name is "unnamed"."""
        pipeline, agent_edge = self._edges(edge.pipeline, str(edge) if edge.agent else UNNAMED)
        return edge.model, pipeline, agent_edge

    def _reuse(self, reply: Reply, place: tuple[str, str, str], method: str) -> None:
        model = place[0]
        for source, tokens in (
            ("relayed", reply.relayed_tokens),
            ("prefix", reply.prefix_tokens - reply.prepared_tokens),
            ("prepared", reply.prepared_tokens),
            ("computed", reply.fresh_tokens - reply.prefix_tokens),
        ):
            self.counter("relay_prompt_tokens_total", *place, source).inc(tokens)
        for kind, entries in (
            ("fresh", reply.fresh_entries),
            ("recomputed", reply.recomputed_entries),
            ("reused", reply.relayed_entries - reply.recomputed_entries),
        ):
            self.counter("relay_entries_total", model, method, kind).inc(max(0, entries))
        self.counter("relay_healed_entries_total", model).inc(reply.healed_entries)
        for fallback in reply.fallbacks:
            reason = fallback.reason if fallback.reason in FALLBACK_REASONS else OTHER
            self.counter("relay_fallbacks_total", model, reason).inc()
            self.counter("relay_fallback_tokens_total", model, reason).inc(fallback.tokens)
        for cost in reply.span_costs:
            self._break_even(model, cost)

    def _break_even(self, model: str, cost: SpanCost) -> None:
        decision = "relay" if cost.relayed else "compute"
        self.counter("relay_break_even_spans_total", model, decision).inc()
        actual, relay, prefill = cost.actual_relay_s, cost.predicted_relay_s, cost.predicted_prefill_s
        if actual is None or relay is None or prefill is None:
            return
        for kind, spent in (
            ("actual_relay", actual),
            ("predicted_relay", relay),
            ("predicted_prefill", prefill),
        ):
            self.counter("relay_break_even_seconds_total", model, kind).inc(spent)
        if actual > prefill:
            self.counter("relay_break_even_mispredictions_total", model).inc()
        if relay > 0:
            self.histogram("relay_break_even_error_ratio", model).observe(actual / relay)

    def _pulls(self, reply: Reply, model: str) -> None:
        for pull in reply.transfers:
            self._pull(pull, reply.node)
        if reply.transfers:
            self.histogram("relay_pull_exposed_seconds", model).observe(reply.stages.pull_s)
            self.histogram("relay_pull_hidden_seconds", model).observe(reply.pull_hidden_s)

    def _pull(self, pull: SlotTransfer, node: str) -> None:
        moved = pull.transfer
        (source,), (here,) = self._nodes(pull.source_node), self._nodes(node)
        route = (source, here, moved.backend)
        self.counter("relay_transfers_total", *route, moved.outcome.value).inc()
        if moved.outcome is not Outcome.PULLED or moved.backend == _LOCAL or not moved.nbytes:
            return
        self.histogram("relay_transfer_seconds", *route).observe(moved.seconds)
        self.counter("relay_transfer_bytes_total", *route).inc(moved.nbytes)
        self.counter("relay_transfer_blocks_total", *route).inc(moved.blocks)
        if moved.seconds > 0:
            self.histogram("relay_transfer_bytes_per_second", *route).observe(moved.nbytes / moved.seconds)

    # -- the quality gate ----------------------------------------------------------------------------------

    def checked(self, edge: Edge, method: str, found: Check | None) -> None:
        """A shadow check of an edge that asks for `method`. found: None where it came to no verdict."""
        labels = (*self.edge(edge), base_name(method))
        self.counter("relay_quality_checks_total", *labels, "skipped" if found is None else "judged").inc()
        if found is not None:
            self.histogram("relay_quality_kl_nats", *labels).observe(found.kl_mean)
            self.histogram("relay_quality_top1_agreement_ratio", *labels).observe(found.top1)

    def gated(self, edge: Edge, method: str, *, rung: int, fell: int = 0, rose: int = 0) -> None:
        """The rung that an edge uses now, and how often it has moved since this was told last."""
        labels = (*self.edge(edge), base_name(method))
        self.gauge("relay_quality_rung", *labels).set(rung)
        self.counter("relay_quality_demotions_total", *labels).inc(fell)
        self.counter("relay_quality_recoveries_total", *labels).inc(rose)

    def _begin(self, model: str) -> None:
        for reason in FALLBACK_REASONS:
            self.counter("relay_fallbacks_total", model, reason)
            self.counter("relay_fallback_tokens_total", model, reason)
        for decision in ("relay", "compute"):
            self.counter("relay_break_even_spans_total", model, decision)
        for kind in ("actual_relay", "predicted_relay", "predicted_prefill"):
            self.counter("relay_break_even_seconds_total", model, kind)
        self.counter("relay_break_even_mispredictions_total", model)
        self.counter("relay_healed_entries_total", model)
        self.histogram("relay_break_even_error_ratio", model)


def tenant_hash(name: str, key: bytes) -> str:
    """A tenant's name in labels: short, and nobody without the key can check a guess."""
    return hashlib.blake2b(name.encode(), key=key[:64], digest_size=5).hexdigest()


def outcome(reply: Reply) -> str:
    """How a prompt was prefilled: one of metrics.OUTCOMES."""
    if reply.fallbacks:
        return "fallback"
    if reply.relayed_tokens:
        return "anchored" if method_name(reply) == "kvcomm" else "relayed"
    return "prefix" if reply.prefix_tokens else "dense"


def method_name(reply: Reply) -> str:
    """The reuse method that a request came to, without its parameters."""
    return base_name(reply.resolved_method or reply.method)


def base_name(method: str) -> str:
    """A method as users write it, without its parameters; presets keep theirs."""
    name, _, rest = method.strip().partition(":")
    name = name.partition("+")[0]
    if name == "auto":
        preset = rest.partition("+")[0]
        return f"auto:{preset}" if preset in ("fast", "balanced", "strict") else "auto"
    return name if name in METHODS else OTHER


def _make(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if metric.kind is Kind.HISTOGRAM:
        return Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)
    made = Counter if metric.kind is Kind.COUNTER else Gauge
    return made(metric.name, metric.help, metric.labels, registry=registry)


class _WithoutCreated:
    """A registry without the `_created` series of each counter and histogram: nobody asks for them, and they
    are a third of the page."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Family]:
        for family in self._registry.collect():
            family.samples = [s for s in family.samples if not s.name.endswith("_created")]
            yield family


__all__ = ["Bounded", "Recorder", "base_name", "method_name", "outcome", "tenant_hash"]
