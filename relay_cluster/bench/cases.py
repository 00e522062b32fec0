"""Chains of agents whose answers are really decoded: the inputs of `relay bench fidelity`.

A pattern is a little pipeline of roles over one task; the prompts of some of its agents are measured:

    linear      planner -> solver -> judge         each sees the answer before it: one relayed span
    connected   everyone has read everyone         the last sees the task and 3 or 4 answers: 4 or 5 spans
    panel       5 to 7 solvers -> judge            the last sees the task and all answers: 6 to 8 spans

Answers are decoded greedily by full prefill, many chains at once, in batches that do not depend on timing:
the same seed, data and model give the same tokens. They can be kept on disk as token ids; their KV never
is, it is made anew (`AgentWorker.replay`). This module does not know what is measured on a case.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Literal

from relay_cluster.bench.common import BASE
from relay_cluster.bench.texts import Task, Tasks
from relay_cluster.pipeline import Agent, Pipeline
from transport.errors import ConfigError, RelayError
from transport.types import SegmentKey
from workers.agent import AgentWorker
from workers.messages import Request
from workers.segment import SlotValue
from workers.settings import SamplingSettings

FORMAT = 1
"""Raise this when patterns or prompts change: answers on disk are then decoded anew."""
MIN_TOKENS = 24
"""Shortest answer; shorter ones would not be relayed, and would measure nothing."""
_TASK = "task"

Kind = Literal["single", "composite"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """Roles of a chain in the order in which they answer, and whose prompts are measured, as what kind."""

    name: str
    pipeline: Pipeline
    measured: Mapping[str, Kind]


@dataclass(frozen=True, slots=True)
class Case:
    """A pattern over one task.

    Attributes:
        id: unique within a seed; answers on disk go by it.
    """

    id: str
    task: Task
    pattern: Pattern

    @property
    def samples(self) -> int:
        return len(self.pattern.measured)


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt to be measured, its upstream segments being published.

    Attributes:
        kind: "single" or "composite".
        request: as a user's pipeline would ask; relays only the spans that its kind stands for.
        task: for judging the answer.
        answers: whether the prompt asks for the task's final number.
    """

    id: str
    kind: Kind
    request: Request
    task: Task
    answers: bool


# --- patterns -----------------------------------------------------------------------------------------------

_MATHS: dict[str, tuple[str, str]] = {
    "planner": (
        "You plan how a word problem is solved. You do not solve it.",
        "List the steps that lead to the answer, one line each.",
    ),
    "solver": (
        "You are a careful maths tutor. Work step by step and end with the answer on its own line.",
        "Solve the problem step by step.",
    ),
    "checker": (
        "You repeat calculations. You say which numbers you checked and whether they are right.",
        "Repeat every calculation above and say what you get.",
    ),
    "critic": (
        "You check solutions of maths problems. Name the first wrong step, or say that every step is right.",
        "Check each step of the solution above.",
    ),
    "judge": (
        "You decide on the final answer of a maths problem.",
        "Give the final answer of the problem. End with the number.",
    ),
}
_CODE: dict[str, tuple[str, str]] = {
    "planner": (
        "You are a senior Python engineer. You plan before anyone writes code.",
        "List the steps of the function, and its edge cases.",
    ),
    "solver": ("You write short, correct Python. Answer with one code block.", "Write the function."),
    "checker": (
        "You think of test cases. You give inputs and the results that they must have.",
        "List test cases for the function with their results.",
    ),
    "critic": (
        "You review Python code. You are brief and concrete.",
        "Name each bug with its fix, or say that the code does what the task asks.",
    ),
    "judge": (
        "You decide which code goes into the product.",
        "Write the final version of the function.",
    ),
}
_VOICES = (
    "You are quick and use few words.",
    "You explain everything as if to a child.",
    "You always look for the shortest way.",
    "You write down what is given before you start.",
    "You check every intermediate result.",
    "You like equations more than words.",
    "You think from the end back to the start.",
)


def _agent(kind: str, role: str, heard: Sequence[str], *, name: str = "", voice: str = "") -> Agent:
    """A role that reads the task and the answers of `heard`."""
    system, wish = (_MATHS if kind == "maths" else _CODE)[role]
    parts = [f"Task:\n{{{_TASK}}}", *(f"{n.capitalize()}:\n{{{n}}}" for n in heard), wish]
    return Agent(name or role, "\n\n".join(parts), system=f"{system} {voice}".strip())


