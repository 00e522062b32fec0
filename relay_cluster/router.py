"""Placement of agents on workers. Pure: facts in, names and reasons out; knows neither Ray nor requests.

    route()            one agent: expected seconds until its first token on every worker that can answer it
    route_pipeline()   all agents of a run, those on the longest path of expected work first
    place()            the same where nothing is known but names and models

What a worker costs an agent, in seconds:

    wait      work that the worker has already
    pull      segments that the prompt contains and that lie elsewhere, over the links as they were measured
    prefill   its own text, without its fixed prefix on the worker that answered it before, and segments that
              nobody holds

So an agent comes back to its worker unless that costs more, and goes where its segments are unless others
are there. Two agents of one critical path never share a busy worker while an idle one can be had: with
prefill ahead the later one works while the earlier one still writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transport.errors import PipelineError
from transport.types import WorkerId

ASSUMED_PREFILL_S = 1e-3
"""Seconds per prompt token, while nothing has been measured."""
ASSUMED_DECODE_S = 20e-3
"""Seconds per answer token, while nothing has been measured."""
MOST_CANDIDATES = 8
"""So many candidates are told, the best first."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What placement needs to know of a worker.

    Attributes:
        worker: its name.
        model: the model that it hosts.
        alive: whether it answers.
        node: the machine that it is on; "" where that is not known.
        busy_s: seconds for which the work that it has would hold up one more request.
        agents: how many agents it answers by habit; decides between workers that are equal otherwise.
        prefill_s, decode_s: seconds per prompt and answer token, as measured.
    """

    worker: WorkerId
    model: str
    alive: bool = True
    node: str = ""
    busy_s: float = 0.0
    agents: int = 0
    prefill_s: float = ASSUMED_PREFILL_S
    decode_s: float = ASSUMED_DECODE_S


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """Seconds of a transfer: `fixed_s`, and `byte_s` for each byte."""

    fixed_s: float
    byte_s: float

    def seconds(self, nbytes: float) -> float:
        """Of a transfer of `nbytes`; nothing takes no time."""
        return self.fixed_s + self.byte_s * nbytes if nbytes else 0.0


@dataclass(frozen=True, slots=True)
class Links:
    """How fast workers reach each other; a worker has what it holds at once.

    Attributes:
        near: between workers of one node; far: between nodes of which nothing is measured.
        between: (from node, to node) -> as measured; (n, n) is within node n.
    """

    near: LinkSpeed = LinkSpeed(5e-3, 1e-9)
    far: LinkSpeed = LinkSpeed(10e-3, 8e-9)
    between: Mapping[tuple[str, str], LinkSpeed] = field(default_factory=dict[tuple[str, str], LinkSpeed])

    def seconds(self, source: WorkerView, to: WorkerView, nbytes: float) -> float:
        """Of a pull of `nbytes` by `to` from `source`."""
        if source.worker == to.worker:
            return 0.0
        speed = self.between.get((source.node, to.node))
        if speed is None:
            speed = self.near if source.node == to.node else self.far
        return speed.seconds(nbytes)


@dataclass(frozen=True, slots=True)
class Read:
    """Text in a prompt that may be held as a segment.

    Attributes:
        tokens, nbytes: its size.
        holders: workers that hold it; empty: nobody does, and the reader computes it.
        source: the agent that will have written it when the prompt is made; `route_pipeline` puts its worker
            in `holders`.
    """

    tokens: int
    nbytes: int = 0
    holders: tuple[WorkerId, ...] = ()
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An agent that is to be placed.

    Attributes:
        agent, model: who, and what must be hosted.
        prefix_tokens: of its fixed prefix, which the worker that it had before has cached.
        fresh_tokens: of its prompt beside the prefix and `reads`.
        answer_tokens: expected.
        reads: segments in its prompt.
        homes: workers that have its prefix, because it was there before; the latest first.
        after: agents that it waits for.
    """

    agent: str
    model: str
    prefix_tokens: int = 0
    fresh_tokens: int = 0
    answer_tokens: int = 0
    reads: tuple[Read, ...] = ()
    homes: tuple[WorkerId, ...] = ()
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """What an agent is expected to wait for on a worker, in seconds until its first token."""

    worker: WorkerId
    wait_s: float
    pull_s: float
    prefill_s: float

    @property
    def total_s(self) -> float:
        return self.wait_s + self.pull_s + self.prefill_s


@dataclass(frozen=True, slots=True)
class Choice:
    """Where an agent goes.

    Attributes:
        worker: chosen.
        reason: in plain words.
        candidates: at most MOST_CANDIDATES of them, the chosen one first, then by expected seconds.
    """

    worker: WorkerId
    reason: str
    candidates: tuple[Candidate, ...]

    @property
    def expected_s(self) -> float:
        """Seconds until the first token."""
        return self.candidates[0].total_s


