"""Runs of a workload's pipeline through a simulated cluster: the life of a request, in modelled seconds.

    run arrives -> route_pipeline -> for each agent, once those it reads have answered:
    dispatch -> slot and cache memory -> lease, lookup -> worth a pull? -> pulls -> plan
    -> rows in shared steps -> first token -> decode -> publish -> its readers go on

and with streaming, from the run's beginning: what is certain of a prompt is prefilled on its worker, in steps
that have room for it. Decisions are the product's own functions (see the package); this module only
puts them in order.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import simpy
from simpy.resources.resource import Request as ResourceRequest

from relay_cluster.ahead import CHUNK_TOKENS
from relay_cluster.rates import Rates
from relay_cluster.router import Choice, WorkerView, route_pipeline
from relay_cluster.simulation.device import Device, costs_of, layout_of, profile_of
from relay_cluster.simulation.fabric import Arenas, Directory, Fabric, Passage, owners_of
from relay_cluster.simulation.settings import SimulatedCluster, Workload
from relay_cluster.simulation.worker import Rows, SimulatedWorker
from transport.errors import ConfigError
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    Lease,
    Located,
    NodeId,
    Outcome,
    Owner,
    Segment,
    SegmentKey,
    Transfer,
    WorkerId,
)
from workers.break_even import estimate_relays
from workers.budget import Urgency
from workers.costs import plan_flops, selected_share, span_flops
from workers.loading import nearly_prepared
from workers.messages import Published, Reply, SlotTransfer, StageTimes
from workers.methods import parse_reuse
from workers.methods.base import RectifyPlan, Span
from workers.segment import SlotValue

Steps = Generator[simpy.Event, Any, None]
Stream = Literal["off", "auto", "exact"]
_SPACE = "simulated"


@dataclass(frozen=True, slots=True)
class Mode:
    """How runs are made. text: "METHOD" or "METHOD+stream" ("auto+stream" is --stream auto, "exact+stream"
    is --stream exact)."""

    text: str

    @property
    def stream(self) -> Stream:
        if not self.text.endswith("+stream"):
            return "off"
        return "exact" if self.text.startswith("exact") else "auto"

    @property
    def method(self) -> str:
        name = self.text.removesuffix("+stream")
        return "exact_prefix" if self.stream == "exact" else name


@dataclass(slots=True)
class Answered:
    """One request's facts, in seconds and tokens."""

    run: int
    agent: str
    worker: str
    asked: float
    ttft_s: float = 0.0
    queue_s: float = 0.0
    directory_s: float = 0.0
    pull_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    relayed_tokens: int = 0
    prefix_tokens: int = 0
    prepared_tokens: int = 0
    answer_tokens: int = 0
    pulled_bytes: int = 0
    relayed: tuple[str, ...] = ()
    transfers: tuple[SlotTransfer, ...] = ()


@dataclass(slots=True)
class Finished:
    """One run of the pipeline. order: in which it ended."""

    run: int
    began: float
    ended: float


@dataclass(eq=False, slots=True)
class _Run:
    """A run under way. written: tokens of every agent so far; answered: those that have ended, and where."""

    number: int
    lengths: dict[str, int]
    chosen: dict[str, Choice]
    began: float
    written: dict[str, int] = field(default_factory=dict[str, int])
    answered: dict[str, simpy.Event] = field(default_factory=dict[str, simpy.Event])
    prepared: dict[str, _Prepared] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set[str])
    spans: dict[str, tuple[Span, ...]] = field(default_factory=dict[str, tuple[Span, ...]])


@dataclass(eq=False, slots=True)
class _Prepared:
    """A prompt that is prepared: whose it is, its rows, and the slot and tokens that it holds."""

    run: _Run
    name: str
    rows: Rows
    worker: SimulatedWorker
    slot: ResourceRequest
    tokens: int


