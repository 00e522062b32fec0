"""The cluster as its users see it: starts Ray, directory shards and workers, runs pipelines, and ends what it
started.

    with Cluster(config) as cluster:
        result = cluster.run(pipeline, {"question": "..."})

Only requests, keys and reports cross Ray. Everything here blocks, and every wait has a deadline.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import ray
from ray.exceptions import RayError

from relay_cluster import standing
from relay_cluster.config import ClusterConfig
from relay_cluster.doctor import this_machine
from relay_cluster.executor import Executor, Observer, RunOptions
from relay_cluster.faulting import unwrapped
from relay_cluster.gate import Edge, EdgeState, Gate, QualitySettings
from relay_cluster.heads import settled
from relay_cluster.joining import join
from relay_cluster.links import choose_wire
from relay_cluster.nodes import affinities, shares
from relay_cluster.pipeline import Pipeline, Stream
from relay_cluster.report import AgentReport, ClusterReport, RowReport, RunReport
from relay_cluster.router import place, worker_models
from relay_cluster.turns import agent_report
from relay_cluster.worker_calls import Member, WorkerCalls
from transport.directory.client import DirectoryClient
from transport.directory.shard import create_shards, kill_shards
from transport.errors import (
    ConfigError,
    DeadlineExceeded,
    RelayError,
)
from transport.types import WorkerId
from workers.actor import WorkerInfo, remote_worker
from workers.methods import parse_method

log = logging.getLogger(__name__)

_LINK_TIMEOUT_S: Final = 20.0

OnEvent = Callable[..., None]


def _no_event(*_: Any) -> None:
    """Nobody is watching."""


@dataclass(frozen=True, slots=True)
class Result:
    """What `Cluster.run` returns. `result["judge"].text` is an agent's answer."""

    report: RunReport

    def __getitem__(self, agent: str) -> AgentReport:
        return self.report.rows[-1][agent]


