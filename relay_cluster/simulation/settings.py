"""The two files of a simulation, checked like all others (`relay_cluster.config`): every fault at once, with
its line. Seconds end in `_s`, rates in `_per_s`, sizes in `_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, Field

from relay_cluster.config_files import ConfigFile, load_file
from relay_cluster.pipeline import Agent, Pipeline, find_problems
from transport.settings import DirectorySettings, TransportSettings
from workers.settings import WorkerSettings

_STRICT = ConfigDict(extra="forbid", frozen=True)
_MOST_WORKERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Sizes of the model; see `workers.costs.ModelCosts`.

    Attributes:
        name: finds the model's profile, and tells in reports.
        dtype: of weights, keys and values.
    """

    name: str
    hidden: Annotated[int, Ge(1)]
    intermediate: Annotated[int, Ge(1)]
    vocab: Annotated[int, Ge(1)]
    heads: Annotated[int, Ge(1)]
    kv_heads: Annotated[int, Ge(1)]
    head_dim: Annotated[int, Ge(1)]
    layers: Annotated[int, Ge(1)]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """What a worker's device takes for a step; see `simulation.device`.

    Attributes:
        source: where the numbers come from.
        flops_per_s: that dense prefill reaches.
        sparse_efficiency: share of it that the few rows of a rectification reach.
        memory_bytes_per_s: at which weights and KV are read; null: reading is inside step_fixed_s.
        step_fixed_s: of any step. sequence_s: for every sequence in it.
        rotate_token_s: putting a relayed token into a cache.
        dispatch_s: from the driver to the worker and back. publish_s: of an answer, beside its bytes.
        copy_bytes_per_s: at which published bytes are copied and summed.
    """

    source: str
    flops_per_s: Annotated[float, Gt(0)]
    sparse_efficiency: Annotated[float, Gt(0), Le(1)] = 1.0
    memory_bytes_per_s: Annotated[float, Gt(0)] | None = None
    step_fixed_s: Annotated[float, Ge(0)] = 0.0
    sequence_s: Annotated[float, Ge(0)] = 0.0
    rotate_token_s: Annotated[float, Ge(0)] = 0.0
    dispatch_s: Annotated[float, Ge(0)] = 0.0
    publish_s: Annotated[float, Ge(0)] = 0.0
    copy_bytes_per_s: Annotated[float, Gt(0)] = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """One kind of link: what a transfer takes, and who shares the port on either side."""

    source: str
    latency_s: Annotated[float, Ge(0)]
    bytes_per_s: Annotated[float, Gt(0)]
    port: Literal["worker", "node"] = "worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinksSettings:
    """same_node: between workers of one node; remote: between nodes."""

    same_node: LinkSettings
    remote: LinkSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryCosts:
    """Processor time of one shard, which answers one call at a time.

    Attributes:
        call_s: of a call; key_s: for each of its keys, mean over the operations.
        announce_s: of a heartbeat. latency_s: on the way, both ways together.
    """

    source: str
    call_s: Annotated[float, Ge(0)]
    key_s: Annotated[float, Ge(0)]
    announce_s: Annotated[float, Ge(0)]
    latency_s: Annotated[float, Ge(0)]


class SimulatedCluster(BaseModel):
    """A cluster file of `relay simulate`.

    Attributes:
        workers: how many; `--workers` and `sweep` say otherwise. workers_per_node: nodes are filled in turn.
        profile: file of the model's profile; null: the one that ships, or the generic one.
        sweep: numbers of workers that are simulated one after another; empty: `workers` alone.
        worker, transport, directory: as in a real cluster's file.
    """

    model_config = _STRICT

    simulation: Literal["cluster"]
    name: str
    description: str = ""
    workers: Annotated[int, Ge(1), Le(_MOST_WORKERS)] = 2
    workers_per_node: Annotated[int, Ge(1)] = 8
    sweep: list[Annotated[int, Ge(1), Le(_MOST_WORKERS)]] = Field(default_factory=list)
    model: ModelSettings
    profile: str | None = None
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    transport: TransportSettings = Field(default_factory=TransportSettings)
    directory: DirectorySettings = Field(default_factory=DirectorySettings)
    device: DeviceSettings
    links: LinksSettings
    directory_costs: DirectoryCosts

    @staticmethod
    def load(path: str | Path) -> SimulatedCluster:
        """Read a cluster file. Raises ConfigError with everything that is wrong with it."""
        return load_file(Path(path), SimulatedCluster)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedAgent:
    """One agent: its prompt is its prefix, then what it reads in this order, then its fresh text.

    Attributes:
        reads: inputs of the workload and other agents.
        prefix_tokens: of its fixed beginning. fresh_tokens: of its fixed end. answer_tokens: on average.
    """

    answer_tokens: Annotated[int, Ge(1)]
    reads: tuple[str, ...] = ()
    prefix_tokens: Annotated[int, Ge(0)] = 0
    fresh_tokens: Annotated[int, Ge(1)] = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalSettings:
    """How runs come.

    Attributes:
        kind: "closed": `per_worker` runs for each worker are under way, and each is followed by the next;
            "poisson": `per_worker` runs per second and worker come, whatever is under way.
    """

    kind: Literal["closed", "poisson"] = "closed"
    per_worker: Annotated[float, Gt(0)] = 1.0


class Workload(BaseModel):
    """A workload file of `relay simulate`.

    Attributes:
        inputs: name -> tokens; every run has its own.
        runs_per_worker: runs of the pipeline for each worker; at least `least_runs` in all.
        answer_spread: standard deviation of an answer's length over its mean; the longest have two of them
            more than the mean.
    """

    model_config = _STRICT

    simulation: Literal["workload"]
    name: str
    description: str = ""
    inputs: dict[str, Annotated[int, Ge(1)]] = Field(default_factory=dict)
    agents: dict[str, SimulatedAgent]
    arrivals: ArrivalSettings = Field(default_factory=ArrivalSettings)
    runs_per_worker: Annotated[float, Gt(0)] = 4
    least_runs: Annotated[int, Ge(1)] = 20
    answer_spread: Annotated[float, Ge(0), Le(2)] = 0.0

    def pipeline(self) -> Pipeline:
        """The graph, as the product draws it."""
        return Pipeline(_agents(self), name=self.name)

    def longest(self, agent: str) -> int:
        """Most tokens of an agent's answer."""
        return math.ceil(self.agents[agent].answer_tokens * (1 + 2 * self.answer_spread))

    def runs(self, workers: int) -> int:
        """Runs on a cluster of so many workers."""
        return max(self.least_runs, round(self.runs_per_worker * workers))

    @staticmethod
    def load(path: str | Path) -> Workload:
        """Read a workload file. Raises ConfigError with everything that is wrong with it."""
        return load_file(Path(path), Workload, _check_workload)


def _agents(workload: Workload) -> list[Agent]:
    return [
        Agent(name, prompt=" ".join(f"{{{read}}}" for read in agent.reads) + " .")
        for name, agent in workload.agents.items()
    ]


def _check_workload(file: ConfigFile, workload: Any) -> Iterator[str]:
    for problem in find_problems(_agents(workload), list(workload.inputs)):
        at = ("agents",) if problem.agent is None else ("agents", problem.agent)
        yield file.fault((*at, "reads") if problem.field == "prompt" else at, problem.what)


def check_simulation(path: Path) -> None:
    """Validate a file of either kind. Raises ConfigError."""
    kind = load_file(path, _Kind).simulation
    (SimulatedCluster if kind == "cluster" else Workload).load(path)


class _Kind(BaseModel):
    """The line that says which of the two a file is."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    simulation: Literal["cluster", "workload"]