class Simulation:
    """One mode on one number of workers.

    Args:
        seed: of arrivals and answer lengths; every mode of a seed meets the same ones.
        tick: called after every run that has ended.
        lengths: (run, agent) -> answer tokens, where they are given; else drawn.
    """

    def __init__(
        self,
        cluster: SimulatedCluster,
        workload: Workload,
        mode: Mode,
        *,
        workers: int,
        seed: int,
        tick: Callable[[], None] = lambda: None,
        lengths: Callable[[int, str], int] | None = None,
    ) -> None:
        self.env = simpy.Environment()
        self.cluster, self.workload, self.mode = cluster, workload, mode
        self.pipeline = workload.pipeline()
        # Each of these parses prompts, which is nothing to do for every token.
        self._consumers, self._upstreams = self.pipeline.consumers, self.pipeline.upstreams
        self._order = self.pipeline.order
        self.answers: list[Answered] = []
        self.finished: list[Finished] = []
        self.runs = workload.runs(workers)
        self.dropped = 0
        self.wasted_tokens = 0
        self._open: dict[WorkerId, dict[tuple[int, str], _Prepared]] = {}
        self._seed = seed
        self._tick = tick
        self._lengths = lengths
        self._profile = profile_of(cluster.model, cluster.profile)
        self._reuse = parse_reuse(mode.method, self._profile)
        transport = cluster.transport
        self._layout = layout_of(
            cluster.model,
            self._profile,
            block_tokens=transport.block_tokens,
            groups=transport.layer_groups,
            wire=transport.wire,
        )
        self._costs = costs_of(cluster.model)
        self._rates = Rates(max_agents=4096)
        self.fabric = Fabric(cluster.links, transport.layer_groups, transport.pull_timeout_s)
        self.directory = Directory(cluster.directory, cluster.directory_costs, workers)
        self.arenas = Arenas(self.directory, transport.arena_bytes)
        device = Device.of(cluster.device, cluster.model)
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        for i in range(workers):
            name = WorkerId(f"w{i}")
            owner = Owner(name, Incarnation(1), NodeId(f"n{i // cluster.workers_per_node}"))
            self.directory.announce(owner, 0.0)
            self.workers[name] = SimulatedWorker(self.env, owner, device, cluster.worker)
        self._views = [
            WorkerView(name, cluster.model.name, node=str(w.owner.node)) for name, w in self.workers.items()
        ]
        self._check_room()

    def run(self) -> None:
        """To the end of the last run."""
        arrivals, rng = self.workload.arrivals, random.Random(f"{self._seed} arrivals")
        if arrivals.kind == "poisson":
            self.env.process(self._poisson(arrivals.per_worker * len(self.workers), rng))
        else:
            lines = max(1, round(arrivals.per_worker * len(self.workers)))
            numbers = iter(range(self.runs))
            for _ in range(min(lines, self.runs)):
                self.env.process(self._line(numbers))
        self.env.run()

    # -- runs ----------------------------------------------------------------------------------------------

    def _poisson(self, rate: float, rng: random.Random) -> Steps:
        for number in range(self.runs):
            self.env.process(self._one(number))
            yield self.env.timeout(rng.expovariate(rate))

    def _line(self, numbers: Any) -> Steps:
        for number in numbers:
            yield self.env.process(self._one(number))

    def _one(self, number: int) -> Steps:
        """One run of the pipeline, as the executor makes it."""
        order, upstreams = self._order, self._upstreams
        model = self.cluster.model.name
        lengths = {name: self._length(number, name) for name in order}
        tasks = [
            self._rates.task(
                name,
                model,
                after=upstreams[name],
                max_new_tokens=self.workload.agents[name].answer_tokens,
            )
            for name in order
        ]
        views = self._rates.views(self._views, self.env.now)
        chosen = route_pipeline(tasks, views, self._rates.links())
        for task in tasks:
            self._rates.placed(task.agent, model, chosen[task.agent].worker)
            # `Cluster._prepare` does so before the run begins, and its time is not the run's.
            worker = self.workers[chosen[task.agent].worker]
            worker.prefixes[task.agent] = self.workload.agents[task.agent].prefix_tokens
            self._rates.planned(f"{number}-{task.agent}", chosen[task.agent].worker, task)
        run = _Run(number, lengths, chosen, self.env.now)
        run.answered = {name: self.env.event() for name in order}
        if self.mode.stream != "off":
            for name in order:
                if upstreams[name]:
                    self._later(self.cluster.device.dispatch_s, lambda n=name: self._prepare(run, n))
        for name in order:
            self.env.process(self._agent(run, name, upstreams[name]))
        yield simpy.AllOf(self.env, run.answered.values())
        self.finished.append(Finished(number, run.began, self.env.now))
        self._tick()

    def _length(self, number: int, agent: str) -> int:
        """Tokens of an answer: log-normal about its mean, cut where max_new_tokens would cut it."""
        if self._lengths is not None:
            return self._lengths(number, agent)
        mean, spread = self.workload.agents[agent].answer_tokens, self.workload.answer_spread
        if not spread:
            return mean
        sigma = math.sqrt(math.log(1 + spread**2))
        rng = random.Random(f"{self._seed} {number} {agent}")
        drawn = round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
        return max(2, min(drawn, self.workload.longest(agent)))

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call something in a while, without a process of its own."""
        timeout = self.env.timeout(seconds)
        assert timeout.callbacks is not None  # only a processed event has none
        timeout.callbacks.append(lambda _: call())

    # -- prompts -------------------------------------------------------------------------------------------

    def _spans(self, run: _Run, name: str) -> tuple[Span, ...]:
        """The prompt: prefix, what it reads in order, fresh text. An answer's last token has no KV."""
        if name not in run.spans:
            run.spans[name] = self._make_spans(run, name)
        return run.spans[name]

    def _make_spans(self, run: _Run, name: str) -> tuple[Span, ...]:
        agent = self.workload.agents[name]
        spans: list[Span] = []
        at = 0

        def add(tokens: int, slot: str | None = None, key: SegmentKey | None = None) -> None:
            nonlocal at
            if tokens > 0:
                spans.append(Span(at, at + tokens, slot, key))
                at += tokens

        add(agent.prefix_tokens)
        least = self.cluster.worker.min_segment_tokens
        for read in agent.reads:
            if read in self.workload.inputs:
                tokens, rest = self.workload.inputs[read], 0
            else:
                tokens, rest = run.lengths[read] - 1, 1
            add(tokens, read, _key(run.number, read) if tokens >= least else None)
            add(rest)
        add(agent.fresh_tokens)
        return tuple(spans)

    def _known(self, run: _Run, name: str) -> int:
        """Leading prompt tokens that are certain, at the latest."""
        agent = self.workload.agents[name]
        known = agent.prefix_tokens
        for read in agent.reads:
            if read in self.workload.inputs:
                known += self.workload.inputs[read]
                continue
            known += run.written.get(read, 0)
            if not run.answered[read].triggered:
                return known
        return known

    def _tokens(self, run: _Run, name: str) -> int:
        """Cache memory of a request: its whole prompt and its longest answer."""
        return self._spans(run, name)[-1].stop + max(run.lengths[name], self.workload.longest(name))

    def _check_room(self) -> None:
        workload = self.workload
        for name, agent in workload.agents.items():
            most = agent.prefix_tokens + agent.fresh_tokens + workload.longest(name)
            most += sum(workload.inputs.get(read) or workload.longest(read) for read in agent.reads)
            if most > self.cluster.worker.cache_tokens:
                raise ConfigError(
                    f'agent "{name}" needs up to {most} tokens of cache, but a worker has '
                    f"{self.cluster.worker.cache_tokens}. Raise worker.cache_tokens in the cluster file."
                )

    # -- prefill ahead -------------------------------------------------------------------------------------

    def _prepare(self, run: _Run, name: str) -> None:
        """A draft has come: more of the prompt can be computed, where there is room."""
        if name in run.asked:
            return
        found = run.prepared.get(name)
        if found is None:
            worker = self.workers[run.chosen[name].worker]
            tokens = self._tokens(run, name)
            if not worker.has_room(tokens):
                return  # refused; a later draft may find room
            rows = Rows(run.lengths[name], self.env.event(), self.env.event())
            rows.urgency, rows.group = Urgency.AHEAD, str(run.number)
            rows.computed = min(worker.prefixes.get(name, 0), self.workload.agents[name].prefix_tokens)
            worker.memory.get(tokens)
            found = _Prepared(run, name, rows, worker, worker.slots.request(), tokens)
            run.prepared[name] = self._open.setdefault(worker.owner.worker, {})[run.number, name] = found
            worker.submit(rows)
        known = self._known(run, name)
        if known > found.rows.known:
            found.rows.known = known
            found.worker.wake()

    def _make_room(self, worker: SimulatedWorker, tokens: int) -> None:
        """Drop what is only prepared, the oldest first, until a request has room; as the worker does."""
        preparations = self._open.get(worker.owner.worker, {})
        while preparations and not worker.has_room(tokens):
            found = preparations.pop(next(iter(preparations)))
            del found.run.prepared[found.name]
            worker.leave(found.rows)
            worker.slots.release(found.slot)
            worker.memory.put(found.tokens)
            self.dropped += 1
            self.wasted_tokens += found.rows.computed

    def _told(self, run: _Run, name: str, rows: Rows) -> None:
        """An agent has written more: drafts of all that read it go out."""
        run.written[name] = rows.written

        def drafts() -> None:
            for reader in self._consumers[name]:
                self._prepare(run, reader)

        self._later(self.cluster.device.dispatch_s, drafts)

    # -- one request ---------------------------------------------------------------------------------------

    def _agent(self, run: _Run, name: str, upstreams: tuple[str, ...]) -> Steps:
        """One agent's request, from the moment it can be made until its readers may go on."""
        env = self.env
        if upstreams:
            yield simpy.AllOf(env, [run.answered[up] for up in upstreams])
        worker = self.workers[run.chosen[name].worker]
        fact = Answered(run.number, name, str(worker.owner.worker), env.now)
        run.asked.add(name)
        request_id = f"{run.number}-{name}"
        task = self._rates.task(name, self.cluster.model.name, max_new_tokens=run.lengths[name])
        self._rates.began(request_id, worker.owner.worker, task, env.now)
        yield env.timeout(self.cluster.device.dispatch_s)
        queued = env.now
        prepared = run.prepared.pop(name, None)
        if prepared is None:
            tokens = self._tokens(run, name)
            self._make_room(worker, tokens)
            slot = worker.slots.request()
            yield slot
            yield worker.memory.get(tokens)
            rows = Rows(run.lengths[name], env.event(), env.event())
        else:
            slot, tokens, rows = prepared.slot, prepared.tokens, prepared.rows
            del self._open[worker.owner.worker][run.number, name]
            rows.known = rows.computed  # nothing more of it in the background
            yield from worker.settled(rows)
            worker.leave(rows)
            rows.urgency = Urgency.NOW
        fact.queue_s = env.now - queued
        yield from self._load(run, name, worker, rows, fact)
        begun = env.now
        yield rows.first
        fact.prefill_s = env.now - begun
        fact.ttft_s = env.now - fact.asked
        self._rates.first_token(request_id, env.now)
        self._learn(worker, rows, fact)
        env.process(self._publish_inputs(run, worker, fact))
        first_at = env.now
        yield rows.done
        fact.decode_s = env.now - first_at
        readers = len(self._consumers[name])
        published = yield from self._publish(run, name, run.lengths[name] - 1, worker, readers)
        self._rates.answered(_reply(worker, fact, published))
        worker.slots.release(slot)
        yield worker.memory.put(tokens)
        self._rates.ended(request_id)
        self.answers.append(fact)
        run.written[name] = run.lengths[name]
        run.answered[name].succeed()

    def _load(self, run: _Run, name: str, worker: SimulatedWorker, rows: Rows, fact: Answered) -> Steps:
        """Lease, pull, plan, and let the rows join the steps."""
        env = self.env
        spans = self._spans(run, name)
        fact.prompt_tokens, fact.answer_tokens = spans[-1].stop, run.lengths[name]
        prepared = min(rows.computed, fact.prompt_tokens - 1)
        leases: dict[SegmentKey, Lease] = {}
        if self._reuse.method.uses_segments:
            keys = [
                s.key
                for s in spans
                if s.key is not None and s.stop > prepared and not nearly_prepared(prepared, s)
            ]
            if keys:
                begin = env.now
                leases, there = self.directory.lease(keys, worker.owner.worker, env.now)
                yield env.timeout(there - env.now)
                fact.directory_s = env.now - begin
        hits = self._worth(worker, spans, owners_of(leases.values()))
        passages = [
            (found, self.fabric.pull(found.owner, worker.owner, found.segment.nbytes, env.now))
            for found in hits.values()
        ]
        if any(passage.lost for _, passage in passages):
            yield env.timeout(self.cluster.transport.pull_timeout_s)
            fact.pull_s = self.cluster.transport.pull_timeout_s
            lost = {found.segment.key for found, passage in passages if passage.lost}
            hits = {key: found for key, found in hits.items() if key not in lost}
            passages = [(found, passage) for found, passage in passages if not passage.lost]
        fact.pulled_bytes = sum(f.segment.nbytes for f, p in passages if p.kind != "local")
        fact.transfers = tuple(_transfer(found, worker, passage) for found, passage in passages)
        plan = self._reuse.method.plan(spans, hits, self._profile)
        self._lay_out(plan, run, worker, rows, fact, prepared)
        if passages:
            yield from self._arrive(passages, worker, rows, fact)
        else:
            worker.submit(rows)
        self.directory.release(leases.values(), env.now)

    def _worth(
        self, worker: SimulatedWorker, spans: tuple[Span, ...], found: dict[SegmentKey, Located]
    ) -> dict[SegmentKey, Located]:
        """What of it is pulled: all but what is predicted to be computed faster."""
        if not found or not self.cluster.worker.break_even:
            return found
        plan = self._reuse.method.plan(spans, found, self._profile)
        here = worker.owner.worker
        estimates = estimate_relays(worker.speeds, self._costs, plan, found, here=here, now=self.env.now)
        return {key: at for key, at in found.items() if key not in estimates or estimates[key].worth}

    def _lay_out(
        self,
        plan: RectifyPlan,
        run: _Run,
        worker: SimulatedWorker,
        rows: Rows,
        fact: Answered,
        prepared: int,
    ) -> None:
        """The plan's rows, and what each of them takes."""
        name, last = fact.agent, fact.prompt_tokens - 1
        relayed = [s for s in plan.spans if s.source is not None]
        fact.relayed = tuple(s.span.slot or "" for s in relayed)
        limit = min([last, *(s.span.start for s in relayed)])
        cached = worker.prefixes.get(name, 0) if plan.use_prefix_cache else 0
        prefix = min(prepared or cached, limit)
        computed = [s.span for s in plan.spans if s.source is None]
        fresh = sum(max(0, s.stop - max(s.start, prefix)) for s in computed)
        chosen = sum(math.ceil(selected_share(s.select, len(s.span)) * len(s.span)) for s in relayed)
        slower = 1 / self.cluster.device.sparse_efficiency - 1
        flops = plan_flops(self._costs, plan, prefix) - self._costs.head_flops
        flops += slower * sum(span_flops(self._costs, s) for s in relayed)
        fact.relayed_tokens = sum(len(s.span) for s in relayed)
        fact.prefix_tokens = prefix
        fact.prepared_tokens = prefix if prepared else 0
        self.wasted_tokens += max(0, prepared - prefix)
        rows.computed, rows.known, rows.whole = 0, fresh + chosen, True
        rows.row_flops = flops / rows.known
        rows.context = fact.prompt_tokens
        rows.extra_s = self.cluster.device.rotate_token_s * fact.relayed_tokens
        if self.mode.stream != "off" and self._consumers[name]:
            rows.every, rows.told = CHUNK_TOKENS, lambda: self._told(run, name, rows)

    def _arrive(
        self, passages: list[tuple[Located, Passage]], worker: SimulatedWorker, rows: Rows, fact: Answered
    ) -> Steps:
        """Rows begin with the first layers of every segment, and end behind the last."""
        env = self.env
        begin = env.now
        first = max(p.first for _, p in passages)
        end = max(p.end for _, p in passages)
        if first > env.now:
            yield env.timeout(first - env.now)
        fact.pull_s += env.now - begin
        rows.held_back = 1 if end > env.now else 0
        worker.submit(rows)
        if rows.held_back:
            yield env.timeout(end - env.now)
            rows.held_back = 0
            worker.wake()
        for found, passage in passages:
            if passage.kind != "local":
                seconds = passage.end - passage.begin
                node = str(found.owner.node)
                worker.speeds.observe_pull(node, passage.kind, found.segment.nbytes, seconds, env.now)

    def _learn(self, worker: SimulatedWorker, rows: Rows, fact: Answered) -> None:
        """What a worker measures of its own prefills."""
        rotated_s = self.cluster.device.rotate_token_s * fact.relayed_tokens
        worker.speeds.observe_prefill((rows.row_flops or 0.0) * rows.known, rows.prefill_s)
        worker.speeds.observe_rotate(fact.relayed_tokens, rotated_s)

    def _publish_inputs(self, run: _Run, worker: SimulatedWorker, fact: Answered) -> Steps:
        """Shared inputs that were computed here whole, while the answer is decoded."""
        at = self.workload.agents[fact.agent].prefix_tokens
        for read in self.workload.agents[fact.agent].reads:
            tokens = self.workload.inputs.get(read, 0)
            shared = tokens and len(self._consumers[read]) > 1
            if shared and read not in fact.relayed and at >= fact.prefix_tokens:
                yield from self._publish(run, read, tokens, worker, 0)
            at += tokens or run.lengths[read]

    def _publish(
        self, run: _Run, slot: str, tokens: int, worker: SimulatedWorker, readers: int
    ) -> Generator[simpy.Event, Any, tuple[Published, ...]]:
        """Copy a segment into the arena and tell the directory; nothing where it is too short or there is no
        room."""
        env, device = self.env, self.cluster.device
        if tokens < self.cluster.worker.min_segment_tokens:
            return ()
        nbytes = self._layout.blocks_for(tokens) * self._layout.block_nbytes
        yield env.timeout(device.publish_s + nbytes / device.copy_bytes_per_s)
        key = _key(run.number, slot)
        block = BlockRef(BlockId(0), 0, nbytes, ())
        segment = Segment(key, tokens, 0, (block,), variant=slot, consumers=readers)
        there = self.arenas.publish(worker.owner, segment, env.now)
        if there is None:
            return ()
        yield env.timeout(there - env.now)
        return (Published(None, key, tokens, 1, nbytes),)