def route(
    task: Task, workers: Sequence[WorkerView], links: Links | None = None, avoid: Collection[WorkerId] = ()
) -> Choice:
    """The worker on which the agent's first token is expected first.

    Ties go to the worker that the agent had last, then to the one with the fewest agents, then to the first.

    Args:
        workers: candidates, in a stable order.
        links: between them; None: as assumed.
        avoid: workers that another agent of the same critical path is on. One that is busy is left out while
            there is an idle one outside.

    Raises:
        PipelineError: no worker that is alive hosts the model.
    """
    able = [w for w in workers if w.alive and w.model == task.model]
    if not able:
        hosted = ", ".join(sorted({w.model for w in workers})) or "none"
        raise PipelineError(
            f'agent "{task.agent}" needs model {task.model}, which no live worker hosts (hosted: {hosted}). '
            "Set `model` in the cluster file, or start more workers."
        )
    free = [w for w in able if w.busy_s <= 0 and w.worker not in avoid]
    left_out = [w for w in able if free and w.busy_s > 0 and w.worker in avoid]
    out = {w.worker for w in left_out}
    allowed = [w for w in able if w.worker not in out]
    holders = _holders(task, workers)
    links = links or Links()
    homes = {worker: turn for turn, worker in enumerate(task.homes)}
    # Every step of the order is a number or a place: the same facts always give the same worker.
    scored = sorted(
        (
            (
                *_cost(task, view, holders, links, homes),
                homes.get(view.worker, len(homes)),
                view.agents,
                place,
            )
            for place, view in enumerate(allowed)
        ),
        key=lambda row: (row[0], *row[4:]),
    )
    best = scored[:MOST_CANDIDATES]
    candidates = tuple(Candidate(allowed[place].worker, *parts) for _, *parts, _, _, place in best)
    chosen = allowed[best[0][-1]]
    return Choice(chosen.worker, _reason(task, chosen, candidates, left_out), candidates)


def _holders(task: Task, workers: Sequence[WorkerView]) -> list[tuple[Read, list[WorkerView]]]:
    """Every read, and the live workers that it can be pulled from."""
    if not task.reads:
        return []
    alive = {w.worker: w for w in workers if w.alive}
    return [(read, [alive[h] for h in read.holders if h in alive]) for read in task.reads]


def _cost(
    task: Task,
    view: WorkerView,
    reads: Sequence[tuple[Read, list[WorkerView]]],
    links: Links,
    homes: Collection[WorkerId],
) -> tuple[float, float, float, float]:
    """(total, wait, pull, prefill) in seconds."""
    tokens = task.fresh_tokens + (0 if view.worker in homes else task.prefix_tokens)
    pull_s = 0.0
    for read, holders in reads:
        if holders:
            pull_s += min(links.seconds(holder, view, read.nbytes) for holder in holders)
        else:
            tokens += read.tokens
    prefill_s = tokens * view.prefill_s
    return view.busy_s + pull_s + prefill_s, view.busy_s, pull_s, prefill_s


def _reason(
    task: Task, chosen: WorkerView, candidates: Sequence[Candidate], left_out: Sequence[WorkerView]
) -> str:
    best = candidates[0]
    parts: list[str] = ["idle" if chosen.busy_s <= 0 else f"busy for {best.wait_s:.2f} s"]
    if chosen.worker in task.homes:
        parts.append("has the agent's prefix")
    if task.reads and best.pull_s == 0 and any(chosen.worker in read.holders for read in task.reads):
        parts.append("holds what the prompt reads")
    if left_out:
        names = ", ".join(w.worker for w in left_out[:3])
        parts.append(f"{names} left out: busy with the critical path")
    if len(candidates) > 1:
        following = candidates[1]
        parts.append(f"next best {following.worker} in {following.total_s:.2f} s")
    elif not left_out:
        parts.append("the only live worker of the model")
    return "; ".join(parts)


# --- whole pipelines ----------------------------------------------------------------------------------------


def critical_path(tasks: Sequence[Task], prefill_s: float, decode_s: float) -> tuple[str, ...]:
    """The chain of agents with the most expected work, in the order in which they run.

    Args:
        prefill_s, decode_s: seconds per prompt and answer token.
    """
    ranks = _ranks(tasks, prefill_s, decode_s)
    readers = _readers(tasks)
    path: list[str] = []
    following = [t.agent for t in tasks if not any(a in ranks for a in t.after)]
    while following:
        path.append(max(following, key=lambda name: (ranks[name], -_index(tasks, name))))
        following = readers[path[-1]]
    return tuple(path)


