"""kvcomm: the gate as published, one choice per span, and whole requests on the real model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers import tiny
from tests.workers.rigs import Desk, request, two_desks
from transport.errors import ConfigError
from transport.types import Incarnation, Located, NodeId, Owner, Segment, SegmentKey, WorkerId
from workers.compare import kl_divergence
from workers.messages import Request
from workers.methods import parse_method
from workers.methods.base import ModelProfile, Span, SpanPlan
from workers.methods.kvcomm import AnchorCandidate, KVComm, Verdict
from workers.model import LoadedModel

PROFILE = ModelProfile("tiny", 6, 2, 3, 6, 0.2, 4)


def at(*distances: float) -> list[AnchorCandidate]:
    return [AnchorCandidate(f"a{i}", d, d / 100) for i, d in enumerate(distances)]


def located(name: str) -> tuple[SegmentKey, Located]:
    key = SegmentKey("space", name.encode())
    owner = Owner(WorkerId("w0"), Incarnation(1), NodeId("n"))
    return key, Located(Segment(key, 40, 7, ()), owner)


# -- the gate --


def test_one_clearly_nearest_anchor_opens_the_gate_however_far_it_is() -> None:
    """As published: entropy near zero, whatever the distance."""
    assert KVComm().judge(at(5.0, 80.0)).sharable
    assert KVComm().judge(at(5000.0, 5080.0)) == Verdict(True, pytest.approx(0.0), 0.3, ("a0",))


def test_two_anchors_that_are_as_near_close_it() -> None:
    verdict = KVComm().judge(at(5.0, 5.0))
    assert (verdict.sharable, verdict.entropy, verdict.limit) == (False, pytest.approx(1.0), 0.3)
    # 0.3 bits: the distance at which the gate opens, from the binary entropy function.
    assert not KVComm().judge(at(0.0, 2.8)).sharable
    assert KVComm().judge(at(0.0, 3.0)).sharable


def test_two_usable_anchors_are_needed() -> None:
    assert not KVComm(threshold=1).judge([]).sharable
    assert not KVComm(threshold=1).judge(at(0.0)).sharable
    assert KVComm(threshold=1).judge(at(0.0, 0.0)).sharable


@given(st.lists(st.floats(0, 1e4), max_size=12))
def test_at_threshold_zero_nothing_is_sharable_and_at_one_everything(distances: list[float]) -> None:
    """Zero entropy, which rounding makes of any far pair, is not enough at threshold 0."""
    assert not KVComm(threshold=0).judge(at(*distances)).sharable
    assert KVComm(threshold=1).judge(at(*distances)).sharable == (len(distances) >= 2)


@given(st.lists(st.floats(0, 50), min_size=2, max_size=12), st.floats(0, 1), st.randoms())
def test_the_gate_does_not_see_the_order_of_anchors(
    distances: list[float], threshold: float, rng: Any
) -> None:
    candidates = at(*distances)
    shuffled = rng.sample(candidates, len(candidates))
    one, two = (KVComm(threshold=threshold).judge(c) for c in (candidates, shuffled))
    assert one.entropy == pytest.approx(two.entropy, abs=1e-9)
    assert 0 <= one.entropy <= math.log2(len(distances)) + 1e-9
    if abs(one.entropy - one.limit) > 1e-6:
        assert one.sharable == two.sharable


def test_the_head_is_the_nearest_anchors_up_to_nine_tenths() -> None:
    method = KVComm(threshold=1)
    assert method.judge(at(9.0, 0.0, 9.0)).head == ("a1",)
    assert method.judge(at(1.0, 0.0, 9.0)).head == ("a1", "a0")
    assert sorted(method.judge(at(0.0, 0.0, 0.0)).head) == ["a0", "a1", "a2"]


def test_the_absolute_gate_is_off_unless_asked_for() -> None:
    far = at(50.0, 90.0)  # relative distances 0.5 and 0.9
    assert KVComm().judge(far).sharable
    assert KVComm(max_distance=0.5).judge(far).sharable
    assert not KVComm(max_distance=0.49).judge(far).sharable


@pytest.mark.parametrize(
    "text",
    [
        "threshold=1.1",
        "threshold=-1",
        "max_anchor_num=0",
        "window_size=0",
        "bits=4",
        "temperature=0",
        "prior=-1",
        "max_distance=-1",
    ],
)
def test_parameters_out_of_bounds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=text.partition("=")[0]):
        parse_method(f"kvcomm:{text}")


# -- the plan --


def test_every_span_is_judged_alone() -> None:
    """The published code computes the whole prompt when one slot has a stranger; here only that slot."""
    (a, hit_a), (b, hit_b), (c, _) = located("a"), located("b"), located("c")
    spans = [Span(0, 5), Span(5, 30, "x", a), Span(30, 50, "y", b), Span(50, 70, "z", c), Span(70, 80)]
    candidates = {spans[1]: at(0.0, 90.0), spans[2]: at(5.0, 5.0), spans[3]: at(0.0, 90.0)}
    plan = KVComm().plan(spans, {a: hit_a, b: hit_b}, PROFILE, candidates)
    assert plan.spans == (
        SpanPlan(spans[0]),
        SpanPlan(spans[1], hit_a, correction="kvcomm"),
        SpanPlan(spans[2]),
        SpanPlan(spans[3]),  # its anchors are near, but its segment could not be had
        SpanPlan(spans[4]),
    )
    assert plan.spans[1].band == (0, 0), "nothing of a corrected span is recomputed"


def test_without_anchors_everything_is_computed() -> None:
    key, hit = located("a")
    spans = [Span(0, 5), Span(5, 30, "x", key), Span(30, 31)]
    assert all(s.source is None for s in KVComm().plan(spans, {key: hit}, PROFILE).spans)


def test_threshold_zero_equals_full_prefill(family: str) -> None:
    rig = tiny.Rig(tiny.build(family))
    ids = tiny.tokens(40, 1)
    pieces = [
        (tiny.tokens(17, 5), None),
        (ids, rig.segment(tiny.tokens(11, 3), ids)),
        (tiny.tokens(9, 7), None),
    ]
    assert KVComm.exhaustive is not None
    logits, prefill = rig.run(parse_method(KVComm.exhaustive), pieces)
    full = tiny.reference_logits(rig.model, [i for p, _ in pieces for i in p])[-1]
    assert (logits - full).abs().max() < 1e-4
    assert prefill.counts.relayed == 0


# -- requests on the real model --

SOLVE = "Solve this problem.\n{question}"
CHECK = "You check solutions.\nProblem:\n{question}\nSolution:\n{solver}\nIs the solution right?"
_TOPICS = [
    ("farmer", "sheep", 17, 5),
    ("baker", "loaves", 96, 8),
    ("teacher", "books", 43, 6),
    ("gardener", "tulips", 28, 9),
    ("collector", "stamps", 64, 7),
    ("fisherman", "nets", 12, 3),
    ("potter", "bowls", 35, 4),
    ("tailor", "shirts", 51, 2),
    ("miller", "sacks", 22, 6),
    ("painter", "frames", 19, 4),
    ("printer", "cards", 75, 5),
]
"""Eight conversations to learn from, three to be corrected."""


def _question(n: int) -> str:
    who, what, start, more = _TOPICS[n]
    # Longer ones first: an anchor serves spans that are no longer than itself.
    tail = " Say how you found the number, and check it once more before you answer." if n < 8 else ""
    return f"A {who} has {start} {what} and gets {more} more every week. How many after six weeks?{tail}"


def _answer(n: int) -> str:
    who, what, start, more = _TOPICS[n]
    tail = " Counting again from the start gives the very same number, so it must be right." if n < 8 else ""
    return (
        f" In six weeks the {who} gets {6 * more} {what}. With the {start} from the start that makes "
        f"{start + 6 * more}.{tail}"
    )


@pytest.fixture
def pair(loaded: LoadedModel) -> Iterator[tuple[Desk, Desk]]:
    """Two replicas with room for anchors."""
    with two_desks(loaded, arena_blocks=100) as desks:
        yield desks


def _ask(one: Desk, n: int, method: str, **options: Any) -> Request:
    """The n-th question, with the upstream agent's answer published on `one`."""
    solver = one.agent.replay(
        request("solver", SOLVE, question=_question(n)),
        tuple(one.agent.loaded.tokenizer.encode(_answer(n), add_special_tokens=False)),
    )
    options.setdefault("max_new_tokens", 1)
    return request("critic", CHECK, method, question=_question(n), solver=solver.output, **options)


