"""Asks every worker and every directory shard for its statistics, at the same time and with one deadline.

A worker that is dead, frozen or slow is simply missing from the answers; while a call to it is still open no
other is made, so a frozen worker does not collect one for each scrape. Decides nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import ray
from ray.exceptions import RayError

from relay_cluster.collecting import Facts
from transport.directory.fleet import Fleet
from transport.directory.operate import DirectoryOperator
from transport.errors import RelayError
from transport.settings import DirectorySettings
from transport.types import WorkerId
from workers.actor import WorkerInfo

log = logging.getLogger(__name__)

Workers = Callable[[], Mapping[WorkerId, tuple[Any, WorkerInfo]]]
"""Actor handle and facts of each worker that has come up."""
POLL_TIMEOUT_S: Final = 2.0
"""For all workers and shards together; Prometheus itself gives up after 10 s by default."""
_LEAST_S = 0.1


class Poll:
    """Statistics of a running cluster. Thread-safe.

    Args:
        workers: asked at each poll, since workers come and go.
        shards: names of the directory's, or actor handles by name.
        settings: of the directory.
        timeout_s: what a poll may take.
    """

    def __init__(
        self,
        workers: Workers,
        shards: Mapping[str, Any] | Sequence[str],
        settings: DirectorySettings,
        *,
        timeout_s: float = POLL_TIMEOUT_S,
    ) -> None:
        self._workers = workers
        self._timeout_s = timeout_s
        # Half of the time each for the list of shards and their statistics.
        hurried = replace(settings, call_timeout_s=timeout_s / 2)
        self._fleet = Fleet(shards, hurried) if shards else None
        self._open: dict[WorkerId, Any] = {}
        self._lock = threading.Lock()

    def __call__(self) -> Facts:
        """Ask all; those that do not answer in time have None."""
        if not ray.is_initialized():  # a call would start a Ray of its own
            return Facts({}, {})
        with self._lock:
            deadline = time.monotonic() + self._timeout_s
            workers = dict(self._workers())
            calls = self._send(workers)
            shards = self._ask_shards()
            # The shards' time is not the workers': they have been computing their answers meanwhile.
            answered = self._take(calls, max(_LEAST_S, deadline - time.monotonic()))
        return Facts({w: (info, answered.get(w)) for w, (_, info) in workers.items()}, shards)

    def _send(self, workers: Mapping[WorkerId, tuple[Any, WorkerInfo]]) -> dict[WorkerId, Any]:
        calls: dict[WorkerId, Any] = {}
        for worker, (handle, _) in workers.items():
            old = self._open.get(worker)
            if old is not None and not ray.wait([old], timeout=0)[0]:
                continue  # still silent
            try:
                self._open[worker] = calls[worker] = handle.stats.remote()
            except RayError as error:
                log.debug("worker %s could not be asked: %s", worker, error)
        return calls

    def _take(self, calls: Mapping[WorkerId, Any], timeout_s: float) -> dict[WorkerId, dict[str, Any]]:
        if not calls:
            return {}
        ready = set(ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)[0])
        out: dict[WorkerId, dict[str, Any]] = {}
        for worker, call in calls.items():
            if call not in ready:
                continue
            self._open.pop(worker, None)
            try:
                out[worker] = ray.get(call, timeout=timeout_s)
            except RayError as error:
                log.debug("worker %s did not tell its statistics: %s", worker, error)
        return out

    def _ask_shards(self) -> dict[str, Mapping[str, float] | None]:
        if self._fleet is None:  # the cluster has not been started
            return {}
        try:
            told = DirectoryOperator(self._fleet).stats()
        except RelayError as error:
            log.warning("the directory did not tell its statistics: %s", error)
            told = {}
        return {name: told.get(name) for name in self._fleet.shards}
