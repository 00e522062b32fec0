"""The Grafana board, generated from the table of metrics: `python -m relay_cluster.grafana` writes
configs/grafana/relay.json, and with --check only says whether it is up to date.

    queries and panels (grafana_parts.py) -> sections -> one dashboard
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from relay_cluster.grafana_parts import (
    FILTERS,
    SOURCE,
    Query,
    count,
    gauge,
    matrix,
    mean,
    of,
    panel,
    quantile,
    quantiles,
    rate,
)

UID: Final = "relay"
TITLE: Final = "relay_cluster"
_WIDTH = 24

_TTFT = "relay_time_to_first_token_seconds"
_DENSE = "relay_full_prefill_estimate_seconds"
_SLOW = ((None, "green"), (0.1, "yellow"), (0.5, "orange"), (1.0, "red"))
_FAST = ((None, "red"), (1e8, "orange"), (1e9, "yellow"), (5e9, "green"))


def _overview() -> list[dict[str, Any]]:
    def number(title: str, expr: str, about: str, unit: str = "short") -> dict[str, Any]:
        return panel(title, [Query(expr, "", unit)], about=about, width=4, height=4, kind="stat")

    computed = rate("relay_prompt_tokens_total", where='source!="computed"')
    return [
        number("Workers up", gauge("relay_worker_up"), "Workers that answered the last scrape."),
        number("Shards up", gauge("relay_directory_shard_up"), "Directory shards that answered it."),
        number("Running", gauge("relay_requests_running"), "Requests that run."),
        number("Waiting", gauge("relay_requests_waiting"), "Requests in the queue."),
        number("Requests", count("relay_request_seconds"), "Answered per second.", "reqps"),
        number(
            "Prompt tokens not computed",
            f"{computed} / {rate('relay_prompt_tokens_total')}",
            "Relayed, or from the exact prefix cache.",
            "percentunit",
        ),
    ]


def _ttft() -> list[dict[str, Any]]:
    about = "Time to first token by how the prompt was prefilled: dense, prefix, relayed, anchored, fallback."
    by_outcome = [q for q in quantiles(_TTFT, "outcome") if not q.legend.startswith("p99")]
    by_outcome.append(of(_TTFT, quantile(0.99, _TTFT, "outcome"), "p99 {{outcome}}"))
    beside = [
        of(_TTFT, quantile(0.5, _TTFT, where='outcome="relayed"'), "relayed p50"),
        of(_DENSE, quantile(0.5, _DENSE), "full prefill of the same, estimated p50"),
    ]
    edges = [of(_TTFT, quantile(0.95, _TTFT, "pipeline", "agent_edge"), "{{pipeline}} {{agent_edge}}")]
    stages = [of("relay_stage_seconds", mean("relay_stage_seconds", "stage"), "{{stage}}")]
    per_token = quantiles("relay_time_per_output_token_seconds")
    return [
        panel("1 Time to first token by outcome", by_outcome, about=about, height=9),
        panel(
            "1 Relayed against full prefill", beside, about="What relay saves; the lower line wins.", height=9
        ),
        panel(
            "2 Stages of the time to first token",
            stages,
            about="Mean seconds a request spends in each; together they are its time to first token.",
            stacked=True,
            height=9,
        ),
        panel("1 p95 by pipeline and edge", edges, about="Which hop is slow.", height=9),
        panel("Time per output token", per_token, about="The inverse of decode speed."),
        panel(
            "Requests by outcome",
            [of(_TTFT, count(_TTFT, "outcome"), "{{outcome}}", unit="reqps")],
            about="Calls, not tokens.",
            stacked=True,
        ),
    ]


def _transfers() -> list[dict[str, Any]]:
    seconds, speed = "relay_transfer_seconds", "relay_transfer_bytes_per_second"
    route = ("src_node", "dst_node")
    slow = Query(quantile(0.95, seconds, *route), "", "s", instant=True)
    fast = Query(quantile(0.5, speed, *route), "", "binBps", instant=True)
    total, blocks = rate("relay_transfer_bytes_total"), rate("relay_transfer_blocks_total")
    return [
        matrix("3 p95 of pulls, source by destination", slow, rows=route[0], columns=route[1],
               about="Reading and verifying, of pulls that succeeded.", steps=_SLOW),
        matrix("3 Bandwidth, source by destination", fast, rows=route[0], columns=route[1],
               about="Median bandwidth of single pulls, verification included.", steps=_FAST),
        panel(
            "3 Transport in use",
            [Query(rate("relay_transfers_total", "backend"), "{{backend}}", "ops")],
            about="Pulls per second by backend. tcp where nixl or shm should be is a downgrade.",
            stacked=True,
        ),
        panel(
            "3 Downgrades and failovers",
            [
                Query(rate("relay_transport_downgrades_total", "worker"), "downgrade {{worker}}", "ops"),
                Query(rate("relay_transport_failovers_total", "worker"), "failover {{worker}}", "ops"),
            ],
            about="Pulls over a slower backend than both ends should have, and pulls that changed it midway.",
        ),
        panel(
            "4 Bytes pulled",
            [Query(rate("relay_transfer_bytes_total", *route), "{{src_node}} to {{dst_node}}", "binBps")],
            about="Payload by route.",
            stacked=True,
        ),
        panel(
            "4 Bytes per block",
            [Query(f"{total} / {blocks}", "bytes per descriptor", "bytes")],
            about="A block is one descriptor: small ones cost more per byte.",
            width=6,
        ),
        panel(
            "4 Pulls under way",
            [Query(gauge("relay_arena_blocks", "worker", where='state="landing"'), "{{worker}}", "short")],
            about="Blocks that bytes are landing in.",
            width=6,
        ),
        panel(
            "Hidden and exposed pull time",
            [
                of(name, mean(name), legend)
                for name, legend in (
                    ("relay_pull_exposed_seconds", "waited for"),
                    ("relay_pull_hidden_seconds", "behind computing"),
                )
            ],
            about="Mean per request with pulls: what it waited for, and what travelled while it computed.",
            stacked=True,
        ),
        panel(
            "Pulls by outcome",
            [Query(rate("relay_transfers_total", "outcome"), "{{outcome}}", "ops")],
            about="Everything but pulled was computed instead.",
            stacked=True,
        ),
    ]  # fmt: skip


def _reuse() -> list[dict[str, Any]]:
    recomputed = rate("relay_entries_total", where='kind="recomputed"')
    relayed = rate("relay_entries_total", where='kind=~"recomputed|reused"')
    return [
        panel(
            "5 Prompt tokens by source",
            [Query(rate("relay_prompt_tokens_total", "source"), "{{source}}", "short")],
            about="Tokens per second: relayed, from the exact prefix cache, prepared ahead, computed.",
            stacked=True,
        ),
        panel(
            "5 Entries recomputed in relayed spans",
            [Query(f"{recomputed} / {relayed}", "rectified", "percentunit")],
            about="Share of the relayed spans' (token, layer) entries.",
        ),
        panel(
            "6 Fallbacks by reason",
            [Query(rate("relay_fallbacks_total", "reason"), "{{reason}}", "ops")],
            about="Spans computed although their KV should exist: each is a dense fallback, and answers stay "
            "right. corrupt, refused and layout_mismatch are never normal.",
            stacked=True,
        ),
        panel(
            "6 Tokens of fallbacks",
            [Query(rate("relay_fallback_tokens_total", "reason"), "{{reason}}", "short")],
            about="What they cost, in tokens per second.",
            stacked=True,
        ),
    ]


def _directory() -> list[dict[str, Any]]:
    name = "relay_directory_operation_seconds"
    events = {
        "relay_directory_call_failures_total": "calls unanswered",
        "relay_directory_republished_total": "published again",
        "relay_directory_dropped_owners_total": "owners dropped",
        "relay_directory_expired_leases_total": "leases expired",
        "relay_directory_refused_leases_total": "leases refused",
    }
    return [
        panel(
            "7 p99 of directory calls",
            [of(name, quantile(0.99, name, "operation"), "{{operation}}")],
            about="As workers see them.",
        ),
        panel(
            "7 Events",
            [Query(rate(metric), legend, "ops") for metric, legend in events.items()],
            about="Shards that were silent or restarted, owners that went, leases that ran out.",
        ),
        panel(
            "7 What shards know",
            [
                Query(gauge("relay_directory_segments", "shard"), "segments, shard {{shard}}", "short"),
                Query(
                    gauge("relay_directory_fenced_incarnations", "shard"), "fenced, shard {{shard}}", "short"
                ),
            ],
            about="Copies of segments, and earlier lives of workers that are refused.",
        ),
        panel(
            "8 Leases by age",
            [Query(gauge("relay_directory_leases", "age"), "{{age}}", "short")],
            about="Readers' leases. Old ones pin memory of workers.",
            stacked=True,
        ),
    ]


def _memory() -> list[dict[str, Any]]:
    blocks, payload = (
        gauge("relay_arena_blocks", "worker", "state"),
        gauge("relay_arena_block_bytes", "worker"),
    )
    return [
        panel(
            "8 Arena",
            [Query(f"{blocks} * on (worker) group_left {payload}", "{{worker}} {{state}}", "bytes")],
            about="Registered memory by state. Quarantined above 0 for minutes is a defect.",
            stacked=True,
        ),
        panel(
            "8 Tiers",
            [Query(gauge("relay_tier_bytes", "worker", "tier"), "{{worker}} {{tier}}", "bytes")],
            about="Segments held, and spilled.",
            stacked=True,
        ),
        panel(
            "8 Evictions by cause",
            [
                Query(rate("relay_evictions_total", "cause"), "{{cause}}", "ops"),
                Query(rate("relay_publish_backpressure_total"), "not published: arena full", "ops"),
                Query(rate("relay_promotions_total"), "promoted", "ops"),
            ],
            about="lru beside not_found fallbacks: the arena is too small.",
        ),
        panel(
            "8 Caches",
            [
                Query(gauge("relay_worker_prefix_cache_bytes", "worker"), "prefix cache {{worker}}", "bytes"),
                Query(gauge("relay_worker_anchor_bytes", "worker"), "anchors {{worker}}", "bytes"),
                Query(gauge("relay_remembered_bytes"), "remembered texts", "bytes"),
            ],
            about="The exact prefix cache, kvcomm's anchors, and the service's texts.",
        ),
    ]


def _quality() -> list[dict[str, Any]]:
    edge = ("pipeline", "agent_edge")
    moves = ("demotions", "recoveries")
    checks = "relay_quality_checks_total"
    names = "{{pipeline}} {{agent_edge}}"
    return [
        panel(
            "9 Top-1 agreement with full prefill",
            [
                of(metric, mean(metric, *edge), names)
                for metric in ("relay_quality_top1_agreement_ratio",)
            ],
            about="Mean of the shadow checks: share of first tokens with the same most likely token.",
        ),
        panel(
            "9 KL from full prefill",
            [of("relay_quality_kl_nats", mean("relay_quality_kl_nats", *edge), names)],
            about="Mean of the shadow checks, in nats.",
        ),
        panel(
            "9 Gate: rung in use",
            [Query(gauge("relay_quality_rung", *edge, how="max"), names, "short")],
            about="0 is the method that was asked for; higher is stricter, the last is full prefill.",
        ),
        panel(
            "9 Gate: checks and moves",
            [
                Query(rate(checks, "outcome"), "checks {{outcome}}", "ops"),
                *(Query(rate(f"relay_quality_{move}_total"), move, "ops") for move in moves),
            ],
            about="Shadow checks, and moves between methods.",
        ),
    ]  # fmt: skip


def _break_even() -> list[dict[str, Any]]:
    wrong = rate("relay_break_even_mispredictions_total")
    relayed = rate("relay_break_even_spans_total", where='decision="relay"')
    return [
        panel(
            "10 Break-even: predicted and actual",
            [Query(rate("relay_break_even_seconds_total", "kind"), "{{kind}}", "s")],
            about="Seconds of relayed spans. actual_relay above predicted_prefill: relay did not pay.",
        ),
        panel(
            "10 Mispredictions",
            [Query(f"{wrong} / {relayed}", "slower than computing was predicted", "percentunit")],
            about="Share of relayed spans.",
            width=6,
        ),
        panel(
            "10 Decisions",
            [Query(rate("relay_break_even_spans_total", "decision"), "{{decision}}", "ops")],
            about="Spans relayed, and spans computed since that was predicted to be faster.",
            width=6,
            stacked=True,
        ),
    ]


def dashboard() -> dict[str, Any]:
    """The whole board, as Grafana imports it."""
    sections = {
        "Now": _overview(),
        "Time to first token": _ttft(),
        "Transfers": _transfers(),
        "Reuse and fallbacks": _reuse(),
        "Directory": _directory(),
        "Memory": _memory(),
        "Quality": _quality(),
        "Break-even": _break_even(),
    }
    return {
        "uid": UID,
        "title": TITLE,
        "description": "Why a hop is slow, what is reused, and whether it is right.",
        "tags": ["relay_cluster", "llm", "kv-cache"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": _laid_out(sections),
    }


def _variables() -> list[dict[str, Any]]:
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    chosen = [
        {
            "name": name,
            "label": name.capitalize(),
            "type": "query",
            "datasource": SOURCE,
            "definition": f"label_values({_TTFT}_count, {name})",
            "query": {"query": f"label_values({_TTFT}_count, {name})", "refId": name},
            "refresh": 2,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }
        for name in FILTERS
    ]
    return [source, *chosen]


def _laid_out(sections: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Panels with numbers and places, a row above each section."""
    out: list[dict[str, Any]] = []
    y = 0
    for title, panels in sections.items():
        place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        out.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place})
        x, y, tallest = 0, y + 1, 0
        for one in panels:
            size = one["gridPos"]
            if x + size["w"] > _WIDTH:
                x, y, tallest = 0, y + tallest, 0
            out.append({**one, "gridPos": {"x": x, "y": y, **size}})
            x, tallest = x + size["w"], max(tallest, size["h"])
        y += tallest
    return [{"id": number, **one} for number, one in enumerate(out, start=1)]


def text() -> str:
    """The board as it is kept in the repository."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the board, or with --check only compare it; 1 where it is out of date."""
    path = Path(__file__).resolve().parent.parent / "configs" / "grafana" / "relay.json"
    if "--check" in arguments:
        return int(not path.is_file() or path.read_text("utf-8") != text())
    path.write_text(text(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