def _keyed(one: Desk, ask: Request) -> int:
    """Tokens of both slots that have KV somewhere."""
    spans = [s for s in one.agent.render(ask).spans if s.key is not None]
    assert [s.slot for s in spans] == ["question", "solver"]
    return sum(len(s) for s in spans)


def _kl(one: Desk, ask: Request, method: str) -> torch.Tensor:
    """Of `method` against full prefill over the next 16 tokens; nothing is learned."""
    forced = one.agent.generate(
        replace(ask, id=f"{ask.id}-full", method="full_prefill", publish=False)
    ).token_ids
    full = one.agent.score(replace(ask, id=f"{ask.id}-a", method="full_prefill", publish=False), forced[:-1])
    ours = one.agent.score(replace(ask, id=f"{ask.id}-b", method=method, publish=False), forced[:-1])
    return kl_divergence(full.logits, ours.logits)


@pytest.mark.slow
def test_the_third_question_is_corrected_by_the_first_two(pair: tuple[Desk, Desk]) -> None:
    one, _ = pair
    asked = [_ask(one, n, "kvcomm:threshold=1") for n in (0, 1, 8)]
    replies = [one.agent.generate(ask) for ask in asked]
    # A cold start is dense; so is the second: one anchor says nothing about near and far.
    assert [r.relayed_tokens for r in replies[:2]] == [0, 0]
    assert replies[2].relayed_tokens == _keyed(one, asked[2])
    assert replies[2].recomputed_entries == 0
    assert replies[2].reuse == 1.0
    stats = one.agent.stats()
    assert (stats["learned"], stats["corrected"], stats["strangers"]) == (4, 2, 4)
    assert stats["anchors"] == 4, "two slots, two questions; a corrected span teaches nothing"


