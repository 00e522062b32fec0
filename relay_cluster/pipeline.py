"""Agents and the graph that their prompts draw.

A prompt is a template whose slots, `{name}`, *are* the edges: a slot that names an agent is filled with that
agent's output, any other slot with a pipeline input of that name. So nothing can disagree with the prompts.
This module knows neither Ray nor models; it does not render prompts either (workers splice token ids).
"""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from relay_cluster.gate import STRICT_ROLES, QualitySettings, Role
from transport.errors import PipelineError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


Stream = Literal["off", "auto", "exact", "relay"]
"""Whether prompts are prepared while their upstream agents still write: "auto" computes what the idle workers
have time for and relays the rest; "exact" relays nothing, so that answers are full prefill's; "relay"
computes none of it, but pulls the upstream agents' KV as it is made: the answers are the method's."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A hole in a prompt, filled by an agent's output or by a pipeline input."""

    name: str

    def __str__(self) -> str:
        return "{" + self.name + "}"


def parse_template(text: str) -> tuple[str | Slot, ...]:
    """Split a prompt into literal text and slots, in order; `{{` and `}}` become single braces.

    Raises:
        PipelineError: a brace without its partner, or a slot that is more than a name.
    """
    parts: list[str | Slot] = []
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise PipelineError(
            f"bad slot syntax: {error}. Write {{{{ and }}}} for braces that are text."
        ) from error
    for literal, name, spec, conversion in fields:
        if literal:
            # The parser cuts the text at each escaped brace; one run of text is one part.
            last = parts.pop() if parts and isinstance(parts[-1], str) else ""
            parts.append(f"{last}{literal}")
        if name is None:
            continue
        if spec or conversion or not _NAME.fullmatch(name):
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise PipelineError(
                f"bad slot {{{shown}}}: a slot is one name, like {{solver}}. "
                "Write {{ and }} for braces that are text."
            )
        parts.append(Slot(name))
    return tuple(parts)


