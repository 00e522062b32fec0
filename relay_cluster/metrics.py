"""Every metric that relay_cluster exports, in one table: name, type, unit, labels, buckets, what it says.

    TABLE -> recording.py  what requests, pulls and checks came to, as they happen
          -> collecting.py what workers and directory shards are asked for at a scrape
          -> grafana.py, docs/observability.md, the tests of configs/prometheus

Names follow Prometheus: base units, `_total`, `_seconds`, `_bytes`; times that vLLM has too are called as
there. No label carries an id of a request, a prompt, or a tenant in plain: see `recording.py` for how labels
are bounded. This module knows how nothing is measured, and needs no client library.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from transport.latency import BOUNDS_S
from transport.types import Outcome

PREFIX: Final = "relay_"
OTHER: Final = "other"
"""What label values beyond a bound are called."""


class Kind(StrEnum):
    """Type of a metric, as Prometheus calls it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Group(StrEnum):
    """Who knows it. The values are headings of the documentation."""

    REQUESTS = "Requests"
    REUSE = "Reuse"
    TRANSFERS = "Transfers"
    QUALITY = "Quality gate"
    SERVICE = "The HTTP service"
    WORKERS = "Workers"
    MEMORY = "Memory of workers"
    DIRECTORY = "Directory"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as Prometheus sees it.
        unit: of its values; of a histogram, of what is observed.
        help: one sentence.
        labels: names, in the order in which values are given.
        buckets: upper bounds of a histogram, without +Inf.
    """

    name: str
    kind: Kind
    group: Group
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """Names that a query may use."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


