"""Configuration files: clusters, pipelines and model profiles, loaded and checked without torch or Ray.

The settings themselves, defaults and bounds included, are the frozen dataclasses of each room's
`settings.py`; this module composes them, and checks what only the whole of a file can tell. How files are
read and their faults told: `config_files.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from relay_cluster.config_files import STRICT, ConfigFile, Path_, load_file, read_file
from relay_cluster.gate import QualitySettings, Role
from relay_cluster.pipeline import Agent, Pipeline, Stream, did_you_mean, find_problems
from relay_cluster.serving.settings import ServeSettings
from relay_cluster.telemetry import TelemetrySettings
from transport.errors import ConfigError
from transport.settings import DirectorySettings, TransportSettings
from workers.methods import check_presets, parse_method
from workers.methods.base import ModelProfile
from workers.settings import DEFAULT_MODEL, SamplingSettings, WorkerSettings

MAX_AUTO_WORKERS = 8
"""`workers: auto` starts one worker per agent, up to this many."""


# --- what can be set ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RaySettings:
    """How Ray is started or joined.

    Attributes:
        address: a running cluster ("auto", "host:6379"); null starts one of our own and stops it at the end.
        namespace: Ray namespace of our actors.
        num_cpus: CPUs that a cluster of our own offers; null: those of the machine.
        object_store_bytes: its object store; only keys and reports go through it, never tensors.
        auth: Ray's token authentication. "auto": a token, unless RAY_AUTH_MODE says otherwise or a cluster on
            this machine has none; see `relay_cluster/access.py`.
        dashboard: start Ray's dashboard (about 1 GB more memory); it takes jobs (`relay submit`).
        dashboard_port: where it listens, on loopback.
    """

    address: str | None = None
    namespace: str = "relay"
    num_cpus: Annotated[int, Ge(1)] | None = None
    object_store_bytes: Annotated[int, Ge(80_000_000)] = 128 << 20
    auth: Literal["auto", "disabled", "token"] = "auto"
    dashboard: bool = False
    dashboard_port: Annotated[int, Ge(1024), Le(65535)] = 8265


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """Patience of the executor.

    Attributes:
        start_timeout_s: deadline for all workers to have their model loaded.
        stop_timeout_s: deadline for them to end; after it they are killed.
        frozen_timeout_s: how long a worker's process may leave a sign of life unanswered, however busy it is;
            after it the worker counts as frozen, and its requests are started again on another one.
        max_retries: times a request is started again after its worker died.
        max_restarts: times Ray starts a dead worker again; -1 is always.
    """

    start_timeout_s: Annotated[float, Gt(0)] = 180.0
    stop_timeout_s: Annotated[float, Gt(0)] = 10.0
    frozen_timeout_s: Annotated[float, Gt(0)] = 30.0
    max_retries: Annotated[int, Ge(0)] = 2
    max_restarts: Annotated[int, Ge(-1)] = 3


def _worker_count(value: object) -> object:
    if value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError(
            "workers", 'must be a whole number or "auto", got {given}', {"given": repr(value)}
        )
    if value < 1:
        what = 'a cluster needs at least one worker, got {given}. Write 1 or more, or "auto": one per agent'
        raise PydanticCustomError("workers", what, {"given": value})
    return value


def _off_is_a_word(value: object) -> object:
    """YAML reads `off` as false."""
    return "off" if value is False else value


class ClusterConfig(BaseModel):
    """One cluster file.

    Attributes:
        name: for reports.
        workers: number of worker processes, or "auto": one per agent, up to 8.
        model: of agents and pipelines that name none.
        nodes: Ray nodes that the workers are put on in turn, the first agent's worker on the first one:
            addresses, host names, or custom resources that a node offers. Empty leaves it to Ray.
        stream: of pipelines that say nothing else.
    """

    model_config = STRICT

    name: str = "local"
    description: str = ""
    workers: Annotated[int | Literal["auto"], BeforeValidator(_worker_count)] = "auto"
    model: str = DEFAULT_MODEL
    stream: Annotated[Stream, BeforeValidator(_off_is_a_word)] = "auto"
    nodes: list[str] = Field(default_factory=list)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    transport: TransportSettings = Field(default_factory=TransportSettings)
    directory: DirectorySettings = Field(default_factory=DirectorySettings)
    ray: RaySettings = Field(default_factory=RaySettings)
    runtime: RuntimeSettings = Field(default_factory=RuntimeSettings)
    serve: ServeSettings = Field(default_factory=ServeSettings)
    telemetry: TelemetrySettings = Field(default_factory=TelemetrySettings)

    def worker_count(self, agents: int) -> int:
        """How many workers to start for a pipeline of so many agents."""
        return min(agents, MAX_AUTO_WORKERS) if self.workers == "auto" else self.workers

    @staticmethod
    def load(path: str | Path) -> ClusterConfig:
        """Read a cluster file.

        Raises:
            ConfigError: everything that is wrong with it.
        """
        return load_file(Path(path), ClusterConfig)


class AgentConfig(BaseModel):
    """One agent of a pipeline file; see `relay_cluster.pipeline.Agent`."""

    model_config = STRICT

    prompt: str
    system: str | None = None
    model: str | None = None
    method: str | None = None
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    temperature: Annotated[float, Ge(0)] | None = None
    top_p: Annotated[float, Gt(0), Le(1)] | None = None
    reuse: bool = True
    role: Role | None = None

    def agent(self, name: str) -> Agent:
        """The agent of the Python API."""
        return Agent(name, **{key: getattr(self, key) for key in type(self).model_fields})


class PipelineConfig(BaseModel):
    """One pipeline file.

    Attributes:
        name: for reports; the file's name where it is not given.
        method: reuse method of agents that name none: "auto", "auto:fast", "auto:strict", a name, or
            "name:key=value+key=value"; any of them may end in "+heal=off|idle|always".
        model: of agents that name none; null leaves it to the cluster.
        inputs: names of the inputs; where given, every other slot must name an agent.
        agents: name -> agent.
        sampling: of agents that say nothing else.
        examples: inputs to try the pipeline with (`relay run --example`).
        quality: error budget of reuse; where given, even empty, the quality gate watches every edge.
        stream: prepare prompts while upstream agents still write, "off", "auto", "exact" or "relay"; null
            leaves it to the cluster.
    """

    model_config = STRICT

    name: str = ""
    description: str = ""
    method: str = "auto"
    model: str | None = None
    inputs: list[str] | None = None
    agents: dict[str, AgentConfig]
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    examples: list[dict[str, str]] = Field(default_factory=list)
    quality: QualitySettings | None = None
    stream: Annotated[Stream | None, BeforeValidator(_off_is_a_word)] = None

    def pipeline(self) -> Pipeline:
        """The pipeline of the Python API, with `sampling` for agents that name no temperature or top_p."""
        drawn = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        agents = [agent.agent(name) for name, agent in self.agents.items()]
        return Pipeline(
            [
                dataclasses.replace(
                    agent, **{key: v for key, v in drawn.items() if getattr(agent, key) is None}
                )
                for agent in agents
            ],
            name=self.name or "pipeline",
            method=self.method,
            model=self.model,
            declared_inputs=self.inputs,
            quality=self.quality,
            stream=self.stream,
        )

    @staticmethod
    def load(path: str | Path) -> PipelineConfig:
        """Read a pipeline file; its graph is checked as well.

        Raises:
            ConfigError: everything that is wrong with it.
        """
        path = Path(path)
        config = load_file(path, PipelineConfig, _check_pipeline)
        return config if config.name else config.model_copy(update={"name": path.stem})


# --- files --------------------------------------------------------------------------------------------------

Kind = Literal["cluster", "pipeline", "profile", "simulation"]
_FOLDERS: dict[str, Kind] = {
    "clusters": "cluster",
    "pipelines": "pipeline",
    "profiles": "profile",
    "simulations": "simulation",
}
_TYPICAL: dict[Kind, frozenset[str]] = {
    "pipeline": frozenset({"agents", "inputs", "examples", "sampling"}),
    "profile": frozenset({"checkpoint_layer", "detection_layer", "end_layer", "num_layers", "first_tokens"}),
    "cluster": frozenset({"workers", "nodes", "worker", "transport", "directory", "ray", "runtime"}),
}


def kind_of(path: Path) -> Kind | None:
    """What kind of file this is, by its folder or else by its keys; None when it is none of ours."""
    if path.parent.name in _FOLDERS:
        return _FOLDERS[path.parent.name]
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if not isinstance(data, dict):
        return None
    if "simulation" in data:  # files of `relay simulate` say so, because a cluster's settings are in them
        return "simulation"
    scores: dict[Kind, int] = {kind: len(keys & data.keys()) for kind, keys in _TYPICAL.items()}
    best = max(scores, key=lambda kind: scores[kind])
    return best if scores[best] else None


def check_file(path: Path) -> Kind:
    """Validate one file of any kind and say which it was.

    Raises:
        ConfigError: everything that is wrong with it, or that its kind cannot be told.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    kind = kind_of(path)
    if kind is None:
        read_file(path)  # a YAML fault is the better explanation where there is one
        known = "; ".join(f"a {kind} has {', '.join(sorted(keys))}" for kind, keys in _TYPICAL.items())
        known += "; a simulation has simulation: cluster or workload"
        raise ConfigError(f"{path}: neither a cluster, a pipeline nor a profile ({known})")
    loaders: dict[Kind, Callable[[Path], object]] = {
        "cluster": ClusterConfig.load,
        "pipeline": PipelineConfig.load,
        "profile": load_profile,
        "simulation": _check_simulation,
    }
    loaders[kind](path)
    return kind