@dataclass(frozen=True, slots=True)
class Agent:
    """One role of a pipeline. None always means: as the pipeline, the cluster or the method's default has it.

    Attributes:
        name: how other prompts refer to it.
        prompt: the user message, with slots.
        system: the system message, taken literally (it has no slots).
        model: Hugging Face id or folder.
        method: reuse method for the slots of this prompt.
        max_new_tokens: answer length limit.
        temperature: 0 is greedy.
        top_p: nucleus mass.
        reuse: False computes every slot of this prompt in full, whatever the method.
        role: "judge" or "aggregator" starts stricter under the pipeline's quality gate.
    """

    name: str
    prompt: str
    system: str | None = None
    model: str | None = None
    method: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    reuse: bool = True
    role: Role | None = None

    @property
    def parts(self) -> tuple[str | Slot, ...]:
        """The prompt as text and slots, in order; a slot may appear more than once."""
        return parse_template(self.prompt)

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the slots, each once, in order of first appearance."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Slot)))


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a graph: the agent (None: the whole pipeline), its field and slot, and what is wrong."""

    agent: str | None
    field: str
    what: str
    slot: str = ""

    def __str__(self) -> str:
        return self.what if self.agent is None else f'agent "{self.agent}", {self.field}: {self.what}'


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that suggests the nearest known word, with a leading space; empty when none is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f' Did you mean "{near[0]}"?' if near else ""


def find_problems(agents: Sequence[Agent], declared: Sequence[str] | None = None) -> tuple[Problem, ...]:
    """Everything that is wrong with a graph, all at once.

    Args:
        agents: the agents, in the order in which they are written.
        declared: the pipeline's inputs where they are declared; then every other slot must name an agent.
    """
    if not agents:
        return (Problem(None, "agents", "a pipeline needs at least one agent"),)
    names = [agent.name for agent in agents]
    problems = [
        Problem(name, "name", f"{count} agents have this name; names must differ")
        for name, count in Counter(names).items()
        if count > 1
    ]
    problems += [
        Problem(None, "inputs", f'input "{name}" has the name of an agent; rename one of them')
        for name in declared or ()
        if name in names
    ]
    for agent in agents:
        problems += _agent_problems(agent, names, declared)
    if not problems and (cycle := _find_cycle(agents)):
        arrows = " -> ".join(cycle)
        what = (
            f"the agents wait for each other in a cycle: {arrows}. Take one of these slots out of its prompt."
        )
        problems.append(Problem(cycle[1], "prompt", what, cycle[0]))
    return tuple(problems)


def _agent_problems(agent: Agent, names: Sequence[str], declared: Sequence[str] | None) -> list[Problem]:
    problems: list[Problem] = []
    if not _NAME.fullmatch(agent.name):
        what = "a name is made of letters, digits, _ and -, and does not start with a digit"
        problems.append(Problem(agent.name, "name", what))
    problems += _role_problems(agent)
    if not agent.prompt.strip():
        return [*problems, Problem(agent.name, "prompt", "the prompt is empty")]
    try:
        slots = agent.slots
    except PipelineError as error:
        return [*problems, Problem(agent.name, "prompt", str(error))]
    if agent.name in slots:
        what = (
            f"slot {{{agent.name}}} refers to the agent itself; an agent can only use the output of another"
        )
        problems.append(Problem(agent.name, "prompt", what, agent.name))
    others = [name for name in names if name != agent.name]
    if declared is not None:
        for slot in slots:
            if slot not in names and slot not in declared:
                known = [*others, *declared]
                what = f"slot {{{slot}}} names neither an agent nor a declared input."
                hint = did_you_mean(slot, known) or f" Known: {', '.join(known) or 'none'}."
                problems.append(Problem(agent.name, "prompt", what + hint, slot))
    for name in [*others, *(declared or ())]:
        if agent.system and f"{{{name}}}" in agent.system:
            what = f"a system message is literal text: {{{name}}} would not be filled. Move it to the prompt."
            problems.append(Problem(agent.name, "system", what, name))
    return problems


def _role_problems(agent: Agent) -> list[Problem]:
    if agent.role is None or agent.role in STRICT_ROLES:
        return []
    hint = did_you_mean(agent.role, STRICT_ROLES)
    known = ", ".join(STRICT_ROLES)
    return [Problem(agent.name, "role", f'role "{agent.role}" is not known.{hint} Known: {known}')]


def _find_cycle(agents: Sequence[Agent]) -> list[str]:
    """Names along one cycle, the first repeated at the end; empty when there is none."""
    edges = _edges(agents)
    done: set[str] = set()
    for root in edges:
        # An explicit stack: the depth of a graph is the user's, the recursion limit is Python's.
        path: list[str] = []
        stack: list[tuple[str, bool]] = [(root, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                path.pop()
                done.add(name)
            elif name in path:
                return [*path[path.index(name) :], name][::-1]
            elif name not in done:
                path.append(name)
                stack.append((name, True))
                stack.extend((upstream, False) for upstream in reversed(edges[name]))
    return []


def _edges(agents: Sequence[Agent]) -> dict[str, tuple[str, ...]]:
    """Agent -> the agents whose output its prompt contains."""
    names = {agent.name for agent in agents}
    return {agent.name: tuple(slot for slot in agent.slots if slot in names) for agent in agents}


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Agents and the graph that their slots draw; checked when it is made.

    Attributes:
        agents: in the order in which they are written; any sequence is accepted.
        name: for reports.
        method: reuse method of every agent that names none; None leaves it to the run ("auto").
        model: model of every agent that names none; None leaves it to the cluster.
        declared_inputs: where given, a slot that is neither an agent nor one of these is an error.
        quality: error budget of reuse, kept by a gate that makes an edge stricter where it is exceeded; None
            lets every agent use its method unwatched.
        stream: whether prompts are prepared while others still write; None leaves it to the cluster.

    Raises:
        PipelineError: everything that is wrong with the graph, one line each.
    """

    agents: Sequence[Agent]
    name: str = "pipeline"
    method: str | None = None
    model: str | None = None
    declared_inputs: Sequence[str] | None = None
    quality: QualitySettings | None = None
    stream: Stream | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", tuple(self.agents))
        if self.declared_inputs is not None:
            object.__setattr__(self, "declared_inputs", tuple(self.declared_inputs))
        if problems := find_problems(self.agents, self.declared_inputs):
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise PipelineError(f'pipeline "{self.name}" cannot run:\n{lines}')

    def __getitem__(self, name: str) -> Agent:
        for agent in self.agents:
            if agent.name == name:
                return agent
        known = [agent.name for agent in self.agents]
        raise PipelineError(f'pipeline "{self.name}" has no agent "{name}".{did_you_mean(name, known)}')

    @property
    def agent_names(self) -> tuple[str, ...]:
        """Names of the agents, in the order in which they are written."""
        return tuple(agent.name for agent in self.agents)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that the prompts use, in order of first appearance."""
        names = set(self.agent_names)
        return tuple(dict.fromkeys(s for agent in self.agents for s in agent.slots if s not in names))

    @property
    def upstreams(self) -> dict[str, tuple[str, ...]]:
        """Agent -> the agents whose output its prompt contains, each once."""
        return _edges(self.agents)

    @property
    def consumers(self) -> dict[str, tuple[str, ...]]:
        """Agent or input -> the agents whose prompt contains it, in written order."""
        return {
            source: tuple(agent.name for agent in self.agents if source in agent.slots)
            for source in (*self.inputs, *self.agent_names)
        }

    @property
    def levels(self) -> tuple[tuple[str, ...], ...]:
        """Groups of agents that may run at once: each needs only agents of earlier groups."""
        waiting: dict[str, set[str]] = {name: set(upstream) for name, upstream in self.upstreams.items()}
        levels: list[tuple[str, ...]] = []
        while waiting:
            # Never empty: a graph with a cycle cannot be constructed.
            ready = tuple(name for name, upstream in waiting.items() if not upstream)
            levels.append(ready)
            waiting = {name: up.difference(ready) for name, up in waiting.items() if name not in ready}
        return tuple(levels)

    @property
    def order(self) -> tuple[str, ...]:
        """A topological order, stable: level by level, in written order within a level."""
        return tuple(name for level in self.levels for name in level)

    def check_inputs(self, values: Mapping[str, object], *, where: str = "") -> dict[str, str]:
        """The inputs of one run, checked.

        Args:
            values: input name -> text.
            where: prefix of the error, such as "rows.jsonl:3: ".

        Raises:
            PipelineError: inputs are missing, unknown or not text; names every one of them.
        """
        faults: list[str] = []
        for name in self.inputs:
            if name not in values:
                users = ", ".join(f'"{agent}"' for agent in self.consumers[name])
                what = f'missing input "{name}" (slot {{{name}}} of {users}).'
                near = did_you_mean(name, self.agent_names) or did_you_mean(name, values)
                faults.append(what + (near or f" Pass it, for example --input {name}=..."))
        for name, value in values.items():
            if name not in self.inputs:
                known = ", ".join(self.inputs) or "none"
                hint = did_you_mean(name, self.inputs) or f" Inputs of this pipeline: {known}."
                faults.append(f'unknown input "{name}".{hint}')
            elif not isinstance(value, str):
                faults.append(f'input "{name}" must be text, not {type(value).__name__}.')
        if faults:
            raise PipelineError("\n".join(f'{where}pipeline "{self.name}": {fault}' for fault in faults))
        return {name: str(values[name]) for name in self.inputs}