class Cluster(WorkerCalls):
    """Workers on Ray. A context manager; leaving it ends every process that it started.

    Args:
        config: the cluster; None = this machine with defaults.
        agents_hint: start the workers that this pipeline needs at once; else the first `run` starts them.
        attach: where a cluster of that name is up (`relay up`), use its workers and leave it up.
        on_event: called with ("cluster", text) while it starts.
        observer: hears of every agent's answer, for metrics.
    """

    def __init__(
        self,
        config: ClusterConfig | None = None,
        *,
        agents_hint: Pipeline | None = None,
        attach: bool = False,
        on_event: OnEvent | None = None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(config or ClusterConfig())
        self.observer = observer
        self._hint = agents_hint
        self._attach = attach
        self.attached = False
        """Whether the workers are those of a standing cluster."""
        self._on_event = on_event or _no_event
        self._started_ray = False
        self._transport = self.config.transport
        self._wire_note = ""
        self._prepared: set[tuple[object, ...]] = set()
        self._runs = 0
        self._gates: dict[tuple[str, QualitySettings], Gate] = {}
        self._id = uuid.uuid4().hex[:6]
        self._directory_prefix = f"relay-directory-{self._id}"

    @classmethod
    def from_yaml(cls, path: str | Path, **kwargs: Any) -> Cluster:
        """A cluster from a file.

        Raises:
            ConfigError: everything that is wrong with the file.
        """
        return cls(ClusterConfig.load(path), **kwargs)

    # -- life ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start or join Ray, then the directory and, with a hint, the workers. Idempotent.

        Raises:
            RelayError: a worker did not come up within runtime.start_timeout_s.
        """
        if not ray.is_initialized():
            ray_settings = settled(self.config) if self._attach else self.config.ray
            join(ray_settings, lambda text: self._on_event("cluster", text))
            self._started_ray = True
        if not self._shards and self._attach:
            self._adopt()
        if not self._shards:
            self._shards = create_shards(self.config.directory, prefix=self._directory_prefix)
            self._directory = DirectoryClient(self._shards, self.config.directory)
        if self._hint is not None:
            self._ensure_workers(self._hint)

    def stop(self) -> None:
        """End workers and shards, and Ray where we started it; leave a standing cluster. Idempotent."""
        members, self._members = self._members, {}
        shards, self._shards = self._shards, {}
        self._directory = None
        if self.attached:
            members, shards, self.attached = {}, {}, False
        self._prepared.clear()
        if not ray.is_initialized():
            return
        try:
            closing = [m.handle.close.remote() for m in members.values() if m.info is not None]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=self.config.runtime.stop_timeout_s)
            for member in members.values():
                _kill(member.handle)
            if shards:  # by name: a resize, here or from another process, adds some
                kill_shards(self._directory_prefix)
        except (RayError, ValueError, ConnectionError) as error:
            log.warning("stopping the cluster: %s", error)
        finally:
            if self._started_ray:
                self._started_ray = False
                ray.shutdown()

    def _adopt(self) -> None:
        """Use the workers of the standing cluster of our name, if it is up.

        Raises:
            RelayError: it is up, and no worker of it answers, or its directory is gone.
        """
        found = standing.find(self.config.name)
        if found is None:
            return
        if not found.shards:
            raise RelayError(
                f'"{found.name}" is up without a directory: `relay up` with its file repairs it.'
            )
        self._on_event("cluster", f'attaching to "{self.config.name}", which is up')
        for worker, spec, follower in standing.follow(found, timeout_s=self.config.runtime.frozen_timeout_s):
            self._members[worker] = Member(spec, follower.handle, follower.info, follower=follower)
        self._shards = found.shards
        self._directory_prefix = found.directory
        self._directory = DirectoryClient(self._shards, self.config.directory)
        self.attached = True
        for line in standing.notes(self.config, [m.spec for m in self._members.values()]):
            self._on_event("cluster", line)

    # -- workers -------------------------------------------------------------------------------------------

    def _ensure_workers(self, pipeline: Pipeline) -> None:
        """Start the workers that the pipeline needs, unless they run already; place its agents; warm their
        prefixes."""
        agents = self._models(pipeline)
        self.start_workers(agents)
        self._placed.update(place(agents, self.views()))
        self._prepare(pipeline)

    def start_workers(self, agents: Sequence[tuple[str, str]]) -> None:
        """Start workers for (agent, model) pairs and wait until they are ready, unless they run already.

        Raises:
            RelayError: a worker did not come up within runtime.start_timeout_s.
        """
        if not self._shards:
            self.start()
        if not self._members:
            count = self.config.worker_count(len(agents))
            models = worker_models(agents, count, self.config.model)
            shares(self.config, count)  # refuses what does not fit, before anything is measured
            places = affinities(self.config.nodes) or [None]
            self._on_event("cluster", f"starting {count} workers ({', '.join(dict.fromkeys(models))})")
            self._choose_wire()
            for i, model in enumerate(models):
                self._spawn(WorkerId(f"w{i}"), model, count, places[i % len(places)])
            self._await_ready()
        self._welcome_back()

    def _models(self, pipeline: Pipeline) -> list[tuple[str, str]]:
        default = pipeline.model or self.config.model
        return [(name, pipeline[name].model or default) for name in pipeline.order]

    def _choose_wire(self) -> None:
        """Settle in which format keys and values travel: one for all, who read each other's blocks."""
        nodes = [str(node["NodeID"]) for node in ray.nodes() if node["Alive"]]
        chosen, why = choose_wire(self.config.transport, nodes, timeout_s=_LINK_TIMEOUT_S)
        self._transport = replace(self.config.transport, wire=chosen)
        if self.config.transport.wire == "auto" and chosen != "raw":
            self._wire_note = f"transport: keys and values travel as {chosen}, because {why}"

    def _spawn(self, worker: WorkerId, model: str, count: int, place: Any) -> None:
        spec = standing.worker_spec(self.config, worker, model, self._transport, tuple(self._shards))
        cpus, gpus = shares(self.config, count)
        handle = remote_worker(
            spec,
            name=f"relay-worker-{self._id}-{worker}",
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=self.config.runtime.max_restarts,
            scheduling_strategy=place,
        )
        self._members[worker] = Member(spec, handle)

    def _await_ready(self) -> None:
        timeout_s = self.config.runtime.start_timeout_s
        pending = {m.handle.info.remote(): m for m in self._members.values()}
        deadline = time.monotonic() + timeout_s
        while pending:
            done, _ = ray.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                names = ", ".join(m.spec.worker for m in pending.values())
                raise DeadlineExceeded(
                    f"workers {names} were not ready within {timeout_s:.0f} s. Raise "
                    "runtime.start_timeout_s, or see `relay doctor` and the logs in Ray's session folder."
                )
            member = pending.pop(done[0])
            try:
                info: WorkerInfo = ray.get(done[0])
            except RayError as error:
                raise unwrapped(error, f"worker {member.spec.worker} could not start") from None
            member.info = info
            how = f"{info.device}, pid {info.pid}, {'/'.join(info.backends)}"
            self._on_event("cluster", f"{info.worker} ready on {info.node} ({how})")
        for line in self.notes():
            self._on_event("cluster", line)

    def _prepare(self, pipeline: Pipeline) -> None:
        """Prefill every agent's own fixed prefix into its worker's exact prefix cache."""
        jobs: dict[Any, tuple[object, ...]] = {}
        for name in pipeline.order:
            agent = pipeline[name]
            member = self._members[self._placed[name]]
            life = member.info.incarnation if member.info else 0
            key = (self._placed[name], life, agent.system, agent.prompt)
            if key not in self._prepared:
                jobs[member.handle.prepare.remote(agent.system, agent.prompt)] = key
        for call, key in jobs.items():
            try:
                self._get(WorkerId(str(key[0])), call, self.config.worker.request_timeout_s)
            except (RayError, RelayError) as error:
                fault = unwrapped(error, f"the prompt of an agent on {key[0]} could not be prepared")
                if isinstance(fault, ConfigError):
                    raise fault from None
                # Only warmth is lost; whether the worker lives is seen when a request goes there.
                log.warning("%s", fault)
            else:
                self._prepared.add(key)

    def notes(self) -> tuple[str, ...]:
        """Plain sentences about what is not as good as it could be."""
        infos = [m.info for m in self._members.values() if m.info is not None]
        lines: dict[str, None] = {self._wire_note: None} if self._wire_note else {}
        one_node = len({info.node for info in infos}) == 1
        for info in infos:
            missed = "nixl" not in info.backends and not (one_node and "shm" in info.backends)
            if self.config.transport.backend == "auto" and missed:
                why = info.missing_backends.get("nixl", "not available")
                lines[
                    f"transport: nixl is not available ({why}), so KV moves over tcp (slower, same answers)"
                ] = None
            if not info.profile_measured:
                lines[f"model {info.model} has no profile: the generic one is used (slower, safe)"] = None
        return tuple(lines)

    def gate_states(self) -> list[tuple[Edge, str, EdgeState]]:
        """(edge, method asked for, state) of every gate of this cluster."""
        with self._lock:
            gates = list(self._gates.values())
            return [(edge, asked, state) for g in gates for (edge, asked), state in g.states.items()]

    # -- running -------------------------------------------------------------------------------------------

    def run(
        self,
        pipeline: Pipeline,
        inputs: Mapping[str, str] | None = None,
        *,
        method: str | None = None,
        compare: str | None = None,
        repeats: int = 3,
        max_new_tokens: int = 256,
        seed: int = 0,
        stream: Stream | None = None,
        on_event: OnEvent | None = None,
        **more_inputs: str,
    ) -> Result:
        """Run a pipeline once.

        Args:
            inputs: input name -> text; also as keywords.
            method: reuse method; None = the pipeline's, or "auto".
            compare: run every prompt under this method too, afterwards, on the same workers ("full_prefill").
            repeats: TTFT samples of each method for `compare`.
            max_new_tokens: of agents that name no limit.
            seed: of sampled decoding.
            stream: prepare prompts while the agents that they contain still write, see pipeline.Stream; None:
                the pipeline's, or else the cluster's.
            on_event: called with ("agent_started", agent, worker), ("token", agent, n), ("agent_done", agent)
                and ("compare", agent, text).

        Raises:
            PipelineError: inputs do not fit. PromptTooLong, ConfigError: a prompt does not fit the model.
            WorkerLost: a worker died more often than runtime.max_retries.
        """
        values = pipeline.check_inputs({**(inputs or {}), **more_inputs})
        options = RunOptions(
            method=method or pipeline.method or "auto",
            compare=compare,
            repeats=repeats,
            max_new_tokens=max_new_tokens,
            seed=seed,
            max_retries=self.config.runtime.max_retries,
            stream=stream or pipeline.stream or self.config.stream,
        )
        for name in filter(None, (options.method, compare, *(a.method for a in pipeline.agents))):
            parse_method(name)
        self._ensure_workers(pipeline)
        row = self._run_row(pipeline, values, options, on_event or _no_event)
        report = RunReport(
            pipeline=pipeline.name,
            method=options.method,
            seed=seed,
            max_new_tokens=max_new_tokens,
            machine=this_machine(),
            cluster=self._cluster_report(row),
            rows=(row,),
        )
        return Result(report)

    def _run_row(
        self, pipeline: Pipeline, inputs: Mapping[str, str], options: RunOptions, on_event: OnEvent
    ) -> RowReport:
        with self._lock:
            self._runs += 1
            run_id = f"{self._id}-{self._runs}"
        gate = self._gate(pipeline, options)
        executor = Executor(pipeline, self, options, run_id, on_event, gate=gate, observer=self.observer)
        turns, wall_s = executor.run(inputs)
        gated = executor.check(turns)
        # Afterwards and one at a time: a comparison beside a running agent would slow both down.
        compared = executor.compare({name: turns[name] for name in pipeline.order})
        return RowReport(
            agents=tuple(
                agent_report(turns[name], compared.get(name), executor.notes(turns[name]), gated.get(name))
                for name in pipeline.order
            ),
            wall_s=wall_s,
            inputs_digest=_digest(inputs),
        )

    def _gate(self, pipeline: Pipeline, options: RunOptions) -> Gate | None:
        """The gate of a pipeline's edges; it lives as long as the cluster."""
        if pipeline.quality is None:
            return None
        key = (pipeline.name, pipeline.quality)
        with self._lock:
            if key not in self._gates:
                self._gates[key] = Gate(pipeline.quality, seed=options.seed)
            return self._gates[key]

    def _cluster_report(self, row: RowReport) -> ClusterReport:
        infos = list(self.workers.values())
        moved = dict.fromkeys(
            t.backend for agent in row.agents for t in agent.transfers if t.outcome == "pulled" and t.bytes
        )
        return ClusterReport(
            name=self.config.name,
            workers=len(infos),
            nodes=len({i.node for i in infos}),
            backend="+".join(moved) or self.config.transport.backend,
            device="+".join(dict.fromkeys(i.device for i in infos)),
            notes=self.notes(),
        )


def _digest(inputs: Mapping[str, str]) -> str:
    """Names a set of inputs without telling them."""
    text = "\0".join(f"{k}\0{inputs[k]}" for k in sorted(inputs))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _kill(handle: Any) -> None:
    try:
        ray.kill(handle)
    except (RayError, ValueError) as error:
        log.warning("an actor could not be ended: %s", error)


__all__ = ["Cluster", "Result"]
