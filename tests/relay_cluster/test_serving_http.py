"""Clients that misbehave below HTTP's bodies, and the end of the server, over real sockets. The worker is
played by an object that answers when the test says so. (Real ones are in tests/e2e/serving.)
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from tests.relay_cluster.scripted_service import DEADLINE_S, MODEL, Running, eventually, running

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
HEAD_S = 0.4


@pytest.fixture
def live() -> Iterator[Running]:
    with running(head_timeout_s=HEAD_S, body_timeout_s=HEAD_S) as made:
        yield made


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


def test_full_prefill_computes_the_tokens_of_relay_off() -> None:
    text = "A report of what happened on that day, and why it did. " * 6
    with running(max_waiting=4) as live:
        live.worker.goes_on.set()
        asks = [{}, {"relay": {"reuse": "full_prefill"}}, {"relay": {"enabled": False}}]
        for more in asks:
            body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **more}
            answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=DEADLINE_S).json()
            assert bool(answer["relay"]["found"]) == (more == asks[1]), "what is known is told all the same"
    relayed, full, off = live.worker.asked
    assert relayed.values
    assert (full.messages, full.values) == (off.messages, off.values)
    assert not full.values
