"""The fault campaign without a cluster: what it draws, how it counts, what it refuses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from relay_cluster import cli
from relay_cluster.bench.common import Document, check_document
from relay_cluster.bench.fault_judge import Seen, judge
from relay_cluster.bench.fault_kinds import HELD_MS, IN_PULL, KINDS, Stagehand, Trial
from relay_cluster.bench.fault_rows import FaultRow, fault_table
from relay_cluster.bench.faults import Campaign, FaultsSettings, draw_trials, shares
from relay_cluster.bench.texts import load_tasks
from transport.faults import ENDED, READ, FaultEvent
from transport.types import SegmentKey
from workers.messages import Fallback, Published, Reply, StageTimes
from workers.segment import SlotValue

SETTINGS = FaultsSettings(trials=2 * len(KINDS), seed=3)


def _words(text: str) -> int:
    return len(text.split())


def relay(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    yield
    for name in ("relay_cluster", "workers", "transport"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


# --- drawing ------------------------------------------------------------------------------------------------


def test_equal_seeds_draw_equal_trials_and_others_others() -> None:
    once, again = (draw_trials(SETTINGS, load_tasks([]), _words) for _ in range(2))
    assert once == again
    other = draw_trials(replace(SETTINGS, seed=4), load_tasks([]), _words)
    assert [t.inputs for t in other] != [t.inputs for t in once]


def test_every_kind_comes_equally_often_over_every_backend() -> None:
    trials = draw_trials(replace(SETTINGS, trials=4 * len(KINDS)), load_tasks([]), _words)
    assert set(Counter(t.kind.name for t in trials).values()) == {4}
    for share in shares(trials, ("auto", "tcp")):
        assert set(Counter(t.kind.name for t in share).values()) == {2}
        assert len({t.kind.name for t in share}) == len(KINDS)


def test_a_trial_is_a_chain_of_which_one_relay_is_disturbed() -> None:
    trials = draw_trials(replace(SETTINGS, trials=200), load_tasks([]), _words)
    texts = [text for t in trials for text in t.inputs.values()]
    assert len(set(texts)) == len(texts), "a text that was there before would be found in a cache"
    assert min(map(_words, texts)) >= 64
    assert {len(t.inputs) for t in trials} == {1, 2, 3}
    assert {len(t.pipeline.agents) for t in trials} == {2, 3}
    for t in trials:
        assert t.stage in t.kind.stages
        assert t.upstream in t.pipeline.upstreams[t.reader]
        assert t.pipeline.check_inputs(t.inputs) == t.inputs


def test_every_kind_is_armed_or_has_a_deed() -> None:
    for name, kind in KINDS.items():
        assert kind.spec is not None or callable(getattr(Stagehand, f"_{name}"))


# --- counting -----------------------------------------------------------------------------------------------


def _trial(kind: str, stage: str = "before_lookup") -> Trial:
    first = draw_trials(replace(SETTINGS, trials=1), load_tasks([]), _words)[0]
    return replace(first, kind=KINDS[kind], stage=stage)


def _reply(*reasons: str, lookup_s: float = 0.0) -> Reply:
    numbers = dict.fromkeys((f.name for f in fields(Reply) if f.type == "int"), 0)
    numbers |= dict.fromkeys(("ttft_s", "decode_s"), 0)
    texts = dict.fromkeys((f.name for f in fields(Reply) if f.type in ("str", "WorkerId", "NodeId")), "")
    empty = dict.fromkeys(("transfers", "published", "token_ids"), ())
    facts: Any = {**numbers, **texts, **empty}
    fallbacks = tuple(Fallback("slot", reason, "why", 5) for reason in reasons)
    stages = StageTimes(lookup_s=lookup_s)
    return Reply(**facts, fallbacks=fallbacks, stages=stages, output=SlotValue(text=""))


def _seen(trial: Trial, acted_at: float | None, replies: Sequence[Reply], *events: FaultEvent) -> Seen:
    return judge(Seen(), trial, acted_at, replies, events, losses=())


def test_a_failed_pull_with_its_fallback_is_in_order() -> None:
    events = (
        FaultEvent(11.0, READ, "k"),
        FaultEvent(11.0, "corrupt", "k"),
        FaultEvent(11.25, ENDED, "k", "corrupt"),
    )
    seen = _seen(_trial("corrupt"), 10.0, [_reply("corrupt")], *events)
    assert (seen.hit, seen.uncounted, seen.failed) == (True, False, False)
    assert seen.fallbacks == {"corrupt": 1}
    assert seen.detect_s == pytest.approx(0.25)


def test_a_failed_pull_that_no_report_tells_of_is_a_defect() -> None:
    events = (FaultEvent(11.0, READ, "k"), FaultEvent(11.2, ENDED, "k", "peer_gone"))
    assert _seen(_trial("owner_kill"), 10.0, [_reply()], *events).uncounted
    assert not _seen(_trial("owner_kill"), 10.0, [_reply("peer_gone")], *events).uncounted


def test_a_pull_that_succeeds_although_it_must_not_is_a_defect() -> None:
    events = (FaultEvent(11.0, "corrupt", "k"), FaultEvent(11.2, ENDED, "k", "pulled"))
    seen = _seen(_trial("corrupt"), 10.0, [_reply()], *events)
    assert seen.uncounted
    assert seen.failed


def test_a_pull_that_a_second_backend_saves_has_not_failed() -> None:
    events = (FaultEvent(11.2, ENDED, "k", "peer_gone"), FaultEvent(11.3, ENDED, "k", "pulled"))
    seen = _seen(_trial("owner_stop"), 10.0, [_reply()], *events)
    assert (seen.uncounted, seen.detect_s) == (False, None)


def test_our_own_delay_is_no_part_of_how_long_it_took_to_notice() -> None:
    held = HELD_MS / 1e3
    events = (FaultEvent(11.0, READ, "k"), FaultEvent(11.0 + held + 0.1, ENDED, "k", "peer_gone"))
    seen = _seen(_trial("owner_kill", IN_PULL), 11.05, [_reply("peer_gone")], *events)
    assert seen.detect_s == pytest.approx(0.1)


def test_a_fault_that_never_came_is_no_hit() -> None:
    assert not _seen(_trial("owner_kill"), None, [_reply()]).hit
    assert not _seen(_trial("drop"), 10.0, [_reply()]).hit, "armed, but nothing was pulled"


def test_a_lost_directory_call_is_noticed_by_the_wait_for_it() -> None:
    seen = _seen(_trial("directory_drop"), 10.0, [_reply(), _reply("directory_down", lookup_s=1.0)])
    assert seen.detect_s == 1.0


def test_rows_add_up_and_the_document_keeps_to_its_schema() -> None:
    campaign = Campaign(SETTINGS)
    good, bad = Seen(hit=True, detect_s=0.5), Seen(hit=True, wrong=["a differs"], error="WorkerLost")
    for kind, seen in (("drop", good), ("drop", bad), ("delay", good)):
        campaign.keep("tcp", _trial(kind), seen)
    rows = campaign.rows()
    assert [(r.kind, r.trials, r.wrong_outputs) for r in rows] == [
        ("drop", 2, 1),
        ("delay", 1, 0),
        ("all", 3, 1),
    ]
    assert rows[0].errors == {"WorkerLost": 1}
    assert rows[0].detect_s_max == 0.5
    assert [f["wrong"] for f in campaign.failures] == [["a differs"]]
    document = Document("faults", {}, rows).to_json()
    check_document(document)
    assert document["schema"] == "relay.bench.faults/1"
    assert fault_table(rows).row_count == 3
    assert isinstance(rows[0], FaultRow)


def test_what_could_not_be_published_is_told_in_the_notes() -> None:
    """A full arena may meet a publication before it meets a pull."""
    events = (FaultEvent(11.0, "arena_full"),)
    assert _seen(_trial("arena_full"), 10.0, [_reply()], *events).uncounted
    noted = replace(_reply(), notes=("the answer was not published (ArenaFull): no room",))
    assert not _seen(_trial("arena_full"), 10.0, [noted], *events).uncounted


def test_a_copy_elsewhere_serves_for_what_its_owner_has_lost() -> None:
    trial = _trial("disk_full")
    key = SegmentKey("space", b"answer")
    left = replace(_reply(), agent=trial.upstream, published=(Published(None, key, 80, 2, 1 << 20),))
    missed = replace(_reply(), agent=trial.reader)
    served = replace(missed, relayed_keys=frozenset({key}))
    assert _seen(trial, 10.0, [left, missed]).uncounted
    assert not _seen(trial, 10.0, [left, served]).uncounted


# --- command line -------------------------------------------------------------------------------------------


def test_help_explains_every_option_and_shows_examples() -> None:
    shown = relay("bench", "faults", "--help")
    assert shown.exit_code == 0
    assert "$ relay bench faults --quick" in shown.output
    for option in ("--trials", "--seed", "--kinds", "--backends", "--json"):
        assert option in shown.output


def test_unknown_faults_and_backends_are_refused_before_anything_starts() -> None:
    shown = relay("bench", "faults", "--kinds", "drop,flood")
    assert shown.exit_code == 2
    assert '"flood" is no fault' in shown.output
    assert "owner_kill" in shown.output
    assert relay("bench", "faults", "--backends", "pigeon").exit_code == 2
