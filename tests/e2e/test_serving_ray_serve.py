"""The same app behind Ray Serve's proxy, and `relay serve` as a user starts it. Each starts a cluster."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import small_cluster
from tests.e2e.serving.bad_requests import BAD, check_bad_requests
from workers.settings import DEFAULT_MODEL

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # Ray Serve's own
]

TEXT = "A farmer has 17 sheep and buys 5 more every week. How many sheep does he have after six weeks?"
START_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def settled(url: str) -> bool:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return "relay_requests_running 0.0" in lines


def check(url: str) -> None:
    """What a client sees: an answer, the same streamed, a relayed one, errors, and that it may go away."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=240.0)
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "max_tokens": 20, "temperature": 0, "seed": 1}
    chat: list[Any] = [{"role": "user", "content": TEXT}]
    text = client.chat.completions.create(**ask, messages=chat).choices[0].message.content
    chunks = list(client.chat.completions.create(**ask, messages=chat, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    chat = [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": f"He said:\n{text}\nWhy?"},
    ]
    judged = client.chat.completions.create(**ask, messages=chat, extra_body={"relay": {"agent": "judge"}})
    assert [f["kind"] for f in judged.model_extra["relay"]["found"]] == ["response"]  # type: ignore[index]
    assert 'agent_edge="- -> judge"' in httpx.get(f"{url}/metrics").text, "without keys names are shown"
    eventually(lambda: told_up(url) == {"relay_worker_up": 1, "relay_directory_shard_up": 2})
    check_bad_requests(url, key=None)
    for stream in (True, False):
        body = {**ask, "max_tokens": 1500, "messages": chat, "stream": stream}
        try:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=2.0) as response:
                next(response.iter_lines())
        except httpx.ReadTimeout:
            pass
        eventually(lambda: settled(url))
    board = httpx.get(f"{url}/relay/v1/board").json()
    outcomes = Counter(row["outcome"] for row in board["requests"])
    # Of the bad ones those that are asked for an answer; and one that is good, at the end of them.
    late = ("context_length_exceeded", "model_not_found")
    begun = [bad for bad in BAD.values() if bad.code in late and bad.content]
    assert outcomes == {"ok": 4, "error": len(begun), "cancelled": 2}, "the live page tells the same"
    assert {w["state"] for w in board["cluster"]["workers"]} == {"up"}
    assert httpx.get(f"{url}/dashboard", follow_redirects=True).text.startswith("<!doctype html>")


def told_up(url: str) -> dict[str, float]:
    """How many workers and shards answered a scrape."""
    page = httpx.get(f"{url}/metrics", timeout=30.0).text
    families = {f.name: f for f in text_string_to_metric_families(page)}
    names = ("relay_worker_up", "relay_directory_shard_up")
    return {name: sum(s.value for s in families[name].samples) for name in names}


def eventually(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)  # between two looks
    assert true()


def test_ray_serve_carries_the_same_app() -> None:
    from relay_cluster.serving.deployment import run_serve

    port = free_port()
    config = small_cluster(workers=1, ray={"num_cpus": 3})
    run_serve(config, host="127.0.0.1", port=port, wait=lambda: check(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_serves_until_a_signal_and_ends_what_runs(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    file = tmp_path / "one.yaml"
    file.write_text(
        "workers: 1\nworker: {device: cpu, cache_tokens: 4096}\n"
        "transport: {arena_bytes: 128MiB}\nray: {num_cpus: 2, auth: disabled}\n"
    )
    command = [sys.executable, "-m", "relay_cluster", "serve", str(file), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until_up(url, process)
            if number == signal.SIGINT:
                check(url)
            body = {"model": DEFAULT_MODEL, "max_tokens": 40, "temperature": 0, "stream": True}
            body["messages"] = [{"role": "user", "content": "Count from one to a hundred: one, two, "}]
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60.0) as running:
                lines = running.iter_lines()
                next(lines)
                process.send_signal(number)
                assert [line for line in lines if line][-1] == "data: [DONE]"
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == status, told
    assert "serving on" in told
    assert "Traceback" not in told


def wait_until_up(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)  # not listening yet
    raise AssertionError(f"not up within {START_S} s")
