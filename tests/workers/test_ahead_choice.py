"""Exact preparation or the relay: the choice alone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from workers.ahead_choice import ENOUGH_CORES, LITTLE_ROWS, WORTH_A_PULL, Outlook, choose_mode

outlooks = st.builds(
    Outlook,
    missing=st.integers(0, 20_000),
    coming=st.integers(0, 20_000),
    rate=st.none() | st.floats(0, 1e5),
    left_s=st.none() | st.floats(0, 1e4),
    relayable=st.booleans(),
)


@given(outlooks)
def test_every_choice_says_what_it_is_and_why(outlook: Outlook) -> None:
    choice = choose_mode(outlook)
    assert choice.reason.startswith("exact: " if choice.exact else "relay: ")


@given(outlooks, st.floats(1, 100), st.floats(1, 100))
def test_more_time_never_turns_exact_into_relay(outlook: Outlook, faster: float, longer: float) -> None:
    if choose_mode(outlook).exact and outlook.rate is not None and outlook.left_s is not None:
        more = replace(outlook, rate=outlook.rate * faster, left_s=outlook.left_s * longer)
        assert choose_mode(more).exact


@given(outlooks, st.integers(0, 5000))
def test_with_no_time_at_all_relay_is_chosen_as_soon_as_it_is_less_work(outlook: Outlook, more: int) -> None:
    idle = replace(outlook, rate=0.0, left_s=1.0, relayable=True, missing=LITTLE_ROWS + 1 + more)
    assert not choose_mode(idle).exact


@given(outlooks)
def test_what_nobody_can_relay_is_always_computed(outlook: Outlook) -> None:
    assert choose_mode(replace(outlook, relayable=False)).exact


@given(outlooks)
def test_little_is_computed_whatever_the_load(outlook: Outlook) -> None:
    assert choose_mode(replace(outlook, missing=LITTLE_ROWS, coming=0, rate=0.0, left_s=0.0)).exact


@given(outlooks, st.integers(1, ENOUGH_CORES - 1), st.integers(1, 5000))
def test_no_core_is_taken_from_a_writer_for_what_can_be_relayed(
    outlook: Outlook, cores: int, more: int
) -> None:
    crowded = replace(outlook, relayable=True, missing=LITTLE_ROWS + more, cores=cores)
    assert not choose_mode(crowded).exact
    roomy = replace(crowded, cores=ENOUGH_CORES)
    assert choose_mode(roomy) == choose_mode(replace(crowded, cores=None))


@given(st.integers(1, 10_000), st.floats(1, 1000))
def test_the_border_is_where_the_rest_costs_what_relaying_all_would(needed: int, rate: float) -> None:
    rest = max(LITTLE_ROWS, needed / WORTH_A_PULL)
    at = Outlook(needed, 0, rate, max(0.0, needed - rest) / rate * 1.0001, relayable=True)
    assert choose_mode(at).exact
    if needed - rest > 10:
        assert not choose_mode(replace(at, left_s=(needed - rest - 5) / rate)).exact
