"""Requests that begin with the first layers of what they relay, with the real model in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.workers.rigs import QUESTION, Desk, request
from transport.errors import Cancelled
from transport.types import Transfer
from workers.messages import Reply, Request

pytestmark = pytest.mark.slow

WAIT_S = 30.0
SOLVE = "Solve this problem.\n{question}"
CHECK = "Problem:\n{question}\nSolution:\n{solver}\nIs the solution right?"


@dataclass
class Gate:
    """Stands between a worker and the bytes that it pulls: part i of every segment is handed over when
    `open` has let it through. The bytes, and what checks them, are the real ones."""

    desk: Desk
    parts: int = 0
    reached: int = -1
    before: Callable[[int], None] = lambda _: None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pull = self.desk.transport.pull

        def gated(*args: Any, on_part: Callable[[int], None] | None = None, **options: Any) -> Transfer:
            def hand_over(part: int) -> None:
                with self.changed:
                    self.reached = max(self.reached, part)
                    self.changed.notify_all()
                    assert self.changed.wait_for(lambda: part < self.parts, WAIT_S)
                self.before(part)
                if on_part is not None:
                    on_part(part)

            return pull(*args, on_part=hand_over, **options)

        monkeypatch.setattr(self.desk.transport, "pull", gated)

    def open(self, parts: int) -> None:
        with self.changed:
            self.parts = parts
            self.changed.notify_all()

    def wait_until_reached(self, part: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.reached >= part, WAIT_S)


@pytest.fixture
def gate(pair: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(pair[1])
    gate.install(monkeypatch)
    return gate


def _ask(pair: tuple[Desk, Desk], method: str) -> Request:
    one = pair[0].agent
    answer = one.loaded.tokenizer.encode(QUESTION[::-1], add_special_tokens=False)[:80]
    first = one.replay(request("solver", SOLVE, question=QUESTION), tuple(answer))
    return request("critic", CHECK, method, publish=False, question=QUESTION, solver=first.output)


def _rows_at_rest(desk: Desk) -> int:
    """Entries computed so far, once the engine has nothing more to do."""
    before = -1
    while (now := desk.agent.stats()["row_layers"]) != before:
        before = now
        threading.Event().wait(0.3)
    return now


@pytest.mark.parametrize("method", ["auto", "relay_caching"])
def test_it_computes_what_has_come_and_answers_the_same(
    pair: tuple[Desk, Desk], gate: Gate, method: str
) -> None:
    ask, two = _ask(pair, method), pair[1]
    with ThreadPoolExecutor(1) as pool:
        gate.open(1)
        start = _rows_at_rest(two)
        future = pool.submit(two.agent.generate, ask)
        gate.wait_until_reached(1)
        first = _rows_at_rest(two) - start
        gate.open(3)
        gate.wait_until_reached(3)
        third = _rows_at_rest(two) - start
        assert not future.done()
        gate.open(99)
        reply = future.result(WAIT_S)
    # Five layers a part: what three parts allow is three times what one does, for rows in all layers.
    assert 0 < first < third
    assert third < reply.fresh_entries + reply.recomputed_entries
    assert reply.pull_hidden_s > 0
    assert reply.stages.pull_s > 0.5  # it did wait
    assert reply.fallbacks == ()
    assert [t.transfer.outcome for t in reply.transfers] == ["pulled", "pulled"]
    total = sum(getattr(reply.stages, name) for name in reply.stages.__slots__)
    assert total == pytest.approx(reply.ttft_s, rel=0.05, abs=0.01)
    at_once: Reply = two.agent.generate(ask)
    assert reply.token_ids == at_once.token_ids
    assert (reply.fresh_entries, reply.recomputed_entries) == (
        at_once.fresh_entries,
        at_once.recomputed_entries,
    )


def test_an_owner_lost_half_way_ends_in_the_answer_of_full_prefill(
    pair: tuple[Desk, Desk], gate: Gate
) -> None:
    """The last part of one segment is corrupt, and nobody knows before the first layers are computed."""
    ask, (one, two) = _ask(pair, "auto"), pair
    for segment in one.agent.store.segments():
        if segment.num_tokens > 70:
            one.arena.payload(segment.blocks[-1].block)[-1000] ^= 1
    with ThreadPoolExecutor(1) as pool:
        gate.open(1)
        start = _rows_at_rest(two)
        future = pool.submit(two.agent.generate, ask)
        gate.wait_until_reached(1)
        computed = _rows_at_rest(two) - start
        gate.open(99)
        reply = future.result(WAIT_S)
    assert computed > 0
    assert sorted(t.transfer.outcome for t in reply.transfers) == ["corrupt", "pulled"]
    assert [f.reason for f in reply.fallbacks] == ["corrupt"]
    assert two.agent.stats()["fallbacks"] == {"corrupt": 1}
    # What was computed in vain is told as waiting for bytes.
    total = sum(getattr(reply.stages, name) for name in reply.stages.__slots__)
    assert total == pytest.approx(reply.ttft_s, rel=0.05, abs=0.01)
    assert reply.stages.first_token_s < reply.stages.pull_s
    # The other segment was relayed all the same; beside it everything is as if the lost one had never been.
    assert len(reply.relayed_keys) == 1
    clean = two.agent.generate(replace(ask, id=f"{ask.id}-again", only_keys=reply.relayed_keys))
    assert clean.fallbacks == ()
    assert reply.token_ids == clean.token_ids


def test_everything_lost_half_way_is_full_prefill(pair: tuple[Desk, Desk], gate: Gate) -> None:
    ask, (one, two) = _ask(pair, "auto"), pair
    for segment in one.agent.store.segments():
        one.arena.payload(segment.blocks[-1].block)[-1000] ^= 1
    gate.open(99)
    full = two.agent.generate(request("critic", CHECK, "full_prefill", publish=False, **ask.values))
    gate.open(0)
    with ThreadPoolExecutor(1) as pool:
        gate.open(2)
        future = pool.submit(two.agent.generate, ask)
        gate.wait_until_reached(2)
        gate.open(99)
        reply = future.result(WAIT_S)
    assert reply.token_ids == full.token_ids
    assert reply.relayed_tokens == 0
    assert {f.reason for f in reply.fallbacks} == {"corrupt"}


def test_cancelling_does_not_wait_for_bytes(pair: tuple[Desk, Desk], gate: Gate) -> None:
    """The pull still writes into its blocks when the request is over: they come back when it ends, which the
    fixture checks."""
    ask, two = _ask(pair, "auto"), pair[1]
    with ThreadPoolExecutor(1) as pool:
        gate.open(1)
        future = pool.submit(two.agent.generate, ask)
        gate.wait_until_reached(1)
        two.agent.cancel(ask.id)
        with pytest.raises(Cancelled):
            future.result(WAIT_S)
        held = sum(len(s.blocks) for s in two.agent.store.segments())
        assert two.arena.stats().used > held
        gate.open(99)
        deadline = threading.Event()
        for _ in range(100):
            if two.arena.stats().used == held and not two.directory.stats()["leases"]:
                break
            deadline.wait(0.05)
