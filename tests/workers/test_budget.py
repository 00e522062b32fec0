"""Rows that ride along: what they may cost, and whose they are."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.budget import RideAlong, Turns, deal

shares = st.floats(0.01, 1.0)
alone = st.floats(1e-4, 1.0)


def run(ride: RideAlong, alone_s: float, row_s: float, steps: int, fixed_s: float = 0.0) -> list[int]:
    """Rows of every step of a machine on which a row costs `row_s`, and the first one `fixed_s` more."""
    out: list[int] = []
    for _ in range(steps):
        rows = ride.rows(1)
        ride.observe(1, rows, alone_s + row_s * rows + (fixed_s if rows else 0.0))
        out.append(rows)
    return out


@given(shares, alone, st.floats(1e-6, 1.0), st.floats(0.0, 0.5))
def test_steps_grow_by_their_share_on_average(
    share: float, alone_s: float, row_s: float, fixed: float
) -> None:
    """Whatever rows cost. The first ones are carried before anybody knows."""
    ride = RideAlong(share, 128)
    fixed_s = fixed * alone_s
    run(ride, alone_s, row_s, 200, fixed_s)
    rows = run(ride, alone_s, row_s, 400, fixed_s)
    grown = sum(n * row_s + (fixed_s if n else 0.0) for n in rows)
    one_more = row_s + fixed_s
    assert grown <= 1.02 * share * alone_s * len(rows) + 2 * max(alone_s, one_more)


@given(shares, alone, st.floats(1e-6, 1.0), st.floats(0.0, 0.5))
def test_no_step_takes_much_more_than_twice_its_time_alone_or_one_row(
    share: float, alone_s: float, row_s: float, fixed: float
) -> None:
    """Numbers that are tried may turn out to cost more than was expected of them."""
    ride = RideAlong(share, 128)
    fixed_s = fixed * alone_s
    run(ride, alone_s, row_s, 200, fixed_s)
    for rows in run(ride, alone_s, row_s, 300, fixed_s):
        assert not rows or rows * row_s + fixed_s <= 1.5 * max(alone_s, row_s + fixed_s)


@given(alone, st.floats(0.001, 0.02))
def test_what_is_affordable_is_used(alone_s: float, of_step: float) -> None:
    """Rows at 2 % of a step or less: with a share of 10 % several of them ride in most steps."""
    ride = RideAlong(0.1, 128)
    run(ride, alone_s, of_step * alone_s, 100)
    rows = run(ride, alone_s, of_step * alone_s, 100)
    assert sum(rows) >= 0.8 * min(128, int(0.1 / of_step)) * 100 * 16 / 17
    assert len([n for n in rows if n]) >= 90, "nothing is saved up where rows cost the same in any number"


def test_a_row_that_costs_more_than_a_share_rides_now_and_then() -> None:
    ride = RideAlong(0.1, 128)
    run(ride, 1.0, 0.6, 200)
    rows = Counter(run(ride, 1.0, 0.6, 100))
    assert set(rows) == {0, 1}
    assert 10 <= rows[1] <= 21


def test_rows_that_are_cheap_together_come_together() -> None:
    """As on a CPU: the first row costs as much as fifteen more. Steps are saved up for eight or more at once,
    and on average grow by their share all the same."""
    ride = RideAlong(0.1, 128)
    run(ride, 1.0, 0.02, 100, fixed_s=0.3)
    rows = run(ride, 1.0, 0.02, 300, fixed_s=0.3)
    assert min(n for n in rows if n) >= 8
    assert sum(rows) > 300 * 0.1 / 0.32 * 3, "three times what single rows would come to"
    assert sum(0.02 * n + 0.3 for n in rows if n) <= 0.1 * 300 + 1


def test_one_unlucky_measurement_does_not_decide_for_good() -> None:
    """Eight rows together took very long when they were tried, and are cheap."""
    ride = RideAlong(0.1, 128)
    eights, fewer = 0, 0
    for _ in range(1000):
        rows = ride.rows(1)
        eights += 8 <= rows < 16
        hiccup = 5.0 if rows >= 8 and eights == 1 else 0.0
        ride.observe(1, rows, 1.0 + ((0.3 + 0.02 * rows + hiccup) if rows else 0.0))
        fewer += not rows >= 8 and eights == 1
    assert fewer > 100, "at first it does"
    assert sum(rows >= 8 for rows in run(ride, 1.0, 0.02, 300, fixed_s=0.3)) > 40


@given(st.integers(0, 50), alone, st.floats(0.0, 1.0))
def test_nothing_rides_without_a_share(urgent: int, alone_s: float, row_s: float) -> None:
    ride = RideAlong(0.0, 128)
    for _ in range(20):
        assert ride.rows(urgent) == 0
        ride.observe(urgent, 0, alone_s + row_s)


def test_nothing_rides_before_a_step_alone_was_measured() -> None:
    ride = RideAlong(0.5, 128)
    assert ride.rows(3) == 0
    ride.observe(3, 0, 0.1)
    assert ride.rows(3) == 1
    assert ride.rows(4) == 0, "four at once have not been measured"


def test_steps_alone_are_measured_again_and_again() -> None:
    """The context grows, and others may come to the machine: what a step takes is not settled once."""
    rows = run(RideAlong(0.5, 128), 1.0, 0.01, 200)
    gaps = [i for i, n in enumerate(rows) if n == 0]
    assert all(b - a <= 17 for a, b in itertools.pairwise(gaps))


def test_a_machine_that_becomes_slower_carries_less() -> None:
    ride = RideAlong(0.1, 128)
    before = run(ride, 1.0, 0.005, 100)[-1]
    after = run(ride, 1.0, 0.05, 100)[-1]
    assert after < before


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=8), st.data())
def test_groups_that_keep_wanting_get_the_same(groups: list[str], data: st.DataObject) -> None:
    """However many sequences each has, and whatever room there is: they differ by two steps' rows at most."""
    turns, got = Turns(), Counter[str]()
    most = 128
    for _ in range(60):
        room = data.draw(st.integers(1, most))
        order = turns.order(groups)
        assert sorted(order) == list(range(len(groups)))
        for index, rows in zip(order, deal([room] * len(groups), room), strict=True):
            if rows:
                turns.took(groups[index], rows)
                got[groups[index]] += rows
    counts = [got[g] for g in set(groups)]
    assert max(counts) - min(counts) <= 2 * most


