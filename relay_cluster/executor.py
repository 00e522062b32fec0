"""One run of a pipeline: every agent as soon as the agents it waits for have answered.

The executor hands keys and token ids from agent to agent; KV never passes through it. A request whose worker
died is started again on a live worker. It asks `router.py` where, and knows nothing of models or transport.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Protocol

from relay_cluster.ahead import CHUNK_TOKENS, NO_CHUNKS, Ahead, Written
from relay_cluster.gate import Check, Decision, Edge, EdgeState, Gate
from relay_cluster.pipeline import Agent, Pipeline, Stream
from relay_cluster.report import CompareReport, GateReport
from relay_cluster.turns import Turn, compare_report, gate_report, verdict
from transport.errors import Cancelled, RelayError, WorkerLost
from transport.types import WorkerId
from workers.messages import Comparison, Draft, Reply, Request, ShadowCheck, Token
from workers.segment import SlotValue
from workers.settings import SamplingSettings

log = logging.getLogger(__name__)

OnEvent = Callable[..., None]
OnToken = Callable[[int, Token], None]


class Workers(Protocol):
    """What the executor needs of a cluster."""

    def worker_for(self, agent: str) -> WorkerId:
        """A live worker for the agent; waits for a restart if need be. Raises WorkerLost."""
        ...

    def model_for(self, agent: str) -> str:
        """The model that answers for the agent."""
        ...

    def generate(
        self, worker: WorkerId, request: Request, on_token: OnToken, stop: threading.Event
    ) -> tuple[Reply, float]:
        """(reply, seconds from the call to the first token here). on_token: gets the number of each token,
        from 1, and the token. Raises WorkerLost when the process died and Cancelled soon after `stop` is
        set."""
        ...

    def compare(
        self, worker: WorkerId, request: Request, reply: Reply, base_method: str, repeats: int
    ) -> Comparison: ...

    def shadow(
        self,
        worker: WorkerId,
        request: Request,
        answer: tuple[int, ...],
        probe: str | None,
        timeout_s: float,
    ) -> ShadowCheck:
        """Judge an answer; see AgentWorker.shadow. Raises RelayError where there is no verdict."""
        ...

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        """See AgentWorker.prepare_ahead. Raises RelayError."""
        ...

    def cancel(self, worker: WorkerId, request_id: str) -> None: ...


class Observer(Protocol):
    """Hears of every answer and every check, for metrics and traces; called in any thread."""

    def answered(self, turn: Turn, edge: Edge) -> None:
        """A request of an edge has been answered."""
        ...

    def gated(
        self,
        edge: Edge,
        asked: str,
        before: EdgeState | None,
        after: EdgeState,
        found: Check | None,
        *,
        checked: bool,
    ) -> None:
        """The gate has heard of a request that asked for a method. found: the verdict, if it was checked and
        came to one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How one run is made; see `Cluster.run`."""

    method: str
    compare: str | None
    repeats: int
    max_new_tokens: int
    seed: int
    max_retries: int
    stream: Stream = "off"


class Executor:
    """Runs one pipeline once."""

    def __init__(
        self,
        pipeline: Pipeline,
        workers: Workers,
        options: RunOptions,
        run_id: str,
        on_event: OnEvent,
        gate: Gate | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._workers = workers
        self._options = options
        self._run_id = run_id
        self._on_event = on_event
        self._gate = gate
        self._observer = observer
        self._running: dict[str, WorkerId] = {}
        self._asked_as: dict[str, str] = {}  # agent -> id of its last request
        self._stop = threading.Event()
        self._notes: dict[str, str] = {}
        self._lock = threading.Lock()
        self._inputs: dict[str, SlotValue] = {}
        chunk = NO_CHUNKS if options.stream == "relay" else CHUNK_TOKENS
        self._ahead = Ahead(workers, self._draft, chunk) if options.stream != "off" else None

    def run(self, inputs: Mapping[str, str]) -> tuple[dict[str, Turn], float]:
        """Answer every agent.

        Returns:
            (agent -> turn, seconds for the whole pipeline).

        Raises:
            RelayError: an agent could not be answered; the others are cancelled.
        """
        begin = time.perf_counter()
        values = {name: SlotValue(text=text) for name, text in inputs.items()}
        waiting = {name: set(up) for name, up in self._pipeline.upstreams.items()}
        turns: dict[str, Turn] = {}
        pending: dict[Future[Turn], str] = {}
        pool = ThreadPoolExecutor(max_workers=len(waiting), thread_name_prefix="agent")
        self._inputs = values
        try:
            self._prepare_all()
            while waiting or pending:
                for name in [n for n, up in waiting.items() if up <= turns.keys()]:
                    del waiting[name]
                    agent = self._pipeline[name]
                    pending[pool.submit(self._answer, agent, self._values(agent, values, turns))] = name
                # Every request has a deadline of its own; this loop only wakes up for Ctrl-C.
                done, _ = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in done:
                    name = pending.pop(future)
                    turns[name] = future.result()
                    if self._ahead is not None:
                        self._ahead.writing.answered(name, turns[name].reply.output)
        except BaseException:
            self._stop.set()
            self._cancel_running()
            raise
        finally:
            if self._ahead is not None:
                self._ahead.close()
            # Not waited for: a thread may hang on a frozen worker until its deadline.
            pool.shutdown(wait=False, cancel_futures=True)
        return turns, time.perf_counter() - begin

    def _prepare_all(self) -> None:
        """Let all agents that wait for others be prepared."""
        if self._ahead is None:
            return
        for name, upstreams in self._pipeline.upstreams.items():
            if upstreams:
                self._ahead.start(name, self.request_id(name), upstreams)

    def _draft(self, name: str, written: Mapping[str, Written]) -> Draft:
        """What is known of an agent's request. Tokens of another model, which are passed on as text, are
        known when the last one is."""
        agent, model = self._pipeline[name], self._workers.model_for(name)
        values, room = dict(self._inputs), 0
        growing: set[str] = set()
        for upstream, found in written.items():
            if upstream not in agent.slots:
                continue  # waited for, and not read
            same = self._workers.model_for(upstream) == model
            if found.value is not None and same:
                values[upstream] = found.value
                continue
            values[upstream] = SlotValue(token_ids=found.token_ids if same else ())
            growing.add(upstream)
            limit = self._pipeline[upstream].max_new_tokens or self._options.max_new_tokens
            room += limit if not same else max(0, limit - len(found.token_ids))
        follow = {
            upstream: self._asked_as.get(upstream, self.request_id(upstream))
            for upstream in written
            if self._may_follow(agent, upstream)
        }
        for_certain = self._options.stream == "relay"
        return Draft(
            request=self._request(agent, values, None),
            open_slots=frozenset(growing),
            room_tokens=room,
            group=self._run_id,
            follow=follow if for_certain else {},
            may_follow={} if for_certain else follow,
        )

    def _may_follow(self, agent: Agent, upstream: str) -> bool:
        """Whether the agent relays the upstream's KV, and pulls it as it is made: with `auto`, where its
        worker has no time to compute it."""
        if self._options.stream not in ("relay", "auto") or upstream not in agent.slots:
            return False
        relays = self._asked(agent) not in ("exact_prefix", "full_prefill")
        return relays and self._workers.model_for(upstream) == self._workers.model_for(agent.name)

    def compare(self, turns: Mapping[str, Turn]) -> dict[str, CompareReport]:
        """Every prompt again under the other method, on the same worker, one at a time."""
        base = self._options.compare
        if base is None:
            return {}
        reports: dict[str, CompareReport] = {}
        for name, turn in turns.items():
            self._on_event("compare", name, f"{base} on the same prompt")
            try:
                found = self._workers.compare(
                    turn.reply.worker,
                    replace(turn.request, shadow_tokens=0),
                    turn.reply,
                    base,
                    self._options.repeats,
                )
            except RelayError as error:
                # The run itself succeeded: its report must not be lost with the comparison.
                log.warning("%s could not be compared with %s: %s", name, base, error)
                self._note(name, f"not compared with {base}: {error}")
                continue
            self._note(name, "; ".join(found.notes))
            reports[name] = compare_report(turn.reply, found)
            self._on_event("agent_done", name)
        return reports

    def check(self, turns: Mapping[str, Turn]) -> dict[str, GateReport]:
        """Let the gate hear of the sampled requests, now that nobody waits for an answer any more."""
        if self._gate is None:
            return {}
        return {name: self._check(turns[name], self._gate) for name in self._pipeline.order if name in turns}

    def _check(self, turn: Turn, gate: Gate) -> GateReport:
        decision, edge, asked = turn.decision, self._edge(turn.agent), self._asked(turn.agent)
        assert decision is not None  # with a gate every request has been decided on
        found = self._shadow(turn, decision) if decision.checked else None
        told = None if found is None else verdict(found)
        with self._lock:
            before = gate.state(edge, asked)
            if decision.checked:
                gate.observe(edge, asked, decision, told)
            state = gate.state(edge, asked)
        assert state is not None  # it was decided on
        if self._observer is not None:
            self._observer.gated(edge, asked, before, state, told, checked=decision.checked)
        return gate_report(edge, asked, decision, state, found)

    def _shadow(self, turn: Turn, decision: Decision) -> ShadowCheck | None:
        """None without a verdict."""
        if decision.probe is None and not turn.reply.relayed_tokens:
            return None  # nothing was reused, so there is nothing to judge
        assert self._gate is not None  # only a gate asks for checks
        self._on_event("shadow", turn.agent.name, decision.probe or turn.reply.method)
        try:
            return self._workers.shadow(
                turn.reply.worker,
                turn.request,
                turn.reply.token_ids,
                decision.probe,
                self._gate.settings.timeout_s,
            )
        except RelayError as error:
            log.warning("no shadow check of %s: %s", turn.agent.name, error)
            self._note(turn.agent.name, f"not checked: {error}")
            return None

    def _edge(self, agent: Agent) -> Edge:
        return Edge(self._pipeline.name, self._workers.model_for(agent.name), agent.name, agent.slots)

    def _asked(self, agent: Agent) -> str:
        """The method that the agent's requests ask for."""
        if self._options.stream == "exact":
            return "exact_prefix"
        return (agent.method or self._options.method) if agent.reuse else "exact_prefix"

    def _decide(self, agent: Agent) -> Decision | None:
        if self._gate is None:
            return None
        with self._lock:
            return self._gate.decide(self._edge(agent), self._asked(agent), agent.role)

    def _note(self, agent: str, text: str) -> None:
        self._notes[agent] = "; ".join(filter(None, [self._notes.get(agent, ""), text]))

    def notes(self, turn: Turn) -> tuple[str, ...]:
        """What did not go as it should with an agent, in plain words."""
        return (*turn.reply.notes, *filter(None, [self._notes.get(turn.agent.name, "")]))

    def _values(
        self, agent: Agent, inputs: Mapping[str, SlotValue], turns: Mapping[str, Turn]
    ) -> dict[str, SlotValue]:
        """What fills the agent's slots. Token ids mean nothing to another model: there the text is passed
        on."""
        model = self._workers.model_for(agent.name)
        values = dict(inputs)
        for name, turn in turns.items():
            same = turn.reply.model == model
            values[name] = turn.reply.output if same else SlotValue(text=turn.reply.text)
        return values

    def _answer(self, agent: Agent, values: Mapping[str, SlotValue]) -> Turn:
        """One agent's turn; again on another worker when its worker dies."""
        decision = self._decide(agent)
        first = self._request(agent, values, decision)
        for attempt in range(self._options.max_retries + 1):
            # A new id for each try: the old one may still run on a worker that was only unreachable.
            request = replace(first, id=f"{first.id}-{attempt}") if attempt else first
            self._check_running()
            worker = self._workers.worker_for(agent.name)
            self._check_running()
            self._on_event("agent_started", agent.name, worker)
            if self._ahead is not None:
                self._ahead.asked(agent.name, worker)
            with self._lock:
                self._running[request.id] = worker
                self._asked_as[agent.name] = request.id
            if self._ahead is not None and attempt:
                self._ahead.writing.again(agent.name)
            try:
                reply, ttft_s = self._workers.generate(
                    worker, request, lambda n, token: self._token(agent.name, n, token), self._stop
                )
            except WorkerLost as error:
                log.warning("worker %s died under request %s: %s", worker, request.id, error)
                if attempt == self._options.max_retries:
                    raise WorkerLost(
                        f'agent "{agent.name}": its worker died {attempt + 1} times ({error}). '
                        "See the worker's log; runtime.max_retries allows more tries."
                    ) from error
                self._note(agent.name, f"started again: {error}")
                continue
            finally:
                with self._lock:
                    self._running.pop(request.id, None)
            self._on_event("agent_done", agent.name)
            turn = Turn(agent, request, reply, ttft_s, attempt, decision)
            if self._observer is not None:
                self._observer.answered(turn, self._edge(agent))
            return turn
        raise AssertionError("unreachable: the loop returns or raises")

    def _token(self, agent: str, number: int, token: Token) -> None:
        if self._ahead is not None:
            self._ahead.writing.add(agent, number, token.id)
        self._on_event("token", agent, number)

    def request_id(self, agent: str) -> str:
        """Of the first request for an agent."""
        return f"{self._run_id}-{agent}"

    def _request(self, agent: Agent, values: Mapping[str, SlotValue], decision: Decision | None) -> Request:
        checked = self._gate.settings.tokens if self._gate and decision and decision.checked else 0
        return Request(
            id=self.request_id(agent.name),
            agent=agent.name,
            system=agent.system,
            prompt=agent.prompt,
            values={slot: values[slot] for slot in agent.slots},
            method=decision.method if decision else self._asked(agent),
            shadow_tokens=checked,
            consumers=self._consumers(agent),
            open_answer=any(
                self._may_follow(self._pipeline[name], agent.name)
                for name in self._pipeline.consumers[agent.name]
            ),
            publish_inputs=decision is None or decision.probe is None,
            sampling=SamplingSettings(
                max_new_tokens=agent.max_new_tokens or self._options.max_new_tokens,
                temperature=agent.temperature or 0.0,
                top_p=1.0 if agent.top_p is None else agent.top_p,
                seed=self._options.seed,
            ),
        )

    def _consumers(self, agent: Agent) -> int:
        """Agents that can relay the agent's answer: those whose prompt contains it, of the same model."""
        model = self._workers.model_for(agent.name)
        users = (self._pipeline[name] for name in self._pipeline.consumers[agent.name])
        return sum(user.reuse and self._workers.model_for(user.name) == model for user in users)

    def _check_running(self) -> None:
        if self._stop.is_set():
            raise Cancelled("the run has ended.")

    def _cancel_running(self) -> None:
        with self._lock:
            running = dict(self._running)
        for request_id, worker in running.items():
            try:
                self._workers.cancel(worker, request_id)
            except RelayError as error:
                log.warning("could not cancel %s on %s: %s", request_id, worker, error)
