"""Data sets, and natural text of a given number of tokens.

A row of a data file is a word problem (`question`, and `answer` whose final number follows `####`, as in
GSM8K) or a programming task (`prompt`, as in HumanEval). Without a file the tasks in `configs/bench/` are
taken, which are our own. This module does not know what is done with a task or a text.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from transport.errors import ConfigError

BUILT_IN = "configs/bench/tasks.jsonl"

_NOTE = re.compile(r"<<[^>]*>>")
"""GSM8K's calculator annotations."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Task:
    """One row.

    Attributes:
        kind: "maths" or "code".
        text: the problem.
        answer: a worked answer, without annotations; "" when the row has none.
        gold: the right final number, in the form of `final_number`; None when there is none.
    """

    kind: Literal["maths", "code"]
    text: str
    answer: str = ""
    gold: str | None = None


@dataclass(frozen=True, slots=True)
class Tasks:
    """Rows of one or more files, in their order.

    Attributes:
        sources: file names, for people; never whole paths.
        digest: names the contents.
    """

    rows: tuple[Task, ...]
    sources: tuple[str, ...]
    digest: str

    def of(self, kind: str) -> tuple[Task, ...]:
        return tuple(t for t in self.rows if t.kind == kind)


def load_tasks(files: Sequence[Path]) -> Tasks:
    """Read data files; the built-in tasks where none is given.

    Raises:
        ConfigError: a file cannot be read, or a row is neither a word problem nor a programming task.
    """
    named: list[tuple[str, str]] = []
    for file in files:
        try:
            named.append((file.name, file.read_text("utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{file}: no such file (--data)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error
    if not named:
        folder, _, name = BUILT_IN.partition("/")
        named = [(name, resources.files(folder).joinpath(name).read_text("utf-8"))]
    rows = [task for name, text in named for task in _rows(name, text)]
    digest = hashlib.blake2b("\0".join(text for _, text in named).encode(), digest_size=8).hexdigest()
    return Tasks(tuple(rows), tuple(name for name, _ in named), digest)


def _rows(name: str, text: str) -> list[Task]:
    tasks: list[Task] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{name}:{number} is not JSON ({error}). Every line must be an object."
            ) from None
        tasks.append(_task(row, f"{name}:{number}"))
    if not tasks:
        raise ConfigError(f"{name}: has no rows")
    return tasks


def _task(row: Any, where: str) -> Task:
    if isinstance(row, dict) and isinstance(row.get("question"), str):
        worked = str(row.get("answer", ""))
        reasoning, mark, final = worked.rpartition("####")
        gold = final_number(final) if mark else None
        return Task(
            "maths", row["question"].strip(), _NOTE.sub("", reasoning if mark else worked).strip(), gold
        )
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return Task("code", row["prompt"].rstrip())
    keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise ConfigError(
        f'{where}: a row needs "question" (and "answer") or "prompt"; this one has: {keys or "nothing"}.'
    )


def final_number(text: str) -> str | None:
    """The last number of a text in one form ("1,200.0" -> "1200"); None when it has none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


class TextPool:
    """Natural text as token ids: the tasks with their answers, one after another, shuffled by a seed.

    Args:
        tasks: where the text comes from.
        tokenizer: the model's.
        seed: of the order.
    """

    def __init__(self, tasks: Tasks, tokenizer: Any, seed: int) -> None:
        from workers.text_encoding import TextEncoder

        encoder = TextEncoder(tokenizer)
        rows = list(tasks.rows)
        random.Random(f"texts-{seed}").shuffle(rows)
        ids: list[int] = []
        for task in rows:
            ids.extend(
                encoder.encode(f"{task.text}\n{task.answer}\n\n" if task.answer else f"{task.text}\n\n")
            )
        self._ids = ids
        self._at = 0
        self._sources = ", ".join(tasks.sources)

    def __len__(self) -> int:
        return len(self._ids)

    def take(self, count: int) -> tuple[int, ...]:
        """The next `count` ids. At the end of the text it goes on from the start, shifted by a few tokens, so
        that no two runs are the same for a long time, and none repeats itself.

        Raises:
            ConfigError: the text is shorter than that.
        """
        if count > len(self._ids):
            raise ConfigError(
                f"{self._sources} has {len(self._ids)} tokens of text, and {count} are needed at once. Pass "
                "a larger file with --data, or ask for fewer tokens."
            )
        if self._at + count > len(self._ids):
            self._at = (self._at + count) % 37 + 1 if count + 38 <= len(self._ids) else 0
        taken = tuple(self._ids[self._at : self._at + count])
        self._at += count
        return taken