def test_one_that_comes_anew_does_not_catch_up_with_what_others_had_before() -> None:
    turns = Turns()
    turns.order(["old"])
    turns.took("old", 10_000)
    got = Counter[str]()
    for _ in range(10):
        first = ["old", "new"][turns.order(["old", "new"])[0]]
        turns.took(first, 10)
        got[first] += 10
    assert got["old"] >= 40


@given(st.lists(st.integers(0, 100), max_size=9), st.integers(-5, 300))
def test_rows_are_dealt_in_order_up_to_the_room(wanted: list[int], room: int) -> None:
    dealt = deal(wanted, room)
    assert sum(dealt) == max(0, min(room, sum(wanted)))
    assert all(0 <= given <= want for given, want in zip(dealt, wanted, strict=True))
    short = [i for i, (given, want) in enumerate(zip(dealt, wanted, strict=True)) if given < want]
    assert all(dealt[i] == 0 for i in range(short[0] + 1, len(dealt))) if short else True


@pytest.mark.parametrize("seed", range(3))
def test_a_noisy_machine_keeps_near_its_share(seed: int) -> None:
    import random

    chance = random.Random(seed)
    ride, grown, steps = RideAlong(0.1, 128), 0.0, 2000
    for _ in range(steps):
        rows = ride.rows(1)
        noise = chance.uniform(0.85, 1.15)
        grown += 0.01 * rows
        ride.observe(1, rows, noise * (1.0 + 0.01 * rows))
    assert 0.02 < grown / steps < 0.2
