"""Clients that misbehave below HTTP's bodies, and the end of the server, over real sockets. The worker is
played by an object that answers when the test says so. (Real ones are in tests/e2e/serving.)
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from relay_cluster.router import WorkerView
from relay_cluster.serving.answering import Answering
from relay_cluster.serving.api import build_app
from relay_cluster.serving.http import Server, make_server
from relay_cluster.serving.places import Places
from relay_cluster.serving.service import Service
from relay_cluster.serving.settings import ServeSettings
from relay_cluster.serving.tenants import Tenants
from transport.errors import Cancelled
from transport.types import NodeId, WorkerId
from workers.messages import Reply, Request, StageTimes, Token
from workers.segment import SlotValue

MODEL = "m"
WORKER = WorkerId("w0")
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
HEAD_S = 0.4
DEADLINE_S = 20.0
"""Of everything that a test waits for; nothing takes that long unless it is broken."""


@dataclass
class Worker:
    """Answers with one token, and ends the answer when `goes_on` is set. large: of that token's text."""

    goes_on: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    large: int = 1

    def views(self) -> Sequence[WorkerView]:
        return [WorkerView(WORKER, MODEL, True)]

    def is_up(self, worker: WorkerId, *, timeout_s: float) -> bool:
        return True

    def stream(self, worker: WorkerId, request: Request, stop: threading.Event) -> Iterator[Token | Reply]:
        yield Token(0, "x" * self.large)
        while not self.goes_on.wait(0.01):
            if stop.is_set():
                raise Cancelled("stopped")
        yield _reply(request, "x" * self.large)

    def cancel(self, worker: WorkerId, request_id: str) -> None:
        self.cancelled.set()


def _reply(request: Request, text: str) -> Reply:
    return Reply(
        request_id=request.id,
        agent=request.agent,
        worker=WORKER,
        node=NodeId("n"),
        model=MODEL,
        method=request.method,
        prompt_tokens=3,
        fresh_tokens=3,
        relayed_tokens=0,
        prefix_tokens=0,
        fresh_entries=9,
        recomputed_entries=0,
        relayed_entries=0,
        ttft_s=0.4,
        decode_s=0.1,
        stages=StageTimes(),
        transfers=(),
        fallbacks=(),
        published=(),
        text=text,
        token_ids=(1,),
        output=SlotValue(text=text),
        finish_reason="stop",
    )


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
def running(**changes: Any) -> Iterator[Running]:
    settings = ServeSettings(
        **{"head_timeout_s": HEAD_S, "body_timeout_s": HEAD_S, "max_waiting": 4, **changes}
    )
    worker = Worker()

    async def healthy() -> dict[str, Any]:
        return {"status": "ok"}

    service = Service(
        settings,
        [MODEL],
        Answering(worker, threads=4, max_agents=10, max_retries=0),
        Places(running=4, max_waiting=settings.max_waiting, queue_timeout_s=DEADLINE_S),
    )
    app = build_app(service, Tenants({}), healthy)
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


@pytest.fixture
def live() -> Iterator[Running]:
    with running() as made:
        yield made


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.01)  # between two looks
    return now


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes. Raises TimeoutError when it never does."""
    parts: list[bytes] = []
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def check(answer: bytes, status: int, code: str) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"POST /v1/chat/comp", 408, "timeout"),
        (HEAD + b"X-Slow: yes\r\n", 408, "timeout"),
        (HEAD + b"Content-Length: 100\r\n\r\n{", 408, "timeout"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n", 408, "timeout"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_http"),
        (b"GET\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"X-Large: " + b"x" * 70_000, 400, "invalid_http"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a number\r\n", 400, "invalid_http"),
        (HEAD + b"Content-Length: 5000000\r\n\r\n", 413, "body_too_large"),
    ],
)
def test_a_request_that_never_comes_whole_ends_with_its_reason(
    live: Running, sent: bytes, status: int, code: str
) -> None:
    with live.connect() as connection:
        connection.sendall(sent)
        check(read_all(connection), status, code)
    assert live.healthy()


def test_a_client_that_sends_nothing_or_a_byte_at_a_time_is_sent_away(live: Running) -> None:
    with live.connect() as silent, live.connect() as loris:
        with suppress(OSError):  # closed while we send, which is the point
            for byte in HEAD * 1000:
                loris.sendall(bytes([byte]))
                if byte == ord("\n"):
                    time.sleep(0.05)  # between two lines of a head that never ends
        assert eventually(lambda: len(live.server.server_state.connections) == 0)
        assert read_all(silent) == b"", "nobody asked anything"
    assert live.healthy()


def test_the_head_of_a_second_request_has_a_deadline_as_well(live: Running) -> None:
    with live.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        time.sleep(2 * HEAD_S)  # idle between requests is no fault
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        check(read_all(connection), 408, "timeout")


def test_a_hundred_slow_clients_keep_nobody_out(live: Running) -> None:
    slow = [live.connect() for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(HEAD)
        live.worker.goes_on.set()
        answer = httpx.post(f"{live.url}/v1/chat/completions", json=CHAT, timeout=DEADLINE_S)
        assert answer.status_code == 200
        for connection in slow:
            check(read_all(connection), 408, "timeout")
    finally:
        for connection in slow:
            connection.close()


def test_a_client_that_does_not_read_its_answer_is_dropped() -> None:
    with running(send_timeout_s=0.3) as live:
        live.worker.large = 16 << 20
        body = json.dumps({**CHAT, "stream": True}).encode()
        with live.connect() as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert live.worker.cancelled.wait(DEADLINE_S), "its request is cancelled on the worker"
            assert eventually(lambda: live.service.places.running == 0)
        assert live.healthy()


def post(live: Running, client: httpx.Client) -> httpx.Response:
    return client.post(f"{live.url}/v1/chat/completions", json=CHAT)


def test_at_a_signal_running_requests_end_and_new_ones_are_told() -> None:
    with running(drain_timeout_s=DEADLINE_S) as live, httpx.Client(timeout=DEADLINE_S) as client:
        assert client.get(f"{live.url}/v1/models").status_code == 200
        body = {**CHAT, "stream": True}
        url = f"{live.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=DEADLINE_S) as streamed:
            lines = streamed.iter_lines()
            next(lines)
            live.signal()
            assert eventually(lambda: live.service.places.draining)
            refused = post(live, client)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["Retry-After"]) > 0
            health = client.get(f"{live.url}/healthz")
            assert (health.status_code, health.json()["status"]) == (503, "draining")
            live.worker.goes_on.set()
            assert list(lines)[-2] == "data: [DONE]"
        live.thread.join(DEADLINE_S)
        assert not live.thread.is_alive()
        assert not live.worker.cancelled.is_set()
        with pytest.raises(httpx.ConnectError):
            post(live, client)


def test_the_end_does_not_wait_longer_than_it_was_told() -> None:
    with running(drain_timeout_s=0.2) as live:
        with live.connect() as connection:
            body = json.dumps({**CHAT, "stream": True}).encode()
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert connection.recv(100)
            live.signal()
            live.thread.join(DEADLINE_S)
            assert not live.thread.is_alive()
        assert live.worker.cancelled.is_set()


def test_a_second_signal_ends_at_once() -> None:
    with running(drain_timeout_s=10 * DEADLINE_S) as live, live.connect() as connection:
        body = json.dumps({**CHAT, "stream": True}).encode()
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(100)
        live.signal()
        assert eventually(lambda: live.service.places.draining)
        live.signal()
        live.thread.join(DEADLINE_S)
        assert not live.thread.is_alive()
