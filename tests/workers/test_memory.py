"""Too little memory costs time, never the answer: real workers with the real model, in one process."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.workers.rigs import QUESTION, Desk, request
from transport.directory.local import LocalDirectory
from transport.settings import MIB, SpillSettings
from transport.types import Owner, SegmentKey
from workers.desk import open_desk
from workers.messages import Reply
from workers.model import LoadedModel
from workers.profile import load_profile
from workers.segment import SlotValue
from workers.settings import DEFAULT_MODEL, WorkerSettings

pytestmark = pytest.mark.slow

DRAFT = "Think of a plan."
"""A prompt without slots: only answers become segments, of two blocks each."""
JUDGE = "First:\n{d0}\nSecond:\n{d1}\nThird:\n{d2}\nWhich is best?"
DRAFT_TOKENS, JUDGE_TOKENS = 70, 6


@contextmanager
def workers(loaded: LoadedModel, *blocks: int, spill: SpillSettings | None = None) -> Iterator[list[Desk]]:
    """Workers with arenas of so many blocks, who can ask each other. At the end nothing may be left over."""
    directory, desks = LocalDirectory(), list[Desk]()

    def ask(owner: Owner, keys: Sequence[SegmentKey]) -> frozenset[SegmentKey]:
        (desk,) = (d for d in desks if d.owner.worker == owner.worker)
        return desk.agent.store.holding.promote(keys)

    for at, count in enumerate(blocks):
        desks.append(
            open_desk(
                f"w{at}",
                loaded,
                load_profile(DEFAULT_MODEL, 30),
                arena_blocks=count,
                settings=WorkerSettings(cache_tokens=4096, break_even=False),
                directory=directory,
                spill=spill,
                ask_owner=ask,
            )
        )
    yield desks
    for desk in desks:
        memory = desk.agent.stats()["memory"]
        assert (memory["pins"], memory["leases"], memory["landing_blocks"]) == (0, 0, 0)
        assert memory["held_blocks"] == desk.arena.stats().used
        desk.close()
    assert directory.stats()["leases"] == 0


def draft(desk: Desk, number: int) -> Reply:
    """An answer of this worker, which it need not decode; it is published as any other."""
    text = f"Plan number {number}. {QUESTION} " * 3
    ids = tuple(desk.agent.loaded.tokenizer.encode(text))[:DRAFT_TOKENS]
    return desk.agent.replay(request(f"draft{number}", DRAFT), ids)


def judge(desk: Desk, drafts: Sequence[Reply], method: str) -> Reply:
    values: dict[str, SlotValue] = {f"d{i}": reply.output for i, reply in enumerate(drafts)}
    return desk.agent.generate(request("judge", JUDGE, method, max_new_tokens=JUDGE_TOKENS, **values))


@pytest.fixture(scope="module")
def in_full(loaded: LoadedModel) -> tuple[int, ...]:
    """The judge's answer, all of its prompt computed."""
    with workers(loaded, 20) as (one,):
        return judge(one, [draft(one, i) for i in range(3)], "full_prefill").token_ids


def test_back_pressure_costs_no_answer(loaded: LoadedModel, in_full: tuple[int, ...]) -> None:
    with workers(loaded, 1, 1) as (one, two):
        drafts = [draft(one, i) for i in range(3)]
        reply = judge(two, drafts, "auto")
        owner, reader = one.agent.stats(), two.agent.stats()
    assert (owner["unpublished"], owner["memory"]["backpressure"]) == ({"arena_full": 3}, 3)
    assert all("not published (ArenaFull)" in " ".join(d.notes) for d in drafts)
    assert [f.reason for f in reply.fallbacks] == ["not_found"] * 3
    # The reader publishes the drafts that it has computed, or rather does not.
    assert reader["unpublished"] == {"arena_full": 3}
    assert reply.token_ids == in_full


@pytest.mark.long
def test_without_room_to_land_the_answer_is_that_of_full_prefill(
    loaded: LoadedModel, in_full: tuple[int, ...]
) -> None:
    with workers(loaded, 20, 1) as (one, two):
        reply = judge(two, [draft(one, i) for i in range(3)], "auto")
    assert [f.reason for f in reply.fallbacks] == ["arena_full"] * 3
    assert (reply.token_ids, reply.relayed_tokens) == (in_full, 0)


def test_spilled_drafts_are_relayed_with_the_same_tokens(loaded: LoadedModel, tmp_path: Path) -> None:
    with workers(loaded, 20, 20) as (one, two):
        expected = judge(two, [draft(one, i) for i in range(3)], "auto")
    spill = SpillSettings(disk_dir=str(tmp_path), disk_bytes=64 * MIB)
    with workers(loaded, 6, 8, spill=spill) as (one, two):
        drafts = [draft(one, i) for i in range(5)]
        assert one.agent.store.holding._spilling.flush(30.0)
        before = one.agent.stats()["memory"]
        reply = judge(two, drafts[:3], "auto")
        after = one.agent.stats()["memory"]
        one.agent.store.holding._spilling.flush(30.0)
    assert (before["spills"], before["promotions"], after["promotions"]) == (2, 0, 2)
    assert (before["disk_writes"], after["disk_reads"]) == (2, 2)
    assert reply.fallbacks == expected.fallbacks == ()
    assert reply.relayed_tokens == expected.relayed_tokens == sum(d.output.kv_tokens for d in drafts[:3])
    assert reply.token_ids == expected.token_ids
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_disk_that_refuses_costs_hits_and_no_answer(
    loaded: LoadedModel, in_full: tuple[int, ...], tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))  # less than a block
    try:
        spill = SpillSettings(disk_dir=str(tmp_path), disk_bytes=64 * MIB)
        with workers(loaded, 2, 8, spill=spill) as (one, two):
            drafts = [draft(one, i) for i in range(3)]
            assert one.agent.store.holding._spilling.flush(30.0)
            memory = one.agent.stats()["memory"]
            one.agent.store.withdraw(drafts[2].published[-1].key)
            reply = judge(two, drafts, "auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert memory["lost"] == {"disk_error": 2}
    assert memory["evictions"]["spill"] == 2
    assert "File too large" in memory["disk_fault"]
    assert [f.reason for f in reply.fallbacks] == ["not_found"] * 3
    assert reply.token_ids == in_full


@pytest.mark.long
def test_what_the_reader_has_relayed_is_evicted_first(loaded: LoadedModel) -> None:
    with workers(loaded, 6, 8) as (one, two):
        replies = []
        for i in range(3):
            text = f"Plan number {i}. {QUESTION} " * 3
            ids = tuple(one.agent.loaded.tokenizer.encode(text))[:DRAFT_TOKENS]
            asked = replace(request(f"draft{i}", DRAFT), consumers=1)
            replies.append(one.agent.replay(asked, ids))
        values = {"solver": replies[1].output}
        reply = two.agent.generate(request("judge", "{solver}\nRight?", "auto", max_new_tokens=1, **values))
        assert reply.relayed_tokens == replies[1].output.kv_tokens
        draft(one, 4)
        left = {s.key for s in one.agent.store.segments()}
        memory = one.agent.stats()["memory"]
    assert replies[1].published[-1].key not in left
    assert {replies[0].published[-1].key, replies[2].published[-1].key} <= left
    assert (memory["evictions"]["consumed"], memory["evictions"]["lru"]) == (1, 0)