def _linear(kind: str, *roles: str) -> Pattern:
    """Each agent reads the task and the answer before its own."""
    agents = [_agent(kind, role, roles[max(0, i - 1) : i]) for i, role in enumerate(roles)]
    return Pattern(f"{kind}-linear{len(roles)}", Pipeline(agents), dict.fromkeys(roles[1:], "single"))


def _connected(kind: str, *roles: str) -> Pattern:
    """Each agent reads the task and every answer so far."""
    agents = [_agent(kind, role, roles[:i]) for i, role in enumerate(roles)]
    return Pattern(f"{kind}-connected{len(roles)}", Pipeline(agents), {roles[-1]: "composite"})


def _panel(kind: str, size: int) -> Pattern:
    """Independent solvers, and a judge who reads them all."""
    names = [f"solver{n + 1}" for n in range(size)]
    solvers = [_agent(kind, "solver", (), name=n, voice=v) for n, v in zip(names, _VOICES, strict=False)]
    judge = _agent(kind, "judge", names)
    return Pattern(f"{kind}-panel{size}", Pipeline([*solvers, judge]), {"judge": "composite"})


def patterns(kind: str) -> tuple[Pattern, ...]:
    """What is taken in turns for tasks of a kind: about two single prompts for each composite one."""
    return (
        _linear(kind, "planner", "solver", "judge"),
        _connected(kind, "planner", "solver", "critic", "judge"),
        _linear(kind, "solver", "critic"),
        _panel(kind, 5),
        _linear(kind, "planner", "solver", "critic", "judge"),
        _connected(kind, "planner", "solver", "checker", "critic", "judge"),
        _linear(kind, "planner", "solver", "judge"),
        _panel(kind, 7),
    )


def make_cases(tasks: Tasks, samples: int, seed: int) -> list[Case]:
    """Cases with together exactly `samples` prompts to be measured, maths and code in turns.

    Raises:
        ConfigError: the data has too few tasks for so many samples.
    """
    streams: list[Iterator[Case]] = []
    for kind in ("maths", "code"):
        chosen = list(enumerate(tasks.of(kind)))
        random.Random(f"cases-{kind}-{seed}").shuffle(chosen)
        if chosen:
            streams.append(_stream(kind, chosen))
    cases: list[Case] = []
    have = 0
    while have < samples and streams:
        for stream in list(streams):
            case = next(stream, None)
            if case is None:
                streams.remove(stream)
            elif have < samples:
                cases.append(_cut(case, samples - have))
                have += cases[-1].samples
    if have < samples:
        raise ConfigError(
            f"--samples {samples}: {', '.join(tasks.sources)} has tasks for {have} only. Pass a larger file "
            "with --data, or several."
        )
    return cases


def _stream(kind: str, chosen: Sequence[tuple[int, Task]]) -> Iterator[Case]:
    # Maths begins with singles and code with a composite, so that few samples have both.
    turns = islice(cycle(patterns(kind)), kind == "code", None)
    for (index, task), pattern in zip(chosen, turns, strict=False):
        yield Case(f"{pattern.name}-{index}", task, pattern)


def _cut(case: Case, left: int) -> Case:
    """The case with at most `left` measured prompts."""
    measured = dict(list(case.pattern.measured.items())[:left])
    return Case(case.id, case.task, Pattern(case.pattern.name, case.pattern.pipeline, measured))


# --- answers ------------------------------------------------------------------------------------------------

Ids = tuple[int, ...]


