"""What a scrape asks workers and directory shards for, as metrics.

    Prometheus -> Collector.collect -> poll (one deadline for all) -> samples, by the names of the table

A worker that does not answer in time has `relay_worker_up 0` and nothing else: a scrape is never held up by
it, and no number is told that may be old. Knows nothing of requests; those are in `recording.py`.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from relay_cluster.metrics import BY_NAME, Kind
from transport.latency import BOUNDS_S, Durations
from transport.types import WorkerId
from workers.actor import WorkerInfo

log = logging.getLogger(__name__)

_KEPT_S: Final = 0.5
"""Scrapes that come at the same time ask once."""
_NOT_PROMOTED: Final = ("arena_full", "not_here", "damaged", "busy", "directory_down", "refused")
_LOST: Final = ("budget", "too_large", "queue_full", "disk_error", "damaged")
_UNPUBLISHED: Final = ("arena_full", "directory_down", "fenced")
_FOLLOWED_NO_LONGER: Final = ("aborted", "refused", "room", "too_many")
_INDEX = re.compile(r"\d+$")


@dataclass(frozen=True, slots=True)
class Facts:
    """What was answered.

    Attributes:
        workers: every worker of the cluster that has come up once; its stats are None where it did not
            answer.
        shards: name -> its statistics, or None.
    """

    workers: Mapping[WorkerId, tuple[WorkerInfo, dict[str, Any] | None]]
    shards: Mapping[str, Mapping[str, float] | None]


class Samples:
    """Samples by metric, checked against the table."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}

    def put(self, name: str, value: float, *labels: str) -> None:
        """A counter's or a gauge's value."""
        self._family(name).add_metric(labels, value)

    def put_all(
        self, name: str, values: Mapping[str, float], *labels: str, known: Iterable[str] = ()
    ) -> None:
        """Values by their last label. known: of these also those that are missing, as 0, so that the first
        event is seen as an increase."""
        for key, value in {**dict.fromkeys(known, 0), **values}.items():
            self.put(name, value, *labels, key)

    def put_durations(self, name: str, found: Durations, *labels: str) -> None:
        """A histogram's counts."""
        bounds = [*(str(float(b)) for b in BOUNDS_S), "+Inf"]
        buckets = list(zip(bounds, accumulate(found.counts), strict=True))
        self._family(name).add_metric(labels, buckets, found.seconds)

    def families(self) -> Iterable[Family]:
        return self._families.values()

    def _family(self, name: str) -> Any:
        if name not in self._families:
            metric = BY_NAME[name]
            kinds: dict[Kind, Any] = {
                Kind.COUNTER: CounterMetricFamily,
                Kind.GAUGE: GaugeMetricFamily,
                Kind.HISTOGRAM: HistogramMetricFamily,
            }
            self._families[name] = kinds[metric.kind](name, metric.help, labels=metric.labels)
        return self._families[name]


class ClusterCollector(Collector):
    """For a registry: asks a cluster at each scrape.

    Args:
        poll: asks all, with a deadline of its own; see `polling.py`.
    """

    def __init__(self, poll: Callable[[], Facts]) -> None:
        self._poll = poll
        self._lock = threading.Lock()
        self._facts = Facts({}, {})
        self._asked = float("-inf")

    def describe(self) -> list[Family]:
        """Nothing: or else registering would ask."""
        return []

    def collect(self) -> Iterator[Family]:
        """Ask, and tell."""
        with self._lock:
            if time.monotonic() - self._asked > _KEPT_S:
                self._facts = self._poll()
                self._asked = time.monotonic()
            facts = self._facts
        yield from samples_of(facts).families()


def samples_of(facts: Facts) -> Samples:
    """All samples of one poll."""
    out = Samples()
    for worker, (info, stats) in facts.workers.items():
        at = (str(worker), str(info.node))
        out.put("relay_worker_up", float(stats is not None), *at, info.model)
        if stats is not None:
            _worker(out, stats, at)
            _memory(out, stats, at)
            _calls(out, stats["directory"], at)
    for name, told in facts.shards.items():
        found = _INDEX.search(name)
        shard = found[0] if found else name
        out.put("relay_directory_shard_up", float(told is not None), shard)
        if told is not None:
            _shard(out, told, shard)
    return out


