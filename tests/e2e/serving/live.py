"""A service that listens on a port of this machine: two worker processes, the real model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from relay_cluster import Cluster
from relay_cluster.serving.app import make_app, start_workers
from relay_cluster.serving.http import Server, make_server
from relay_cluster.serving.service import Service
from relay_cluster.serving.settings import ServeSettings
from relay_cluster.serving.tenants import Tenants
from tests.e2e.conftest import small_cluster
from tests.e2e.otlp import Receiver

KEYS = {"sk-red": "red", "sk-blue": "blue"}
TENANTS = Tenants({hashlib.sha256(key.encode()).hexdigest(): name for key, name in KEYS.items()})
DEADLINE_S = 30.0
HEAD_TIMEOUT_S = 2.0


class Recorder:
    """An app around the app, which keeps the reuse report of every answer that is not streamed."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.reports: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = bytearray()

        async def watched(message: Any) -> None:
            body.extend(message.get("body", b""))
            await send(message)

        await self.app(scope, receive, watched)
        if body.startswith(b'{"object":"chat.completion"'):
            self.reports.append(json.loads(body)["relay"])


@dataclass(frozen=True)
class Live:
    """A service that listens, and the cluster under it."""

    url: str
    cluster: Cluster
    recorder: Recorder
    traces: Receiver
    server: Server

    def client(self, key: str = "sk-red") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=240.0)

    @property
    def service(self) -> Service:
        return self.recorder.app.state.service

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def tasks(self) -> set[asyncio.Task[None]]:
        """Requests that the server still has in hand."""
        return set(self.server.server_state.tasks)

    def samples(self, name: str | None = None, **labels: str) -> list[Sample]:
        """What a scrape gets: all of it, or one name's with these labels."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=60.0).text)
        samples = [sample for family in families for sample in family.samples]
        return [s for s in samples if name in (None, s.name) and labels.items() <= s.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        return sum(sample.value for sample in self.samples(name, **labels))

    def settled(self) -> bool:
        """No request, no cache and no lease is left anywhere."""
        stats = self.cluster.stats().values()
        idle = all(s["running"] == 0 and s["free_cache_blocks"] == s["cache_blocks"] for s in stats)
        return idle and self.cluster.directory_stats()["leases"] == 0


def eventually(true: Callable[[], bool], deadline_s: float = DEADLINE_S) -> bool:
    deadline = time.monotonic() + deadline_s
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.05)  # between two looks
    return now


@contextmanager
def serving(traces: Receiver) -> Iterator[Live]:
    """The service, in a thread of this process, as `relay serve` makes it. traces: where its spans go."""
    # One thread each: two teams on two busy cores wait for each other at every operator.
    worker = {
        "device": "cpu",
        "threads": 1,
        "cache_tokens": 4096,
        "break_even": False,
        "min_segment_tokens": 6,
    }
    transport = {"arena_bytes": 128 << 20, "pull_timeout_s": 20.0}  # a busy machine is no fault
    telemetry = {"otlp_endpoint": traces.url}
    with Cluster(small_cluster(worker=worker, transport=transport, telemetry=telemetry)) as cluster:
        start_workers(cluster)
        app = make_app(cluster, TENANTS)
        recorder = Recorder(app)
        settings = ServeSettings(head_timeout_s=HEAD_TIMEOUT_S)
        server = make_server(recorder, settings, app.state.service.drain, host="127.0.0.1", port=0)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", cluster, recorder, traces, server)
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
