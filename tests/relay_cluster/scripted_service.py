"""The service over real sockets, with a worker that is played: it answers when the test says so."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from relay_cluster.router import WorkerView
from relay_cluster.serving.answering import Answering
from relay_cluster.serving.api import build_app
from relay_cluster.serving.http import Server, make_server
from relay_cluster.serving.places import Places
from relay_cluster.serving.service import Service
from relay_cluster.serving.settings import ServeSettings
from relay_cluster.serving.tenants import Tenants
from tests.replies import make_reply
from transport.errors import Cancelled
from transport.types import WorkerId
from workers.messages import Draft, Reply, Request, Token

MODEL = "m"
WORKER = WorkerId("w0")
DEADLINE_S = 20.0
"""Of everything that a test waits for; nothing takes that long unless it is broken."""


@dataclass
class Worker:
    """Answers with one token, and ends the answer when `goes_on` is set. large: of that token's text."""

    goes_on: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    large: int = 1
    asked: list[Request] = field(default_factory=list[Request])

    def views(self) -> Sequence[WorkerView]:
        return [WorkerView(WORKER, MODEL, True)]

    def is_up(self, worker: WorkerId, *, timeout_s: float) -> bool:
        return True

    def stream(self, worker: WorkerId, request: Request, stop: threading.Event) -> Iterator[Token | Reply]:
        self.asked.append(request)
        yield Token(0, "x" * self.large)
        while not self.goes_on.wait(0.01):
            if stop.is_set():
                raise Cancelled("stopped")
        yield make_reply(WORKER, request, model=MODEL, text="x" * self.large)

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        return 0

    def cancel(self, worker: WorkerId, request_id: str) -> None:
        self.cancelled.set()


@dataclass
class Running:
    """A server in a thread."""

    server: Server
    thread: threading.Thread
    worker: Worker
    service: Service
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)

    def healthy(self) -> bool:
        return httpx.get(f"{self.url}/healthz", timeout=DEADLINE_S).status_code == 200

    def signal(self) -> None:
        """What the process does when it is asked to end."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def running(tenants: Tenants | None = None, **changes: Any) -> Iterator[Running]:
    settings = ServeSettings(**{"max_waiting": 4, **changes})
    worker = Worker()

    async def healthy() -> dict[str, Any]:
        return {"status": "ok"}

    service = Service(
        settings,
        [MODEL],
        Answering(worker, threads=4, max_agents=10, max_retries=0),
        Places(running=4, max_waiting=settings.max_waiting, queue_timeout_s=DEADLINE_S),
    )
    app = build_app(service, tenants or Tenants({}), healthy)
    server = make_server(app, settings, service.drain, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Running(server, thread, worker, service, port)
    worker.goes_on.set()
    server.should_exit = True
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.01)  # between two looks
    return now
