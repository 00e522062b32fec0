"""What workers and directory shards say of themselves, without anybody waiting for those that do not answer.

    refresh (one at a time) -> every worker is asked for its counters, every shard for its own
    a worker that leaves a question unanswered for some seconds is "silent"; it is not asked another one

Readers get the last picture at once, with its age. Only this module asks Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import ray
from ray.exceptions import RayError

from relay_cluster.cluster import Cluster
from relay_cluster.gate import Edge, EdgeState
from transport.directory.operate import DirectoryOperator
from transport.errors import RelayError
from transport.types import WorkerId
from workers.actor import WorkerInfo

log = logging.getLogger(__name__)

ASK_TIMEOUT_S: Final = 1.0
"""How long a picture waits for workers."""
SILENT_S: Final = 3.0
"""What a worker may take to answer before it is shown as silent: one that computes on few cores is slow."""
FRESH_S: Final = 0.8
"""A picture that is younger is not taken again."""
_SHARDS_TIMEOUT_S: Final = 4.0
"""For all shards together: an operator looks for their list first."""
FIRST_TIMEOUT_S: Final = 2.5
"""How long the very first reader waits for a picture."""


class Overview:
    """Pictures of one cluster.

    Args:
        cluster: whose workers and shards are asked; it may have none yet.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._thread = ThreadPoolExecutor(2, thread_name_prefix="overview")
        self._asked: dict[WorkerId, tuple[float, Any, Any]] = {}
        self._operator: DirectoryOperator | None = None
        self._workers: dict[str, dict[str, Any]] = {}
        self._shards: list[dict[str, Any]] = []
        self._gates: list[dict[str, Any]] = []
        self._taken_at: float | None = None
        self._task: asyncio.Future[None] | None = None

    async def __call__(self) -> dict[str, Any]:
        """The last picture, at most ASK_TIMEOUT_S older than it must be; age_s is None before the first."""
        old = self._taken_at is None or time.monotonic() - self._taken_at > FRESH_S
        if old and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().run_in_executor(self._thread, self._take)
        if self._task is not None and not self._task.done():
            timeout_s = FIRST_TIMEOUT_S if self._taken_at is None else ASK_TIMEOUT_S / 4
            await asyncio.wait({self._task}, timeout=timeout_s)
        age_s = None if self._taken_at is None else time.monotonic() - self._taken_at
        return {
            "age_s": age_s,
            "workers": list(self._workers.values()),
            "shards": self._shards,
            "gates": self._gates,
        }

    def close(self) -> None:
        """Let the threads go; a question to a silent worker ends at its deadline. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> None:
        shards = self._thread.submit(self._ask_shards)
        try:
            self._workers = self._ask_workers()
            self._shards = shards.result(timeout=_SHARDS_TIMEOUT_S)
            self._gates = [_gate(*row) for row in self._cluster.gate_states()]
        except TimeoutError:
            shards.cancel()
            log.warning("the directory's shards did not answer within %.0f s", _SHARDS_TIMEOUT_S)
        except Exception:  # whatever Ray raises while it ends: the last picture stays
            shards.cancel()
            log.exception("no picture of the cluster for the live page")
        self._taken_at = time.monotonic()

    def _ask_workers(self) -> dict[str, dict[str, Any]]:
        infos, handles = self._cluster.workers, self._cluster.handles()
        for worker, handle in handles.items():
            if worker not in self._asked:
                self._asked[worker] = (time.monotonic(), handle.info.remote(), handle.stats.remote())
        self._asked = {worker: asked for worker, asked in self._asked.items() if worker in handles}
        calls = [call for _, *both in self._asked.values() for call in both]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=ASK_TIMEOUT_S)
        return {str(worker): self._told(worker, infos.get(worker)) for worker in handles}

    def _told(self, worker: WorkerId, before: WorkerInfo | None) -> dict[str, Any]:
        asked_at, *calls = self._asked[worker]
        if len(ray.wait(calls, num_returns=2, timeout=0)[0]) < 2:
            last = self._workers.get(worker, _identity(worker, before))
            late = time.monotonic() - asked_at > SILENT_S and last.get("state") != "down"
            return {**last, "state": "silent"} if late or "state" not in last else last
        del self._asked[worker]
        try:
            info, stats = ray.get(calls, timeout=ASK_TIMEOUT_S)
        except (RayError, RelayError) as error:
            log.debug("worker %s: %s", worker, error)
            return {**_identity(worker, before), "state": "down"}
        return {**_identity(worker, info), "state": "up", **_counters(stats)}

    def _ask_shards(self) -> list[dict[str, Any]]:
        try:
            if self._operator is None:
                self._operator = self._cluster.directory_operator()
            told = self._operator.stats()
            names = dict.fromkeys([*self._operator.view.shards, *told])
        except RelayError as error:
            self._operator = None
            log.debug("the directory: %s", error)
            return [{**shard, "state": "down"} for shard in self._shards]
        return [_shard(name, told.get(name)) for name in names]


def _identity(worker: WorkerId, info: WorkerInfo | None) -> dict[str, Any]:
    if info is None:
        return {"worker": str(worker)}
    return {
        "worker": str(worker),
        "node": str(info.node),
        "pid": info.pid,
        "device": info.device,
        "model": info.model,
        "incarnation": str(info.incarnation),  # more digits than JavaScript's numbers have
        "backends": list(info.backends),
    }


def _gate(edge: Edge, asked: str, state: EdgeState) -> dict[str, Any]:
    return {
        "pipeline": edge.pipeline,
        "edge": str(edge),
        "model": edge.model,
        "asked": asked,
        "method": state.method,
        "rung": state.rung,
        "rungs": len(state.ladder),
        "checks": state.checks,
        "falls": state.falls,
        "recoveries": state.recoveries,
        "reason": state.reason,
    }


def _counters(stats: dict[str, Any]) -> dict[str, Any]:
    memory = stats["memory"]
    tiers = {name: tier for name, tier in memory["tiers"].items() if tier["budget_bytes"] or tier["bytes"]}
    return {
        "running": stats["running"],
        "cache_blocks": stats["cache_blocks"],
        "free_cache_blocks": stats["free_cache_blocks"],
        "prefix_cache_bytes": stats["prefix_cache_bytes"],
        "segments": stats["segments_held"],
        "leases": memory["leases"],
        "pins": memory["pins"],
        "tiers": tiers,
        "evictions": {cause: count for cause, count in memory["evictions"].items() if count},
        "quarantined_blocks": memory["quarantined_blocks"],
    }


_SHARD_FACTS = (
    "segments",
    "owners",
    "bytes",
    "leases",
    "pins",
    "expired_leases",
    "refused_leases",
    "memory_bytes",
)


def _shard(name: str, told: dict[str, float] | None) -> dict[str, Any]:
    if told is None:
        return {"shard": name, "state": "down"}
    facts = (
        "segments",
        "owners",
        "bytes",
        "leases",
        "pins",
        "expired_leases",
        "refused_leases",
        "memory_bytes",
    )
    return {"shard": name, "state": "up", **{fact: told[fact] for fact in facts if fact in told}}
