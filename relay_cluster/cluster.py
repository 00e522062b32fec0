"""The cluster as its users see it: starts Ray, directory shards and workers, runs pipelines, and ends what it
started.

    with Cluster(config) as cluster:
        result = cluster.run(pipeline, {"question": "..."})

Only requests, keys and reports cross Ray. Everything here blocks, and every wait has a deadline.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from relay_cluster import standing
from relay_cluster.config import ClusterConfig
from relay_cluster.directory import resize
from relay_cluster.doctor import this_machine
from relay_cluster.executor import Executor, Observer, OnToken, RunOptions, Stream
from relay_cluster.faulting import unwrapped
from relay_cluster.following import Follower
from relay_cluster.gate import Edge, EdgeState, Gate, QualitySettings
from relay_cluster.heads import settled
from relay_cluster.joining import join
from relay_cluster.links import choose_wire
from relay_cluster.nodes import affinities, shares
from relay_cluster.pipeline import Pipeline
from relay_cluster.polling import Poll
from relay_cluster.report import AgentReport, ClusterReport, RowReport, RunReport
from relay_cluster.router import WorkerView, place, worker_models
from relay_cluster.turns import agent_report
from relay_cluster.watching import POLL_S, Watch, WorkerFrozen, awaited
from transport.directory.client import DirectoryClient
from transport.directory.operate import DirectoryOperator
from transport.directory.shard import create_shards, kill_shards
from transport.directory.view import View
from transport.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    RelayError,
    WorkerDraining,
    WorkerLost,
)
from transport.types import WorkerId
from workers.actor import WorkerInfo, WorkerSpec, remote_worker
from workers.messages import Comparison, Distance, Draft, Reply, Request, ShadowCheck, Token
from workers.methods import parse_method

log = logging.getLogger(__name__)

_LINK_TIMEOUT_S: Final = 20.0
_OTHER_ANSWERS_S: Final = 5.0
"""How long another worker may take to say that it lives, before the next one is asked."""
_LOOK_S: Final = 0.1
"""Between two looks at who takes a worker's place."""
_BEYOND_DEADLINE_S: Final = 180.0
"""What a worker that runs may take beyond its request's deadline to say that it was missed."""

OnEvent = Callable[..., None]


class _Died(WorkerLost):
    """The worker's process is known to be gone, and with it what it was doing."""


def _no_event(*_: Any) -> None:
    """Nobody is watching."""


@dataclass(slots=True)
class _Member:
    """A worker actor of this cluster.

    Attributes:
        lost: no agent is placed there any more. frozen: it is only lost until this call is answered.
        follower: of a standing cluster: finds who has taken its place.
    """

    spec: WorkerSpec
    handle: Any
    info: WorkerInfo | None = None
    lost: bool = False
    frozen: Any = None
    follower: Follower | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What `Cluster.run` returns. `result["judge"].text` is an agent's answer."""

    report: RunReport

    def __getitem__(self, agent: str) -> AgentReport:
        return self.report.rows[-1][agent]


