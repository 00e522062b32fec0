"""One request on a worker, seen from an event loop.

    stream()  worker -> thread that blocks on its stream -> queue of the event loop -> caller

Leaving the stream early, because the client is gone or the task was cancelled, cancels the request on its
worker, which frees its cache and leases; the thread ends soon after. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Protocol

from relay_cluster.router import WorkerView, place_next
from transport.errors import DeadlineExceeded, RelayError, WorkerLost
from transport.types import WorkerId
from workers.messages import Draft, Reply, Request, Token

log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 5.0
_CONTROL_THREADS = 4
_AHEAD_THREADS = 8
"""Drafts on their way at a time. Others wait, and say more when their turn comes."""


class Workers(Protocol):
    """What the service needs of a cluster; see `relay_cluster.cluster.Cluster`. All calls block."""

    def views(self) -> Sequence[WorkerView]: ...

    def is_up(self, worker: WorkerId, *, timeout_s: float) -> bool: ...

    def stream(
        self, worker: WorkerId, request: Request, stop: threading.Event
    ) -> Iterator[Token | Reply]: ...

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int: ...

    def cancel(self, worker: WorkerId, request_id: str) -> None: ...


class Answering:
    """Runs requests on the workers of a cluster, each agent's on the worker that it had before.

    Args:
        workers: the cluster.
        threads: requests that can run at once.
        max_agents: agents whose worker is kept in mind.
        max_retries: times that a request whose worker died is started again.
    """

    def __init__(self, workers: Workers, *, threads: int, max_agents: int, max_retries: int) -> None:
        self._workers = workers
        self._max_agents = max_agents
        self._max_retries = max_retries
        self._placed: OrderedDict[tuple[str, str], WorkerId] = OrderedDict()
        self._running: Counter[WorkerId] = Counter()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="answer")
        self._control = ThreadPoolExecutor(_CONTROL_THREADS, thread_name_prefix="control")
        self._ahead = ThreadPoolExecutor(_AHEAD_THREADS, thread_name_prefix="ahead")
        self._open: set[Future[None]] = set()
        self._looked = float("-inf")
        self.on_retry: Callable[[], None] = lambda: None
        """Called when a request is started again."""

    @property
    def running(self) -> dict[WorkerId, int]:
        """Requests on each worker, those that are being cancelled included."""
        return {worker: count for worker, count in self._running.items() if count}

    def worker_for(self, agent: str, model: str) -> WorkerId:
        """The agent's worker; for a new agent, or one whose worker is gone, the one with least to do.

        Raises:
            WorkerLost: no live worker hosts the model.
        """
        key = (agent, model)
        views = self._workers.views()
        self._look_again(views)
        if not any(v.alive and v.model == model for v in views):
            raise WorkerLost(f"no worker of model {model} answers now. Try again later.")
        worker = self._placed.get(key)
        if worker is None or not any(v.worker == worker and v.alive for v in views):
            agents = Counter(self._placed.values())
            load = {v.worker: self._running[v.worker] + agents[v.worker] / self._max_agents for v in views}
            worker = place_next(agent, model, views, load)
        self._placed[key] = worker
        self._placed.move_to_end(key)
        while len(self._placed) > self._max_agents:
            self._placed.popitem(last=False)
        return worker

    def preparer_for(self, agent: str, model: str, writer: WorkerId) -> WorkerId:
        """Who prepares the agent's next prompt while `writer` writes: its own worker, but not the writer's,
        which has no idle step meanwhile, where another one does nothing.

        Raises:
            WorkerLost: no live worker hosts the model.
        """
        key = (agent, model)
        known = key in self._placed
        worker = self.worker_for(agent, model)
        if worker == writer:
            views = self._workers.views()
            idle = (v.worker for v in views if v.alive and v.model == model and not self._running[v.worker])
            worker = next((w for w in idle if w != writer), worker)
            if not known:  # one that is known has its prefix where it was
                self._placed[key] = worker
        return worker

    async def prepare(self, worker: WorkerId, draft: Draft) -> int:
        """Compute what is known of a draft; how many tokens stand ready.

        Raises:
            RelayError: see Cluster.prepare_ahead.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._ahead, self._workers.prepare_ahead, worker, draft)

    def give_up(self, worker: WorkerId, request_id: str) -> None:
        """Cancel what a worker does for a request, without waiting for it."""
        with suppress(RuntimeError):  # closed: the worker drops it by itself
            self._control.submit(self._cancel, worker, request_id)

    def _look_again(self, views: Sequence[WorkerView]) -> None:
        """Ask workers that were lost whether they are back, now and then, without waiting for it."""
        now = time.monotonic()
        lost = [view.worker for view in views if not view.alive]
        if lost and now - self._looked > _LOOK_AGAIN_S:
            self._looked = now
            for worker in lost:
                self._control.submit(self._workers.is_up, worker, timeout_s=_LOOK_AGAIN_S)

    async def stream(
        self, request: Request, model: str, at: WorkerId | None = None
    ) -> AsyncGenerator[Token | Reply, None]:
        """Tokens as they are drawn, and at last the reply. Close it when it is left early.

        Args:
            at: worker that has prepared the request; tried first, if it lives.

        Raises:
            WorkerLost: its worker died after the first token, or too often before. Else what the worker
                raised.
        """
        for attempt in range(self._max_retries + 1):
            # A new id for each try: the old one may still run on a worker that was only unreachable.
            again = replace(request, id=f"{request.id}-{attempt}") if attempt else request
            worker = self.worker_for(request.agent, model)
            if (
                at is not None
                and not attempt
                and any(v.worker == at and v.alive for v in self._workers.views())
            ):
                worker = at
            begun = False
            try:
                async with aclosing(self._once(worker, again)) as items:
                    async for item in items:
                        begun = True
                        yield item
            except WorkerLost as error:
                log.warning("worker %s died under request %s: %s", worker, again.id, error)
                if begun or attempt == self._max_retries:
                    raise
                self.on_retry()
                await asyncio.to_thread(self._workers.is_up, worker, timeout_s=_LOOK_AGAIN_S)
            else:
                return

    async def _once(self, worker: WorkerId, request: Request) -> AsyncGenerator[Token | Reply, None]:
        pipe = _Pipe()
        self._running[worker] += 1
        task = self._threads.submit(pipe.pump, lambda stop: self._workers.stream(worker, request, stop))
        self._open.add(task)
        task.add_done_callback(lambda _: pipe.tell(self._done, worker, task))
        finished = False
        try:
            while not finished:
                item = await pipe.items.get()
                if isinstance(item, Exception):
                    # A worker that is lost or silent may only be unreachable, and still at work.
                    finished = not isinstance(item, (WorkerLost, DeadlineExceeded))
                    raise item
                finished = isinstance(item, Reply)
                yield item
        finally:
            if not finished:
                pipe.stop.set()
                self.give_up(worker, request.id)

    def _done(self, worker: WorkerId, task: Future[None]) -> None:
        self._running[worker] -= 1
        self._open.discard(task)

    def _cancel(self, worker: WorkerId, request_id: str) -> None:
        try:
            self._workers.cancel(worker, request_id)
        except RelayError as error:
            # The worker ends it at its own deadline; what it holds is leased for less than that.
            log.warning("could not cancel %s on %s: %s", request_id, worker, error)

    def close(self) -> None:
        """Let the threads go. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._ahead.shutdown(wait=False, cancel_futures=True)
        self._control.shutdown(wait=True)


class _Pipe:
    """From a thread that iterates over a stream to the event loop that made this. stop: set when nobody takes
    the items any more."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Token | Reply | Exception] = asyncio.Queue()
        self.stop = threading.Event()

    def tell(self, call: Callable[..., None], *args: object) -> None:
        """Call something on the loop."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call, *args)

    def pump(self, stream: Callable[[threading.Event], Iterator[Token | Reply]]) -> None:
        """Iterate to the end; what is raised becomes the last item."""
        try:
            for item in stream(self.stop):
                self._put(item)
        except Exception as error:  # noqa: BLE001 - raised where the answer is awaited
            self._put(error)

    def _put(self, item: Token | Reply | Exception) -> None:
        if not self.stop.is_set():
            self.tell(self.items.put_nowait, item)
