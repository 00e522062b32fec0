"""Data files, natural text of a given length, and the chains that fidelity is measured on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.bench.cases import Answers, make_cases, patterns
from relay_cluster.bench.texts import Tasks, TextPool, final_number, load_tasks
from transport.errors import ConfigError


class Letters:
    """A tokenizer of one id per character."""

    added_tokens_decoder: dict[int, object] = {}  # noqa: RUF012
    all_special_ids: tuple[int, ...] = ()
    chat_template = None

    def encode(self, text: str, **_: object) -> list[int]:
        return [ord(c) for c in text]


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return path


def test_both_kinds_of_rows(tmp_path: Path) -> None:
    gsm = write(tmp_path / "g.jsonl", {"question": " Q? ", "answer": "2*3=<<2*3=6>>6 eggs\n#### 1,206"}, "")
    code = write(tmp_path / "h.jsonl", {"prompt": "def f():\n", "entry_point": "f"})
    tasks = load_tasks([gsm, code])
    maths, program = tasks.rows
    assert (maths.kind, maths.text, maths.answer, maths.gold) == ("maths", "Q?", "2*3=6 eggs", "1206")
    assert (program.kind, program.text, program.gold) == ("code", "def f():", None)
    assert tasks.sources == ("g.jsonl", "h.jsonl")
    assert tasks.digest != load_tasks([gsm]).digest


def test_the_built_in_tasks_have_right_answers() -> None:
    tasks = load_tasks([])
    assert {t.kind for t in tasks.rows} == {"maths", "code"}
    for task in tasks.of("maths"):
        assert task.gold is not None
        # The worked answer reaches the number that is called right.
        assert any(final_number(s) == task.gold for s in task.answer.split(" ")), task


@pytest.mark.parametrize(
    ("row", "said"),
    [("{", "not JSON"), ({"text": "x"}, "text"), ("[1]", "list"), ({"question": 3}, "question")],
)
def test_a_row_that_is_neither_is_refused_by_line(tmp_path: Path, row: object, said: str) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "ok"}, row)
    with pytest.raises(ConfigError, match=f"x.jsonl:2.*{said}"):
        load_tasks([file])


def test_files_that_are_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_tasks([tmp_path / "none.jsonl"])
    with pytest.raises(ConfigError, match="no rows"):
        load_tasks([write(tmp_path / "e.jsonl", "")])


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7.", "7"), ("$1,200.50!", "1200.5"), ("-12.0", "-12"), ("none", None), ("10", "10")],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == number


@given(st.lists(st.integers(1, 120), min_size=1, max_size=30), st.integers(0, 3))
def test_text_has_the_asked_length_and_is_the_same_for_a_seed(counts: list[int], seed: int) -> None:
    tasks = load_tasks([])
    first, second = (TextPool(tasks, Letters(), seed) for _ in range(2))
    taken = [first.take(n) for n in counts]
    assert [len(t) for t in taken] == counts
    assert taken == [second.take(n) for n in counts]


def test_text_goes_on_from_another_place_at_its_end() -> None:
    pool = TextPool(load_tasks([]), Letters(), 0)
    runs = [pool.take(500) for _ in range(3 * len(pool) // 500)]
    assert len(set(runs)) == len(runs)
    with pytest.raises(ConfigError, match="--data"):
        pool.take(len(pool) + 1)


def many_tasks(count: int) -> Tasks:
    rows = load_tasks([]).rows
    maths = [r for r in rows if r.kind == "maths"]
    code = [r for r in rows if r.kind == "code"]
    return Tasks(
        tuple((maths[i % len(maths)], code[i % len(code)])[i % 2] for i in range(count)), ("t",), "d"
    )


@pytest.mark.parametrize("samples", [1, 2, 3, 10, 64])
def test_cases_have_exactly_the_asked_number_of_prompts(samples: int) -> None:
    cases = make_cases(many_tasks(200), samples, seed=0)
    assert sum(c.samples for c in cases) == samples
    assert len({c.id for c in cases}) == len(cases)
    assert [c.id for c in cases] == [c.id for c in make_cases(many_tasks(200), samples, seed=0)]
    if samples >= 3:
        kinds = Counter(k for c in cases for k in c.pattern.measured.values())
        assert kinds["single"] > 0
        assert kinds["composite"] > 0


def test_another_seed_takes_other_tasks() -> None:
    one, two = ({c.id for c in make_cases(many_tasks(200), 20, seed)} for seed in (0, 1))
    assert one != two


def test_too_few_tasks_for_the_samples() -> None:
    with pytest.raises(ConfigError, match="--data"):
        make_cases(many_tasks(2), 64, seed=0)


def test_patterns_measure_singles_and_composites_of_four_to_eight_spans() -> None:
    for kind in ("maths", "code"):
        sizes: set[int] = set()
        for pattern in patterns(kind):
            for name, spans in pattern.measured.items():
                heard = len(pattern.pipeline[name].slots) - 1
                if spans == "single":
                    assert heard == 1
                else:
                    sizes.add(heard + 1)  # and the task itself
        assert sizes
        assert min(sizes) >= 4
        assert max(sizes) <= 8


def test_answers_on_disk_go_by_model_data_and_seed(tmp_path: Path) -> None:
    options = {"space": "s", "data": "d", "seed": 0, "max_tokens": 32}
    kept = Answers.open(tmp_path, **options)
    kept.ids["case"] = {"solver": (1, 2, 3)}
    kept.keep()
    assert Answers.open(tmp_path, **options).ids == kept.ids
    for change in ({"space": "t"}, {"data": "e"}, {"seed": 1}, {"max_tokens": 33}):
        assert Answers.open(tmp_path, **{**options, **change}).ids == {}
    assert kept.file is not None
    kept.file.write_text("[]")
    with pytest.raises(ConfigError, match="Delete it"):
        Answers.open(tmp_path, **options)
