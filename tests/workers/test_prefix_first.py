"""What the exact prefix cache has is not relayed where a request says so; tenants do not share prefixes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workers.desk import Desk, load_for_desk, open_desk
from workers.messages import Request
from workers.segment import Message, SlotValue
from workers.settings import DEFAULT_MODEL, SamplingSettings

pytestmark = pytest.mark.slow

TEXT = "The farmer has seventeen sheep, and every week he buys another five of them at the market in town."


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    loaded, profile = load_for_desk(DEFAULT_MODEL)
    with open_desk("w0", loaded, profile, arena_blocks=32) as made:
        yield made


def ask(
    name: str, *, prefix_first: bool, tenant: str = "", reuse: str = "naive", text: str = TEXT
) -> Request:
    return Request(
        id=name,
        agent="a",
        messages=(Message("system", "Be brief."), Message("user", "{text} How many?")),
        values={"text": SlotValue(text=text)},
        method=reuse,
        sampling=SamplingSettings(max_new_tokens=2),
        prefix_first=prefix_first,
        tenant=tenant,
    )


def test_a_repeated_prompt_comes_from_the_prefix_cache(desk: Desk) -> None:
    desk.agent.generate(ask("first", prefix_first=True))
    relayed = desk.agent.generate(ask("relayed", prefix_first=False))
    exact = desk.agent.generate(ask("exact", prefix_first=True))
    assert relayed.relayed_tokens > 15
    assert exact.relayed_tokens == 0
    assert exact.prefix_tokens == exact.prompt_tokens - 1
    assert exact.fallbacks == ()


def test_a_tenant_finds_neither_prefixes_nor_segments_of_others(desk: Desk) -> None:
    text = TEXT + " In the red town."
    for tenant in ("red", "blue"):
        first = desk.agent.generate(ask(f"{tenant}-1", prefix_first=False, tenant=tenant, text=text))
        assert (first.relayed_tokens, first.prefix_tokens) == (0, 0), tenant
        again = desk.agent.generate(ask(f"{tenant}-2", prefix_first=False, tenant=tenant, text=text))
        assert again.relayed_tokens > 15
        other = desk.agent.generate(
            ask(f"{tenant}-3", prefix_first=True, tenant=tenant, reuse="exact_prefix", text=text)
        )
        assert other.prefix_tokens == other.prompt_tokens - 1
    spaces = {segment.key.space for segment in desk.agent.store.segments()}
    assert len(spaces) >= 2
