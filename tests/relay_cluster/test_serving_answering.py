"""Which worker answers, what a death does, and that leaving early cancels the work; workers are played by a
recorder. (Real ones are in tests/e2e/serving.)
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import aclosing

import pytest

from relay_cluster.router import WorkerView
from relay_cluster.serving.answering import Answering
from tests.replies import make_reply
from transport.errors import Cancelled, WorkerLost
from transport.types import WorkerId
from workers.messages import Reply, Request, Token
from workers.segment import SlotValue

pytestmark = pytest.mark.asyncio

MODEL = "m"
W0, W1 = WorkerId("w0"), WorkerId("w1")


class Recorder:
    """Two workers that answer with three tokens and write down what they were asked."""

    def __init__(self, deaths: int = 0, dies_after: int = 0, waits: bool = False) -> None:
        self.asked: list[tuple[WorkerId, str]] = []
        self.cancelled: list[tuple[WorkerId, str]] = []
        self.alive = {W0: True, W1: True}
        self.back = False
        self._deaths = deaths
        self._dies_after = dies_after
        self._waits = waits

    def views(self) -> Sequence[WorkerView]:
        return [WorkerView(w, MODEL, alive) for w, alive in self.alive.items()]

    def is_up(self, worker: WorkerId, *, timeout_s: float) -> bool:
        self.alive[worker] = self.back
        return self.back

    def stream(self, worker: WorkerId, request: Request, stop: threading.Event) -> Iterator[Token | Reply]:
        self.asked.append((worker, request.id))
        for number in range(3):
            if self._deaths and number == self._dies_after:
                self._deaths -= 1
                raise WorkerLost("killed")
            yield Token(number, "x")
            if self._waits:
                assert stop.wait(10), "whoever leaves must end this"
                raise Cancelled("stopped")
        output = SlotValue(token_ids=(0, 1, 2), kv_tokens=3)
        yield make_reply(worker, request, model=MODEL, text="xxx", token_ids=(0, 1, 2), output=output)

    def cancel(self, worker: WorkerId, request_id: str) -> None:
        self.cancelled.append((worker, request_id))


def answering(workers: Recorder, *, max_agents: int = 100) -> Answering:
    return Answering(workers, threads=4, max_agents=max_agents, max_retries=2)


async def collect(one: Answering, agent: str = "a", name: str = "r") -> list[Token | Reply]:
    async with aclosing(one.stream(Request(id=name, agent=agent), MODEL)) as items:
        return [item async for item in items]


async def idle(one: Answering) -> bool:
    async with asyncio.timeout(5):
        while one.running:
            await asyncio.sleep(0.01)
    return True


async def test_an_agent_keeps_its_worker_and_agents_are_spread() -> None:
    one = answering(Recorder())
    placed = {agent: one.worker_for(agent, MODEL) for agent in "abcdef"}
    assert Counter(placed.values()) == {W0: 3, W1: 3}
    assert {agent: one.worker_for(agent, MODEL) for agent in "fedcba"} == placed
    with pytest.raises(WorkerLost, match="no worker of model"):
        one.worker_for("a", "another model")


async def test_who_reads_is_prepared_where_nobody_writes() -> None:
    one = answering(Recorder())
    writer = one.worker_for("writer", MODEL)
    assert one.preparer_for("reader", MODEL, writer) == W1 != writer
    assert one.worker_for("third", MODEL) == W0
    assert one.preparer_for("third", MODEL, W0) == W1, "its own worker writes"
    assert one.worker_for("third", MODEL) == W0, "where its prefix is"
    assert one.preparer_for("fourth", MODEL, W0) == W1
    assert one.worker_for("fourth", MODEL) == W1, "a new one stays where it was prepared"
    one._running[W1] = 1
    assert one.preparer_for("third", MODEL, W0) == W0, "no other is idle"
    one.close()


async def test_agents_that_were_not_heard_of_for_long_are_forgotten() -> None:
    one = answering(Recorder(), max_agents=2)
    for agent in "abcdefgh":
        one.worker_for(agent, MODEL)
    assert len(one._placed) == 2


async def test_tokens_come_in_order_and_the_reply_last() -> None:
    items = await collect(one := answering(Recorder()))
    assert [i.id for i in items if isinstance(i, Token)] == [0, 1, 2]
    assert isinstance(items[-1], Reply)
    assert await idle(one)


async def test_a_death_before_the_first_token_starts_again_elsewhere() -> None:
    workers = Recorder(deaths=1)
    items = await collect(one := answering(workers))
    assert len(items) == 4
    assert workers.asked == [(W0, "r"), (W1, "r-1")]
    assert await idle(one)
    assert workers.cancelled == [(W0, "r")], "it may only have been unreachable"
    one.close()


async def test_a_death_after_the_first_token_is_told() -> None:
    workers = Recorder(deaths=1, dies_after=2)
    with pytest.raises(WorkerLost):
        await collect(one := answering(workers))
    assert len(workers.asked) == 1
    assert await idle(one)


async def test_deaths_are_not_followed_for_ever() -> None:
    workers = Recorder(deaths=9)
    with pytest.raises(WorkerLost):
        await collect(one := answering(workers))
    assert len(workers.asked) == 2, "then no worker is left"
    workers.back = True
    one._looked = float("-inf")  # as if some time had passed
    with pytest.raises(WorkerLost):
        await collect(one)
    one.close()
    assert all(workers.alive.values()), "they were asked whether they are back"


async def test_leaving_early_cancels_the_request_and_frees_the_thread() -> None:
    workers = Recorder(waits=True)
    one = answering(workers)
    async with aclosing(one.stream(Request(id="r", agent="a"), MODEL)) as items:
        assert isinstance(await anext(items), Token)
        assert one.running == {W0: 1}
    assert await idle(one)
    task = asyncio.create_task(collect(one, name="s"))
    while len(workers.asked) < 2:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await idle(one)
    one.close()
    assert workers.cancelled == [(W0, "r"), (W0, "s")]
