"""Calibration texts as prompts: a chain of agents that work on a task, and the agents that read their
answers.

Every agent of a chain sees the task and all answers before its own, as in `configs/pipelines/`, so the spans
that are measured were decoded in the contexts in which real ones are. Three readers:

    critic, finisher   read the task again and one answer, in turns: prompts with one relayed span
    judge              reads the task and every answer of the chain: a composite prompt

The shipped tasks are not those of `configs/bench/`: what a benchmark measures must not have been tuned on.

Knows nothing of engines or measuring.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, Protocol

from transport.errors import ConfigError
from workers.model import LoadedModel
from workers.segment import Prompt, PromptBuilder, SlotValue, splice
from workers.text_encoding import special_token_ids, stop_token_ids

Kind = Literal["single", "composite"]

COLUMNS = ("question", "prompt", "task")
"""Fields of a row that may hold the task, in this order."""

STAGES: tuple[tuple[str, str], ...] = (
    (
        "You are a careful tutor. You work step by step and explain every step.",
        "Task:\n{task}\n\nWork it out step by step.",
    ),
    (
        "You check the work of others. You say which steps are right and which are not, and why.",
        "Task:\n{task}\nFirst answer:\n{a0}\n\nCheck the answer step by step.",
    ),
    (
        "You look for another way. You never repeat what was said before.",
        "Task:\n{task}\nFirst answer:\n{a0}\nReview:\n{a1}\n\nDescribe a different way to solve the task.",
    ),
    (
        "You explain things to people without any background, in short and plain sentences.",
        "Task:\n{task}\nFirst answer:\n{a0}\nReview:\n{a1}\nAnother way:\n{a2}\n\n"
        "Explain the result to a beginner.",
    ),
)
"""System text and prompt of each agent of a chain; {a0} is the first one's answer."""

_CRITIC = (
    "You are the last to look at a solution before it is published. Be strict, be brief, and name the first "
    "step that you doubt.",
    "This is the task that was set:\n{task}\n\nA colleague handed in this solution:\n{a0}\n\n"
    "Which step should be looked at again, and what would you change in it? Answer in a few sentences.",
)
_FINISHER = (
    "You are an editor. You turn rough work into a clear final text, and you leave nothing important out.",
    "Task:\n{task}\n\nDraft:\n{a0}\n\nWrite the final answer to the task. Begin with the main point.",
)
_JUDGE = (
    "You have the last word in a group of experts. You weigh what each of them said and decide.",
    "The group was asked:\n{task}\n\nAnswer:\n{a0}\n\nReview:\n{a1}\n\nAnother way:\n{a2}\n\n"
    "For beginners:\n{a3}\n\nDecide: what is the final answer, and whom of the group did you follow?",
)


class Writer(Protocol):
    """Makes the prompts of calibration tasks. `outputs` are the answers of a chain's agents so far.

    Attributes:
        space: of the keys of relayed spans.
    """

    space: str

    def stage(self, task: int, outputs: Sequence[SlotValue], *, room: int) -> Prompt:
        """Prompt of the chain's next agent, with `room` tokens left for its answer."""
        ...

    def reader(self, task: int, outputs: Sequence[SlotValue], kind: Kind, *, room: int) -> Prompt:
        """Prompt of an agent that reads the first answer ("single") or all of them ("composite")."""
        ...

    def splice(self, tokens: Sequence[int], reason: str) -> SlotValue:
        """What downstream prompts get of an answer that ended for `reason`."""
        ...


@dataclass(frozen=True, slots=True)
class TaskSet:
    """Tasks, and where they came from: a file name without its folder, or "built-in"."""

    texts: tuple[str, ...]
    source: str


def load_tasks(path: Path | None, samples: int, seed: int) -> TaskSet:
    """Draw `samples` tasks (fewer where there are fewer), the same ones for the same seed.

    Args:
        path: JSON lines with the task in a field of `COLUMNS` (GSM8K: question, HumanEval: prompt); None
            takes the tasks that the project ships.

    Raises:
        ConfigError: the file cannot be read, or a row is not what it should be; says which line.
    """
    if path is None:
        file = resources.files("configs").joinpath("calibration", "tasks.jsonl")
        texts, source = _rows(file.read_text("utf-8"), "configs/calibration/tasks.jsonl"), "built-in"
    else:
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file (--data)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        texts, source = _rows(text, str(path)), path.name
    if not texts:
        raise ConfigError(f"{path}: has no rows")
    chosen = sorted(random.Random(seed).sample(range(len(texts)), min(samples, len(texts))))
    return TaskSet(tuple(texts[i] for i in chosen), source)


def _rows(text: str, name: str) -> list[str]:
    out: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f'{name}:{number} is not JSON ({error}). Every line must be like {{"question": "..."}}'
            ) from error
        value = next((row[c] for c in COLUMNS if c in row), None) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(
                f"{name}:{number} needs a text in one of the fields {', '.join(COLUMNS)}; it has: {has}"
            )
        out.append(value.strip())
    return out


class TextWriter:
    """Prompts of texts, with the model's own chat template and tokenizer."""

    def __init__(self, loaded: LoadedModel, tasks: Sequence[str], *, min_segment_tokens: int) -> None:
        self.space = loaded.space
        self._tasks = tasks
        self._tokenizer = loaded.tokenizer
        self._builder = PromptBuilder(
            loaded.tokenizer, loaded.space, min_segment_tokens, max_context=loaded.max_context
        )
        self._stop_ids = stop_token_ids(loaded.tokenizer, getattr(loaded.model, "generation_config", None))
        self._special_ids = special_token_ids(loaded.tokenizer)

    def stage(self, task: int, outputs: Sequence[SlotValue], *, room: int) -> Prompt:
        return self._build(STAGES[len(outputs)], task, outputs, room)

    def reader(self, task: int, outputs: Sequence[SlotValue], kind: Kind, *, room: int) -> Prompt:
        if kind == "composite":
            return self._build(_JUDGE, task, outputs, room)
        return self._build(_FINISHER if task % 2 else _CRITIC, task, outputs[:1], room)

    def splice(self, tokens: Sequence[int], reason: str) -> SlotValue:
        return splice(
            tokens,
            stop_ids=self._stop_ids,
            special_ids=self._special_ids,
            tokenizer=self._tokenizer,
            finish_reason=reason,
        )

    def _build(self, agent: tuple[str, str], task: int, outputs: Sequence[SlotValue], room: int) -> Prompt:
        system, text = agent
        template = self._builder.template(system, text)
        values = {f"a{i}": value for i, value in enumerate(outputs)}
        values["task"] = SlotValue(text=self._tasks[task])
        chosen = {name: values[name] for name in template.slots}
        return self._builder.build(template, chosen, max_new_tokens=room)