class Cluster:
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
        self.config = config or ClusterConfig()
        self.observer = observer
        self._hint = agents_hint
        self._attach = attach
        self.attached = False
        """Whether the workers are those of a standing cluster."""
        self._on_event = on_event or _no_event
        self._members: dict[WorkerId, _Member] = {}
        self._placed: dict[str, WorkerId] = {}
        self._shards: dict[str, Any] = {}
        self._directory: DirectoryClient | None = None
        self._elsewhere: dict[str, WorkerId] = {}
        self._started_ray = False
        self._transport = self.config.transport
        self._wire_note = ""
        self._prepared: set[tuple[object, ...]] = set()
        self._runs = 0
        self._gates: dict[tuple[str, QualitySettings], Gate] = {}
        self._id = uuid.uuid4().hex[:6]
        self._directory_prefix = f"relay-directory-{self._id}"
        self._lock = threading.Lock()

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
            self._members[worker] = _Member(spec, follower.handle, follower.info, follower=follower)
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
        self._members[worker] = _Member(spec, handle)

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

    # -- Workers protocol of the executor ------------------------------------------------------------------

    def model_for(self, agent: str) -> str:
        """See executor.Workers."""
        return self._members[self._placed[agent]].spec.model

    def worker_for(self, agent: str) -> WorkerId:
        """The agent's worker, waiting for its restart where it died; else any live worker with its model.
        Another one is taken as well when it is silent for `runtime.frozen_timeout_s`."""
        runtime = self.config.runtime
        self._welcome_back()
        worker = self._placed[agent]
        member = self._members[worker]
        frozen = member.frozen is not None
        patience_s = min(runtime.frozen_timeout_s, runtime.start_timeout_s)
        if self._here(worker) and not frozen and self._answers(worker, patience_s):
            return worker
        member.lost = True
        model = member.spec.model
        for other, others in self._members.items():
            if other == worker or others.spec.model != model or others.frozen is not None:
                continue
            if self._answers(other, _OTHER_ANSWERS_S):
                self._placed[agent] = other
                return other
        # There is no other: it may go on, or its restart takes its time.
        if self._answers(worker, runtime.frozen_timeout_s if frozen else runtime.start_timeout_s):
            return worker
        how = "frozen" if member.frozen is not None else "gone"
        raise WorkerLost(f"worker {worker} is {how} and no other live worker hosts {model}.")

    def _welcome_back(self) -> None:
        """Place agents again on workers that were frozen and have answered since."""
        for worker, member in self._members.items():
            if member.frozen is not None and ray.wait([member.frozen], timeout=0)[0]:
                log.info("worker %s goes on", worker)
                member.lost, member.frozen = False, None

    def _watch(self, worker: WorkerId) -> Watch:
        handle = self._members[worker].handle
        return Watch(worker, handle.info.remote, self.config.runtime.frozen_timeout_s)

    def _note_frozen(self, worker: WorkerId, watch: Watch) -> None:
        member = self._members[worker]
        member.lost, member.frozen = True, watch.pending

    def _get(self, worker: WorkerId, call: Any, timeout_s: float) -> Any:
        """The result of a call to a worker. Raises RayError, WorkerFrozen, DeadlineExceeded."""
        watch = self._watch(worker)
        try:
            return awaited(call, watch, timeout_s)
        except WorkerFrozen:
            self._note_frozen(worker, watch)
            raise

    def _answers(self, worker: WorkerId, timeout_s: float) -> bool:
        """Whether the worker's process lives; a call to a restarting actor waits until it is back. One that
        is still silent after `timeout_s` counts as frozen."""
        deadline = time.monotonic() + timeout_s
        member = self._members[worker]
        while time.monotonic() < deadline:
            if self._here(worker) is None:
                time.sleep(_LOOK_S)  # its successor loads the model
                continue
            call = member.handle.info.remote()
            if not ray.wait([call], timeout=max(0.1, deadline - time.monotonic()))[0]:
                member.frozen = call
                return False
            try:
                member.info = ray.get(call)
            except ActorUnavailableError:
                time.sleep(0.2)  # a restart under way
            except RayError:
                if member.follower is None:
                    return False
                member.follower.leave()
            else:
                member.lost, member.frozen = False, None
                return True
        return False

    def _here(self, worker: WorkerId) -> _Member | None:
        """The member, if it takes requests as far as is known; its successor's handle is taken over."""
        member = self._members[worker]
        if member.follower is not None:
            if not member.follower.back():
                return None
            if member.handle is not member.follower.handle:
                member.handle, member.info = member.follower.handle, member.follower.info
                member.lost, member.frozen = False, None
        return member

    def _settled(self, worker: WorkerId, stop: threading.Event) -> WorkerId:
        """The worker itself; while it is being replaced, another one of its model, or else its successor.

        Raises:
            WorkerLost: nobody takes its place. Cancelled: `stop` was set.
        """
        member = self._members[worker]
        deadline = time.monotonic() + self.config.runtime.start_timeout_s
        while True:
            if self._here(worker) is not None:
                return worker
            for other, others in self._members.items():
                if others.spec.model == member.spec.model and not others.lost and self._here(other):
                    return other
            if stop.wait(_LOOK_S):
                raise Cancelled("the run has ended.")
            gone = member.follower is not None and member.follower.gone
            if gone or time.monotonic() > deadline:
                raise WorkerLost(
                    f"worker {worker} is gone, and no other live worker hosts {member.spec.model}. "
                    "`relay up` with the cluster's file replaces it."
                )

    def _left(self, worker: WorkerId, error: WorkerLost) -> bool:
        """Whether a request that was not begun shall go to who takes the worker's place."""
        follower = self._members[worker].follower
        if follower is None or not isinstance(error, (WorkerDraining, _Died)):
            return False  # it may only be out of reach, and at work
        follower.leave()
        return True

    def generate(
        self,
        worker: WorkerId,
        request: Request,
        on_token: OnToken,
        stop: threading.Event | None = None,
    ) -> tuple[Reply, float]:
        """See executor.Workers."""
        begin = time.perf_counter()
        first = 0.0
        for count, item in enumerate(self.stream(worker, request, stop), start=1):
            if isinstance(item, Reply):
                return item, first
            first = first or time.perf_counter() - begin
            on_token(count, item)
        raise AssertionError("unreachable: a stream ends with a reply or raises")

    def stream(
        self, worker: WorkerId, request: Request, stop: threading.Event | None = None
    ) -> Iterator[Token | Reply]:
        """Answer a request: its tokens as they are drawn, and at last the reply.

        Raises:
            WorkerLost: the process died. Cancelled: soon after `stop` was set (the worker is not told:
            `cancel` does that). Else what the worker raised.
        """
        stop = stop or threading.Event()
        while True:
            at = self._settled(worker, stop)
            begun = False
            if at != worker:
                self._elsewhere[request.id] = at
            try:
                for item in self._stream(at, request, stop):
                    begun = True
                    yield item
            except WorkerLost as error:
                if begun or not self._left(at, error):
                    raise
                log.info("request %s goes elsewhere: %s", request.id, error)
            else:
                return
            finally:
                self._elsewhere.pop(request.id, None)

    def _stream(self, worker: WorkerId, request: Request, stop: threading.Event) -> Iterator[Token | Reply]:
        member = self._members[worker]
        info = member.info
        try:
            stream = member.handle.generate.options(num_returns="streaming").remote(request)
            for kind, item in self._items(stream, worker, stop):
                yield item
                if kind == "reply":
                    return
        except WorkerFrozen:
            member.handle.cancel.remote(request.id)  # should it go on one day
            raise
        except RayError as error:
            fault = unwrapped(error, f'agent "{request.agent}" on {worker}')
            if isinstance(error, ActorDiedError):
                if info is not None:
                    self._bury(worker, info)
                raise _Died(str(fault)) from None
            raise fault from None
        raise WorkerLost(f"worker {worker} ended its stream without a reply.")

    def _items(self, stream: Any, worker: WorkerId, stop: threading.Event) -> Iterator[tuple[str, Any]]:
        """The stream's items. The worker ends every request at its own deadline; a frozen one, which does
        not, is noticed by `Watch`."""
        deadline = time.monotonic() + self.config.worker.request_timeout_s + _BEYOND_DEADLINE_S
        watch = self._watch(worker)
        while True:
            ready, _ = ray.wait([stream], timeout=POLL_S, fetch_local=False)
            if stop.is_set():
                raise Cancelled("the run has ended.")
            if not ready:
                try:
                    watch.check()
                except WorkerFrozen:
                    self._note_frozen(worker, watch)
                    raise
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"worker {worker} has been silent beyond the deadline of its request "
                        f"({self.config.worker.request_timeout_s:.0f} s, worker.request_timeout_s)."
                    )
                continue
            watch.heard()
            try:
                ref = next(stream)
            except StopIteration:
                return
            yield ray.get(ref, timeout=30.0)

    def _bury(self, worker: WorkerId, info: WorkerInfo) -> None:
        """Tell the directory of a process that died, so that nobody waits for its missing heartbeat."""
        if self._directory is None:
            return
        try:
            self._directory.drop_owner(worker, info.incarnation)
        except RelayError as error:
            log.warning("the directory was not told that %s died: %s", worker, error)

    def is_up(self, worker: WorkerId, *, timeout_s: float) -> bool:
        """Whether the worker's process answers; one that is being restarted is waited for."""
        up = self._answers(worker, timeout_s)
        follower = self._members[worker].follower
        # While a successor is awaited, requests are to wait for it, or go elsewhere: see `_settled`.
        coming = follower is not None and follower.away and not follower.gone
        self._members[worker].lost = not up and not coming
        return up

    def views(self) -> tuple[WorkerView, ...]:
        """The workers as placement sees them, in the order in which they were started."""
        return tuple(WorkerView(w, m.spec.model, alive=not m.lost) for w, m in self._members.items())

    def compare(
        self, worker: WorkerId, request: Request, reply: Reply, base_method: str, repeats: int
    ) -> Comparison:
        """See executor.Workers."""
        call = self._members[worker].handle.compare.remote(request, reply, base_method, repeats)
        try:
            return self._get(worker, call, (repeats + 2) * self.config.worker.request_timeout_s)
        except RayError as error:
            raise unwrapped(error, f'comparison of agent "{request.agent}" on {worker}') from None

    def prepare(self, worker: WorkerId, system: str | None, prompt: str) -> int:
        """Prefill a template's fixed prefix into a worker's exact prefix cache; returns its tokens."""
        call = self._members[worker].handle.prepare.remote(system, prompt)
        try:
            return self._get(worker, call, self.config.worker.request_timeout_s)
        except RayError as error:
            raise unwrapped(error, f"preparing a prompt on {worker}") from None

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        """See AgentWorker.prepare_ahead."""
        try:
            call = self._members[worker].handle.prepare_ahead.remote(draft)
            return self._get(worker, call, self.config.worker.request_timeout_s)
        except (RayError, RelayError) as error:
            raise unwrapped(error, f"preparing {draft.request.agent} on {worker}") from None

    def replay(self, worker: WorkerId, request: Request, answer: Sequence[int]) -> Reply:
        """Publish on a worker what an answer known already would have left; see `AgentWorker.replay`."""
        call = self._members[worker].handle.replay.remote(request, tuple(answer))
        try:
            return self._get(worker, call, self.config.worker.request_timeout_s + 60)
        except RayError as error:
            raise unwrapped(error, f'replay of agent "{request.agent}" on {worker}') from None

    def distances(
        self, worker: WorkerId, request: Request, methods: Sequence[str], *, tokens: int = 32
    ) -> tuple[Distance, ...]:
        """How far methods are from full prefill on one prompt; see `workers.fidelity.distances`."""
        call = self._members[worker].handle.distances.remote(request, tuple(methods), tokens)
        try:
            return self._get(worker, call, (len(methods) + 2) * self.config.worker.request_timeout_s)
        except RayError as error:
            raise unwrapped(error, f'fidelity of agent "{request.agent}" on {worker}') from None

    def shadow(
        self,
        worker: WorkerId,
        request: Request,
        answer: tuple[int, ...],
        probe: str | None,
        timeout_s: float,
    ) -> ShadowCheck:
        """See executor.Workers."""
        call = self._members[worker].handle.shadow.remote(request, answer, timeout_s, probe)
        try:
            return self._get(worker, call, timeout_s + 30)
        except RayError as error:
            raise unwrapped(error, f'shadow check of agent "{request.agent}" on {worker}') from None

    def cancel(self, worker: WorkerId, request_id: str) -> None:
        """See executor.Workers."""
        try:
            at = self._elsewhere.get(request_id, worker)
            ray.get(self._members[at].handle.cancel.remote(request_id), timeout=5.0)
        except RayError as error:
            raise unwrapped(error, f"cancelling on {worker}") from None

    def directory_stats(self) -> dict[str, float]:
        """Totals over the directory's shards: segments, leases, owners, bytes, shards_up."""
        return {} if self._directory is None else self._directory.stats()

    def directory_operator(self) -> DirectoryOperator:
        """Lists, evicts and pins what the directory holds.

        Raises:
            RelayError: the cluster is not running, or no shard answers.
        """
        if self._directory is None:
            raise RelayError("the cluster is not running: use it as a context manager, or call start().")
        return DirectoryOperator.of(self._directory.fleet.shards)

    def resize_directory(self, shards: int) -> View:
        """Change the number of directory shards while requests run; see DirectoryOperator.resize."""
        return resize(self.directory_operator(), self._directory_prefix, shards)

    def stats(self) -> dict[WorkerId, dict[str, Any]]:
        """Counters of every worker."""
        calls = {w: m.handle.stats.remote() for w, m in self._members.items()}
        return {w: ray.get(call, timeout=10.0) for w, call in calls.items()}

    def poll(self) -> Poll:
        """Asks workers and shards for their statistics with a deadline: for metrics. Call it when started."""
        return Poll(
            lambda: {w: (m.handle, m.info) for w, m in self._members.items() if m.info is not None},
            tuple(self._shards),
            self.config.directory,
        )

    @property
    def workers(self) -> dict[WorkerId, WorkerInfo]:
        """The workers that are up."""
        return {w: m.info for w, m in self._members.items() if m.info is not None}

    def handles(self) -> dict[WorkerId, Any]:
        """The workers' actors, for those who ask them without waiting."""
        return {w: m.handle for w, m in self._members.items()}

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
        stream: Stream = "off",
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
            stream: prepare prompts while the agents that they contain still write; see executor.Stream.
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
            stream=stream,
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
