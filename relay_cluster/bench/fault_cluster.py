"""A cluster that a fault campaign can look into and do harm to.

It is the real one; this subclass only keeps the requests and replies that pass through it, notes when a
worker's loss was noticed, and knows the processes behind the actors. It does not know which fault comes when.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from relay_cluster.cluster import Cluster
from relay_cluster.executor import OnToken
from transport.directory.client import DirectoryClient
from transport.errors import DeadlineExceeded, DirectoryUnavailable, WorkerLost
from transport.faults import FaultSpec
from transport.types import WorkerId
from workers.actor import WorkerInfo
from workers.faults import FaultFacts
from workers.messages import Reply, Request

_RESTART_TIMEOUT_S = 120.0  # of a worker: Ray, torch, the model, on a busy machine
_CALL_TIMEOUT_S = 20.0
_POLL_S = 0.05


class WatchedCluster(Cluster):
    """See the module.

    Attributes:
        turns: (request, reply) of every request that was answered since `forget`, in order of their ends.
        losses: time.monotonic() of every WorkerLost since then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turns: list[tuple[Request, Reply]] = []
        self.losses: list[float] = []

    def forget(self) -> None:
        """Before a trial."""
        self.turns, self.losses = [], []

    def generate(
        self,
        worker: WorkerId,
        request: Request,
        on_token: OnToken,
        stop: threading.Event | None = None,
    ) -> tuple[Reply, float]:
        """See executor.Workers."""
        turns, losses = self.turns, self.losses
        try:
            reply, ttft_s = super().generate(worker, request, on_token, stop)
        except WorkerLost:
            losses.append(time.monotonic())
            raise
        turns.append((request, reply))
        return reply, ttft_s

    # -- faults --------------------------------------------------------------------------------------------

    @property
    def directory(self) -> DirectoryClient:
        """Of the driver. Raises DirectoryUnavailable before the start."""
        if self._directory is None:
            raise DirectoryUnavailable("the cluster has not been started.")
        return self._directory

    @property
    def names(self) -> tuple[WorkerId, ...]:
        """All workers, dead ones included."""
        return tuple(self._members)

    def inject(self, worker: WorkerId, spec: FaultSpec | None) -> None:
        """See workers.faults.inject. Raises RayError where the worker does not answer."""
        ray.get(self._members[worker].handle.inject.remote(spec), timeout=_CALL_TIMEOUT_S)

    def facts(self, worker: WorkerId) -> FaultFacts:
        """See workers.faults.fault_facts. Raises RayError where the worker does not answer."""
        return ray.get(self._members[worker].handle.fault_facts.remote(), timeout=_CALL_TIMEOUT_S)

    def worker_pid(self, worker: WorkerId) -> int:
        """Of its present life. Raises RayError where the worker does not answer."""
        info: WorkerInfo = ray.get(self._members[worker].handle.info.remote(), timeout=_CALL_TIMEOUT_S)
        return info.pid

    def shard_pids(self) -> list[int]:
        """Of all shards, in the order of their names. Raises RayError where one does not answer."""
        calls = [self._shards[name].__ray_call__.remote(_pid) for name in sorted(self._shards)]
        return ray.get(calls, timeout=_CALL_TIMEOUT_S)

    def await_alive(self, timeout_s: float) -> dict[WorkerId, int]:
        """Wait until every worker and shard answers; the workers' pids.

        Raises:
            DeadlineExceeded: one does not come back.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                pids = {name: self.worker_pid(name) for name in self._members}
                self.shard_pids()
            except RayError as error:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"a worker or shard is not back after {timeout_s:.0f} s: {type(error).__name__}."
                    ) from error
                time.sleep(0.2)
            else:
                return pids

    def await_life(self, worker: WorkerId, other_than: int, timeout_s: float) -> None:
        """Wait until the worker answers from another process than `other_than`, a pid.

        Raises:
            DeadlineExceeded: it does not come back.
        """
        deadline = time.monotonic() + timeout_s
        while self.await_alive(timeout_s)[worker] == other_than:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"{worker} still runs as {other_than} after {timeout_s:.0f} s.")
            time.sleep(_POLL_S)

    def rest(self, timeout_s: float) -> tuple[int, int]:
        """Wait until nothing is leased and every block is accounted for, at most `timeout_s` seconds.

        Returns:
            (leases, blocks) that are left over all the same.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            leases = int(self.directory_stats().get("leases", 0))
            try:
                blocks = sum(_unaccounted(self.facts(name)) for name in self._members)
            except RayError:  # a late death; its blocks went with it
                self.await_alive(_RESTART_TIMEOUT_S)
                deadline = time.monotonic() + timeout_s
                continue
            if (not leases and not blocks) or time.monotonic() > deadline:
                return leases, blocks
            time.sleep(_POLL_S)

    def reset(self, timeout_s: float) -> dict[WorkerId, int]:
        """Let the next trial begin like the first: nothing armed and nothing published, so that it finds no
        answers of which it could not be told who made them. Returns the workers' pids.

        Raises:
            DeadlineExceeded: a worker does not come back within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            pids = self.await_alive(timeout_s)
            try:
                for worker in self._members:
                    self.inject(worker, None)
            except RayError as error:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(f"a worker keeps dying: {type(error).__name__}.") from error
            else:
                return pids


def _unaccounted(facts: FaultFacts) -> int:
    return abs(facts.used_blocks - facts.held_blocks) + facts.quarantined_blocks


def _pid(_: Any) -> int:
    return os.getpid()


def send(pid: int, number: int) -> float:
    """Send a signal to a process of the cluster; time.monotonic() of it. A process that is gone is no fault:
    another one may have been quicker."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return time.monotonic()


def signals() -> Mapping[str, int]:
    """Those that faults are made of."""
    return {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "continue": signal.SIGCONT}
