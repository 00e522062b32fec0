"""The bounded queue: who runs, who waits, who is sent away, and nothing leaks when somebody gives up."""

from __future__ import annotations

import asyncio

import pytest

from relay_cluster.serving.errors import ApiError
from relay_cluster.serving.places import Places

pytestmark = pytest.mark.asyncio


def places(running: int = 1, max_waiting: int = 1, queue_timeout_s: float = 5.0) -> Places:
    return Places(running=running, max_waiting=max_waiting, queue_timeout_s=queue_timeout_s)


async def hold(queue: Places, release: asyncio.Event, log: list[str], name: str) -> None:
    async with queue.place():
        log.append(name)
        await release.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_line_is_bounded_and_keeps_its_order() -> None:
    queue, log = places(running=2, max_waiting=2), []
    gates = [asyncio.Event() for _ in range(4)]
    tasks = [asyncio.create_task(hold(queue, gate, log, str(n))) for n, gate in enumerate(gates)]
    await settle()
    assert (queue.running, queue.waiting, log) == (2, 2, ["0", "1"])
    with pytest.raises(ApiError) as refused:
        async with queue.place():
            pass
    assert refused.value.status == 429
    assert 1 <= (refused.value.retry_after_s or 0) <= 60
    assert refused.value.headers()["Retry-After"].isdigit()
    for gate in gates:
        gate.set()
        await settle()
    await asyncio.gather(*tasks)
    assert log == ["0", "1", "2", "3"]
    assert (queue.running, queue.waiting) == (0, 0)


async def test_whoever_gives_up_leaves_no_place_taken() -> None:
    queue, log = places(max_waiting=3), []
    gate = asyncio.Event()
    first = asyncio.create_task(hold(queue, gate, log, "first"))
    await settle()
    waiting = [asyncio.create_task(hold(queue, gate, log, str(n))) for n in range(3)]
    await settle()
    waiting[0].cancel()
    await settle()
    assert queue.waiting == 2
    gate.set()
    await first
    waiting[1].cancel()  # perhaps just as its place came
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (queue.running, queue.waiting) == (0, 0)
    assert log[-1] == "2"


async def test_waiting_ends_at_the_deadline() -> None:
    queue, gate = places(queue_timeout_s=0.02), asyncio.Event()
    first = asyncio.create_task(hold(queue, gate, [], "first"))
    await settle()
    with pytest.raises(ApiError) as late:
        async with queue.place():
            pass
    assert (late.value.status, late.value.code) == (503, "overloaded")
    gate.set()
    await first
    assert (queue.running, queue.waiting) == (0, 0)


async def test_draining_lets_nobody_in_and_waits_for_those_inside() -> None:
    queue, gate = places(max_waiting=2), asyncio.Event()
    first = asyncio.create_task(hold(queue, gate, [], "first"))
    await settle()
    second = asyncio.create_task(hold(queue, gate, [], "second"))
    await settle()
    assert not await queue.drain(0.02)
    with pytest.raises(ApiError) as sent:
        await second
    assert sent.value.status == 503
    with pytest.raises(ApiError, match="shutting down"):
        async with queue.place():
            pass
    gate.set()
    assert await queue.drain(5.0)
    await first
