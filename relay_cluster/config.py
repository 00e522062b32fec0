"""Configuration files: clusters, pipelines and model profiles, loaded and checked without torch or Ray.

The settings themselves, defaults and bounds included, are the frozen dataclasses of each room's
`settings.py`; this module only composes them (pydantic is used here and nowhere else) and turns every fault
of a file into one line, `FILE:LINE key: what is wrong. Did you mean "x"?`, all of them at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails, PydanticCustomError

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

_STRICT = ConfigDict(extra="forbid", frozen=True)
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")

Path_: TypeAlias = tuple[str | int, ...]
"""Keys from the top of a file down to a value."""


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

    model_config = _STRICT

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
        return _load(Path(path), ClusterConfig)


class AgentConfig(BaseModel):
    """One agent of a pipeline file; see `relay_cluster.pipeline.Agent`."""

    model_config = _STRICT

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

    model_config = _STRICT

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
        config = _load(path, PipelineConfig, _check_pipeline)
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
        _read(path)  # a YAML fault is the better explanation where there is one
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
    return _load(Path(path), ModelProfile, _check_profile, ignored=frozenset({"calibration"}))


# --- reading with line numbers ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    """A parsed file: its data, and the line of each key and item."""

    path: Path
    data: dict[str, Any]
    lines: dict[Path_, int]
    text: str

    def line(self, at: Path_) -> int:
        """Line of a value, or of the nearest parent that is written down."""
        while at and at not in self.lines:
            at = at[:-1]
        return self.lines.get(at, 1)

    def fault(self, at: Path_, what: str, *, near: str = "") -> str:
        """One line of an error. `near`: text within a value of many lines, whose line is meant."""
        line = self.line(at)
        if near:
            rest = self.text.splitlines()[line - 1 :]
            line += next((offset for offset, written in enumerate(rest) if near in written), 0)
        key = ".".join(str(part) for part in at)
        return f"{self.path}:{line} {key}: {what}" if key else f"{self.path}:{line} {what}"

    def together(self, faults: Iterable[str]) -> str:
        """Several faults as one message, from the top of the file to its end."""
        start = len(str(self.path)) + 1
        return "\n".join(sorted(dict.fromkeys(faults), key=lambda fault: int(fault[start:].split(" ", 1)[0])))


def _read(path: Path) -> _File:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.{_similar_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name a file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line} not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if node is None or not isinstance(data, dict):
        given = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}:1 must be a mapping of settings (key: value), but the file is {given}")
    lines: dict[Path_, int] = {}
    twice: list[str] = []
    for at, line in _walk(node, ()):
        if at in lines:
            key = ".".join(str(part) for part in at)
            twice.append(f"{path}:{line} {key}: written twice (first on line {lines[at]}); keep one of them")
        lines.setdefault(at, line)
    if twice:
        raise ConfigError("\n".join(twice))
    return _File(path, data, lines, text)


def _walk(node: yaml.Node, at: Path_) -> Iterator[tuple[Path_, int]]:
    """Every key and item below a node, with its line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            # YAML 1.1 reads `on` and `yes` as booleans, which is never meant in a key: keep the text.
            below = (*at, str(key.value))
            yield below, key.start_mark.line + 1
            yield from _walk(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*at, index)
            yield below, value.start_mark.line + 1
            yield from _walk(value, below)


