"""Placement of agents on workers. Pure: facts in, names out; knows neither Ray nor requests.

Agents of one pipeline go to different workers where there are enough of them, so that each agent has its own
device and its own prefix cache; the same agent goes to the same worker again, because its system prompt is
cached there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transport.errors import PipelineError
from transport.types import WorkerId


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What placement needs to know of a worker.

    Attributes:
        worker: its name.
        model: the model that it hosts.
        alive: whether it answers.
    """

    worker: WorkerId
    model: str
    alive: bool = True


def place(agents: Sequence[tuple[str, str]], workers: Sequence[WorkerView]) -> dict[str, WorkerId]:
    """Agent -> worker.

    Args:
        agents: (agent, model) in the order in which they run.
        workers: candidates, in a stable order.

    Raises:
        PipelineError: no worker that is alive hosts an agent's model.
    """
    load: Counter[WorkerId] = Counter()
    placed: dict[str, WorkerId] = {}
    for agent, model in agents:
        placed[agent] = place_next(agent, model, workers, load)
        load[placed[agent]] += 1
    return placed


def place_next(
    agent: str, model: str, workers: Sequence[WorkerView], load: Mapping[WorkerId, float]
) -> WorkerId:
    """The worker for one more agent: the one with the least `load` (a worker that it lacks has none), the
    first of those equal.

    Raises:
        PipelineError: no worker that is alive hosts the model.
    """
    able = [w.worker for w in workers if w.alive and w.model == model]
    if not able:
        hosted = ", ".join(sorted({w.model for w in workers})) or "none"
        raise PipelineError(
            f'agent "{agent}" needs model {model}, which no live worker hosts (hosted: {hosted}). '
            "Set `model` in the cluster file, or start more workers."
        )
    return min(able, key=lambda name: (load.get(name, 0), able.index(name)))


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
