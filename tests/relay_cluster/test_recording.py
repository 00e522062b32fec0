"""What replies, pulls and checks become in metrics, and that labels stay few and tell nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from relay_cluster.gate import Check, Edge
from relay_cluster.metrics import FALLBACK_REASONS
from relay_cluster.recording import (
    MAX_EDGES,
    UNNAMED,
    Bounded,
    Recorder,
    base_name,
    outcome,
    tenant_hash,
)
from transport.types import NodeId, Outcome, SegmentKey, Transfer, WorkerId
from workers.messages import Fallback, Reply, SlotTransfer, SpanCost, StageTimes
from workers.segment import SlotValue

EDGE = Edge("pair", "m", "critic", ("question", "solver"))
PLACE = {"model": "m", "pipeline": "pair", "agent_edge": "question+solver -> critic"}
ROUTE = {"src_node": "a", "dst_node": "b", "backend": "nixl"}


def pull(outcome: Outcome = Outcome.PULLED, backend: str = "nixl", nbytes: int = 4_000_000) -> SlotTransfer:
    moved = Transfer(WorkerId("w0"), WorkerId("w1"), backend, nbytes, 2, 0.02, outcome)
    return SlotTransfer("solver", SegmentKey("s", b"k"), NodeId("a"), moved)


def span(**facts: Any) -> SpanCost:
    base: dict[str, Any] = {
        "relayed": True,
        "predicted_pull_s": 0.1,
        "predicted_relay_s": 0.2,
        "predicted_prefill_s": 0.5,
        "actual_relay_s": 0.3,
    }
    return SpanCost("solver", 40, **{**base, **facts})


def reply(**facts: Any) -> Reply:
    base: dict[str, Any] = {
        "request_id": "req-1",
        "agent": "critic",
        "worker": WorkerId("w1"),
        "node": NodeId("b"),
        "model": "a name of its own",
        "method": "auto",
        "resolved_method": "context_mass:ratio=0.2+heal=idle",
        "prompt_tokens": 100,
        "fresh_tokens": 60,
        "relayed_tokens": 40,
        "prefix_tokens": 10,
        "prepared_tokens": 4,
        "fresh_entries": 600,
        "recomputed_entries": 100,
        "relayed_entries": 400,
        "ttft_s": 1.0,
        "decode_s": 0.9,
        "stages": StageTimes(queue_s=0.1, pull_s=0.2, rotate_s=0.1, rectify_s=0.2, prefill_s=0.4),
        "transfers": (pull(),),
        "fallbacks": (),
        "published": (),
        "token_ids": (1,) * 10,
        "text": "a secret",
        "finish_reason": "stop",
        "output": SlotValue(text="a secret"),
        "span_costs": (span(),),
        "pull_hidden_s": 0.05,
        "full_prefill_s": 2.5,
    }
    return Reply(**{**base, **facts})


def record(*replies: Reply, **told: Any) -> Recorder:
    recorder = Recorder(["m"], tenant_key=b"key")
    for one in replies:
        recorder.answered(
            one, **{"edge": EDGE, "ttft_s": 1.5, "seconds": 2.4, "stages": {"wait": 0.4}, **told}
        )
    return recorder


def value(recorder: Recorder, name: str, **labels: str) -> float | None:
    return recorder.registry.get_sample_value(name, labels)


def test_a_relayed_answer() -> None:
    it = record(reply())
    how = {**PLACE, "method": "context_mass"}
    assert value(it, "relay_time_to_first_token_seconds_sum", **how, outcome="relayed") == 1.5
    assert value(it, "relay_request_seconds_sum", **how) == 2.4
    assert value(it, "relay_full_prefill_estimate_seconds_sum", **how) == pytest.approx(0.5 + 2.5)
    for stage, seconds in {"wait": 0.4, "pull": 0.2, "prefill": 0.4, "lookup": 0.0}.items():
        assert value(it, "relay_stage_seconds_sum", model="m", stage=stage) == pytest.approx(seconds)
    tokens = {"relayed": 40, "prefix": 6, "prepared": 4, "computed": 50}
    for source, count in tokens.items():
        assert value(it, "relay_prompt_tokens_total", **PLACE, source=source) == count
    for kind, count in {"fresh": 600, "recomputed": 100, "reused": 300}.items():
        assert value(it, "relay_entries_total", model="m", method="context_mass", kind=kind) == count
    assert value(it, "relay_time_per_output_token_seconds_sum", model="m") == pytest.approx(0.1)
    assert value(it, "relay_answer_tokens_total", model="m") == 10
    assert value(it, "relay_pull_exposed_seconds_sum", model="m") == pytest.approx(0.2)
    assert value(it, "relay_pull_hidden_seconds_sum", model="m") == pytest.approx(0.05)


def test_pulls_by_route() -> None:
    failed = pull(Outcome.TIMED_OUT, nbytes=0)
    here = pull(backend="local")
    it = record(reply(transfers=(pull(), failed, here)))
    assert value(it, "relay_transfers_total", **ROUTE, outcome="pulled") == 1
    assert value(it, "relay_transfers_total", **ROUTE, outcome="timed_out") == 1
    assert value(it, "relay_transfers_total", **{**ROUTE, "backend": "local"}, outcome="pulled") == 1
    assert value(it, "relay_transfer_bytes_total", **ROUTE) == 4_000_000
    assert value(it, "relay_transfer_blocks_total", **ROUTE) == 2
    assert value(it, "relay_transfer_seconds_count", **ROUTE) == 1, "failures have no bandwidth"
    assert value(it, "relay_transfer_bytes_per_second_sum", **ROUTE) == pytest.approx(2e8)
    assert value(it, "relay_transfer_bytes_total", **{**ROUTE, "backend": "local"}) is None, "nothing moved"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"relayed_tokens": 0, "prefix_tokens": 0}, "dense"),
        ({"relayed_tokens": 0}, "prefix"),
        ({}, "relayed"),
        ({"resolved_method": "kvcomm:top=4"}, "anchored"),
        ({"fallbacks": (Fallback("solver", "stale", "", 5),)}, "fallback"),
    ],
)
def test_how_a_prompt_was_prefilled(facts: dict[str, Any], expected: str) -> None:
    assert outcome(reply(**facts)) == expected


def test_what_was_computed_in_full_has_no_estimate_beside_it() -> None:
    it = record(reply(relayed_tokens=0, transfers=()), reply(full_prefill_s=None))
    assert "relay_full_prefill_estimate_seconds_count{" not in it.text().decode()
    assert value(it, "relay_pull_exposed_seconds_count", model="m") == 1, "only where there were pulls"


def test_break_even() -> None:
    dear = span(actual_relay_s=0.6)
    unknown = span(predicted_pull_s=None, predicted_relay_s=None, predicted_prefill_s=None)
    left = span(relayed=False, actual_relay_s=None)
    it = record(reply(span_costs=(span(), dear, unknown, left)))
    assert value(it, "relay_break_even_spans_total", model="m", decision="relay") == 3
    assert value(it, "relay_break_even_spans_total", model="m", decision="compute") == 1
    assert value(it, "relay_break_even_mispredictions_total", model="m") == 1
    for kind, seconds in {"actual_relay": 0.9, "predicted_relay": 0.4, "predicted_prefill": 1.0}.items():
        assert value(it, "relay_break_even_seconds_total", model="m", kind=kind) == pytest.approx(seconds)
    assert value(it, "relay_break_even_error_ratio_sum", model="m") == pytest.approx(0.3 / 0.2 + 0.6 / 0.2)


def test_fallbacks_start_at_zero_and_unknown_reasons_are_other() -> None:
    it = record(
        reply(fallbacks=(Fallback("a", "corrupt", "", 7), Fallback("b", "a new one: w0 at 10.0.0.7", "", 3)))
    )
    told = {
        reason: value(it, "relay_fallbacks_total", model="m", reason=reason) for reason in FALLBACK_REASONS
    }
    assert told == {reason: float(reason == "corrupt") for reason in FALLBACK_REASONS}
    assert value(it, "relay_fallback_tokens_total", model="m", reason="corrupt") == 7
    assert value(it, "relay_fallback_tokens_total", model="m", reason="other") == 3
    assert "10.0.0.7" not in it.text().decode()


def test_tenants_are_hashed_with_a_key() -> None:
    it = record(reply(), tenant="acme")
    it.admitted("acme")
    name = tenant_hash("acme", b"key")
    assert value(it, "relay_tenant_tokens_total", tenant=name, kind="prompt") == 100
    assert value(it, "relay_tenant_requests_total", tenant=name) == 1
    assert "acme" not in it.text().decode()
    assert tenant_hash("acme", b"other") != name
    assert tenant_hash("acme", b"k" * 200), "a long key is no fault"
    nobody = record(reply(), tenant="")
    assert value(nobody, "relay_tenant_tokens_total", tenant="", kind="answer") == 10


def test_nothing_of_a_reply_that_is_text_or_an_id_is_told() -> None:
    page = record(reply()).text().decode()
    for told in ("secret", "req-1", "_created", "a name of its own"):
        assert told not in page


def test_names_beyond_the_bound_are_other() -> None:
    it = record()
    for i in range(MAX_EDGES + 5):
        it.answered(reply(), edge=replace(EDGE, agent=f"a{i}"), ttft_s=1, seconds=1, stages={})
    other = {"model": "m", "pipeline": "other", "agent_edge": "other"}
    assert value(it, "relay_request_seconds_count", **other, method="context_mass") == 5
    edges = {
        line.split("agent_edge=")[1].split(",")[0]
        for line in it.text().decode().splitlines()
        if "edge=" in line
    }
    assert len(edges) == MAX_EDGES + 1


@pytest.mark.parametrize("name", ["one\ntwo", 'a"b', "x" * 129, "Wie geht's?", "naïve"])
def test_what_is_no_plain_name_is_other(name: str) -> None:
    assert Bounded(5)(name) == ("other",)
    assert Bounded(5)("plan", name) == ("other", "other")


def test_names_count_together_and_known_ones_stay() -> None:
    bounded = Bounded(2)
    assert [bounded("p", "a"), bounded("p", "b"), bounded("p", "c")] == [
        ("p", "a"),
        ("p", "b"),
        ("other",) * 2,
    ]
    assert bounded("p", "a") == ("p", "a")


def test_an_edge_without_a_name_is_unnamed() -> None:
    it = record(reply(), edge=Edge("", "m", "", ()))
    place = {"model": "m", "pipeline": "", "agent_edge": UNNAMED}
    assert value(it, "relay_prompt_tokens_total", **place, source="relayed") == 40


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("auto", "auto"),
        ("auto:strict+heal=off", "auto:strict"),
        ("auto+heal=idle", "auto"),
        ("auto:nonsense", "auto"),
        ("kvcomm:top=4", "kvcomm"),
        ("full_prefill", "full_prefill"),
        ("epic+heal=always", "epic"),
        ("rm -rf", "other"),
    ],
)
def test_methods_without_parameters(written: str, name: str) -> None:
    assert base_name(written) == name


def test_the_gate() -> None:
    it = record()
    it.checked(EDGE, "auto", Check(kl_mean=0.02, top1=0.9))
    it.checked(EDGE, "auto", None)
    it.gated(EDGE, "auto", rung=1, fell=1)
    it.gated(EDGE, "auto", rung=0, rose=1)
    labels = {**PLACE, "method": "auto"}
    for name, expected in {
        "relay_quality_rung": 0,
        "relay_quality_demotions_total": 1,
        "relay_quality_recoveries_total": 1,
        "relay_quality_kl_nats_sum": 0.02,
        "relay_quality_top1_agreement_ratio_sum": 0.9,
    }.items():
        assert value(it, name, **labels) == pytest.approx(expected), name
    for outcome_, count in {"judged": 1, "skipped": 1}.items():
        assert value(it, "relay_quality_checks_total", **labels, outcome=outcome_) == count
