"""The service on a cluster: builds the parts, and runs the app under uvicorn."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from relay_cluster.cluster import Cluster
from relay_cluster.collecting import ClusterCollector
from relay_cluster.config import ClusterConfig
from relay_cluster.observing import RunObserver
from relay_cluster.recording import Recorder
from relay_cluster.serving.answering import Answering
from relay_cluster.serving.api import build_app
from relay_cluster.serving.http import make_server
from relay_cluster.serving.overview import Overview
from relay_cluster.serving.places import Places
from relay_cluster.serving.service import Service
from relay_cluster.serving.tenants import Tenants, load_tenants
from relay_cluster.tracing import make_tracing

log = logging.getLogger(__name__)

_HEALTH_TIMEOUT_S = 2.0
_HEALTH_KEPT_S = 2.0


def start_workers(cluster: Cluster) -> None:
    """Start the workers of a service, all of the cluster's default model, and wait until they are ready.

    Raises:
        RelayError: one of them did not come up.
    """
    config = cluster.config
    count = config.serve.workers if config.workers == "auto" else config.workers
    cluster.start_workers([(f"serve-{i}", config.model) for i in range(count)])


def make_app(cluster: Cluster, tenants: Tenants, on_close: Callable[[], None] | None = None) -> FastAPI:
    """The ASGI app over a cluster whose workers are up. on_close: called at the very end."""
    config = cluster.config
    running = max(1, config.worker.max_sequences * len(cluster.workers))
    serve = config.serve
    answering = Answering(
        cluster, threads=running, max_agents=serve.max_agents, max_retries=config.runtime.max_retries
    )
    places = Places(running=running, max_waiting=serve.max_waiting, queue_timeout_s=serve.queue_timeout_s)
    service = Service(
        serve,
        [config.model],
        answering,
        places,
        recorder=_recorder(cluster, tenants),
        agent_labels=config.telemetry.agent_labels == "on"
        or (config.telemetry.agent_labels == "auto" and tenants.open),
    )
    tracing = make_tracing(config.telemetry)
    picture = Overview(cluster)

    def close() -> None:
        picture.close()
        if on_close is not None:
            on_close()

    return build_app(service, tenants, _Health(cluster), close, picture=picture, tracing=tracing)


def _recorder(cluster: Cluster, tenants: Tenants) -> Recorder:
    """Metrics of a service, those of its workers and of pipelines that run on them included."""
    recorder = Recorder([cluster.config.model], tenant_key=tenants.label_key)
    recorder.collect_also(ClusterCollector(cluster.poll()))
    cluster.observer = RunObserver(recorder)
    for name in sorted(tenants.names):
        log.info("tenant %s is %s in metrics", name, recorder.tenant(name))
    return recorder


class _Health:
    """Asks the workers, not more often than every few seconds."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._facts: dict[str, Any] = {}
        self._asked = float("-inf")
        self._lock = asyncio.Lock()

    async def __call__(self) -> dict[str, Any]:
        async with self._lock:
            if time.monotonic() - self._asked > _HEALTH_KEPT_S:
                names = list(self._cluster.workers)
                up = await asyncio.gather(
                    *(asyncio.to_thread(self._cluster.is_up, w, timeout_s=_HEALTH_TIMEOUT_S) for w in names)
                )
                self._facts = {
                    "status": "ok" if any(up) else "down",
                    "workers": {
                        str(w): "up" if answers else "down" for w, answers in zip(names, up, strict=True)
                    },
                }
                self._asked = time.monotonic()
            return self._facts


def run_uvicorn(
    config: ClusterConfig, *, host: str, port: int, on_event: Callable[..., None] | None = None
) -> None:
    """Serve until a signal comes: workers, then the app, in this process. Requests that run then have
    serve.drain_timeout_s to end.

    Raises:
        ConfigError: no keys where they are needed. RelayError: a worker did not come up.
    """
    tenants = load_tenants(config.serve, host)
    # An answer whose client went away ends with an error that nobody takes: no news.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    with Cluster(config, attach=True, on_event=on_event) as cluster:
        start_workers(cluster)
        app = make_app(cluster, tenants)
        server = make_server(app, config.serve, app.state.service.drain, host=host, port=port)
        if on_event is not None:
            on_event("cluster", f"serving on http://{host}:{port}/v1")
        server.run()
        if server.ended_by == signal.SIGINT:
            raise KeyboardInterrupt
        if server.ended_by is not None:
            sys.exit(128 + server.ended_by)
