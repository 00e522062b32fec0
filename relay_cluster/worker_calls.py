"""The workers of a cluster as they are asked: calls with deadlines, workers that die, freeze or are replaced.

    worker_for()   the agent's worker, while it lives; else another one of its model, or its restart
    stream()       a request's tokens and its reply, or WorkerLost as soon as the process is known to be gone

Nothing here starts or ends a process. Everything blocks, and every wait has a deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from relay_cluster.config import ClusterConfig
from relay_cluster.directory import resize
from relay_cluster.executor import OnToken
from relay_cluster.faulting import unwrapped
from relay_cluster.following import Follower
from relay_cluster.polling import Poll
from relay_cluster.rates import Rates
from relay_cluster.router import Choice, Task, WorkerView, route
from relay_cluster.watching import POLL_S, Watch, WorkerFrozen, awaited
from transport.directory.client import DirectoryClient
from transport.directory.operate import DirectoryOperator
from transport.directory.view import View
from transport.errors import (
    Cancelled,
    DeadlineExceeded,
    RelayError,
    WorkerDraining,
    WorkerLost,
)
from transport.types import WorkerId
from workers.actor import WorkerInfo, WorkerSpec
from workers.messages import Comparison, Distance, Draft, Reply, Request, ShadowCheck, Token

log = logging.getLogger(__name__)

_OTHER_ANSWERS_S: Final = 5.0
"""How long another worker may take to say that it lives, before the next one is asked."""
_LOOK_S: Final = 0.1
"""Between two looks at who takes a worker's place."""
_BEYOND_DEADLINE_S: Final = 180.0
"""What a worker that runs may take beyond its request's deadline to say that it was missed."""


class _Died(WorkerLost):
    """The worker's process is known to be gone, and with it what it was doing."""


@dataclass(slots=True)
class Member:
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


class WorkerCalls:
    """Live workers and their directory.

    Args:
        config: of the cluster; says how long to wait for what.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self._members: dict[WorkerId, Member] = {}
        self.rates = Rates()
        self._placed: dict[str, WorkerId] = {}
        self._choices: dict[str, Choice] = {}
        self._elsewhere: dict[str, WorkerId] = {}
        self._shards: dict[str, Any] = {}
        self._directory: DirectoryClient | None = None
        self._directory_prefix = ""
        self._lock = threading.Lock()

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
        for other in self._others(agent, worker):
            if self._answers(other, _OTHER_ANSWERS_S):
                self._placed[agent] = other
                return other
        # There is no other: it may go on, or its restart takes its time.
        if self._answers(worker, runtime.frozen_timeout_s if frozen else runtime.start_timeout_s):
            return worker
        how = "frozen" if member.frozen is not None else "gone"
        raise WorkerLost(f"worker {worker} is {how} and no other live worker hosts {model}.")

    def _others(self, agent: str, worker: WorkerId) -> list[WorkerId]:
        """Workers that can take the place of an agent's own, the one that is expected to answer first in
        front; those that were lost before come last."""
        model = self._members[worker].spec.model
        able = [
            w for w, m in self._members.items() if w != worker and m.spec.model == model and m.frozen is None
        ]
        views = [v for v in self.views() if v.worker in able]
        if any(v.alive for v in views):
            choice = route(self.rates.task(agent, model), views, self.rates.links())
            self._choices[agent] = replace(choice, reason=f"{worker} does not answer; {choice.reason}")
            able.sort(key=[c.worker for c in choice.candidates].__contains__, reverse=True)
            able.sort(key=lambda w: w != choice.worker)
        return able

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

    def _here(self, worker: WorkerId) -> Member | None:
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
        task = self._task(request, worker)
        while True:
            at = self._settled(worker, stop)
            begun = False
            if at != worker:
                self._elsewhere[request.id] = at
            self.rates.began(request.id, at, task, time.monotonic())
            try:
                for item in self._stream(at, request, stop):
                    begun = True
                    self._heard(request.id, item)
                    yield item
            except WorkerLost as error:
                if begun or not self._left(at, error):
                    raise
                log.info("request %s goes elsewhere: %s", request.id, error)
            else:
                return
            finally:
                self._elsewhere.pop(request.id, None)
                self.rates.ended(request.id)

    def _task(self, request: Request, worker: WorkerId) -> Task:
        """What the request is for placement."""
        return self.rates.task(
            request.agent,
            self._members[worker].spec.model,
            values=request.values,
            max_new_tokens=request.sampling.max_new_tokens,
        )

    def _heard(self, request_id: str, item: Token | Reply) -> None:
        if isinstance(item, Reply):
            self.rates.answered(item)
        else:
            self.rates.first_token(request_id, time.monotonic())

    def _stream(self, worker: WorkerId, request: Request, stop: threading.Event) -> Iterator[Token | Reply]:
        member = self._members[worker]
        info = member.info
        try:
            stream = member.handle.generate.options(num_returns="streaming").remote(request)
            for item in self._items(stream, worker, stop):
                if isinstance(item, Reply):
                    yield item
                    return
                yield from item
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

    def _items(
        self, stream: Any, worker: WorkerId, stop: threading.Event
    ) -> Iterator[tuple[Token, ...] | Reply]:
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
        views = [
            WorkerView(w, m.spec.model, alive=not m.lost, node=str(m.info.node) if m.info else "")
            for w, m in self._members.items()
        ]
        return tuple(self.rates.views(views, time.monotonic()))

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
        """See AgentWorker.prepare_ahead. Its caller may outlive the cluster by a moment."""
        member = self._members.get(worker)
        if member is None:
            raise WorkerLost(f"worker {worker} is gone: the cluster was stopped.")
        try:
            call = member.handle.prepare_ahead.remote(draft)
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
