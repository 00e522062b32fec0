"""Many short requests whose clients go away whenever they like leave nothing behind: no request, cache block
or lease, no task or thread, no file descriptor, no process; in the service and in its workers."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import psutil
import pytest

from tests.e2e.serving.live import Live, eventually
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

AT_ONCE = 8
ENDS = ("whole", "streamed", "before the body", "in the body", "after the request", "in the stream", "reset")
SLACK = 12
"""Descriptors and threads that come and go by themselves: kept connections, Ray's pools. What leaks with
every request, or every third, is far more."""


class Held:
    """What the service's process and those that it started hold now."""

    def __init__(self) -> None:
        me = psutil.Process()
        workers = [child for child in me.children(recursive=True) if is_actor(child)]
        self.workers = sorted(worker.pid for worker in workers)
        self.descriptors = {p.pid: p.num_fds() for p in (me, *workers)}
        self.threads = {p.pid: p.num_threads() for p in (me, *workers)}
        self.python_threads = threading.active_count()

    def more_than(self, before: Held) -> dict[str, Any]:
        """What is more now than it was, beyond the slack."""
        grown: dict[str, Any] = {}
        for name in ("descriptors", "threads"):
            now, then = getattr(self, name), getattr(before, name)
            found = {
                pid: (then.get(pid), count) for pid, count in now.items() if count > then.get(pid, 0) + SLACK
            }
            if found:
                grown[name] = found
        if self.workers != before.workers:
            grown["workers"] = (before.workers, self.workers)
        if self.python_threads > before.python_threads + SLACK:
            grown["python threads"] = (before.python_threads, self.python_threads)
        return grown


def is_actor(process: psutil.Process) -> bool:
    """Whether a process is one of Ray's that have an actor; idle ones come and go."""
    with suppress(psutil.Error):
        name = process.cmdline()[:1]
        return bool(name) and name[0].startswith("ray::") and "IDLE" not in name[0]
    return False


async def request(live: Live, number: int, end: str, chance: random.Random) -> str:
    """One request that ends as `end` says; what came of it."""
    stream = end in ("streamed", "in the stream")
    # Whoever means to leave in the middle needs a middle.
    tokens = 400 if end in ("in the stream", "after the request", "reset") else chance.randint(1, 3)
    body = json.dumps(
        {
            "model": DEFAULT_MODEL,
            "messages": [{"role": "user", "content": f"Say {number}."}],
            "max_tokens": tokens,
            "stream": stream,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: relay\r\nAuthorization: Bearer sk-red\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode()
    host, port = live.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head[: chance.randrange(len(head))] if end == "before the body" else head)
        if end == "in the body":
            writer.write(body[: chance.randrange(len(body))])
        elif end != "before the body":
            writer.write(body)
        await writer.drain()
        if end in ("before the body", "in the body"):
            return "left"
        if end in ("after the request", "reset"):
            await asyncio.sleep(chance.uniform(0, 0.5))  # somewhere in queue, prefill or decoding
            if end == "reset":
                now = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            return "left"
        if end == "in the stream":
            for _ in range(chance.randint(1, 12)):
                await reader.readline()
            return "left"
        answer = await reader.read()
        return answer.split(b" ", 2)[1].decode()
    finally:
        writer.close()


async def clients(live: Live, count: int, seed: int) -> Counter[str]:
    chance = random.Random(seed)
    numbers = iter(range(count))
    outcomes: Counter[str] = Counter()

    async def client() -> None:
        for number in numbers:
            end = ENDS[number % len(ENDS)]
            outcomes[f"{end}: {await request(live, number, end, chance)}"] += 1

    async with asyncio.timeout(280):
        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return outcomes


def check(live: Live, count: int) -> None:
    asyncio.run(clients(live, 4 * AT_ONCE, seed=1))  # pools are filled, connections made
    assert eventually(live.settled)
    before = Held()
    outcomes = asyncio.run(clients(live, count, seed=2))
    assert sum(outcomes.values()) == count
    for kind in ("whole", "streamed"):
        assert outcomes[f"{kind}: 200"] == len([n for n in range(count) if ENDS[n % len(ENDS)] == kind]), (
            outcomes
        )
    assert eventually(live.settled), live.cluster.stats()
    assert eventually(lambda: live.metric("relay_requests_running") == 0)
    assert live.metric("relay_requests_waiting") == 0
    assert eventually(lambda: not live.tasks())
    assert eventually(lambda: not Held().more_than(before)), Held().more_than(before)
    client = live.client()
    assert client.chat.completions.create(
        model=DEFAULT_MODEL, messages=[{"role": "user", "content": "Still there?"}], max_tokens=1
    ).usage


def test_a_hundred_clients_that_come_and_go_leave_nothing_behind(live: Live) -> None:
    check(live, 100)


@pytest.mark.long
def test_a_thousand_clients_that_come_and_go_leave_nothing_behind(live: Live) -> None:
    check(live, 1000)
