"""What many requests come to: percentiles, links, reasons. Pure: entries in, plain values out."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from relay_cluster.serving.explaining import REASONS
from relay_cluster.serving.recent import Entry, Pull

WINDOW_S = 900.0
"""Older requests are listed, but not summed up."""
RATE_WINDOW_S = 60.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """Linearly between the two nearest values, as NumPy does by default; None of no values.

    Args:
        share: 0 to 1.
    """
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def totals(entries: Sequence[Entry], now: float, up_s: float, *, full: bool) -> dict[str, Any]:
    """Of requests that ended, within the window.

    Args:
        entries: newest first. now: Unix time. up_s: since when there are any.
        full: whether older ones have been forgotten, so that the list may not reach through the window.
    """
    reach_s = min(up_s, now - entries[-1].at) if full and entries else up_s
    answered = [e for e in entries if e.outcome == "ok"]
    ttfts = [e.ttft_s for e in answered if e.ttft_s is not None]
    gains = [
        e.full_ttft_s / e.ttft_s for e in answered if e.basis == "predicted" and e.full_ttft_s and e.ttft_s
    ]
    prompt = sum(e.prompt_tokens for e in answered)
    span_s = max(1.0, min(RATE_WINDOW_S, reach_s))
    return {
        "window_s": min(WINDOW_S, reach_s),
        "requests": len(entries),
        "per_s": sum(now - e.at - (e.total_s or 0.0) <= span_s for e in entries) / span_s,
        "ttft_p50_s": percentile(ttfts, 0.5),
        "ttft_p95_s": percentile(ttfts, 0.95),
        "ttft_p99_s": percentile(ttfts, 0.99),
        "gain_p50": statistics.median(gains) if gains else None,
        "gains": len(gains),
        "prompt_tokens": prompt,
        "relayed_tokens": sum(e.relayed_tokens for e in answered),
        "prefix_tokens": sum(e.prefix_tokens for e in answered),
        "computed_tokens": sum(e.computed_tokens for e in answered),
        "fallbacks": sum(len(e.fallbacks) for e in entries),
        "errors": sum(e.outcome == "error" for e in entries),
        "cancelled": sum(e.outcome == "cancelled" for e in entries),
        "retries": sum(e.retries for e in entries),
    }


def links(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Pulls by source and destination worker, most bytes first. What a worker has itself is no pull."""
    by_ends: dict[tuple[str, str], list[Pull]] = {}
    for entry in entries:
        for pull in entry.pulls:
            if pull.source != pull.destination:
                by_ends.setdefault((pull.source, pull.destination), []).append(pull)
    rows = [_link(source, destination, pulls) for (source, destination), pulls in by_ends.items()]
    return sorted(rows, key=lambda row: (-row["bytes"], row["source"], row["destination"]))


def _link(source: str, destination: str, pulls: Sequence[Pull]) -> dict[str, Any]:
    """pulls: newest first."""
    done = [p for p in pulls if p.outcome == "pulled"]
    took = [p.seconds for p in done]
    rates = [p.bytes / p.seconds for p in done if p.bytes and p.seconds > 0]
    return {
        "source": source,
        "destination": destination,
        "source_node": pulls[0].source_node,
        "destination_node": pulls[0].destination_node,
        "backends": dict(Counter(p.backend for p in done)),
        "pulls": len(pulls),
        "failed": dict(Counter(p.outcome for p in pulls if p.outcome != "pulled")),
        "bytes": sum(p.bytes for p in done),
        "p50_s": percentile(took, 0.5),
        "p95_s": percentile(took, 0.95),
        "bytes_per_s": statistics.median(rates) if rates else None,
    }


def reasons(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Fallbacks by reason, most frequent first; `latest`: the id of the last request that had one."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for span in entry.fallbacks:
            row = rows.setdefault(
                span.reason,
                {
                    "reason": span.reason,
                    "what": REASONS.get(span.reason, ""),
                    "count": 0,
                    "tokens": 0,
                    "latest": entry.id,
                    "at": entry.at,
                },
            )
            row["count"] += 1
            row["tokens"] += span.tokens or 0
    return sorted(rows.values(), key=lambda row: (-row["count"], row["reason"]))
