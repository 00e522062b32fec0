"""What the service counts, for Prometheus. No request ids, no tenants, no text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from workers.messages import Reply

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_MATCHING_S = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)


class Metrics:
    """One service's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "relay_requests", "Requests by HTTP status.", ["endpoint", "status"], registry=registry
        )
        self.ttft = Histogram(
            "relay_time_to_first_token_seconds",
            "From the request to its first token, waiting in the queue included.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "relay_request_seconds",
            "From the request to its end.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.matching = Histogram(
            "relay_matching_seconds",
            "Finding remembered texts in a prompt.",
            buckets=_MATCHING_S,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "relay_prompt_tokens",
            "Prompt tokens: relayed, from the exact prefix cache, or computed.",
            ["model", "source"],
            registry=registry,
        )
        self.answer_tokens = Counter("relay_answer_tokens", "Tokens drawn.", ["model"], registry=registry)
        self.found = Counter(
            "relay_found_texts", "Remembered texts found in prompts.", ["kind"], registry=registry
        )
        self.fallbacks = Counter(
            "relay_fallbacks",
            "Slots computed although they should be reusable.",
            ["reason"],
            registry=registry,
        )
        self.cancelled = Counter(
            "relay_cancelled_requests", "Requests whose client went away.", registry=registry
        )
        self.running = Gauge("relay_requests_running", "Requests that run.", registry=registry)
        self.waiting = Gauge("relay_requests_waiting", "Requests in the queue.", registry=registry)
        self.texts = Gauge("relay_remembered_texts", "Texts remembered.", registry=registry)
        self.nbytes = Gauge("relay_remembered_bytes", "Memory for them, estimated.", registry=registry)

    def count(self, model: str, reply: Reply) -> None:
        """An answered request."""
        fresh = reply.fresh_tokens - reply.prefix_tokens
        self.prompt_tokens.labels(model, "relayed").inc(reply.relayed_tokens)
        self.prompt_tokens.labels(model, "prefix").inc(reply.prefix_tokens)
        self.prompt_tokens.labels(model, "computed").inc(fresh)
        self.answer_tokens.labels(model).inc(len(reply.token_ids))
        for fallback in reply.fallbacks:
            self.fallbacks.labels(fallback.reason).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
