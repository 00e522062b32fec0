"""Why a request took as long as it did, in a few plain sentences, the most telling first.

Compares a request with others of its agent, its pulls with others between the same workers, and with full
prefill. Pure: entries in, sentences out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from relay_cluster.serving.hops import BY_NAME
from relay_cluster.serving.recent import Entry

_LEAST_OTHERS = 3
"""Fewer requests of an agent than this are no measure for another one."""
_MUCH_MORE = 1.5
_MORE_WORK = 1.3
_WORK: Mapping[str, tuple[Callable[[Entry], float], str]] = {
    "pull": (lambda e: sum(p.bytes for p in e.pulls), "bytes"),
    "rotate": (lambda e: e.relayed_tokens, "relayed tokens"),
    "rectify": (lambda e: e.relayed_tokens, "relayed tokens"),
    "prefill": (lambda e: e.computed_tokens, "computed tokens"),
}
"""What a hop's time goes up with."""
_TELLING = 0.1
"""Share of the time to first token from which on an excess is worth a sentence."""

REASONS = {
    "not_found": "its segment was no longer in the directory: evicted, or never published",
    "arena_full": "there was no room for it in the worker's arena",
    "directory_down": "no directory shard answered",
    "transport_error": "the transport failed",
    "not_promoted": "its owner could not bring it back from the spill in time",
    "stale": "its blocks had been reused in the meantime",
    "corrupt": "its bytes did not match their checksum",
    "lease_expired": "its lease ended before the bytes had come",
    "peer_gone": "the worker that held it was gone",
    "timed_out": "the pull did not end in time (transport.pull_timeout_s)",
    "layout_mismatch": "it is laid out for another model",
    "no_route": "no backend reaches the worker that held it",
    "refused": "its owner did not accept the lease",
}


class Usual(NamedTuple):
    """Medians of an agent's other requests.

    Attributes:
        seconds: of each hop. work: what a hop had to do, in tokens or bytes, where that can be told.
    """

    seconds: Mapping[str, float]
    work: Mapping[str, float]


NOTHING_USUAL = Usual({}, {})


def typical(entry: Entry, others: Iterable[Entry]) -> Usual:
    """Of other answered requests of the same agent and model; nothing where there are too few."""
    same = [
        o
        for o in others
        if o.id != entry.id and o.outcome == "ok" and (o.agent, o.model) == (entry.agent, entry.model)
    ]
    if len(same) < _LEAST_OTHERS:
        return NOTHING_USUAL
    return Usual(
        {name: statistics.median(o.hops.get(name, 0.0) for o in same) for name in entry.hops},
        {name: statistics.median(work(o) for o in same) for name, (work, _) in _WORK.items()},
    )


def explain(entry: Entry, usual: Usual) -> list[str]:
    """Sentences about an ended request. usual: what `typical` says."""
    if entry.outcome == "running":
        return ["It still runs: the parts of its time are known when it ends."]
    if entry.outcome == "cancelled":
        when = "before its first token" if entry.ttft_s is None else "while its answer was sent"
        return [f"The client went away {when}, after {seconds(entry.total_s or 0)}."]
    if entry.outcome == "error":
        why = f": {entry.detail}" if entry.detail else "."
        return [
            f"It failed with status {entry.status} ({entry.code}) after {seconds(entry.total_s or 0)}{why}"
        ]
    ttft_s = entry.ttft_s or 0.0
    lines = [_largest(entry, ttft_s), *_excesses(entry, ttft_s, usual)]
    if entry.retries:
        lines.append(f"It was started again {_times(entry.retries)}, because its worker was lost.")
    lines += [_fallback(s.slot, s.tokens, s.reason, s.detail) for s in entry.fallbacks]
    lines += _new(entry)
    lines += _cheaper(entry)
    lines.append(_beside_full(entry, ttft_s))
    return [line for line in lines if line]


