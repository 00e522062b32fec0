"""Runs that texts share: really shared, long enough, not overlapping, and the long ones are found."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.serving.runs import CommonRuns, Run, _common

WORDS = [f"word{n}" for n in range(400)]


def prose(count: int, seed: int) -> str:
    """`count` words, about every eighth ending a line."""
    choose = random.Random(seed)
    return "".join(choose.choice(WORDS) + choose.choice("       \n") for _ in range(count)).strip()


def runs(min_chars: int = 128, max_chars: int = 1 << 16) -> CommonRuns:
    return CommonRuns(min_chars=min_chars, max_chars=max_chars)


def test_a_document_is_found_in_another_template() -> None:
    document = prose(200, 1)
    kept = runs()
    kept.add(f"Context:\n{document}\n\nWrite a plan.")
    prompt = f"Read this carefully.\n{document}\n\nThe plan:"
    (run,) = kept.find(prompt)
    assert prompt[run.start : run.stop] == document
    assert kept.find("Nothing of this is known. " * 20) == []
    assert kept.find("short") == []


def test_what_is_found_is_the_same_for_the_third_reader() -> None:
    document = prose(200, 2)
    kept = runs()
    prompts = [
        f"{head}:\n\n{document}\n\n{tail}" for head, tail in (("A", "Plan."), ("B", "Pay."), ("C", "Say."))
    ]
    kept.add(prompts[0])
    found = []
    for prompt in prompts[1:]:
        found += [prompt[r.start : r.stop] for r in kept.find(prompt)]
        kept.add(prompt)
    assert found == [document, document]


@given(
    texts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    order=st.lists(st.integers(0, 5), max_size=6),
    cut=st.integers(0, 30),
)
def test_runs_are_shared_long_and_apart(texts: list[int], order: list[int], cut: int) -> None:
    parts = [prose(12 + 9 * n, n) for n in range(6)]
    kept = runs(min_chars=64)
    known = ["\n".join(parts[n] for n in texts)[cut:]]
    kept.add(known[0])
    prompt = " and ".join(parts[n] for n in order)
    found = kept.find(prompt)
    before = 0
    for run in found:
        assert run.start >= before
        before = run.stop
        assert run.stop - run.start >= 64
        assert prompt[run.start : run.stop] in known[0]
    whole = [n for n in set(order) & set(texts) if n >= 3 and not cut]
    for n in whole:  # some 250 characters and more: sampled all but for sure
        at = prompt.find(parts[n])
        assert any(r.start < at + len(parts[n]) and at < r.stop for r in found)


def test_the_oldest_text_goes_first_and_takes_its_samples_with_it() -> None:
    a, b, c = (prose(100, n) for n in (11, 12, 13))
    kept = runs(max_chars=len(a) + len(b) + len(c) // 2)
    for text in (a, b, a, c):
        kept.add(text)
    assert kept.find(b) == []
    assert kept.find(a)
    assert kept.find(c)
    assert kept.chars == len(a) + len(c)
    kept.add("x" * (1 << 20))
    assert kept.chars == len(a) + len(c)
    assert {text for text, _ in kept._samples.values()} == {a, c}


def test_repetition_takes_linear_time_and_one_run() -> None:
    kept = runs()
    refrain = prose(40, 3) + " "
    kept.add(refrain * 50)
    assert kept.find(refrain * 40) == [Run(0, 40 * len(refrain) - 1)]


@given(st.text(alphabet="ab", max_size=200), st.text(alphabet="ab", max_size=200))
def test_common_is_the_common_prefix(a: str, b: str) -> None:
    size = _common(min(len(a), len(b)), lambda i, j: a[i:j] == b[i:j])
    assert a[:size] == b[:size]
    assert a[size : size + 1] != b[size : size + 1] or size == min(len(a), len(b))
