"""Too little memory costs time, never the answer: real workers with the real model, in one process."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

# The real model decodes about ten tokens a second on two cores.
pytestmark = pytest.mark.slow

DRAFTS = tuple(f"Plan number {i}. {QUESTION}" for i in range(3))
"""Prompts without slots: only their answers become segments, of two blocks each."""
JUDGE = "First:\n{d0}\nSecond:\n{d1}\nThird:\n{d2}\nWhich is best?"
TOKENS = 70


@contextmanager
def workers(loaded: LoadedModel, *blocks: int, spill: SpillSettings | None = None) -> Iterator[list[Desk]]:
    """Workers with arenas of so many blocks, who can ask each other. At the end all that they hold is told."""
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


def chain(desks: Sequence[Desk], method: str) -> tuple[list[Reply], Reply]:
    """Three drafts on the first worker, judged by the last one."""
    drafts = [
        desks[0].agent.generate(request("draft", prompt, method, max_new_tokens=TOKENS)) for prompt in DRAFTS
    ]
    values: dict[str, SlotValue] = {f"d{i}": draft.output for i, draft in enumerate(drafts)}
    return drafts, desks[-1].agent.generate(request("judge", JUDGE, method, max_new_tokens=TOKENS, **values))


@pytest.fixture(scope="module")
def in_full(loaded: LoadedModel) -> tuple[list[Reply], Reply]:
    """The same chain, all of it computed."""
    with workers(loaded, 20, 20) as desks:
        return chain(desks, "full_prefill")


@pytest.fixture(scope="module")
def relayed(loaded: LoadedModel) -> Reply:
    """The judge with all drafts relayed, in arenas with room for everything."""
    with workers(loaded, 20, 20) as desks:
        _, judge = chain(desks, "auto")
    assert judge.fallbacks == ()
    return judge


def test_back_pressure_costs_no_answer(loaded: LoadedModel, in_full: tuple[list[Reply], Reply]) -> None:
    with workers(loaded, 1, 1) as desks:
        drafts, judge = chain(desks, "auto")
        owner, reader = (desk.agent.stats() for desk in desks)
    assert [d.token_ids for d in drafts] == [d.token_ids for d in in_full[0]]
    assert judge.token_ids == in_full[1].token_ids
    assert {f.reason for f in judge.fallbacks} == {"not_found"}
    assert (owner["unpublished"], owner["memory"]["backpressure"]) == ({"arena_full": 3}, 3)
    assert all("not published (ArenaFull)" in " ".join(d.notes) for d in drafts)
    # The judge publishes the drafts that it has computed, and its answer, or rather does not.
    assert reader["unpublished"] == {"arena_full": 4}


def test_without_room_to_land_the_answer_is_that_of_full_prefill(
    loaded: LoadedModel, in_full: tuple[list[Reply], Reply]
) -> None:
    with workers(loaded, 20, 1) as desks:
        _, judge = chain(desks, "auto")
    assert [(f.reason, f.slot) for f in judge.fallbacks] == [("arena_full", f"d{i}") for i in range(3)]
    assert judge.token_ids == in_full[1].token_ids
    assert judge.relayed_tokens == 0


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_spilled_drafts_are_relayed_with_the_same_tokens(
    loaded: LoadedModel, relayed: Reply, tier: str, tmp_path: Path
) -> None:
    spill = SpillSettings(disk_dir=str(tmp_path), **{f"{tier}_bytes": 64 * MIB})
    with workers(loaded, 6, 8, spill=spill) as desks:
        drafts = [
            desks[0].agent.generate(request("draft", prompt, "auto", max_new_tokens=TOKENS))
            for prompt in (*DRAFTS, f"Something else. {QUESTION}")
        ]
        values: dict[str, SlotValue] = {f"d{i}": draft.output for i, draft in enumerate(drafts[:3])}
        before = desks[0].agent.stats()["memory"]
        judge = desks[1].agent.generate(request("judge", JUDGE, "auto", max_new_tokens=TOKENS, **values))
        after = desks[0].agent.stats()["memory"]
    assert (before["spills"], before["promotions"]) == (1, 0)
    assert (after["spills"], after["promotions"]) == (2, 1)
    assert judge.fallbacks == ()
    assert judge.relayed_tokens == relayed.relayed_tokens
    assert judge.token_ids == relayed.token_ids
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_costs_hits_and_no_answer(
    loaded: LoadedModel, in_full: tuple[list[Reply], Reply], tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))  # less than a block
    try:
        spill = SpillSettings(disk_dir=str(tmp_path), disk_bytes=64 * MIB)
        with workers(loaded, 2, 8, spill=spill) as desks:
            # Only the last draft is still there, and it is not what this judge gets.
            drafts, _ = chain(desks[:1], "full_prefill")
            desks[0].agent.store.holding._spilling.flush(10.0)
            values: dict[str, SlotValue] = {f"d{i}": drafts[0].output for i in range(3)}
            method_values = {"max_new_tokens": TOKENS, **values}
            judge = desks[1].agent.generate(request("judge", JUDGE, "auto", **method_values))
            full = desks[1].agent.generate(request("judge", JUDGE, "full_prefill", **method_values))
            memory = desks[0].agent.stats()["memory"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert memory["lost"]["disk_error"] >= 2
    assert "File too large" in memory["disk_fault"]
    assert {f.reason for f in judge.fallbacks} == {"not_found"}
    assert judge.token_ids == full.token_ids
