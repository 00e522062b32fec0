"""The campaign against streaming: what its harm does to drafts, and how trials are drawn. No cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from relay_cluster.bench.stream_faults import (
    KINDS,
    Harmed,
    StreamFaultsSettings,
    Trial,
    draw_trials,
    parse_stream_kinds,
)
from relay_cluster.cluster import Cluster
from transport.errors import ConfigError, RelayError
from transport.types import WorkerId
from workers.messages import Draft, Request
from workers.segment import SlotValue

W0 = WorkerId("w0")


@dataclass
class Seen:
    """The cluster behind the harm: notes the drafts that reach a worker."""

    drafts: list[Draft] = field(default_factory=list)

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        self.drafts.append(draft)
        return 7


def sent(kind: str, count: int = 12) -> tuple[list[Draft], list[Draft], bool]:
    """(drafts sent, drafts that arrived, whether harm was done)"""
    seen = Seen()
    harmed = Harmed(cast("Cluster", seen), Trial(0, kind, 0, "solver", 3, seed=1))
    drafts = [
        Draft(
            request=Request(
                id="r",
                agent="critic",
                values={"text": SlotValue(token_ids=(9, 9)), "solver": SlotValue(token_ids=(1,) * n)},
            ),
            open_slots=frozenset({"solver"}),
            room_tokens=count - n,
        )
        for n in range(1, count + 1)
    ]
    for draft in drafts:
        harmed.prepare_ahead(W0, draft)
    assert harmed.settle(30)
    return drafts, seen.drafts, harmed.hit


def numbers(drafts: list[Draft]) -> list[int]:
    return [d.room_tokens for d in drafts]


def test_lost_drafts_do_not_arrive() -> None:
    drafts, arrived, hit = sent("lost")
    assert hit
    assert 0 < len(arrived) < len(drafts)
    assert set(numbers(arrived)) < set(numbers(drafts))


@pytest.mark.parametrize("kind", ["late", "duplicated"])
def test_late_and_repeated_drafts_all_arrive(kind: str) -> None:
    drafts, arrived, hit = sent(kind, 6)
    assert hit
    counts = Counter(numbers(arrived))
    assert set(counts) == set(numbers(drafts))
    assert max(counts.values()) == (2 if kind == "duplicated" else 1)


def test_a_reordered_draft_comes_behind_a_newer_one() -> None:
    _, arrived, hit = sent("reordered")
    assert hit
    order = numbers(arrived)
    assert order != sorted(order, reverse=True)
    assert len(set(order)) == len(order)


def test_another_branch_differs_in_open_slots_only() -> None:
    drafts, arrived, hit = sent("branch")
    assert hit
    assert len(arrived) == len(drafts)
    for ours, theirs in zip(drafts, arrived, strict=True):
        assert ours.request.values["text"] == theirs.request.values["text"]
    assert any(
        a.request.values["solver"] != b.request.values["solver"] for a, b in zip(drafts, arrived, strict=True)
    )


def test_a_run_is_cancelled_once_at_its_token() -> None:
    harmed = Harmed(cast("Cluster", Seen()), Trial(0, "cancelled", 0, "solver", 3, seed=1))
    harmed.on_event("token", "solver", 2)
    harmed.on_event("token", "critic", 5)
    harmed.on_event("agent_done", "solver")
    assert not harmed.hit
    with pytest.raises(RelayError, match="enough"):
        harmed.on_event("token", "solver", 3)
    harmed.on_event("token", "solver", 4)


def test_trials_are_drawn_by_the_seed_and_kinds_come_in_turn() -> None:
    settings = StreamFaultsSettings(trials=40, seed=3)
    trials = draw_trials(settings)
    assert trials == draw_trials(settings)
    assert trials != draw_trials(StreamFaultsSettings(trials=40, seed=4))
    assert set(Counter(t.kind for t in trials).values()) == {5}
    assert {t.agent for t in trials} == {"solver", "critic"}
    assert all(1 <= t.at < settings.max_new_tokens for t in trials)


def test_kinds_are_named_or_all() -> None:
    assert parse_stream_kinds(None) == KINDS
    assert parse_stream_kinds("lost, late") == ("lost", "late")
    with pytest.raises(ConfigError, match="writer_killed"):
        parse_stream_kinds("lots")


def test_what_is_not_harmed_is_the_cluster_s() -> None:
    harmed: Any = Harmed(cast("Cluster", Seen()), Trial(0, "writer_killed", 0, "solver", 3, seed=1))
    assert harmed.prepare_ahead(W0, sent("lost")[0][0]) == 7
    assert harmed.drafts == harmed.cluster.drafts
