"""Break-even of a span: the fits find the line that made the measurements, and decisions are monotone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    Located,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)
from workers.break_even import FORGET_S, MIN_SAMPLES, Estimate, LineFit, Speeds, estimate_relays
from workers.costs import ModelCosts
from workers.methods import parse_method
from workers.methods.base import ModelProfile, Span

COSTS = ModelCosts(
    hidden=64, intermediate=128, vocab=100, heads=4, kv_heads=2, head_dim=16, windows=(None,) * 8
)
PROFILE = ModelProfile("m", 8, 2, 3, 8, 0.2, 4)
TOKEN_BYTES = 8 * 2 * 2 * 16 * 4
positive = st.floats(1e-3, 1e3)


def speeds(*, latency: float, bandwidth: float, per_flop: float, per_token: float = 1e-6) -> Speeds:
    """A worker that has measured exactly these."""
    out = Speeds()
    for size in (1e5, 4e5, 1e6, 7e5):
        out.observe_pull("far", "tcp", int(size), latency + size / bandwidth, now=0.0)
        out.observe_rotate(int(size / 1000), per_token * int(size / 1000))
        out.observe_prefill(size, per_flop * size)
    return out


def located(tokens: int, node: str = "far", worker: str = "up") -> Located:
    block = BlockRef(BlockId(0), 1, tokens * TOKEN_BYTES, (0,))
    segment = Segment(SegmentKey("s", b"k"), tokens, 0, (block,))
    return Located(segment, Owner(WorkerId(worker), Incarnation(1), NodeId(node)))


def estimate(known: Speeds, tokens: int, method: str = "naive", *, now: float = 1.0) -> Estimate | None:
    found = located(tokens)
    key = found.segment.key
    spans = [Span(0, 20), Span(20, 20 + tokens, "a", key), Span(20 + tokens, 30 + tokens)]
    plan = parse_method(method).plan(spans, {key: found}, PROFILE)
    return estimate_relays(known, COSTS, plan, {key: found}, here=WorkerId("me"), now=now).get(key)


@given(
    fixed=st.floats(0, 10), slope=positive, sizes=st.lists(st.integers(1, 10_000), min_size=4, max_size=20)
)
def test_a_fit_finds_the_line_that_made_the_measurements(
    fixed: float, slope: float, sizes: list[int]
) -> None:
    fit = LineFit()
    for size in sizes:
        fit.observe(size, fixed + slope * size)
    inside = (min(sizes), max(sizes))
    low, high = fixed + slope * inside[0], fixed + slope * inside[1]
    assert low * 0.99 - 1e-6 <= fit.predict(sum(sizes) / len(sizes)) <= high * 1.01 + 1e-6
    if max(sizes[-4:]) > 4 * min(sizes[-4:]):
        assert fit.predict(5000) == pytest.approx(fixed + slope * 5000, rel=1e-3)


@given(
    measured=st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 100)), min_size=1, max_size=30),
    a=st.floats(0, 1e4),
    b=st.floats(0, 1e4),
)
def test_a_prediction_never_falls_with_size_nor_below_zero(
    measured: list[tuple[int, float]], a: float, b: float
) -> None:
    fit = LineFit()
    for size, seconds in measured:
        fit.observe(size, seconds)
    assert 0 <= fit.predict(min(a, b)) <= fit.predict(max(a, b))


@given(
    latency=st.floats(0, 10),
    bandwidth=st.floats(1e3, 1e9),
    per_flop=st.floats(1e-12, 1e-6),
    tokens=st.integers(1, 2000),
    more=st.integers(0, 2000),
)
def test_a_span_worth_a_pull_is_worth_it_when_it_is_longer(
    latency: float, bandwidth: float, per_flop: float, tokens: int, more: int
) -> None:
    known = speeds(latency=latency, bandwidth=bandwidth, per_flop=per_flop)
    short, long = estimate(known, tokens), estimate(known, tokens + more)
    assert short is not None
    assert long is not None
    # Not at the very edge, where rounding decides.
    assume(short.prefill_s > short.relay_s * 1.001)
    assert long.worth


@given(
    latency=st.floats(0, 1),
    bandwidth=st.floats(1e3, 1e8),
    factor=st.floats(1.01, 100),
    tokens=st.integers(1, 2000),
    method=st.sampled_from(["naive", "epic", "context_mass", "cacheblend", "relay_caching"]),
)
def test_more_bandwidth_never_turns_a_pull_down(
    latency: float, bandwidth: float, factor: float, tokens: int, method: str
) -> None:
    slow = estimate(speeds(latency=latency, bandwidth=bandwidth, per_flop=1e-9), tokens, method)
    fast = estimate(speeds(latency=latency, bandwidth=bandwidth * factor, per_flop=1e-9), tokens, method)
    assert slow is not None
    assert fast is not None
    assert fast.pull_s <= slow.pull_s * (1 + 1e-6) + 1e-9
    assume(slow.prefill_s > slow.relay_s * 1.001)
    assert fast.worth


def test_the_decision_is_made_where_the_times_cross() -> None:
    """1 s of latency against 0.01 s of prefill per token: pulls pay from about 100 tokens on."""
    per_token_flops = 8 * COSTS.entry_flops
    known = speeds(latency=1.0, bandwidth=1e15, per_flop=0.01 / per_token_flops, per_token=0.0)
    found = {n: estimate(known, n) for n in (50, 70, 150, 1000)}
    assert {n: e.worth for n, e in found.items() if e} == {50: False, 70: False, 150: True, 1000: True}


def test_a_method_that_recomputes_all_is_never_worth_a_pull() -> None:
    known = speeds(latency=0.0, bandwidth=1e12, per_flop=1e-6)
    dear = estimate(known, 500, "epic:k=500")
    assert dear is not None
    assert not dear.worth
    cheap = estimate(known, 500, "epic:k=16")
    assert cheap is not None
    assert cheap.worth


def test_what_is_not_known_is_pulled() -> None:
    known = speeds(latency=9.0, bandwidth=1e3, per_flop=1e-12)
    slow = estimate(known, 100)
    assert slow is not None
    assert not slow.worth
    assert estimate(known, 100, now=FORGET_S + 1) is None, "measured too long ago"
    assert estimate(Speeds(), 100) is None
    few = Speeds()
    for _ in range(MIN_SAMPLES - 1):
        few.observe_pull("far", "tcp", 1000, 1.0, now=0.0)
    few.observe_rotate(5, 1.0)
    few.observe_prefill(1e3, 1.0)
    assert estimate(few, 100) is None


def test_links_are_told_apart_by_node_and_by_backend() -> None:
    known = speeds(latency=0.0, bandwidth=1e6, per_flop=1e-9)
    for _ in range(MIN_SAMPLES):
        known.observe_pull("near", "nixl", 1_000_000, 0.01, now=0.0)
    far = known.estimate("far", 1_000_000, 10, 0.0, 1.0, now=1.0)
    near = known.estimate("near", 1_000_000, 10, 0.0, 1.0, now=1.0)
    assert far is not None
    assert near is not None
    assert (far.pull_s, near.pull_s) == (pytest.approx(1.0), pytest.approx(0.01))
    # The backend in use is the one that was used last.
    known.observe_pull("near", "tcp", 1_000_000, 5.0, now=2.0)
    assert known.estimate("near", 1_000_000, 10, 0.0, 1.0, now=3.0) is None


def test_what_this_worker_holds_itself_costs_no_pull() -> None:
    known = speeds(latency=9.0, bandwidth=1e3, per_flop=1e-9)
    found = located(100, worker="me")
    key = found.segment.key
    plan = parse_method("naive").plan([Span(0, 100, "a", key), Span(100, 110)], {key: found}, PROFILE)
    own = estimate_relays(known, COSTS, plan, {key: found}, here=WorkerId("me"), now=1.0)[key]
    assert own.pull_s == 0
    other = replace(found, owner=replace(found.owner, worker=WorkerId("you")))
    assert estimate_relays(known, COSTS, plan, {key: other}, here=WorkerId("me"), now=1.0)[key].pull_s > 9


def test_full_prefill_is_predicted_from_prefills_before() -> None:
    speeds = Speeds()
    for flops in (1e9, 2e9):
        speeds.observe_prefill(flops, 0.1 + flops * 1e-9)
    assert speeds.prefill_s(3e9) is None, "too few"
    speeds.observe_prefill(4e9, 4.1)
    assert speeds.prefill_s(3e9) == pytest.approx(3.1)


def test_pulls_that_are_given_up_one_after_the_other_are_a_slow_link() -> None:
    known = speeds(latency=0.001, bandwidth=1e9, per_flop=1e-9)
    before = estimate(known, 50)
    assert before is not None
    size = 50 * TOKEN_BYTES
    known.gave_up("far", "tcp", size, 5.0, now=1.0)
    assert estimate(known, 50) == before, "one is a fault, not a speed"
    known.observe_pull("far", "tcp", size, 0.001 + size / 1e9, now=1.0)
    known.gave_up("far", "tcp", size, 5.0, now=1.0)
    again = estimate(known, 50)
    assert again is not None
    assert again.pull_s < 0.01
    for _ in range(3):
        known.gave_up("far", "tcp", size, 5.0, now=1.0)
    after = estimate(known, 50)
    assert after is not None
    assert after.pull_s > 10 * before.pull_s
    assert not after.worth
    assert estimate(known, 50, now=1.0 + FORGET_S + 1.0) is None, "and it may recover"