def _worker(out: Samples, stats: Mapping[str, Any], at: Sequence[str]) -> None:
    free = stats["free_cache_blocks"]
    out.put("relay_worker_running_sequences", stats["running"], *at)
    blocks = {"free": free, "used": stats["cache_blocks"] - free}
    out.put_all("relay_worker_kv_cache_blocks", blocks, *at)
    out.put("relay_worker_prefix_cache_bytes", stats["prefix_cache_bytes"], *at)
    out.put("relay_worker_anchor_bytes", stats["anchor_bytes"], *at)
    out.put("relay_engine_passes_total", stats["weight_passes"], *at)
    out.put("relay_engine_rows_total", stats["rows"], *at)
    ahead = {what: stats[f"prepared_tokens_{what}"] for what in ("used", "wasted")}
    out.put_all("relay_prepared_tokens_total", ahead, *at)
    _open(out, stats["memory"]["opening"], stats["memory"]["following"], at)
    moved: Mapping[str, float] = stats["transport"]
    pulls = {name.removeprefix("pulls."): n for name, n in moved.items() if name.startswith("pulls.")}
    out.put_all("relay_transport_pulls_total", pulls, *at)
    out.put("relay_transport_downgrades_total", moved.get("downgrades", 0), *at)
    out.put("relay_transport_failovers_total", moved.get("fallbacks", 0), *at)
    out.put_all("relay_unpublished_total", stats["unpublished"], *at, known=_UNPUBLISHED)


def _open(out: Samples, opening: Mapping[str, Any], following: Mapping[str, Any], at: Sequence[str]) -> None:
    out.put("relay_open_answers", opening["live"], *at)
    out.put_all("relay_opened_answers_total", opening["ended"], *at, known=("closed",))
    out.put("relay_followed_answers", following["live"], *at)
    out.put_all("relay_following_ended_total", following["ended"], *at, known=_FOLLOWED_NO_LONGER)
    out.put("relay_pulled_ahead_bytes_total", following["pulled_bytes"], *at)
    ahead = {what: following[f"{what}_blocks"] for what in ("used", "wasted")}
    out.put_all("relay_pulled_ahead_blocks_total", ahead, *at)


def _memory(out: Samples, stats: Mapping[str, Any], at: Sequence[str]) -> None:
    arena, memory = stats["arena"], stats["memory"]
    states = {
        state: memory[f"{state}_blocks"] for state in ("held", "open", "landing", "doomed", "quarantined")
    }
    out.put_all("relay_arena_blocks", {"free": arena.free, **states}, *at)
    out.put("relay_arena_block_bytes", arena.block_nbytes, *at)
    for tier, held in memory["tiers"].items():
        out.put("relay_tier_bytes", held["bytes"], *at, tier)
        out.put("relay_tier_budget_bytes", held["budget_bytes"], *at, tier)
        out.put("relay_tier_segments", held["segments"], *at, tier)
    out.put("relay_worker_pins", memory["pins"], *at)
    out.put("relay_worker_leases", memory["leases"], *at)
    out.put_all("relay_evictions_total", memory["evictions"], *at)
    out.put("relay_spills_total", memory["spills"], *at)
    out.put("relay_promotions_total", memory["promotions"], *at)
    out.put_all("relay_not_promoted_total", memory["not_promoted"], *at, known=_NOT_PROMOTED)
    out.put_all("relay_spill_lost_total", memory["lost"], *at, known=_LOST)
    out.put("relay_spill_disk_fault", float(bool(memory["disk_fault"])), *at)
    out.put("relay_publish_backpressure_total", memory["backpressure"], *at)


def _calls(out: Samples, calls: Mapping[str, Any], at: Sequence[str]) -> None:
    for operation, found in calls["latencies"].items():
        out.put_durations("relay_directory_operation_seconds", found, *at, operation)
    out.put("relay_directory_call_failures_total", calls["failures"], *at)
    out.put("relay_directory_republished_total", calls["republished"], *at)


_OF_SHARD: Final = {
    "segments": "relay_directory_segments",
    "bytes": "relay_directory_segment_bytes",
    "memory_bytes": "relay_directory_memory_bytes",
    "owners": "relay_directory_owners",
    "fences": "relay_directory_fenced_incarnations",
    "dropped_owners": "relay_directory_dropped_owners_total",
    "open_segments": "relay_directory_open_segments",
    "watches": "relay_directory_watches",
    "open_gaps_total": "relay_directory_open_gaps_total",
    "open_refused_total": "relay_directory_open_refused_total",
    "pins": "relay_directory_pins",
    "expired_leases": "relay_directory_expired_leases_total",
    "refused_leases": "relay_directory_refused_leases_total",
}
_AGES: Final = {"le_1": "<=1s", "le_10": "<=10s", "le_60": "<=60s", "gt_60": ">60s"}


def _shard(out: Samples, told: Mapping[str, float], shard: str) -> None:
    for name, metric in _OF_SHARD.items():
        out.put(metric, told[name], shard)
    for name, age in _AGES.items():
        out.put("relay_directory_leases", told[f"leases_age_{name}"], shard, age)


__all__ = ["ClusterCollector", "Facts", "Samples", "samples_of"]
