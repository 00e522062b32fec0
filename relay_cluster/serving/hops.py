"""The parts of a time to first token, in the order in which they happen: names, groups, and what each means.

One table for the live page, `relay top` and the words of `explaining.py`. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from workers.messages import StageTimes

Group = Literal["wait", "find", "move", "compute"]

GROUPS: Mapping[Group, str] = {
    "wait": "waiting",
    "find": "finding and asking",
    "move": "moving KV",
    "compute": "computing",
}


class Hop(NamedTuple):
    """A part of the time to first token.

    Attributes:
        name: key in JSON; label: for people.
        what: what happens in it. slow: what to look at when it takes long.
    """

    name: str
    label: str
    group: Group
    what: str
    slow: str


HOPS: tuple[Hop, ...] = (
    Hop(
        "place",
        "service queue",
        "wait",
        "waiting in the service for a free place",
        "All places were taken: add workers, or raise worker.max_sequences where memory allows it.",
    ),
    Hop(
        "matching",
        "matching",
        "find",
        "finding remembered texts in the prompt",
        "The prompt is very long, or the service process has too little CPU.",
    ),
    Hop(
        "dispatch",
        "dispatch",
        "wait",
        "the call to the worker and back, and earlier tries on workers that were lost",
        "Ray, the network to the worker's node, or the service process is busy; or a worker died on the way.",
    ),
    Hop(
        "queue",
        "worker queue",
        "wait",
        "waiting in the worker for cache memory and for steps of other requests",
        "The worker computes for others: add workers, or raise worker.cache_tokens.",
    ),
    Hop(
        "lookup",
        "lookup",
        "find",
        "asking the directory who holds the segments",
        "A directory shard is slow or down: see the shards on this page.",
    ),
    Hop(
        "lease",
        "lease",
        "find",
        "pinning the segments at their owners",
        "A directory shard or an owner answers slowly.",
    ),
    Hop(
        "pull",
        "pull",
        "move",
        "waiting for bytes; those that travel behind computing cost nothing",
        "The link or the owner is slow: compare its p50 and p95, and which backend moved the bytes.",
    ),
    Hop(
        "rotate",
        "rotate",
        "compute",
        "putting keys at their new positions into the cache",
        "Memory bandwidth of the worker; it grows with relayed tokens.",
    ),
    Hop(
        "rectify",
        "rectify",
        "compute",
        "recomputing the selected entries of relayed spans",
        "The method recomputes much, or the worker's device is busy; relay.reuse chooses another method.",
    ),
    Hop(
        "prefill",
        "prefill",
        "compute",
        "computing the tokens that nothing covers",
        "Much of the prompt was not relayed: see its spans and fallbacks.",
    ),
    Hop(
        "first_token",
        "first token",
        "compute",
        "drawing the first token from the logits",
        "The worker's device is busy.",
    ),
)
BY_NAME: Mapping[str, Hop] = {hop.name: hop for hop in HOPS}
IN_WORKER = ("queue", "lookup", "lease", "pull", "rotate", "rectify", "prefill", "first_token")
"""Those that a worker tells: StageTimes' fields."""


def durations(
    stages: StageTimes, *, ttft_s: float, worker_ttft_s: float, queue_s: float, match_s: float
) -> dict[str, float]:
    """Hop -> seconds, in order; together they are `ttft_s`, up to rounding.

    Args:
        stages: of the worker. worker_ttft_s: their sum.
        ttft_s: from the request's arrival at the service. queue_s, match_s: before the worker was asked.
    """
    dispatch_s = max(0.0, ttft_s - queue_s - match_s - worker_ttft_s)
    inside = {name: float(getattr(stages, f"{name}_s")) for name in IN_WORKER}
    return {"place": queue_s, "matching": match_s, "dispatch": dispatch_s, **inside}
