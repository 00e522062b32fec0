"""The row of `relay bench serve`. Plain; the benchmark is in `serve.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRow:
    """One measured thing.

    Attributes:
        part: "pipelines"; "next": the second of two agents, one pipeline at a time; "overhead": of a warm
            request of one token; "matching": of remembered texts in a prompt, in this process.
        what: the agent, or "all"; of "next" whether the first agent's request had a "hint" of the second's,
            or "no hint"; of the overhead "http" (seen by the client: time to first token less the worker's)
            or "service" (from the request's arrival in the app to its first token there, less the same); of
            the matching "find" (texts alone) or "rewrite" (all that is done to a prompt).
        concurrency: pipelines at a time.
        relay: whether the service was to relay; None where that makes no difference.
        requests: that were answered; errors: that were not.
        throughput_rps, tokens_per_s: answers and tokens drawn per second of all pipelines together.
        ttft_s_p50, ttft_s_p95, ttft_s_p99: time to first token as the client saw it, in seconds.
        speedup: median of the relay-off row, or of the one without a hint / median of this one.
        prompt_tokens, cached_tokens: mean of a request; cached: relayed, prepared or in the prefix cache.
        prepared_tokens: mean of those that were computed while the first agent wrote; of "next".
        seconds_p50, seconds_p99: of the overhead, and of the matching; the latter's are processor time.
    """

    part: str
    what: str
    concurrency: int | None = None
    relay: bool | None = None
    requests: int = 0
    errors: int = 0
    throughput_rps: float | None = None
    tokens_per_s: float | None = None
    ttft_s_p50: float | None = None
    ttft_s_p95: float | None = None
    ttft_s_p99: float | None = None
    speedup: float | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None
    prepared_tokens: float | None = None
    seconds_p50: float | None = None
    seconds_p99: float | None = None


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor if factor != 1.0 else value, form)


SERVE_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("at once", lambda r: _number(r.concurrency, "d")),
    ("relay", lambda r: {None: "-", True: "on", False: "off"}[r.relay]),
    ("answers", lambda r: str(r.requests)),
    ("errors", lambda r: str(r.errors)),
    ("per s", lambda r: _number(r.throughput_rps, ".2f")),
    ("tok/s", lambda r: _number(r.tokens_per_s, ".1f")),
    ("TTFT p50", lambda r: _number(r.ttft_s_p50, ".0f", 1e3)),
    ("p95", lambda r: _number(r.ttft_s_p95, ".0f", 1e3)),
    ("p99 ms", lambda r: _number(r.ttft_s_p99, ".0f", 1e3)),
    ("off/on", lambda r: _number(r.speedup, ".2f")),
    ("prompt", lambda r: _number(r.prompt_tokens, ".0f")),
    ("cached", lambda r: _number(r.cached_tokens, ".0f")),
    ("prepared", lambda r: _number(r.prepared_tokens, ".0f")),
    ("p50", lambda r: _number(r.seconds_p50, ".2f", 1e3)),
    ("p99 ms", lambda r: _number(r.seconds_p99, ".2f", 1e3)),
)
