"""The ring of recent requests, what it sums up to, and what it says in words. No cluster: replies are made by
hand, as workers make them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.serving.board import detail
from relay_cluster.serving.errors import ApiError
from relay_cluster.serving.explaining import NOTHING_USUAL, REASONS, explain, typical
from relay_cluster.serving.following import followed
from relay_cluster.serving.hops import GROUPS, HOPS, IN_WORKER
from relay_cluster.serving.memory import ChatText, Found, Rewritten
from relay_cluster.serving.recent import Entry, Recent, fill, plain
from relay_cluster.serving.service import Ask, Finished
from relay_cluster.serving.summing import links, percentile, reasons, totals
from transport.errors import ConfigError, WorkerLost
from transport.types import NodeId, Outcome, SegmentKey, Transfer, WorkerId
from workers.messages import Fallback, Reply, SlotTransfer, SpanCost, StageTimes, Token
from workers.segment import SlotValue
from workers.settings import SamplingSettings

MODEL = "model"
SECRET = "the password is swordfish"
STAGES = StageTimes(lookup_s=0.01, lease_s=0.01, pull_s=0.1, rotate_s=0.02, rectify_s=0.2, prefill_s=0.15)
KEY = SegmentKey("space", b"0123456789abcdef")


def ask(tenant: str = "", agent: str | None = "team/judge") -> Ask:
    texts = (ChatText("user", SECRET),)
    told = ("team", "judge") if agent == "team/judge" else ("", agent or "")
    return Ask(tenant=tenant, model=MODEL, texts=texts, sampling=SamplingSettings(), agent=agent, told=told)


def transfer(
    source: str, *, outcome: Outcome = Outcome.PULLED, nbytes: int = 1000, seconds: float = 0.1
) -> Transfer:
    return Transfer(WorkerId(source), WorkerId("w1"), "nixl", nbytes, 4, seconds, outcome)


def reply(**changes: Any) -> Reply:
    worker_ttft_s = sum(getattr(STAGES, name) for name in STAGES.__slots__)
    base: dict[str, Any] = {
        "request_id": "req-1a2b",
        "agent": "team/judge",
        "worker": WorkerId("w1"),
        "node": NodeId("n1"),
        "model": MODEL,
        "method": "auto",
        "resolved_method": "context_mass:ratio=0.15",
        "prompt_tokens": 1000,
        "fresh_tokens": 200,
        "relayed_tokens": 800,
        "prefix_tokens": 50,
        "fresh_entries": 0,
        "recomputed_entries": 10,
        "relayed_entries": 100,
        "ttft_s": worker_ttft_s,
        "decode_s": 1.0,
        "stages": STAGES,
        "transfers": (SlotTransfer("s0", KEY, NodeId("n0"), transfer("w0")),),
        "fallbacks": (),
        "published": (),
        "token_ids": (1, 2, 3),
        "text": SECRET,
        "finish_reason": "length",
        "output": SlotValue(text=SECRET),
        "flop_ratio": 0.3,
        "span_costs": (SpanCost("s0", 800, True, 0.1, 0.3, 1.5, 0.32),),
    }
    return Reply(**{**base, **changes})


def finished(found: Reply | None = None, *, ttft_s: float = 0.6, queue_s: float = 0.05) -> Finished:
    prompt = Rewritten((), {"s0": SlotValue(text=SECRET)}, (Found("s0", "seg-1", "response", 400),))
    return Finished(found or reply(), "seg-2", prompt, queue_s, 0.001, ttft_s)


def ended(recent: Recent, done: Finished, request_id: str, tenant: str = "") -> Entry:
    entry = recent.begin(request_id, ask(tenant))
    fill(entry, done)
    recent.end(request_id, entry, "ok")
    return entry


def some(count: int, **changes: Any) -> list[Entry]:
    """Entries, newest first."""
    recent = Recent(1000)
    for i in range(count):
        ended(recent, finished(reply(**changes)), f"{i:012x}ffff")
    return list(recent.of(""))


# -- the ring ------------------------------------------------------------------------------------------------


def test_the_ring_keeps_the_last_of_each_tenant() -> None:
    recent = Recent(3)
    for i in range(5):
        ended(recent, finished(), f"{i:012x}aaaa", "red")
    ended(recent, finished(), "b" * 32, "blue")
    assert [e.id for e in recent.of("red")] == [f"{i:012x}" for i in (4, 3, 2)]
    assert [e.seq for e in recent.of("red")] == [5, 4, 3]
    assert [e.id for e in recent.of("blue")] == ["b" * 12]
    assert list(recent.of("green")) == []


def test_the_ring_of_one_tenant_is_not_anothers() -> None:
    recent = Recent(3)
    mine = ended(recent, finished(), "a" * 32, "red")
    recent.begin("c" * 32, ask("red"))
    assert recent.find("red", mine.id) is mine
    assert recent.find("red", "chatcmpl-" + "a" * 32) is mine
    assert recent.find("blue", mine.id) is None
    assert recent.find("blue", "c" * 32) is None
    assert recent.running("blue") == []
    assert [e.id for e in recent.running("red")] == ["c" * 12]
    assert recent.find("red", "a") is None, "part of an id is none"


def test_nothing_is_kept_where_nothing_is_to_be_kept() -> None:
    recent = Recent(0)
    ended(recent, finished(), "a" * 32)
    assert list(recent.of("")) == []
    assert recent.running("") == []


def test_no_text_is_kept() -> None:
    recent = Recent(3, (MODEL,))
    fall = Fallback("s0", "peer_gone", "w0 is gone", 800)
    entry = ended(recent, finished(reply(fallbacks=(fall,))), "a" * 32)
    said = json.dumps([plain(entry, 0.0), detail(entry, 0.0, [entry])])
    assert "swordfish" not in said
    assert "s0" in said


def test_a_model_name_that_is_not_served_is_the_clients_own_text() -> None:
    recent = Recent(3, ("served",))
    assert recent.begin("a" * 32, ask()).model == ""
    assert recent.begin("b" * 32, replace(ask(), model="served")).model == "served"


def test_parts_add_up_to_the_time_to_first_token() -> None:
    entry = some(1)[0]
    assert list(entry.hops) == [hop.name for hop in HOPS]
    assert sum(entry.hops.values()) == pytest.approx(entry.ttft_s)
    assert entry.hops["dispatch"] == pytest.approx(0.6 - 0.05 - 0.001 - entry.hops["pull"] - 0.39)
    bars = detail(entry, 0.0, [])["bars"]
    assert [bar["start_s"] for bar in bars] == pytest.approx([0, *np.cumsum(list(entry.hops.values()))[:-1]])
    assert {hop.group for hop in HOPS} == set(GROUPS)
    assert {f"{name}_s" for name in IN_WORKER} == set(StageTimes.__slots__), "a stage is left out"


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, "relayed"),
        ({"fallbacks": (Fallback("s0", "stale", "", 800),)}, "fallback"),
        ({"span_costs": (SpanCost("s0", 800, False, 0.1, 3.0, 1.5, None),)}, "cheaper"),
        ({"span_costs": (), "transfers": ()}, "prefix"),
    ],
)
def test_what_became_of_a_span(changes: dict[str, Any], how: str) -> None:
    (span,) = some(1, **changes)[0].spans
    assert (span.how, span.id, span.kind) == (how, "seg-1", "response")


def test_a_pull_from_several_owners_is_told_by_owner() -> None:
    shares = (transfer("w0", nbytes=600), transfer("w2", nbytes=400))
    whole = replace(transfer("w0"), shares=shares)
    entry = some(1, transfers=(SlotTransfer("s0", KEY, NodeId("n0"), whole),))[0]
    assert [(p.source, p.bytes) for p in entry.pulls] == [("w0", 600), ("w2", 400)]


def test_a_later_try_is_counted() -> None:
    assert [some(1, request_id=i)[0].retries for i in ("req-1a2b", "req-1a2b-1", "req-1a2b-2")] == [0, 1, 2]


# -- recording -----------------------------------------------------------------------------------------------


async def items(*given: Any) -> AsyncGenerator[Token | Finished, None]:
    for item in given:
        if isinstance(item, Exception):
            raise item
        yield item


def follow(recent: Recent, *given: Any, take: int | None = None) -> list[Any]:
    async def run() -> list[Any]:
        got: list[Any] = []
        source = followed(recent, "a" * 32, ask(), items(*given))
        async for item in source:
            got.append(item)
            if take == len(got):
                break
        await source.aclose()
        return got

    return asyncio.run(run())


def test_an_answered_request_is_recorded_and_passes_unchanged() -> None:
    recent, done = Recent(3, (MODEL,)), finished()
    assert follow(recent, Token(1, "a"), done) == [Token(1, "a"), done]
    (entry,) = recent.of("")
    assert (entry.outcome, entry.ttft_s, entry.agent, entry.pipeline) == ("ok", 0.6, "team/judge", "team")
    assert recent.running("") == []


def test_one_that_is_left_is_cancelled() -> None:
    recent = Recent(3)
    follow(recent, Token(1, "a"), finished(), take=1)
    (entry,) = recent.of("")
    assert entry.outcome == "cancelled"
    assert entry.ttft_s is not None
    assert "client went away while" in explain(entry, NOTHING_USUAL)[0]


def test_a_fault_of_the_record_is_none_of_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    recent, odd = Recent(3), finished(reply(span_costs=None))
    assert follow(recent, odd) == [odd]
    (entry,) = recent.of("")
    assert entry.outcome == "ok"
    assert "could not be recorded" in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "code", "told"),
    [
        (WorkerLost("worker w0 is gone."), 503, "worker_lost", "worker w0 is gone."),
        (ConfigError(f"bad {SECRET}"), 400, "invalid_request_error", ""),
        (ApiError(429, SECRET, code="queue_full"), 429, "queue_full", ""),
        (KeyError(SECRET), 500, "internal_error", ""),
    ],
)
def test_one_that_fails_says_how_but_not_what_was_sent(
    error: Exception, status: int, code: str, told: str
) -> None:
    recent = Recent(3)
    with pytest.raises(type(error)):
        follow(recent, error)
    (entry,) = recent.of("")
    assert (entry.outcome, entry.status, entry.code, entry.detail) == ("error", status, code, told)
    (line,) = explain(entry, NOTHING_USUAL)
    assert f"status {status}" in line
    assert "swordfish" not in line


# -- sums ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(float(np.percentile(values, 100 * share)), abs=1e-6)


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentile([], 0.5) is None


def test_links_are_by_source_and_destination() -> None:
    recent = Recent(10)
    for seconds in (0.1, 0.2, 0.3):
        moved = SlotTransfer("s0", KEY, NodeId("n0"), transfer("w0", seconds=seconds))
        ended(recent, finished(reply(transfers=(moved,))), f"{seconds}" + "a" * 30)
    failed = SlotTransfer("s0", KEY, NodeId("n0"), transfer("w0", outcome=Outcome.STALE, nbytes=0, seconds=9))
    own = SlotTransfer("s1", KEY, NodeId("n1"), transfer("w1"))
    other = SlotTransfer("s2", KEY, NodeId("n2"), transfer("w2", nbytes=5))
    ended(recent, finished(reply(transfers=(failed, own, other))), "b" * 32)
    first, second = links(recent.of(""))
    assert (first["source"], first["destination"], first["source_node"]) == ("w0", "w1", "n0")
    assert (first["pulls"], first["bytes"], first["failed"]) == (4, 3000, {"stale": 1})
    assert first["p50_s"] == pytest.approx(0.2), "of those that came through"
    assert first["p95_s"] == pytest.approx(float(np.percentile([0.1, 0.2, 0.3], 95)))
    assert (second["source"], second["bytes"], second["backends"]) == ("w2", 5, {"nixl": 1})


def test_fallbacks_are_by_reason() -> None:
    recent = Recent(10)
    for i, why in enumerate(("stale", "peer_gone", "stale")):
        ended(recent, finished(reply(fallbacks=(Fallback("s0", why, "", 100),))), f"{i:012x}aaaa")
    rows = reasons(recent.of(""))
    assert [(r["reason"], r["count"], r["tokens"], r["latest"]) for r in rows] == [
        ("stale", 2, 200, f"{2:012x}"),
        ("peer_gone", 1, 100, f"{1:012x}"),
    ]
    assert all(r["what"] for r in rows)


def test_every_outcome_of_a_pull_has_words() -> None:
    assert {str(o) for o in Outcome} - {"pulled"} <= set(REASONS)


def test_totals() -> None:
    entries = some(4)
    sums = totals(entries, now=entries[0].at + 30, up_s=1000.0, full=False)
    assert (sums["requests"], sums["prompt_tokens"], sums["relayed_tokens"]) == (4, 4000, 3200)
    assert sums["prefix_tokens"] + sums["relayed_tokens"] + sums["computed_tokens"] == sums["prompt_tokens"]
    assert sums["per_s"] == pytest.approx(4 / 60)
    assert sums["ttft_p50_s"] == sums["ttft_p99_s"] == pytest.approx(0.6)
    assert totals([], 0.0, 5.0, full=False)["ttft_p50_s"] is None
    short = totals(entries, now=entries[-1].at + 30, up_s=1000.0, full=True)
    assert short["window_s"] == pytest.approx(30), "older requests were forgotten"


# -- full prefill's estimate ---------------------------------------------------------------------------------


def test_the_estimate_is_the_workers_with_the_same_waits() -> None:
    entry = some(1, full_prefill_s=2.0)[0]
    assert entry.basis == "predicted"
    assert entry.full_ttft_s == pytest.approx(2.0 + 0.05 + entry.hops["dispatch"])
    assert (some(1)[0].full_ttft_s, some(1)[0].basis) == (None, ""), "the worker has measured too little"


def test_a_request_that_reused_nothing_was_a_full_prefill() -> None:
    entry = some(1, relayed_tokens=0, prefix_tokens=0, fresh_tokens=1000, full_prefill_s=2.0)[0]
    assert (entry.full_ttft_s, entry.basis) == (0.6, "measured")


# -- words ---------------------------------------------------------------------------------------------------


def test_the_largest_part_is_told_first() -> None:
    entry = some(1)[0]
    assert explain(entry, NOTHING_USUAL)[0].startswith("The largest part was rectify: 200 ms of 600 ms (33%)")


def test_what_took_longer_than_usual_is_told_with_what_to_look_at() -> None:
    entries = some(4)
    late = replace(STAGES, pull_s=0.9)
    recent = Recent(9)
    entry = ended(recent, finished(reply(stages=late, ttft_s=1.29), ttft_s=1.4), "c" * 32)
    usual = typical(entry, [*entries, entry])
    assert usual.seconds["pull"] == pytest.approx(0.1), "the median of the others"
    assert usual.work == {"pull": 1000, "rotate": 800, "rectify": 800, "prefill": 150}
    lines = explain(entry, usual)
    assert lines[0].startswith("The largest part was pull: 900 ms of 1.40 s (64%), waiting for bytes from w0")
    assert any(line.startswith("Pull took 9.0x its median") and "link or the owner" in line for line in lines)
    assert typical(entry, entries[:2]) == NOTHING_USUAL, "two are no measure"
    assert typical(replace(entry, agent="another"), entries) == NOTHING_USUAL


@pytest.mark.parametrize(
    ("fresh", "told"),
    [(200, "no more to do than usual (150 computed tokens)"), (900, "850 computed tokens, usually 150")],
)
def test_more_work_is_told_from_slower_work(fresh: int, told: str) -> None:
    entries = some(4)
    late = replace(STAGES, prefill_s=1.5)
    recent = Recent(9)
    much = reply(stages=late, ttft_s=1.84, fresh_tokens=fresh)
    entry = ended(recent, finished(much, ttft_s=1.95), "c" * 32)
    (line,) = (text for text in explain(entry, typical(entry, entries)) if text.startswith("Prefill took"))
    assert told in line


def test_fallbacks_and_full_prefill_are_told() -> None:
    fall = Fallback("s0", "timed_out", "2 of 9 blocks", 800)
    entry = replace(some(1, fallbacks=(fall,))[0], full_ttft_s=3.0, basis="predicted", retries=1)
    said = " ".join(explain(entry, NOTHING_USUAL))
    assert "800 tokens of span s0" in said
    assert "transport.pull_timeout_s" in said
    assert "started again once" in said
    assert "5.0x as long" in said
    assert "as fast or faster" in " ".join(explain(replace(entry, full_ttft_s=0.3), NOTHING_USUAL))


def test_a_running_request_says_so() -> None:
    entry = Recent(1).begin("a" * 32, ask())
    assert "still runs" in explain(entry, NOTHING_USUAL)[0]