def _check_simulation(path: Path) -> None:
    from relay_cluster.simulation.settings import check_simulation  # which builds on this module

    check_simulation(path)


def load_profile(path: str | Path) -> ModelProfile:
    """Read a model profile. How it was found (`calibration`, by `relay profile`) is not looked at.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    return load_file(Path(path), ModelProfile, _check_profile, ignored=frozenset({"calibration"}))


# --- checking ---------------------------------------------------------------------------------------------


def _check_method(file: ConfigFile, at: Path_, name: str | None) -> Iterator[str]:
    if name is not None:
        try:
            parse_method(name)
        except ConfigError as error:
            yield file.fault(at, str(error))


def _check_pipeline(file: ConfigFile, config: PipelineConfig) -> Iterator[str]:
    """What only the whole of a pipeline file can tell: the graph, the methods, the examples."""
    if "method" in file.data:
        yield from _check_method(file, ("method",), config.method)
    for name, agent in config.agents.items():
        yield from _check_method(file, ("agents", name, "method"), agent.method)
    agents = [agent.agent(name) for name, agent in config.agents.items()]
    problems = find_problems(agents, config.inputs)
    for problem in problems:
        at: Path_ = (problem.field,) if problem.agent is None else ("agents", problem.agent, problem.field)
        if problem.field == "name":
            at = at[:-1]  # an agent's name is its key
        yield file.fault(at, problem.what, near=f"{{{problem.slot}}}" if problem.slot else "")
    if not problems:
        used = config.pipeline().inputs
        for name in config.inputs or ():
            if name not in used:
                yield file.fault(("inputs",), f'input "{name}" is in no prompt; use {{{name}}} or remove it')
        yield from _check_examples(file, config.examples, used)


def _check_examples(
    file: ConfigFile, examples: Sequence[Mapping[str, str]], used: Sequence[str]
) -> Iterator[str]:
    for index, example in enumerate(examples):
        for name in used:
            if name not in example:
                yield file.fault(("examples", index), f'input "{name}" is missing')
        for name in example:
            if name not in used:
                what = f"is not an input of this pipeline.{did_you_mean(name, used)}"
                yield file.fault(("examples", index, name), what)


def _check_profile(file: ConfigFile, profile: ModelProfile) -> Iterator[str]:
    """Bands must lie inside the model."""
    if profile.num_layers < 1:
        yield file.fault(("num_layers",), f"must be at least 1, got {profile.num_layers}")
    if not 0 <= profile.checkpoint_layer < profile.end_layer <= profile.num_layers:
        what = (
            "must satisfy 0 <= checkpoint_layer < end_layer <= num_layers, got "
            f"{profile.checkpoint_layer}, {profile.end_layer}, {profile.num_layers}"
        )
        yield file.fault(("checkpoint_layer",), what)
    if not profile.checkpoint_layer <= profile.detection_layer < profile.end_layer:
        what = f"must lie in [checkpoint_layer, end_layer), got {profile.detection_layer}"
        yield file.fault(("detection_layer",), what)
    if not 0 <= profile.ratio <= 1:
        yield file.fault(("ratio",), f"must lie between 0 and 1, got {profile.ratio}")
    if profile.first_tokens < 0:
        yield file.fault(("first_tokens",), f"must be at least 0, got {profile.first_tokens}")
    try:
        check_presets(profile.presets)
    except ConfigError as error:
        yield file.fault(("presets",), str(error))
