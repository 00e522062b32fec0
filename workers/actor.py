"""The Ray shell around one worker: builds it from plain settings and passes calls through. No decisions.

Tensors never enter Ray's object store: only requests, keys and reports cross it.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from transport.errors import DeadlineExceeded, RelayError, WorkerDraining
from transport.settings import DirectorySettings, TransportSettings
from transport.types import Incarnation, NodeId, Owner, SegmentKey, WorkerId
from workers.messages import Comparison, Distance, Draft, Reply, Request, ShadowCheck, Token
from workers.outbox import Outbox
from workers.pulse import Pulse, start_pulse
from workers.settings import DEFAULT_MODEL, WorkerSettings

if TYPE_CHECKING:  # the driver handles these classes without loading torch
    from transport.faults import FaultSpec
    from workers.cores import CoreShare
    from workers.faults import FaultFacts
    from workers.store import SegmentStore

log = logging.getLogger(__name__)

CONTROL = "control"
"""Concurrency group of calls that must get through however many requests are waiting."""
PROMOTE = "promote"
"""Of calls by other workers, which may wait for a disk."""
AHEAD = "ahead"
"""Of prefill ahead, which may wait for the engine as long as others want it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """All that a worker process needs to come up.

    Attributes:
        worker: its name.
        model: embedded name, folder or hub id.
        tenant: goes into `space`.
        directory_shards: names of the shard actors.
        namespace: Ray namespace of the actors.
        host: address on which peers reach this worker; None = the node's own.
        pulses: folder for the socket over which it tells that it lives (see pulse.py); "" = none.
    """

    worker: WorkerId
    model: str = DEFAULT_MODEL
    tenant: str = "default"
    settings: WorkerSettings = field(default_factory=WorkerSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)
    directory: DirectorySettings = field(default_factory=DirectorySettings)
    directory_shards: tuple[str, ...] = ()
    namespace: str = "relay"
    host: str | None = None
    pulses: str = ""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a started worker tells the cluster."""

    worker: WorkerId
    node: NodeId
    pid: int
    incarnation: int
    device: str
    model: str
    space: str
    profile_measured: bool
    backends: tuple[str, ...]
    missing_backends: dict[str, str]
    block_nbytes: int
    load_s: float


class _Calls:
    """Counts the calls that run, and says whether a new request may begin. Thread-safe."""

    def __init__(self) -> None:
        self.running = 0
        self.draining = False
        self._lock = threading.Lock()

    @contextmanager
    def one(self, request: str | None = None) -> Iterator[None]:
        """Around a call. request: id of a new request; None for what belongs to one that was answered.

        Raises:
            WorkerDraining: a new request, and none is taken any more.
        """
        with self._lock:
            if self.draining and request is not None:
                raise WorkerDraining(f"request {request} was not begun: the worker is being replaced.")
            self.running += 1
        try:
            yield
        finally:
            with self._lock:
                self.running -= 1

    def drain(self, draining: bool) -> int:
        """Refuse new requests from now on, or no longer; how many calls run."""
        with self._lock:
            self.draining = draining
            return self.running


class Worker:
    """One model on one device. Made a Ray actor by `remote_worker`; plain class so that it can be read and
    tested."""

    def __init__(self, spec: WorkerSpec) -> None:
        # On a thread of its own that ends: loading runs parallel operators, and the OpenMP team of a thread
        # that stays would slow down every later step (see `workers/scheduler.py`).
        self._fault: RelayError | None = None
        self._spec = spec
        self._calls = _Calls()
        self._pulse: Pulse | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="load") as loader:
            try:
                loader.submit(self._start, spec).result()
            except RelayError as error:
                # Told by `info`: an exception in an actor's constructor reaches the caller as text only.
                self._fault = error

    def _start(self, spec: WorkerSpec) -> None:
        begin = time.perf_counter()
        # Imported here: the driver handles this class without loading torch.
        import torch

        from transport.auto import available_backends, make_transport
        from transport.directory.client import DirectoryClient
        from transport.directory.faulty import worker_calls
        from transport.faults import make_faults
        from transport.helping import usable_cores
        from workers.agent import AgentWorker
        from workers.promoting import OwnerCalls
        from workers.store import SegmentStore

        torch.set_num_threads(spec.settings.threads or usable_cores())
        self._faults = make_faults(spec.transport.faults)
        loaded, profile = _load(spec)
        self._cores = _core_share(spec, loaded.device)
        node = NodeId(ray.util.get_node_ip_address())
        incarnation = Incarnation(time.time_ns())
        self._arena = _arena(spec, loaded.layout, incarnation, loaded.device)
        self._arena.faults = self._faults
        self._transport = make_transport(spec.transport, worker=spec.worker, host=spec.host or node)
        self._transport.register(self._arena)
        addresses, key = self._transport.addresses(), self._arena.pull_key
        owner = Owner(spec.worker, incarnation, node, addresses, key)
        self._directory = DirectoryClient(
            list(spec.directory_shards), spec.directory, calls=worker_calls(self._faults)
        )
        spill = spec.transport.spill
        self._store = store = SegmentStore(
            owner,
            loaded.layout,
            self._arena,
            self._transport,
            self._directory,
            lease_ttl_s=spec.directory.lease_ttl_s,
            pull_timeout_s=spec.transport.pull_timeout_s,
            spill=spill,
            keep_pulled=spec.transport.keep_pulled,
            ask_owner=OwnerCalls(spec.worker, timeout_s=spill.promote_timeout_s),
        )
        self._agent = AgentWorker(spec.worker, node, loaded, profile, spec.settings, store, self._cores)
        self._directory.start_owner(owner, store.segments, store.drop)
        self._info = WorkerInfo(
            worker=spec.worker,
            node=node,
            pid=os.getpid(),
            incarnation=int(incarnation),
            device=str(loaded.device),
            model=spec.model,
            space=loaded.space,
            profile_measured=profile.measured,
            backends=tuple(owner.addresses),
            missing_backends={n: why for n, (ok, why) in available_backends().items() if not ok},
            block_nbytes=loaded.layout.block_nbytes,
            load_s=time.perf_counter() - begin,
        )
        self._pulse = start_pulse(spec.pulses, spec.worker, self._pulse_facts)

    def _pulse_facts(self) -> dict[str, Any]:
        """That this process takes requests, and reaches the directory."""
        shards = self._directory.fleet.shards
        return {
            "worker": self._info.worker,
            "incarnation": self._info.incarnation,
            "accepting": not self._calls.draining,
            "shards": sorted(shards),
            "shards_up": int(self._directory.stats()["shards_up"]),
        }

    @property
    def store(self) -> SegmentStore:
        """For what runs in this process beside requests, such as a benchmark."""
        return self._store

    @ray.method(concurrency_group=CONTROL)
    def info(self) -> WorkerInfo:
        """Who this is; answers once the worker is ready, or raises what kept it from coming up."""
        return self._told()

    def _told(self) -> WorkerInfo:
        if self._fault is not None:
            raise self._fault
        return self._info

    @ray.method(concurrency_group=CONTROL)
    def spec(self) -> WorkerSpec:
        """What it was made of."""
        return self._spec

    @ray.method(concurrency_group=CONTROL)
    def accepting(self) -> WorkerInfo | None:
        """As `info`; None while it drains."""
        return None if self._calls.draining else self._told()

    @ray.method(concurrency_group=CONTROL)
    def drain(self, draining: bool = True) -> int:
        """Take no new requests any more (or again); how many calls still run."""
        return self._calls.drain(draining)

    def prepare(self, system: str | None, prompt: str) -> int:
        """See AgentWorker.prepare."""
        with self._calls.one():
            return self._agent.prepare(system, prompt)

    def generate(self, request: Request) -> Iterator[tuple[Token, ...] | Reply]:
        """Stream of tokens, several at a time (`worker.stream_interval`), and at last the reply. Errors are
        raised where they happen; WorkerDraining before anything was begun."""
        with self._calls.one(request.id):
            yield from self._generate(request)

    def _generate(self, request: Request) -> Iterator[tuple[Token, ...] | Reply]:
        settings = self._spec.settings
        # The request has its own deadline; this one only catches a dead thread.
        outbox = Outbox(settings.stream_interval, timeout_s=settings.request_timeout_s + 120)

        def answer() -> None:
            try:
                outbox.end(self._agent.generate(request, outbox.put))
            except Exception as error:  # noqa: BLE001 - carried to the caller's thread and raised there
                outbox.end(error)

        threading.Thread(target=answer, name=f"request-{request.id}", daemon=True).start()
        try:
            yield from outbox.take()
        except queue.Empty:
            raise DeadlineExceeded(f"request {request.id}: silent since its deadline.") from None
        finally:
            if not outbox.ended:
                # Nobody takes the answer any more.
                self._agent.cancel(request.id)

    def shadow(
        self, request: Request, answer: tuple[int, ...], timeout_s: float, probe: str | None
    ) -> ShadowCheck:
        """See AgentWorker.shadow."""
        with self._calls.one():
            return self._agent.shadow(request, answer, timeout_s=timeout_s, probe=probe)

    def compare(self, request: Request, reply: Reply, base_method: str, repeats: int) -> Comparison:
        """See AgentWorker.compare."""
        with self._calls.one():
            return self._agent.compare(request, reply, base_method, repeats=repeats)

    def replay(self, request: Request, answer: tuple[int, ...]) -> Reply:
        """See AgentWorker.replay."""
        with self._calls.one():
            return self._agent.replay(request, answer)

    def distances(self, request: Request, methods: tuple[str, ...], tokens: int) -> tuple[Distance, ...]:
        """See workers.fidelity.distances."""
        from workers.fidelity import distances

        with self._calls.one():
            return distances(self._agent, request, methods, tokens=tokens)

    @ray.method(concurrency_group=AHEAD)
    def prepare_ahead(self, draft: Draft) -> int:
        """See AgentWorker.prepare_ahead."""
        with self._calls.one():
            return self._agent.prepare_ahead(draft)

    @ray.method(concurrency_group=CONTROL)
    def cancel(self, request_id: str) -> bool:
        """See AgentWorker.cancel."""
        return self._agent.cancel(request_id)

    @ray.method(concurrency_group=PROMOTE)
    def promote(self, incarnation: int, keys: tuple[SegmentKey, ...]) -> frozenset[SegmentKey]:
        """See Holding.promote; nothing, when another life of this worker is meant."""
        return self._store.holding.promote(keys) if incarnation == self._info.incarnation else frozenset()

    @ray.method(concurrency_group=CONTROL)
    def stats(self) -> dict[str, Any]:
        """Counters of the engine, the arena and the transport, and of calls to the directory."""
        return {
            **self._agent.stats(),
            "calls": self._calls.running,
            "draining": self._calls.draining,
            "arena": self._arena.stats(),
            "transport": self._transport.stats(),
            "directory": self._directory.calls(),
        }

    @ray.method(concurrency_group=CONTROL)
    def inject(self, spec: FaultSpec | None) -> None:
        """See workers.faults.inject; test mode only."""
        from workers.faults import inject

        inject(self._faults, spec, self._agent.store, self._arena, self._directory)

    @ray.method(concurrency_group=CONTROL)
    def fault_facts(self) -> FaultFacts:
        """See workers.faults.fault_facts; test mode only."""
        from workers.faults import fault_facts

        return fault_facts(self._faults, self._agent.store, self._arena)

    @ray.method(concurrency_group=CONTROL)
    def close(self) -> None:
        """Stop threads and sockets."""
        if self._pulse is not None:
            self._pulse.close()
        self._agent.close()
        if self._cores is not None:
            self._cores.close()
        self._store.close()
        self._directory.close()
        self._transport.close()


def _load(spec: WorkerSpec) -> tuple[Any, Any]:
    from workers.model import describe, load_model, resolve
    from workers.profile import load_profile

    resolve(spec.model)  # imports the embedded model on a node that has not got it yet
    profile = load_profile(spec.model, int(describe(spec.model)["layers"]), spec.settings.profile)
    loaded = load_model(
        spec.model,
        dtype=spec.settings.dtype,
        device=spec.settings.device,
        tenant=spec.tenant,
        checkpoint_layer=profile.checkpoint_layer,
        block_tokens=spec.transport.block_tokens,
        layer_groups=spec.transport.layer_groups,
        # The cluster has resolved "auto" for all its workers; one that stands alone has no slow link.
        wire="raw" if spec.transport.wire == "auto" else spec.transport.wire,
    )
    return loaded, profile


def _core_share(spec: WorkerSpec, device: Any) -> CoreShare | None:
    """None where the model computes elsewhere, or on a number of threads of its own."""
    from workers.cores import CoreShare

    if device.type != "cpu" or spec.settings.threads:
        return None
    try:
        return CoreShare()
    except OSError as error:
        log.warning("cores are not shared with other workers of this machine: %s", error)
        return None


def _arena(spec: WorkerSpec, layout: Any, incarnation: Incarnation, device: Any) -> Any:
    from transport.arena import Arena

    return Arena(
        spec.transport.arena_bytes,
        layout.block_nbytes,
        device=str(device),
        incarnation=incarnation,
        parts=layout.parts,
        shared=spec.transport.shared_memory,
    )


def remote_worker(
    spec: WorkerSpec,
    *,
    name: str,
    num_cpus: float,
    num_gpus: float,
    max_restarts: int,
    scheduling_strategy: Any = None,
    detached: bool = False,
) -> Any:
    """Start the worker as a named Ray actor and return its handle (`info` answers when it is ready).

    Args:
        scheduling_strategy: Ray's, for a certain node; None leaves it to Ray.
        detached: outlive the process that starts it.
    """
    options: dict[str, Any] = {
        "name": name,
        "namespace": spec.namespace,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "max_restarts": max_restarts,
        "max_concurrency": 2 * spec.settings.max_sequences + 4,
        "scheduling_strategy": scheduling_strategy,
        "lifetime": "detached" if detached else None,
    }
    remote: Any = ray.remote  # its stubs do not know concurrency groups
    return (
        remote(concurrency_groups={CONTROL: 4, PROMOTE: 2, AHEAD: 8})(Worker).options(**options).remote(spec)
    )