@dataclass(slots=True)
class Answers:
    """Decoded token ids by case and agent, in memory and, with a folder, on disk.

    Args:
        file: where they are kept; None: nowhere.
    """

    file: Path | None = None
    ids: dict[str, dict[str, Ids]] = field(default_factory=dict[str, dict[str, Ids]])

    @staticmethod
    def open(folder: Path | None, *, space: str, data: str, seed: int, max_tokens: int) -> Answers:
        """Those of an earlier run with the same model, data, seed and answer length.

        Raises:
            ConfigError: the file is there but is not ours.
        """
        if folder is None:
            return Answers()
        key = json.dumps([FORMAT, space, data, seed, max_tokens])
        file = folder / f"cases-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.json"
        if not file.exists():
            return Answers(file)
        try:
            stored = json.loads(file.read_text("utf-8"))
            ids = {case: {a: tuple(i) for a, i in found.items()} for case, found in stored["answers"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{file}: not a file of decoded answers ({error}). Delete it.") from None
        return Answers(file, ids)

    def complete(self, case: Case) -> bool:
        """Whether every answer is there that the case's prompts need."""
        return self.ids.get(case.id, {}).keys() >= {role.name for role in _upstream(case)}

    def keep(self) -> None:
        """Write them, whole or not at all."""
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".part")
        partial.write_text(json.dumps({"answers": self.ids}) + "\n", "utf-8")
        partial.replace(self.file)


def decode_cases(
    agent: AgentWorker,
    cases: Sequence[Case],
    answers: Answers,
    *,
    max_tokens: int,
    batch: int,
    advance: Callable[[str], None],
) -> None:
    """Decode what `answers` does not have yet.

    Args:
        max_tokens: longest answer; the shortest is MIN_TOKENS.
        batch: requests decoded together.
        advance: called once for every case.
    """
    missing = [case for case in cases if not answers.complete(case)]
    for _ in range(len(cases) - len(missing)):
        advance("kept from an earlier run")
    sampling = SamplingSettings(max_new_tokens=max_tokens, min_new_tokens=min(MIN_TOKENS, max_tokens))
    for start in range(0, len(missing), batch):
        group = missing[start : start + batch]
        done: dict[str, dict[str, Ids]] = {case.id: {} for case in group}
        values: dict[str, dict[str, SlotValue]] = {c.id: {_TASK: SlotValue(text=c.task.text)} for c in group}
        while wave := [(c, a) for c in group for a in _ready(c, done[c.id])]:
            for at in range(0, len(wave), batch):
                part = wave[at : at + batch]
                requests = [_request(c, a, values[c.id], sampling=sampling, publish=False) for c, a in part]
                for (case, role), reply in zip(part, agent.generate_all(requests), strict=True):
                    done[case.id][role.name] = reply.token_ids
                    values[case.id][role.name] = reply.output
        answers.ids |= done
        answers.keep()
        for case in group:
            advance(f"decoded {case.id}")


def _upstream(case: Case) -> list[Agent]:
    """Agents whose answers somebody measured reads."""
    pipeline = case.pattern.pipeline
    needed = {slot for name in case.pattern.measured for slot in pipeline[name].slots}
    while more := {s for a in pipeline.agents if a.name in needed for s in a.slots} - needed:
        needed |= more
    return [a for a in pipeline.agents if a.name in needed]


def _ready(case: Case, done: Mapping[str, Ids]) -> list[Agent]:
    known = {_TASK, *done}
    return [a for a in _upstream(case) if a.name not in done and known.issuperset(a.slots)]


def _request(
    case: Case,
    role: Agent,
    values: Mapping[str, SlotValue],
    *,
    sampling: SamplingSettings,
    publish: bool,
    only_keys: frozenset[SegmentKey] | None = None,
) -> Request:
    return Request(
        id=f"{case.id}-{role.name}",
        agent=role.name,
        system=role.system,
        prompt=role.prompt,
        values={slot: values[slot] for slot in role.slots},
        method=BASE,
        sampling=sampling,
        publish=publish,
        only_keys=only_keys,
    )


# --- samples ------------------------------------------------------------------------------------------------


def publish_case(agent: AgentWorker, case: Case, answers: Mapping[str, Ids]) -> list[Sample]:
    """Bring a case's segments back into the arena, and make the prompts that read them.

    Raises:
        RelayError: a segment was not published, because the arena is too small.
    """
    values = {_TASK: SlotValue(text=case.task.text)}
    keys: dict[str, SegmentKey] = {}
    sampling = SamplingSettings(max_new_tokens=1)
    for role in _upstream(case):
        reply = agent.replay(
            _request(case, role, values, sampling=sampling, publish=True), answers[role.name]
        )
        values[role.name] = reply.output
        own = [p.key for p in reply.published if p.slot is None]
        if not own:
            raise RelayError(f"{case.id}: the answer of {role.name} was not published: {reply.notes}")
        keys[role.name] = own[0]
    samples: list[Sample] = []
    for name, kind in case.pattern.measured.items():
        role = case.pattern.pipeline[name]
        # A single is exactly one decoded span: the task is computed like any text that nobody has read.
        only = frozenset(keys[s] for s in role.slots if s in keys) if kind == "single" else None
        request = _request(case, role, values, sampling=sampling, publish=False, only_keys=only)
        answers_task = case.task.kind == "maths" and name in ("solver", "judge")
        samples.append(Sample(f"{case.id}-{name}", kind, request, case.task, answers_task))
    return samples
