"""Stop texts: what is given out is exactly what comes before the first of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.stopping import StopText, tokens_before


def naive(text: str, stops: list[str]) -> str:
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


@given(
    pieces=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab\n", max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_text(pieces: list[str], stops: list[str]) -> None:
    watch = StopText(stops)
    given: list[str] = []
    seen = ""
    for piece in pieces:
        given.append(watch.push(piece))
        seen += piece
        assert watch.found == (naive(seen, stops) != seen), "the moment that it is there"
        if watch.found:
            break
        assert naive(seen, stops).startswith("".join(given))
    given.append(watch.finish())
    assert "".join(given) == watch.text == naive(seen, stops)


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    watch = StopText(["END"])
    assert [watch.push(p) for p in ("a", "bE", "N", "x", "EN", "D!")] == ["a", "b", "", "ENx", "", ""]
    assert watch.found
    assert watch.push("more") == watch.finish() == ""


@given(words=st.lists(st.sampled_from(["a", "bb", "\n", "c\n"]), max_size=8), cut=st.integers(0, 12))
def test_only_tokens_wholly_before_the_cut_are_kept(words: list[str], cut: int) -> None:
    text = "".join(words)[:cut]
    count = tokens_before(range(len(words)), text, lambda ids: "".join(words[i] for i in ids), len(words))
    assert text.startswith("".join(words[:count]))
    assert count == len(words) or not text.startswith("".join(words[: count + 1]))