def _key(run: int, slot: str) -> SegmentKey:
    return SegmentKey(_SPACE, hashlib.blake2b(f"{run} {slot}".encode(), digest_size=16).digest())


def _transfer(found: Located, worker: SimulatedWorker, passage: Passage) -> SlotTransfer:
    """A pull as a worker reports it."""
    transfer = Transfer(
        source=found.owner.worker,
        destination=worker.owner.worker,
        backend=passage.kind,
        nbytes=found.segment.nbytes,
        blocks=len(found.segment.blocks),
        seconds=passage.end - passage.begin,
        outcome=Outcome.PULLED,
    )
    return SlotTransfer("", found.segment.key, found.owner.node, transfer)


def _reply(worker: SimulatedWorker, fact: Answered, published: tuple[Published, ...]) -> Reply:
    """What placement learns from."""
    return Reply(
        request_id="",
        agent=fact.agent,
        worker=worker.owner.worker,
        node=worker.owner.node,
        model="",
        method="",
        prompt_tokens=fact.prompt_tokens,
        fresh_tokens=fact.prompt_tokens - fact.relayed_tokens,
        relayed_tokens=fact.relayed_tokens,
        prefix_tokens=fact.prefix_tokens,
        prepared_tokens=fact.prepared_tokens,
        fresh_entries=0,
        recomputed_entries=0,
        relayed_entries=0,
        ttft_s=fact.ttft_s,
        decode_s=fact.decode_s,
        stages=StageTimes(prefill_s=fact.prefill_s),
        transfers=fact.transfers,
        fallbacks=(),
        published=published,
        token_ids=(0,) * fact.answer_tokens,
        text="",
        finish_reason="length",
        output=SlotValue(text=""),
    )