REQUEST_S: Final = (
    0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
STAGE_S: Final = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
PULL_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
TOKEN_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
MATCH_S: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
BYTES_PER_S: Final = (1e6, 1e7, 5e7, 1e8, 2.5e8, 5e8, 1e9, 2.5e9, 5e9, 1e10, 2.5e10, 5e10, 1e11)
RATIO: Final = (0.25, 0.5, 0.75, 0.9, 1.1, 1.33, 2.0, 4.0)
NATS: Final = (0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SHARE: Final = (0.5, 0.7, 0.8, 0.87, 0.9, 0.95, 0.99, 1.0)

FALLBACK_REASONS: Final = (
    *(outcome.value for outcome in Outcome if outcome is not Outcome.PULLED),
    "not_found",
    "arena_full",
    "directory_down",
    "transport_error",
    "not_promoted",
)
"""Why a span was computed although its KV should exist; see docs/operations.md."""
OUTCOMES: Final = ("dense", "prefix", "relayed", "anchored", "fallback")
"""How a prompt was prefilled: in full; after an exact prefix; with relayed spans, repaired or corrected by
anchors; with spans computed that should have been relayed."""
STAGES: Final = (
    "wait", "match", "dispatch",
    "queue", "lookup", "lease", "pull", "rotate", "rectify", "prefill", "first_token",
)  # fmt: skip
"""Parts of the time to first token: in the service; between service and worker; in the worker."""

_EDGE = ("model", "pipeline", "agent_edge")
_ROUTE = ("src_node", "dst_node", "backend")
_AT = ("worker", "node")

C, G, H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
_REQUESTS, _REUSE, _PULLS, _GATE = Group.REQUESTS, Group.REUSE, Group.TRANSFERS, Group.QUALITY
_SERVICE, _WORKERS, _MEMORY, _DIRECTORY = Group.SERVICE, Group.WORKERS, Group.MEMORY, Group.DIRECTORY

# fmt: off
TABLE: Final = (
    Metric("relay_time_to_first_token_seconds", H, _REQUESTS, "seconds",
           "From a request to its first token, by how its prompt was prefilled.",
           (*_EDGE, "method", "outcome"), REQUEST_S),
    Metric("relay_full_prefill_estimate_seconds", H, _REQUESTS, "seconds",
           "What the time to first token would have been with full prefill, predicted by the worker "
           "from its own "
           "prefills; of relayed requests.", (*_EDGE, "method"), REQUEST_S),
    Metric("relay_request_seconds", H, _REQUESTS, "seconds",
           "From a request to the end of its answer.", (*_EDGE, "method"), REQUEST_S),
    Metric("relay_stage_seconds", H, _REQUESTS, "seconds",
           "Parts of the time to first token; those of one request add up to it.", ("model",
           "stage"), STAGE_S),
    Metric("relay_time_per_output_token_seconds", H, _REQUESTS, "seconds",
           "Mean time between the tokens of an answer: the inverse of decode speed.", ("model",), TOKEN_S),
    Metric("relay_answer_tokens_total", C, _REQUESTS, "tokens", "Tokens drawn.", ("model",)),
    Metric("relay_request_retries_total", C, _REQUESTS, "requests",
           "Requests started again since their worker had died or was frozen."),

    Metric("relay_prompt_tokens_total", C, _REUSE, "tokens",
           "Prompt tokens by where their KV came from: relayed, prefix (exact local cache), prepared (while "
           "upstream agents still wrote), or computed.",
           (*_EDGE, "source")),
    Metric("relay_entries_total", C, _REUSE, "(token, layer) entries",
           "Entries of prompts: fresh (of tokens that no segment covers), recomputed or reused (of "
           "relayed spans).",
           ("model", "method", "kind")),
    Metric("relay_healed_entries_total", C, _REUSE, "(token, layer) entries",
           "Stale entries that were made exact after the first token.", ("model",)),
    Metric("relay_fallbacks_total", C, _REUSE, "spans",
           "Spans computed although their KV should exist, by reason: every one fails closed.", ("model",
           "reason")),
    Metric("relay_fallback_tokens_total", C, _REUSE, "tokens",
           "Tokens of these spans.", ("model", "reason")),
    Metric("relay_break_even_spans_total", C, _REUSE, "spans",
           "Spans that might be relayed, by what was decided: relay or compute.", ("model", "decision")),
    Metric("relay_break_even_mispredictions_total", C, _REUSE, "spans",
           "Relayed spans that took longer than computing them was predicted to take.", ("model",)),
    Metric("relay_break_even_seconds_total", C, _REUSE, "seconds",
           "Of relayed spans that were predicted: predicted_relay, actual_relay, predicted_prefill.",
           ("model", "kind")),
    Metric("relay_break_even_error_ratio", H, _REUSE, "ratio",
           "Actual over predicted seconds of relaying a span; 1 is a perfect prediction.", ("model",), RATIO),

    Metric("relay_transfers_total", C, _PULLS, "pulls",
           "Pulls by how they ended.", (*_ROUTE, "outcome")),
    Metric("relay_transfer_seconds", H, _PULLS, "seconds",
           "Reading and verifying, of pulls that succeeded.", _ROUTE, PULL_S),
    Metric("relay_transfer_bytes_total", C, _PULLS, "bytes", "Payload that was pulled.", _ROUTE),
    Metric("relay_transfer_blocks_total", C, _PULLS, "blocks",
           "Blocks that were pulled; a block is one descriptor.", _ROUTE),
    Metric("relay_transfer_bytes_per_second", H, _PULLS, "bytes per second",
           "Bandwidth of single pulls, verification included.", _ROUTE, BYTES_PER_S),
    Metric("relay_pull_exposed_seconds", H, _PULLS, "seconds",
           "Per request with pulls: for how long it waited for bytes.", ("model",), PULL_S),
    Metric("relay_pull_hidden_seconds", H, _PULLS, "seconds",
           "Per request with pulls: for how long bytes travelled behind computing.", ("model",), PULL_S),

    Metric("relay_quality_rung", G, _GATE, "rung",
           "Which rung of its ladder an edge uses: 0 is the method that was asked for, the last is "
           "full prefill.",
           (*_EDGE, "method")),
    Metric("relay_quality_checks_total", C, _GATE, "checks",
           "Shadow checks against full prefill, by whether they came to a verdict: judged or skipped.",
           (*_EDGE, "method", "outcome")),
    Metric("relay_quality_demotions_total", C, _GATE, "moves",
           "Moves to a stricter method, since the error budget was exceeded.", (*_EDGE, "method")),
    Metric("relay_quality_recoveries_total", C, _GATE, "moves",
           "Moves back to a looser one.", (*_EDGE, "method")),
    Metric("relay_quality_kl_nats", H, _GATE, "nats",
           "Mean KL(full prefill || method) of a checked answer's first tokens.", (*_EDGE, "method"), NATS),
    Metric("relay_quality_top1_agreement_ratio", H, _GATE, "ratio",
           "Share of a checked answer's first tokens with the same most likely token.",
           (*_EDGE, "method"), SHARE),

    Metric("relay_requests_total", C, _SERVICE, "requests",
           "Requests by endpoint and HTTP status.", ("endpoint", "status")),
    Metric("relay_request_errors_total", C, _SERVICE, "requests",
           "Requests that ended in an error, by its code.", ("code",)),
    Metric("relay_cancelled_requests_total", C, _SERVICE, "requests", "Requests whose client went away."),
    Metric("relay_tenant_requests_total", C, _SERVICE, "requests",
           "Requests that were let in, by tenant (a keyed hash of its name).", ("tenant",)),
    Metric("relay_tenant_tokens_total", C, _SERVICE, "tokens",
           "Tokens of answered requests by tenant (a keyed hash of its name): prompt or answer.",
           ("tenant", "kind")),
    Metric("relay_requests_running", G, _SERVICE, "requests", "Requests that run."),
    Metric("relay_requests_waiting", G, _SERVICE, "requests", "Requests in the queue."),
    Metric("relay_requests_expected", G, _SERVICE, "requests",
           "Requests that are expected now, whose prompts are prepared."),
    Metric("relay_expected_requests_total", C, _SERVICE, "requests",
           "Requests that were expected (asked: by a hint of the client; learnt: from earlier ones), by what "
           "became of them: came, expired, cancelled (the answer was not finished), displaced or failed.",
           ("source", "outcome")),
    Metric("relay_matching_seconds", H, _SERVICE, "seconds",
           "Finding remembered texts in a prompt.", (), MATCH_S),
    Metric("relay_found_texts_total", C, _SERVICE, "texts",
           "Remembered texts found in prompts: response or input.", ("kind",)),
    Metric("relay_remembered_texts", G, _SERVICE, "texts", "Texts remembered."),
    Metric("relay_remembered_bytes", G, _SERVICE, "bytes", "Memory for them, estimated."),

    Metric("relay_worker_up", G, _WORKERS, "0 or 1",
           "Whether a worker answered this scrape. Of one that did not, nothing below is there.",
           (*_AT, "model")),
    Metric("relay_worker_running_sequences", G, _WORKERS, "requests",
           "Requests that a worker computes.", _AT),
    Metric("relay_worker_kv_cache_blocks", G, _WORKERS, "blocks",
           "Blocks of the cache of running requests: free or used.", (*_AT, "state")),
    Metric("relay_worker_prefix_cache_bytes", G, _WORKERS, "bytes", "The exact local prefix cache.", _AT),
    Metric("relay_worker_anchor_bytes", G, _WORKERS, "bytes", "The anchor pool of kvcomm.", _AT),
    Metric("relay_engine_passes_total", C, _WORKERS, "passes", "Passes over the weights.", _AT),
    Metric("relay_engine_rows_total", C, _WORKERS, "rows", "Rows of these passes, of all requests.", _AT),
    Metric("relay_prepared_tokens_total", C, _WORKERS, "tokens",
           "Tokens computed before their request came: used, or wasted.", (*_AT, "outcome")),
    Metric("relay_open_answers", G, _WORKERS, "answers",
           "Answers that others may follow while a worker writes them.", _AT),
    Metric("relay_opened_answers_total", C, _WORKERS, "answers",
           "Such answers by how they ended: closed, or why readers were told to forget them.",
           (*_AT, "outcome")),
    Metric("relay_followed_answers", G, _WORKERS, "answers",
           "Answers of other workers that a worker pulls while they are written.", _AT),
    Metric("relay_following_ended_total", C, _WORKERS, "answers",
           "Answers that were followed no longer before they ended.", (*_AT, "reason")),
    Metric("relay_pulled_ahead_bytes_total", C, _WORKERS, "bytes",
           "Pulled while the answer was written.", _AT),
    Metric("relay_pulled_ahead_blocks_total", C, _WORKERS, "blocks",
           "Blocks pulled while the answer was written: used, or wasted.", (*_AT, "outcome")),
    Metric("relay_transport_pulls_total", C, _WORKERS, "pulls",
           "Pulls by backend, at the reader.", (*_AT, "backend")),
    Metric("relay_transport_downgrades_total", C, _WORKERS, "pulls",
           "Pulls over a slower backend than both ends should have.", _AT),
    Metric("relay_transport_failovers_total", C, _WORKERS, "pulls",
           "Pulls for which a backend did not reach the peer and the next one was tried.", _AT),

    Metric("relay_arena_blocks", G, _MEMORY, "blocks",
           "Blocks of the arena: free, held (published), open (of answers that are written, here or "
           "elsewhere), landing (pulls under way), doomed (evicted, but read here) or quarantined "
           "(after a timed-out pull).", (*_AT, "state")),
    Metric("relay_arena_block_bytes", G, _MEMORY, "bytes", "Payload of one block.", _AT),
    Metric("relay_tier_bytes", G, _MEMORY, "bytes",
           "Segments in a tier: arena, or spilled to host, queued or disk.", (*_AT, "tier")),
    Metric("relay_tier_budget_bytes", G, _MEMORY, "bytes", "What the tier may hold.", (*_AT, "tier")),
    Metric("relay_tier_segments", G, _MEMORY, "segments", "Segments in a tier.", (*_AT, "tier")),
    Metric("relay_worker_pins", G, _MEMORY, "segments", "Segments of its own that a worker reads.", _AT),
    Metric("relay_worker_leases", G, _MEMORY, "leases", "Leases that a worker has as a reader.", _AT),
    Metric("relay_evictions_total", C, _MEMORY, "segments",
           "Segments that left a tier: lru, consumed (all readers have read it), operator, spill.",
           (*_AT, "cause")),
    Metric("relay_spills_total", C, _MEMORY, "segments", "Segments taken into the spill.", _AT),
    Metric("relay_promotions_total", C, _MEMORY, "segments", "Segments brought back from it.", _AT),
    Metric("relay_not_promoted_total", C, _MEMORY, "segments",
           "Spilled segments that were asked for and not brought back.", (*_AT, "reason")),
    Metric("relay_spill_lost_total", C, _MEMORY, "segments", "Spilled segments given up.", (*_AT, "reason")),
    Metric("relay_spill_disk_fault", G, _MEMORY, "0 or 1",
           "Whether the spill's disk does not work now.", _AT),
    Metric("relay_publish_backpressure_total", C, _MEMORY, "segments",
           "Publishes given up since the arena was full of what is leased or in use.", _AT),
    Metric("relay_unpublished_total", C, _MEMORY, "segments",
           "Answers and inputs that were not published.", (*_AT, "reason")),

    Metric("relay_directory_shard_up", G, _DIRECTORY, "0 or 1",
           "Whether a shard answered this scrape.", ("shard",)),
    Metric("relay_directory_segments", G, _DIRECTORY, "copies",
           "Copies of segments that a shard knows.", ("shard",)),
    Metric("relay_directory_segment_bytes", G, _DIRECTORY, "bytes", "Their payload.", ("shard",)),
    Metric("relay_directory_memory_bytes", G, _DIRECTORY, "bytes",
           "By how much the shard's process has grown since its start.", ("shard",)),
    Metric("relay_directory_owners", G, _DIRECTORY, "workers",
           "Owners that announce themselves.", ("shard",)),
    Metric("relay_directory_fenced_incarnations", G, _DIRECTORY, "workers",
           "Earlier lives of workers that are refused.", ("shard",)),
    Metric("relay_directory_dropped_owners_total", C, _DIRECTORY, "workers",
           "Owners dropped for their silence.", ("shard",)),
    Metric("relay_directory_leases", G, _DIRECTORY, "leases",
           "Readers' leases by age: up to 1, 10 or 60 s, or more.", ("shard", "age")),
    Metric("relay_directory_open_segments", G, _DIRECTORY, "segments",
           "Answers that are written, as a shard knows them.", ("shard",)),
    Metric("relay_directory_watches", G, _DIRECTORY, "calls",
           "Readers that wait at a shard for news of them.", ("shard",)),
    Metric("relay_directory_open_gaps_total", C, _DIRECTORY, "calls",
           "News before which a shard had missed some, and got them again.", ("shard",)),
    Metric("relay_directory_open_refused_total", C, _DIRECTORY, "calls",
           "News of answers that a shard refused: too many or too long ones.", ("shard",)),
    Metric("relay_directory_pins", G, _DIRECTORY, "leases", "Operators' pins.", ("shard",)),
    Metric("relay_directory_expired_leases_total", C, _DIRECTORY, "leases",
           "Leases that ended by their time, not by their reader.", ("shard",)),
    Metric("relay_directory_refused_leases_total", C, _DIRECTORY, "leases",
           "Leases and pins refused, since their holder had too many.", ("shard",)),
    Metric("relay_directory_operation_seconds", H, _DIRECTORY, "seconds",
           "Calls of a worker to the shards, by operation; those that nobody answered take the "
           "whole deadline.",
           (*_AT, "operation"), BOUNDS_S),
    Metric("relay_directory_call_failures_total", C, _DIRECTORY, "calls",
           "Calls of a worker that a shard did not answer in time.", _AT),
    Metric("relay_directory_republished_total", C, _DIRECTORY, "segments",
           "Segments that a worker published again, since a shard had restarted or keys had moved.", _AT),
)
# fmt: on

BY_NAME: Final = {metric.name: metric for metric in TABLE}


def series_names() -> frozenset[str]:
    """Every name that a query may use."""
    return frozenset(name for metric in TABLE for name in metric.series)


__all__ = ["BY_NAME", "OTHER", "TABLE", "Group", "Kind", "Metric", "series_names"]
