"""Remembered texts in a prompt: what a slow and obvious search finds, and nothing else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.serving import matching
from relay_cluster.serving.matching import Match, TextIndex
from relay_cluster.serving.seeds import SEED

LONG = st.text(alphabet="ab \n", min_size=SEED, max_size=SEED + 8)


def index(*texts: str, max_texts: int = 100, max_bytes: int = 1 << 20) -> TextIndex[int]:
    made: TextIndex[int] = TextIndex(max_texts=max_texts, max_bytes=max_bytes)
    for number, text in enumerate(texts):
        made.put(text, number)
    return made


def cuts_a_word(prompt: str, at: int) -> bool:
    return 0 < at < len(prompt) and re.fullmatch(r"\w\w", prompt[at - 1 : at + 1]) is not None


def naive(texts: list[str], prompt: str) -> list[Match[int]]:
    """Every occurrence; the longest first, then the earliest; none overlapping another."""
    values = {text: number for number, text in enumerate(texts)}
    hits = [
        Match(at, at + len(text), number)
        for text, number in values.items()
        for at in range(len(prompt) - len(text) + 1)
        if prompt[at : at + len(text)] == text
        and not cuts_a_word(prompt, at)
        and not cuts_a_word(prompt, at + len(text))
    ]
    taken: list[Match[int]] = []
    for hit in sorted(hits, key=lambda m: (m.start - m.stop, m.start)):
        if all(hit.stop <= other.start or other.stop <= hit.start for other in taken):
            taken.append(hit)
    return sorted(taken, key=lambda m: m.start)


@given(texts=st.lists(LONG, max_size=6), data=st.data())
def test_finds_what_the_obvious_search_finds(texts: list[str], data: st.DataObject) -> None:
    glue = st.text(alphabet="ab \n", max_size=40)
    pieces = st.lists(st.one_of(st.sampled_from(texts), glue) if texts else glue, max_size=8)
    prompt = "".join(data.draw(pieces))
    assert index(*texts).find(prompt) == naive(texts, prompt)


@given(text=st.text(min_size=SEED, max_size=90), before=st.text(max_size=50), after=st.text(max_size=50))
def test_any_text_is_found_between_blanks(text: str, before: str, after: str) -> None:
    prompt = f"{before} {text} {after}"
    start = len(before) + 1
    found = index(text).find(prompt)
    assert any(m.start <= start < m.stop or m.start < start + len(text) <= m.stop for m in found)
    assert all(prompt[m.start : m.stop] == text for m in found)


def test_the_longest_wins_then_the_earliest() -> None:
    short, long = "y" * 10 + " " + "x" * 40, "x" * 40 + " tail " + "z" * 20
    found = index(short, long).find(f"{short} tail {'z' * 20}")
    assert [m.value for m in found] == [1]
    twice = "x y " * 10
    assert [m.start for m in index(twice).find(twice * 2)] == [0, 40]


def test_a_word_is_not_cut_but_scripts_without_blanks_are_searched() -> None:
    text = "the quick brown fox jumps over the lazy cat"
    assert index(text).find(f"{text}egory") == []
    assert index(text).find(f"a{text}") == []
    assert len(index(text).find(f"({text})s")) == 1
    chinese = "天地玄黄宇宙洪荒" * 5
    assert len(index(chinese).find(f"人{chinese}人")) == 1


def test_forgets_the_least_recently_used() -> None:
    a, b, c = (letter * SEED for letter in "abc")
    made = index(a, b, max_texts=2)
    made.find(a)
    made.put(c, 2)
    assert [made.get(t) for t in (a, b, c)] == [0, None, 2]
    assert made.find(f"{a} {b} {c}") == [Match(0, 32, 0), Match(66, 98, 2)]


def test_keeps_to_its_budget_and_counts_it_right() -> None:
    made = index(max_bytes=4000)
    for number in range(50):
        assert made.put(f"{number:04d}" * 20, number)
        assert made.nbytes <= 4000
    assert 0 < len(made) < 50
    assert not made.put("x" * 2000, 0), "alone larger than the budget"
    assert not made.put("short", 0)
    for number in range(50):
        made.drop(f"{number:04d}" * 20)
    assert (len(made), made.nbytes) == (0, 0)
    assert not made._counts.any()
    assert made._by_seed == {}


def test_only_what_is_accepted_stands_in_the_way() -> None:
    inner = "a sentence that was said by somebody else"
    outer = f"He wrote: {inner}. And then he left."
    made = index(inner, outer)
    assert [m.value for m in made.find(outer)] == [1]
    assert [m.value for m in made.find(outer, lambda value: value == 0)] == [0]


def test_texts_that_begin_alike_get_seeds_of_their_own() -> None:
    boilerplate = "Sure! Here is a detailed plan that follows your instructions step by step: "
    texts = [f"{boilerplate}{number:06d} is what matters{boilerplate}" for number in range(300)]
    made = index(*texts, max_texts=1000)
    assert max(len(same) for same in made._by_seed.values()) == 1
    assert [m.value for m in made.find("\n".join(texts[40:50]))] == list(range(40, 50))


def test_a_prompt_made_to_collide_costs_a_bounded_number_of_comparisons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matching, "_MOST_CHECKS", 10)
    made = index("a " * 400 + "b")
    compared = 0

    class Counting(str):
        __slots__ = ()

        def startswith(self, *args: object) -> bool:
            nonlocal compared
            compared += 1
            return super().startswith(*args)  # type: ignore[arg-type]

    made.find(Counting("a " * 2000))
    assert compared == 10
