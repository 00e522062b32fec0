"""What a simulation reports: one row per mode and number of workers, as a document and as tables.

Seconds are of simulated time. Percentiles are over all requests of all runs; throughput is that of the middle
80 % of the runs to end, so that filling and draining the cluster do not count.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from relay_cluster import __version__
from relay_cluster.simulation.run import Simulation
from relay_cluster.simulation.settings import SimulatedCluster, Workload

SCHEMA = "relay.simulate/1"
_EDGE = 0.1
"""Share of the runs at either end that throughput leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRow:
    """One mode on one number of workers.

    Attributes:
        seconds: simulated, from the first run's beginning to the last one's end.
        runs_per_s, answer_tokens_per_s: throughput.
        ttft_s_*: from the moment that a request could be made to its first token. last_ttft_s_p50: of the
            pipeline's last agent. wall_s_*: of whole runs.
        queue_s_*: waiting for a slot and cache memory. directory_s_p95: for leases. pull_s_p95: for bytes.
        wire_bytes: pulled by kind of link ("local": held by the reader itself, nothing moved).
        timed_out: pulls that were given up at transport.pull_timeout_s, and their text computed.
        link_use: kind -> (mean, highest) share of time for which a port was busy.
        directory_calls_per_s: without heartbeats_per_s. directory_use: (mean, highest) of the shards,
            heartbeats included. directory_wait_s: in a shard's queue, per call.
        arena_bytes_highest: most that one worker held, of arena_bytes_limit.
        evictions, unpublished: segments that made room, and those that found none.
        worker_use: share of time for which workers computed.
        relayed_tokens, prepared_tokens, prompt_tokens: of all prompts. wasted_tokens: prepared in vain.
    """

    mode: str
    workers: int
    runs: int
    seconds: float
    runs_per_s: float
    answer_tokens_per_s: float
    ttft_s_p50: float
    ttft_s_p95: float
    ttft_s_p99: float
    last_ttft_s_p50: float
    wall_s_p50: float
    wall_s_p95: float
    queue_s_p50: float
    queue_s_p95: float
    queue_s_p99: float
    directory_s_p95: float
    pull_s_p95: float
    wire_bytes: Mapping[str, int]
    timed_out: int
    link_use: Mapping[str, tuple[float, float]]
    directory_calls_per_s: float
    heartbeats_per_s: float
    directory_use: tuple[float, float]
    directory_wait_s: float
    arena_bytes_highest: int
    arena_bytes_limit: int
    evictions: int
    unpublished: int
    worker_use: float
    prompt_tokens: int
    relayed_tokens: int
    prepared_tokens: int
    wasted_tokens: int


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least a share `q` of them does not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else 0.0


def row_of(simulation: Simulation) -> SimulatedRow:
    """What a simulation that has run says."""
    answers, finished = simulation.answers, simulation.finished
    seconds = simulation.env.now
    ttft, queue = [a.ttft_s for a in answers], [a.queue_s for a in answers]
    last = simulation.pipeline.order[-1]
    walls = [f.ended - f.began for f in finished]
    rate = _throughput([f.ended for f in finished], seconds)
    fabric, directory, arenas = simulation.fabric, simulation.directory, simulation.arenas
    workers = list(simulation.workers.values())
    return SimulatedRow(
        mode=simulation.mode.text,
        workers=len(workers),
        runs=len(finished),
        seconds=seconds,
        runs_per_s=rate,
        answer_tokens_per_s=rate * sum(a.answer_tokens for a in answers) / max(1, len(finished)),
        ttft_s_p50=quantile(ttft, 0.5),
        ttft_s_p95=quantile(ttft, 0.95),
        ttft_s_p99=quantile(ttft, 0.99),
        last_ttft_s_p50=quantile([a.ttft_s for a in answers if a.agent == last], 0.5),
        wall_s_p50=quantile(walls, 0.5),
        wall_s_p95=quantile(walls, 0.95),
        queue_s_p50=quantile(queue, 0.5),
        queue_s_p95=quantile(queue, 0.95),
        queue_s_p99=quantile(queue, 0.99),
        directory_s_p95=quantile([a.directory_s for a in answers], 0.95),
        pull_s_p95=quantile([a.pull_s for a in answers], 0.95),
        wire_bytes={kind: fabric.nbytes[kind] for kind in ("local", "same_node", "remote")},
        timed_out=fabric.timed_out,
        link_use={kind: fabric.utilisation(kind, seconds) for kind in ("same_node", "remote")},
        directory_calls_per_s=sum(directory.counts.calls.values()) / seconds,
        heartbeats_per_s=directory.heartbeats_per_s,
        directory_use=directory.utilisation(seconds),
        directory_wait_s=directory.mean_wait_s(),
        arena_bytes_highest=arenas.highest,
        arena_bytes_limit=simulation.cluster.transport.arena_bytes,
        evictions=arenas.evictions,
        unpublished=arenas.refused,
        worker_use=sum(w.busy_s for w in workers) / len(workers) / seconds,
        prompt_tokens=sum(a.prompt_tokens for a in answers),
        relayed_tokens=sum(a.relayed_tokens for a in answers),
        prepared_tokens=sum(a.prepared_tokens for a in answers),
        wasted_tokens=simulation.wasted_tokens,
    )