def _similar_file(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f' Did you mean "{folder / near[0]}"?' if near else ""


ConfigFile: TypeAlias = _File
"""A parsed file, for checks of other modules: `fault(path, what)` makes a line of an error."""


# --- checking -----------------------------------------------------------------------------------------------

S = TypeVar("S")
_Check: TypeAlias = Callable[[_File, Any], Iterable[str]]


def load_as(path: Path, cls: type[S], check: Callable[[ConfigFile, Any], Iterable[str]] | None = None) -> S:
    """Read a file of another module's kind, with the same faults told in the same way.

    Args:
        cls: pydantic model or dataclass. check: more faults of the whole, one line each.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    return _load(path, cls, check)


def _load(
    path: Path, cls: type[S], check: _Check | None = None, *, ignored: frozenset[str] = frozenset()
) -> S:
    """Read, validate and check a file; every fault in one error. `ignored`: keys that are left alone."""
    file = _read(path)
    # A plain dataclass takes `extra="forbid"` from the model around it, and has no other way to get it.
    box = create_model("File", __config__=_STRICT, value=(cls, ...))
    data = {key: value for key, value in file.data.items() if key not in ignored}
    try:
        value: S = box.model_validate({"value": _with_sizes(data)}).__dict__["value"]
    except ValidationError as error:
        faults = [_sentence(file, cls, detail) for detail in error.errors()]
        raise ConfigError(file.together(faults)) from error
    faults = list(check(file, value)) if check else []
    if faults:
        raise ConfigError(file.together(faults))
    return value


def _with_sizes(data: Any, key: Hashable = "") -> Any:
    """The data with "512MiB" turned into bytes wherever the key ends in `_bytes`, and with text for keys."""
    if isinstance(data, dict):
        return {k if isinstance(k, str) else str(k): _with_sizes(v, k) for k, v in data.items()}
    if isinstance(data, list):
        return [_with_sizes(item) for item in data]
    if isinstance(data, str) and str(key).endswith("_bytes") and (match := _SIZE.fullmatch(data.strip())):
        unit = _UNITS.get(match[2].upper())
        return data if unit is None else int(float(match[1]) * unit)
    return data


def _sentence(file: _File, root: type, detail: ErrorDetails) -> str:
    """One pydantic error in our words."""
    at: Path_ = tuple(part for part in detail["loc"][1:] if part != "[key]")
    given = detail["input"]
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return file.fault(at, _unknown_key(root, at))
    if kind in ("missing", "missing_argument"):
        return file.fault(at, "is missing and has no default")
    if str(at[-1] if at else "").endswith("_bytes") and isinstance(given, str):
        return file.fault(at, f'"{given}" is not a size; write a number of bytes, or 512MiB, 2GiB, 100MB')
    if kind == "literal_error":
        expected = str(context["expected"])
        hint = did_you_mean(str(given), re.findall(r"'([^']*)'", expected)) if isinstance(given, str) else ""
        return file.fault(at, f"must be {expected}, got {_shown(given)}.{hint}")
    for prefix, noun in _NOUNS.items():
        if kind.startswith(prefix):
            return file.fault(at, f"must be {noun}, got {_shown(given)}")
    for name, words in _BOUNDS.items():
        if name in context:
            return file.fault(at, f"must be {words} {context[name]:g}, got {_shown(given)}")
    return file.fault(at, detail["msg"])


_NOUNS = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_": "text",
    "list_": "a list",
    "dict_": "a mapping (key: value)",
    "model_": "a mapping (key: value)",
    "dataclass_": "a mapping (key: value)",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _shown(value: object) -> str:
    if isinstance(value, str | int | float | bool) or value is None:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:57] + "..."
    return {"list": "a list", "dict": "a mapping"}.get(type(value).__name__, type(value).__name__)


def _unknown_key(root: type, at: Path_) -> str:
    """Say that a key is unknown, and which one may have been meant, here or one level down."""
    parent = _type_at(root, at[:-1])
    known = list(_fields(parent)) if parent else []
    key = str(at[-1])
    owner = f'"{at[-2]}"' if len(at) > 1 else "this file"
    what = f"is not a setting of {owner}."
    if hint := did_you_mean(key, known):
        return what + hint
    for section, hint_type in _fields(root).items():
        inner = _plain_type(hint_type)
        if inner and key in _fields(inner) and at[:-1] != (section,):
            return f'{what} Did you mean "{section}.{key}"?'
    return f"{what} Known: {', '.join(known)}."


def _fields(cls: type) -> dict[str, Any]:
    """Names and types of the settings of a class."""
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        return {name: info.annotation for name, info in cls.model_fields.items()}
    if dataclasses.is_dataclass(cls):
        return typing.get_type_hints(cls)
    return {}


def _plain_type(hint: Any) -> type | None:
    """The class of settings inside a type hint, if there is one."""
    if isinstance(hint, type) and _fields(hint):
        return hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union, Annotated, list, dict):
        return next((found for arg in args if (found := _plain_type(arg))), None)
    return None


def _type_at(root: type, at: Path_) -> type | None:
    """The class of settings at a path; keys of a dict and indices of a list are stepped over."""
    cls: type | None = root
    for part in at:
        if cls is None:
            return None
        hints = _fields(cls)
        if part in hints:
            cls = _plain_type(hints[str(part)])
    return cls


def _check_method(file: _File, at: Path_, name: str | None) -> Iterator[str]:
    if name is not None:
        try:
            parse_method(name)
        except ConfigError as error:
            yield file.fault(at, str(error))


def _check_pipeline(file: _File, config: PipelineConfig) -> Iterator[str]:
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


def _check_examples(file: _File, examples: Sequence[Mapping[str, str]], used: Sequence[str]) -> Iterator[str]:
    for index, example in enumerate(examples):
        for name in used:
            if name not in example:
                yield file.fault(("examples", index), f'input "{name}" is missing')
        for name in example:
            if name not in used:
                what = f"is not an input of this pipeline.{did_you_mean(name, used)}"
                yield file.fault(("examples", index, name), what)


def _check_profile(file: _File, profile: ModelProfile) -> Iterator[str]:
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