@pytest.mark.bench
@pytest.mark.slow
def test_anchors_of_other_conversations_come_nearer_to_full_prefill_than_no_repair(
    pair: tuple[Desk, Desk],
) -> None:
    one, _ = pair
    for n in range(8):
        one.agent.score(_ask(one, n, "kvcomm:threshold=0"), ())
    asked = [_ask(one, n, "kvcomm:threshold=1", max_new_tokens=17) for n in (8, 9, 10)]
    naive = torch.stack([_kl(one, ask, "naive") for ask in asked])
    ours = torch.stack([_kl(one, ask, "kvcomm:threshold=1") for ask in asked])
    assert ours.sum() < naive.sum(), (ours.mean(1), naive.mean(1))
    assert ours[:, 0].sum() < naive[:, 0].sum(), (ours[:, 0], naive[:, 0])


@pytest.mark.long
@pytest.mark.slow
def test_a_prompt_that_was_seen_is_as_good_as_full_prefill(pair: tuple[Desk, Desk]) -> None:
    one, _ = pair
    asked = [_ask(one, n, "kvcomm:threshold=1", max_new_tokens=17) for n in range(2)]
    for ask in asked:
        one.agent.score(ask, ())
    naive = torch.cat([_kl(one, ask, "naive") for ask in asked])
    ours = torch.cat([_kl(one, ask, "kvcomm:threshold=1") for ask in asked])
    assert naive.sum() > 0.01
    assert ours.sum() < 1e-3 * naive.sum()


@pytest.mark.slow
def test_a_replica_uses_anchors_that_another_has_learned(pair: tuple[Desk, Desk]) -> None:
    one, two = pair
    for n in range(2):
        one.agent.generate(_ask(one, n, "kvcomm:threshold=1"))
    two.agent.prepare(None, CHECK)
    assert two.agent.stats()["pulled"] == 4
    ask = _ask(two, 8, "kvcomm:threshold=1", max_new_tokens=2)
    mine = two.agent.generate(replace(ask, publish=False))
    theirs = one.agent.generate(replace(ask, id="again", publish=False))
    assert mine.relayed_tokens == theirs.relayed_tokens == _keyed(two, ask)
    assert mine.token_ids == theirs.token_ids


@pytest.mark.slow
def test_a_request_that_leaves_nothing_behind_leaves_no_anchor(pair: tuple[Desk, Desk]) -> None:
    one, _ = pair
    one.agent.generate(_ask(one, 0, "kvcomm", publish=False))
    assert one.agent.stats()["anchors"] == 0


@pytest.mark.slow
def test_a_comparison_repeats_what_the_run_chose(pair: tuple[Desk, Desk]) -> None:
    """The second prompt is computed and becomes the second anchor; run again, it would be corrected."""
    one, _ = pair
    one.agent.generate(_ask(one, 0, "kvcomm:threshold=1"))
    ask = _ask(one, 8, "kvcomm:threshold=1", max_new_tokens=4)
    reply = one.agent.generate(ask)
    assert (reply.relayed_tokens, reply.relayed_keys) == (0, frozenset())
    assert len(reply.transfers) == 2
    comparison = one.agent.compare(ask, reply, "full_prefill")
    assert comparison.notes == ()
    assert comparison.kl_mean < 1e-6
    assert one.agent.generate(replace(ask, id="again", publish=False)).relayed_tokens == _keyed(one, ask)