def _throughput(ends: Sequence[float], seconds: float) -> float:
    """Runs per second."""
    ordered = sorted(ends)
    edge = int(_EDGE * len(ordered))
    middle = ordered[edge : len(ordered) - edge]
    span_s = middle[-1] - middle[0] if edge else 0.0
    return (len(middle) - 1) / span_s if span_s > 0 else len(ordered) / seconds


def document(
    cluster: SimulatedCluster, workload: Workload, rows: Sequence[SimulatedRow], seed: int
) -> dict[str, Any]:
    """Everything, as plain JSON values."""
    return {
        "schema": SCHEMA,
        "relay_cluster": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "cluster": cluster.model_dump(mode="json"),
        "workload": workload.model_dump(mode="json"),
        "rows": [_plain(dataclasses.asdict(row)) for row in rows],
    }


def write_document(found: Mapping[str, Any], path: Path) -> None:
    """Write as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    part.replace(path)


def _plain(value: Any) -> Any:
    """Six digits say enough, and the same on every machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# --- tables -------------------------------------------------------------------------------------------------


def latency_table(rows: Sequence[SimulatedRow]) -> Table:
    """Modes side by side: throughput and times."""
    table = _table("workers", "mode", "runs/s", "tokens/s", "wall p50", "TTFT p50", "p95", "p99", "queue p95")
    for row in rows:
        table.add_row(
            str(row.workers),
            row.mode,
            f"{row.runs_per_s:.3g}",
            f"{row.answer_tokens_per_s:,.0f}",
            *(_s(v) for v in (row.wall_s_p50, row.ttft_s_p50, row.ttft_s_p95, row.ttft_s_p99)),
            _s(row.queue_s_p95),
        )
    return table


def load_table(rows: Sequence[SimulatedRow]) -> Table:
    """What the shared parts carry."""
    table = _table(
        "workers",
        "mode",
        "busy",
        "near",
        "far",
        "far link",
        "dir calls/s",
        "shards",
        "arena",
        "evicted",
        "relayed",
        "ahead",
    )
    for row in rows:
        prompt = max(1, row.prompt_tokens)
        calls = row.directory_calls_per_s + row.heartbeats_per_s
        table.add_row(
            str(row.workers),
            row.mode,
            f"{row.worker_use:.0%}",
            *(_size(row.wire_bytes[kind]) for kind in ("same_node", "remote")),
            f"{row.link_use['remote'][1]:.0%}",
            f"{calls:,.0f}",
            f"{row.directory_use[1]:.0%}",
            f"{row.arena_bytes_highest / row.arena_bytes_limit:.0%}",
            f"{row.evictions:,}",
            f"{row.relayed_tokens / prompt:.0%}",
            f"{row.prepared_tokens / prompt:.0%}",
        )
    return table


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="left" if name == "mode" else "right", no_wrap=True)
    return table


def _s(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.3g} TB"
