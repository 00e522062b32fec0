"""Answers that are followed while they are decoded, between two workers of the real model in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.transport.rigs import wait_for
from tests.workers.rigs import Desk, request, two_desks
from transport.errors import Cancelled
from workers.messages import Draft, Reply, Request, Token
from workers.model import LoadedModel, load_model
from workers.profile import load_profile
from workers.segment import SlotValue
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.slow, pytest.mark.long]

BLOCK = 16
ANSWER = 2 * BLOCK + 5
METHOD = "cacheblend:r=1"
"""Every relayed entry is recomputed: full prefill's logits."""


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    """The embedded model with blocks that a short answer fills."""
    profile = load_profile(DEFAULT_MODEL, 30)
    return load_model(
        DEFAULT_MODEL, checkpoint_layer=profile.checkpoint_layer, device="cpu", block_tokens=BLOCK
    )


@pytest.fixture
def desks(small: LoadedModel) -> Iterator[tuple[Desk, Desk]]:
    """At the end nothing is leased, and every block is accounted for."""
    with two_desks(small) as both:
        yield both
        for desk in both:
            stats = desk.agent.store.stats
            wait_for(lambda s=stats: s()["opening"]["live"] == 0, "readers have been told", 10)
            assert (stats()["following"]["live"], stats()["open_blocks"]) == (0, 0)


def writer() -> Request:
    asked = request("solver", "Tell a long story about a lighthouse.", max_new_tokens=ANSWER)
    return replace(asked, open_answer=True, consumers=2)


def reader(output: SlotValue, method: str = METHOD) -> Request:
    prompt = "Here is a story:\n{solver}\nHow does it end?"
    return replace(
        request("critic", prompt, method, max_new_tokens=6, publish=False), values={"solver": output}
    )


def follow(desk: Desk, asked: Request, writes: Request) -> None:
    nothing = replace(asked, values={"solver": SlotValue(token_ids=())})
    ready = desk.agent.prepare_ahead(
        Draft(
            request=nothing,
            open_slots=frozenset({"solver"}),
            room_tokens=ANSWER,
            follow={"solver": writes.id},
        )
    )
    assert 0 < ready < 40, "what stands before the story, and nothing of it"


def write(desk: Desk, asked: Request) -> Reply:
    return desk.agent.generate(asked)


def test_what_is_relayed_while_it_is_written_is_what_is_relayed_afterwards(desks: tuple[Desk, Desk]) -> None:
    one, two = desks
    asked, writes = reader(SlotValue(token_ids=())), writer()
    follow(two, asked, writes)
    told = write(one, writes)
    assert told.published[-1].blocks == 3
    asked = replace(asked, values={"solver": told.output})
    reply = two.agent.generate(asked)
    assert reply.ahead_blocks >= 2
    assert sum(t.transfer.blocks for t in reply.transfers) <= 1
    assert reply.relayed_tokens == told.output.kv_tokens
    assert reply.prepared_tokens > 0
    assert reply.fallbacks == ()
    for method in (METHOD, "full_prefill"):
        plain = two.agent.generate(replace(asked, id=f"plain-{method}", method=method))
        assert plain.ahead_blocks == 0
        assert plain.token_ids == reply.token_ids, method


@pytest.mark.parametrize("cores", [1, None])
def test_with_auto_it_is_followed_where_it_is_not_computed(
    desks: tuple[Desk, Desk], monkeypatch: pytest.MonkeyPatch, cores: int | None
) -> None:
    """One core for each worker is too few to prepare on, so what is written is pulled."""
    one, two = desks
    monkeypatch.setattr(two.agent._preparing, "_shared_cores", lambda: cores)
    asked, writes = reader(SlotValue(token_ids=())), writer()
    ready: list[int] = []

    def draft(token: Token) -> None:
        ids.append(token.id)
        if len(ids) % 8 == 0:
            so_far = replace(asked, values={"solver": SlotValue(token_ids=tuple(ids))})
            ready.append(
                two.agent.prepare_ahead(
                    Draft(
                        request=so_far,
                        open_slots=frozenset({"solver"}),
                        room_tokens=200,
                        may_follow={"solver": writes.id},
                    )
                )
            )

    ids: list[int] = []
    told = one.agent.generate(writes, draft)
    reply = two.agent.generate(replace(asked, values={"solver": told.output}))
    plain = two.agent.generate(
        replace(asked, id="plain", method="full_prefill", values={"solver": told.output})
    )
    assert reply.token_ids == plain.token_ids
    if cores is None:
        assert reply.ahead_blocks == 0
        assert ready[-1] > ready[0] + ANSWER // 2
    else:
        assert reply.ahead_blocks >= 2
        assert ready[-1] == ready[0]


def test_a_writer_that_is_cancelled_leaves_nothing(desks: tuple[Desk, Desk]) -> None:
    one, two = desks
    asked, writes = reader(SlotValue(token_ids=())), writer()
    follow(two, asked, writes)
    seen: list[Token] = []

    def stop(token: Token) -> None:
        seen.append(token)
        if len(seen) == BLOCK + 4:
            one.agent.cancel(writes.id)

    with pytest.raises(Cancelled):
        one.agent.generate(writes, stop)
    stats = one.agent.store.stats
    wait_for(lambda: stats()["opening"]["ended"] == {"ended": 1}, "readers are told", 10)
    assert one.arena.stats().used == 0
    two.agent.cancel(asked.id)