def route_pipeline(
    tasks: Sequence[Task], workers: Sequence[WorkerView], links: Links | None = None
) -> dict[str, Choice]:
    """Agent -> choice, for a run that has not begun.

    Those with the most work behind them come first; what has been placed counts as work of its worker.

    Args:
        tasks: agents; `after` and `Read.source` name others of them.
        workers: candidates, in a stable order.

    Raises:
        PipelineError: no worker that is alive hosts an agent's model.
    """
    live = [w for w in workers if w.alive] or list(workers)
    prefill_s = _mean([w.prefill_s for w in live], ASSUMED_PREFILL_S)
    decode_s = _mean([w.decode_s for w in live], ASSUMED_DECODE_S)
    ranks = _ranks(tasks, prefill_s, decode_s)
    path = set(critical_path(tasks, prefill_s, decode_s))
    views = {w.worker: w for w in workers}
    chosen: dict[str, Choice] = {}
    # A reader's rank is below its writers', so these are placed before it.
    for task in sorted(tasks, key=lambda t: (-ranks[t.agent], _index(tasks, t.agent))):
        reads = tuple(
            replace(r, holders=(*r.holders, chosen[r.source].worker)) if r.source in chosen else r
            for r in task.reads
        )
        on_path = {chosen[a].worker for a in path if a in chosen} if task.agent in path else ()
        choice = route(replace(task, reads=reads), list(views.values()), links, on_path)
        chosen[task.agent] = choice
        view = views[choice.worker]
        busy_s = view.busy_s + _work_s(task, view.prefill_s, view.decode_s)
        views[choice.worker] = replace(view, busy_s=busy_s, agents=view.agents + 1)
    return {t.agent: chosen[t.agent] for t in tasks}


def place(agents: Sequence[tuple[str, str]], workers: Sequence[WorkerView]) -> dict[str, WorkerId]:
    """Agent -> worker, for agents of which nothing else is known.

    Args:
        agents: (agent, model) in the order in which they run.
        workers: candidates, in a stable order.

    Raises:
        PipelineError: no worker that is alive hosts an agent's model.
    """
    tasks = [Task(agent=agent, model=model) for agent, model in agents]
    return {agent: choice.worker for agent, choice in route_pipeline(tasks, workers).items()}


def _work_s(task: Task, prefill_s: float, decode_s: float) -> float:
    """Seconds that an agent occupies a worker; never nothing, so that one that has agents is not idle."""
    tokens = task.prefix_tokens + task.fresh_tokens + sum(r.tokens for r in task.reads)
    return (tokens + 1) * prefill_s + task.answer_tokens * decode_s


def _readers(tasks: Sequence[Task]) -> dict[str, list[str]]:
    return {t.agent: [other.agent for other in tasks if t.agent in other.after] for t in tasks}


def _ranks(tasks: Sequence[Task], prefill_s: float, decode_s: float) -> dict[str, float]:
    """Agent -> seconds of work from its beginning to the end of the longest path behind it."""
    work = {t.agent: _work_s(t, prefill_s, decode_s) for t in tasks}
    ranks = dict(work)
    # As often as the longest path can be long; a graph has no cycles (Pipeline sees to that).
    for _ in tasks:
        changed = False
        for task in tasks:
            for upstream in task.after:
                if upstream in ranks and ranks[upstream] < work[upstream] + ranks[task.agent]:
                    ranks[upstream] = work[upstream] + ranks[task.agent]
                    changed = True
        if not changed:
            break
    return ranks


def _index(tasks: Sequence[Task], agent: str) -> int:
    return next(i for i, t in enumerate(tasks) if t.agent == agent)


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def worker_models(agents: Sequence[tuple[str, str]], count: int, default_model: str) -> list[str]:
    """The model of each of `count` workers, so that every model that the agents need is hosted.

    Models get workers in proportion to their agents, in order of first appearance, at least one each.

    Raises:
        PipelineError: more models than workers.
    """
    wanted: Mapping[str, int] = Counter(model for _, model in agents) or {default_model: 1}
    if len(wanted) > count:
        raise PipelineError(
            f"the agents need {len(wanted)} models ({', '.join(wanted)}) but the cluster has {count} "
            "workers, and a worker hosts one model. Raise `workers` in the cluster file."
        )
    models = list(wanted)
    while len(models) < count:
        # The model with the fewest workers per agent gets the next one.
        given = Counter(models)
        models.append(min(wanted, key=lambda m: given[m] / wanted[m]))
    return models