def seconds(value: float) -> str:
    """For people: three digits or so, with a unit."""
    if value >= 10:
        return f"{value:.1f} s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value * 1e3:.1f} ms"


def _largest(entry: Entry, ttft_s: float) -> str:
    if not entry.hops or ttft_s <= 0:
        return ""
    name, most = max(entry.hops.items(), key=lambda item: item[1])
    hop = BY_NAME[name]
    what = hop.what
    if name == "prefill":
        what = f"computing {entry.computed_tokens:,} of {entry.prompt_tokens:,} prompt tokens"
    elif name == "pull" and entry.pulls:
        what = f"waiting for {_sources(entry)}"
    share = most / ttft_s
    return f"The largest part was {hop.label}: {seconds(most)} of {seconds(ttft_s)} ({share:.0%}), {what}."


def _sources(entry: Entry) -> str:
    names = dict.fromkeys(p.source for p in entry.pulls if p.source != p.destination)
    return f"bytes from {' and '.join(names)}" if names else "bytes"


def _excesses(entry: Entry, ttft_s: float, usual: Usual) -> Sequence[str]:
    """Parts that took much longer than they usually do for this agent."""
    found: list[tuple[float, str]] = []
    for name, usually in usual.seconds.items():
        took = entry.hops[name]
        if took > _MUCH_MORE * usually and took - usually > _TELLING * ttft_s:
            hop = BY_NAME[name]
            times = f"{took / usually:.1f}x" if usually >= 1e-4 else "far more than"
            what = f"{hop.label.capitalize()} took {times} its median for this agent ({seconds(usually)})."
            found.append((took - usually, f"{what} {_cause(entry, name, usual)}"))
    return [line for _, line in sorted(found, reverse=True)]


def _cause(entry: Entry, name: str, usual: Usual) -> str:
    """Whether the part had more to do, or was slower at it."""
    slow = BY_NAME[name].slow
    if name not in _WORK:
        return slow
    work, unit = _WORK[name]
    had, usually = work(entry), usual.work[name]
    if had > _MORE_WORK * usually:
        return f"It had more to do: {had:,.0f} {unit}, usually {usually:,.0f}. {slow}"
    busy = "the link or the owner was slow" if name == "pull" else "the worker's device was busy"
    return f"It had no more to do than usual ({had:,.0f} {unit}), so {busy}."


def _fallback(slot: str, tokens: int | None, reason: str, detail: str) -> str:
    why = REASONS.get(reason, reason)
    more = f" ({detail})" if detail else ""
    return f"Fallback: {tokens or 0:,} tokens of span {slot} were computed, since {why}{more}."


def _new(entry: Entry) -> list[str]:
    """Spans that nobody had computed before, where they are most of what was computed."""
    return [
        f"Span {s.slot}, {s.tokens:,} tokens, was seen for the first time: later requests can relay it."
        for s in entry.spans
        if s.how == "new" and s.tokens and 2 * s.tokens > entry.computed_tokens
    ]


def _cheaper(entry: Entry) -> list[str]:
    return [
        f"Span {s.slot} ({s.tokens or 0:,} tokens) was computed in place of a pull, which was predicted to "
        f"be slower ({seconds(s.predicted_relay_s)}, not {seconds(s.predicted_prefill_s)})."
        for s in entry.spans
        if s.how == "cheaper" and s.predicted_relay_s is not None and s.predicted_prefill_s is not None
    ]


def _beside_full(entry: Entry, ttft_s: float) -> str:
    full = entry.full_ttft_s
    if entry.basis == "measured":
        return "Nothing was relayed and nothing was cached: this was a full prefill."
    if full is None or ttft_s <= 0:
        return ""
    ratio = full / ttft_s
    if ratio < 1:
        return f"Full prefill would have been about as fast or faster: {seconds(full)} estimated."
    return f"With full prefill it would have been about {seconds(full)}: {ratio:.1f}x as long."


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
