"""The life of one request on a worker:

    prompt to spans -> admission -> lookup, lease, pull -> plan -> rotate + scatter -> prefill rows in shared
    steps -> first token -> publish shared inputs -> decode -> publish the answer -> release, on every path

Decisions live elsewhere: spans in `segment.py`, plans in `methods/`, rows in `prefill.py`, batching in
`scheduler.py`, bytes in `store.py`. This module only puts them in order. It knows nothing of Ray.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from transport.errors import CacheFull, CacheTooSmall, Cancelled, DeadlineExceeded, RelayError
from transport.types import Located, NodeId, Outcome, SegmentKey, WorkerId
from workers.anchoring import Anchoring, template_contexts
from workers.anchors import Match
from workers.attention import MassSpan
from workers.break_even import Speeds, estimate_relays
from workers.compare import compare_methods
from workers.costs import model_costs
from workers.engine import Engine
from workers.heal import Heal, chunk_rows, first_stale
from workers.kv_cache import CachePool, copy_out
from workers.messages import Comparison, Published, Reply, Request, ShadowCheck
from workers.methods import parse_reuse
from workers.methods.base import HealMode, ModelProfile, RectifyPlan, Reuse, Span
from workers.methods.kvcomm import KVComm
from workers.model import LoadedModel, inverse_frequencies
from workers.prefill import Prefill, PrefillModel
from workers.prefix_cache import PrefixCache
from workers.sampling import Sampler
from workers.scheduler import (
    Event,
    FailedEvent,
    FinishedEvent,
    Sequence,
    StepLoop,
    TokenEvent,
    decoded_mass,
)
from workers.segment import (
    Prompt,
    PromptBuilder,
    PromptTemplate,
    SlotValue,
    digest_tokens,
    special_token_ids,
    splice,
    stop_token_ids,
)
from workers.settings import WorkerSettings
from workers.shadow import Evidence, EvidenceBox, judge, relayed_positions
from workers.store import SegmentStore
from workers.tokens import TokenStream
from workers.turn import Clock, Turn, build_reply, fallbacks, log_costs

log = logging.getLogger(__name__)

T = TypeVar("T")
OnToken = Callable[[int, str], None]

_MOST_EVIDENCE = 16
"""Answered requests that can wait for a shadow check."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A prompt and a continuation, teacher-forced.

    Attributes:
        ttft_s: seconds to the first logits.
        logits: [1 + continuation, vocab] float32.
        relayed_tokens: tokens taken from segments; prefix_tokens: from the exact local prefix cache.
        reuse: share of the relayed (token, layer) entries that were not recomputed; None when there are none.
        resolved_method: the request's method with every parameter.
        flop_ratio_predicted, flop_ratio: FLOPs of the prefill over full prefill's, from the plan alone and as
            computed.
        healed_at_token: index of the first row of logits that came from an exact cache; None where healing
            was off or did not get so far.
    """

    ttft_s: float
    logits: torch.Tensor
    relayed_tokens: int
    prefix_tokens: int = 0
    reuse: float | None = None
    resolved_method: str = ""
    flop_ratio_predicted: float | None = None
    flop_ratio: float | None = None
    healed_at_token: int | None = None


class AgentWorker:
    """One model on one device, serving requests of several agents at once. Thread-safe; calls block."""

    def __init__(
        self,
        worker: WorkerId,
        node: NodeId,
        loaded: LoadedModel,
        profile: ModelProfile,
        settings: WorkerSettings,
        store: SegmentStore,
    ) -> None:
        self.worker = worker
        self.node = node
        self.loaded = loaded
        self.profile = profile
        self.settings = settings
        self.engine = Engine(loaded.model)
        self.pool = CachePool(loaded.layout, settings.cache_tokens, loaded.device)
        self.prefixes = PrefixCache(settings.prefix_cache_bytes)
        self.store = store
        self._loop = StepLoop(
            self.engine, max_rows=settings.max_rows_per_step, checkpoint_layer=profile.checkpoint_layer
        )
        self._builder = PromptBuilder(
            loaded.tokenizer,
            loaded.space,
            min_segment_tokens=settings.min_segment_tokens,
            max_context=loaded.max_context,
        )
        self._stop_ids = stop_token_ids(loaded.tokenizer, getattr(loaded.model, "generation_config", None))
        self._special_ids = special_token_ids(loaded.tokenizer)
        self._shape = PrefillModel(
            loaded.num_layers,
            profile.checkpoint_layer,
            _inverse_frequencies(loaded).to(loaded.device),
            model_costs(loaded.model),
            _scaling(loaded),
        )
        self.anchors = Anchoring(
            store,
            loaded.layout,
            loaded.space,
            self._shape.inv_freq,
            settings.anchor_bytes,
            self.on_engine,
            producer=str(worker),
        )
        self._templates: dict[tuple[str | None, str], PromptTemplate] = {}
        self._slots = threading.BoundedSemaphore(settings.max_sequences)
        self._running: dict[str, threading.Event] = {}
        # Cancelled before they arrived: a cancel may overtake its request.
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._fallbacks: Counter[str] = Counter()
        self.speeds = Speeds()
        self._evidence = EvidenceBox(_MOST_EVIDENCE, settings.shadow_bytes)
        self._lock = threading.Lock()

    # -- calls ---------------------------------------------------------------------------------------------

    def generate(self, request: Request, on_token: OnToken | None = None) -> Reply:
        """Answer one request.

        Args:
            request: what to do.
            on_token: called with (token id, text that is certain by now) for every token, on this thread.

        Raises:
            ConfigError: template, values, method or length do not fit.
            DeadlineExceeded, CacheFull: out of time or memory. Cancelled: `cancel` was called.
        """
        turn = self._begin(request, request.sampling.max_new_tokens)
        try:
            self._prefill(turn)
            return self._answer(turn, self._start(turn), on_token)
        finally:
            self._end(turn)

    def generate_all(self, requests: Iterable[Request]) -> list[Reply]:
        """Answer several requests in steps that they share from the first one on.

        Which rows meet in a step does not depend on how threads run, so the same requests give the same bits.
        All are held at once; times to first token include the wait for the others.

        Raises:
            CacheTooSmall: together they are more than the cache or `max_sequences` holds. Else as `generate`.
        """
        chosen = list(requests)
        self._check_room(chosen)
        with ExitStack() as held:
            turns: list[Turn] = []
            with self._loop.held():
                for request in chosen:
                    turn = self._begin(request, request.sampling.max_new_tokens)
                    held.callback(self._end, turn)
                    turns.append(turn)
                    self._prefill(turn)
                sequences = [self._start(turn) for turn in turns]
            return [self._answer(t, s, None) for t, s in zip(turns, sequences, strict=True)]

    def shadow(
        self, request: Request, answer: tuple[int, ...], *, timeout_s: float, probe: str | None = None
    ) -> ShadowCheck:
        """Judge an answered request, in steps in which this worker has nothing else to do.

        Its prompt is run again and teacher-forced on its answer; the logits are compared with those that it
        kept (`Request.shadow_tokens`). Full prefill is the reference: it is either what runs now or, where
        the request itself was computed in full, what was kept.

        Args:
            request: as it was answered, its id included.
            answer: the token ids of its reply.
            timeout_s: give up after so many seconds.
            probe: method to judge instead of the request's own, which must then be an exact one.

        Raises:
            RelayError: nothing was kept, there is no room, or time ran out: there is no verdict.
        """
        kept = self._evidence.take(request.id, now=time.monotonic())
        if kept is None or not kept.logits.shape[0]:
            raise RelayError(f"nothing is kept of request {request.id} that could be judged.")
        count = kept.logits.shape[0]
        again = replace(
            request,
            id=f"{request.id}-shadow",
            method=probe or "exact_prefix",
            publish=False,
            prefix_limit=None,
            shadow_tokens=0,
        )
        turn = self._begin(again, count - 1, background_s=timeout_s)
        try:
            self._prefill(turn)
            sequence = self._submit(turn, None, 0, forced=answer[: count - 1], background=True)
            self._wait(turn, sequence)
            if probe is not None:
                return self.on_engine(lambda: judge(sequence.scored, kept.logits, (), (), probe))
            return self.on_engine(
                lambda: judge(
                    kept.logits,
                    sequence.scored,
                    kept.layers,
                    kept.value_errors(turn.cache),
                    request.method,
                )
            )
        finally:
            self._end(turn)

    def replay(self, request: Request, answer: tuple[int, ...]) -> Reply:
        """Take `answer` as what the model has drawn, and publish what `generate` would have published.

        Prompt and answer are computed in two passes instead of token by token, so old conversations come back
        at the speed of a prefill. The KV is that of decoding, up to rounding.
        """
        turn = self._begin(request, len(answer))
        try:
            self._prefill(turn)
            sequence = self._submit(turn, None, 0, forced=answer)
            self._wait(turn, sequence)
            turn.clock.first_token = turn.clock.last_token = sequence.first_logits_at
            if request.publish:
                self._remember_prompt(turn)
            sequence.tokens = list(answer)
            stream = TokenStream(self.loaded.tokenizer)
            text = "".join(stream.push(i) for i in answer if i not in self._stop_ids) + stream.finish()
            reason = "stop" if answer[-1] in self._stop_ids else "length"
            return self._reply(turn, sequence, text, reason)
        finally:
            self._end(turn)

    def score(self, request: Request, continuation: tuple[int, ...]) -> Scored:
        """Teacher-force `continuation` after the prompt: the distribution before each of its tokens, and
        after."""
        turn = self._begin(request, len(continuation))
        try:
            self._prefill(turn)
            sequence = self._submit(turn, None, 0, forced=continuation)
            self._wait(turn, sequence)
            if request.publish:
                self._learn_anchors(turn)
            relayed = sum(len(s.span) for s in sequence.prefill.plan.spans if s.source)
            return Scored(
                sequence.first_logits_at - turn.clock.arrived,
                sequence.scored,
                relayed,
                prefix_tokens=sequence.prefill.prefix_tokens,
                reuse=sequence.prefill.counts.reuse,
                resolved_method=turn.reuse.text,
                flop_ratio_predicted=sequence.prefill.flop_ratio_predicted,
                flop_ratio=sequence.prefill.flop_ratio,
                healed_at_token=turn.heal.finished_at if turn.heal else None,
            )
        finally:
            self._end(turn)

    def compare(self, request: Request, reply: Reply, base_method: str, *, repeats: int = 2) -> Comparison:
        """See `workers.compare.compare_methods`."""
        return compare_methods(self, request, reply, base_method, repeats=repeats)

    def on_engine(self, job: Callable[[], T]) -> T:
        """Run tensor work on the engine's thread; see `StepLoop.call`."""
        return self._loop.call(job, timeout_s=self.settings.request_timeout_s)

    def render(self, request: Request) -> Prompt:
        """The request's token ids and spans."""
        template = self._template(request.system, request.prompt)
        return self._builder.build(template, request.values, max_new_tokens=0)

    def prepare(self, system: str | None, prompt: str) -> int:
        """Prefill the part of a template before its first slot into the prefix cache, before requests come.

        Returns:
            Number of tokens prepared.
        """
        template = self._template(system, prompt)
        self.anchors.sync(KVComm(), template_contexts(template), ())
        ids = template.leading_ids
        if not ids:
            return 0
        spans = (Span(0, len(ids)),)
        request = Request(
            id=f"prepare-{uuid.uuid4().hex[:8]}", agent="", prompt=prompt, method="full_prefill"
        )
        turn = self._admit(request, parse_reuse(request.method), Prompt(ids, spans), 0)
        try:
            self._prefill(turn)
            for event in self._events(turn, self._submit(turn, None, 0)):
                if isinstance(event, FinishedEvent):
                    break
            self.on_engine(lambda: self.prefixes.store(ids, turn.cache))
            return len(ids)
        finally:
            self._end(turn)

    def cancel(self, request_id: str) -> bool:
        """End a request at its next step, or as soon as it arrives. Returns whether it was running."""
        with self._lock:
            event = self._running.get(request_id)
            if event is None:
                self._cancelled[request_id] = None
                while len(self._cancelled) > 256:
                    self._cancelled.popitem(last=False)
        if event is not None:
            event.set()
        return event is not None

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of this worker."""
        c = self.engine.counters
        with self._lock:
            running, reasons = len(self._running), dict(self._fallbacks)
        return {
            "weight_passes": c.weight_passes,
            "rows": c.rows,
            "row_layers": c.row_layers,
            "free_cache_blocks": self.pool.free_blocks,
            "cache_blocks": self.pool.num_blocks,
            "prefix_cache_bytes": self.prefixes.nbytes,
            "running": running,
            "segments_held": len(self.store.segments()),
            "fallbacks": reasons,
            "healed_entries": self._loop.healed_entries,
            "healing_steps": self._loop.healing_steps,
            "evidence_bytes": self._evidence.nbytes,
            **self.anchors.pool.stats(),
        }

    def close(self) -> None:
        """Stop the step loop. Idempotent."""
        self._loop.stop()

    # -- admission -----------------------------------------------------------------------------------------

    def _begin(self, request: Request, answer_tokens: int, background_s: float | None = None) -> Turn:
        """Render the prompt and wait for room. background_s: for one that must not be in anybody's way, its
        deadline; it does not wait."""
        reuse = parse_reuse(request.method, self.profile)
        template = self._template(request.system, request.prompt)
        prompt = self._builder.build(template, request.values, max_new_tokens=answer_tokens)
        return self._admit(request, reuse, prompt, answer_tokens, background_s)

    def _check_room(self, requests: list[Request]) -> None:
        """Refuse what would wait for itself."""
        tokens = [len(self.render(r)) + r.sampling.max_new_tokens for r in requests]
        blocks = sum(self.loaded.layout.blocks_for(n) for n in tokens)
        if blocks > self.pool.num_blocks or len(requests) > self.settings.max_sequences:
            raise CacheTooSmall(
                f"{len(requests)} requests of {sum(tokens)} tokens do not fit together: the worker has "
                f"{self.pool.num_blocks} cache blocks (worker.cache_tokens; {blocks} needed) for at most "
                f"{self.settings.max_sequences} requests (worker.max_sequences). Ask for fewer at a time."
            )

    def _admit(
        self,
        request: Request,
        reuse: Reuse,
        prompt: Prompt,
        answer_tokens: int,
        background_s: float | None = None,
    ) -> Turn:
        clock = Clock()
        cancelled = threading.Event()
        limit_s = self.settings.request_timeout_s
        deadline = time.monotonic() + (limit_s if background_s is None else min(limit_s, background_s))
        with self._lock:
            self._running[request.id] = cancelled
            if request.id in self._cancelled:
                cancelled.set()
        try:
            self._take_slot(cancelled, deadline if background_s is None else 0.0)
        except BaseException:
            self._forget(request)
            raise
        try:
            cache = self.pool.allocate(
                len(prompt.token_ids) + answer_tokens,
                # Who waits for cache memory waits in line: a background turn would hold up those behind it.
                timeout_s=deadline - time.monotonic() if background_s is None else 0.0,
                cancelled=cancelled,
            )
        except BaseException:
            self._slots.release()
            self._forget(request)
            raise
        clock.queue_s = time.perf_counter() - clock.arrived
        return Turn(request, reuse, prompt, deadline, cancelled, clock, cache)

    def _take_slot(self, cancelled: threading.Event, deadline: float) -> None:
        while not self._slots.acquire(timeout=0.2):
            if cancelled.is_set():
                raise Cancelled("the request was cancelled while it waited for its turn.")
            if time.monotonic() > deadline:
                raise CacheFull(
                    f"{self.settings.max_sequences} requests are running and none ended within "
                    f"{self.settings.request_timeout_s:.0f} s. Raise worker.max_sequences or add workers."
                )

    def _end(self, turn: Turn) -> None:
        """Give everything back, whatever happened."""
        self._measure(turn)
        try:
            self.store.release(turn.acquired)
            if self._settled(turn):
                self.pool.free(turn.cache)
            else:
                # Better to lose the extent than to hand memory out that the engine still writes to.
                log.error("request %s does not leave the engine: its cache is not freed", turn.request.id)
        finally:
            self._slots.release()
            self._forget(turn.request)

    def _settled(self, turn: Turn, timeout_s: float = 60.0) -> bool:
        """Whether the engine is done with the sequence; cancels it if need be and waits for the running
        step."""
        if turn.sequence is None:
            return True
        if not turn.sequence.finished:
            turn.cancelled.set()
        deadline = time.monotonic() + timeout_s
        while not turn.sequence.finished and time.monotonic() < deadline:
            time.sleep(0.005)
        return turn.sequence.finished

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._running.pop(request.id, None)
            self._cancelled.pop(request.id, None)

    def _template(self, system: str | None, prompt: str) -> PromptTemplate:
        key = (system, prompt)
        if key not in self._templates:
            self._templates[key] = self._builder.template(system, prompt)
        return self._templates[key]

    # -- prefill -------------------------------------------------------------------------------------------

    def _prefill(self, turn: Turn) -> None:
        """Pull, plan, scatter; afterwards landing blocks are free again."""
        request, prompt = turn.request, turn.prompt
        method = turn.reuse.method
        wanted: dict[SegmentKey, int] = {}
        if method.uses_segments:
            for span in prompt.spans:
                if span.key is not None and (request.only_keys is None or span.key in request.only_keys):
                    wanted[span.key] = max(len(span), wanted.get(span.key, 0))
        # A prompt that is repeated relays what it relayed before, whatever was measured since.
        free = self.settings.break_even and request.only_keys is None
        turn.acquired = self.store.acquire(wanted, partial(self._worth, turn) if free else None)
        self._count_fallbacks(turn)
        begin = time.perf_counter()
        plan = self._plan(turn)
        turn.prefill = self._loop.call(lambda: self._load(turn, plan), timeout_s=turn.remaining_s)
        turn.stale_from = first_stale(turn.prefill.plan, prompt.token_ids)
        # The rest of the time was waiting for a step of other requests to end.
        turn.clock.queue_s += time.perf_counter() - begin - turn.clock.rotate_s
        self.store.release_bytes(turn.acquired)

    def _worth(self, turn: Turn, found: Mapping[SegmentKey, Located]) -> set[SegmentKey]:
        """Which of the found segments are to be pulled: all but those that are faster to compute."""
        plan = turn.reuse.method.plan(turn.prompt.spans, found, self.profile)
        turn.estimates = estimate_relays(
            self.speeds, self._shape.costs, plan, found, here=self.worker, now=time.monotonic()
        )
        return {key for key in found if key not in turn.estimates or turn.estimates[key].worth}

    def _measure(self, turn: Turn) -> None:
        """Let a finished prefill count for later predictions, and say how this one's came out."""
        if turn.prefill is None or turn.sequence is None or not turn.prefill.finished:
            return
        prefill, now = turn.prefill, time.monotonic()
        for located, transfer in turn.acquired.transfers:
            if transfer.outcome is Outcome.PULLED:
                node, backend = located.owner.node, transfer.backend
                self.speeds.observe_pull(node, backend, transfer.nbytes, transfer.seconds, now)
        relayed = sum(len(s.span) for s in prefill.plan.spans if s.source)
        self.speeds.observe_rotate(relayed, turn.clock.rotate_s)
        self.speeds.observe_prefill(prefill.actual_flops, turn.sequence.prefill_seconds)
        if log.isEnabledFor(logging.DEBUG):
            log_costs(turn, prefill, turn.sequence)

    def _plan(self, turn: Turn) -> RectifyPlan:
        method, spans, hits = turn.reuse.method, turn.prompt.spans, turn.acquired.hits
        if not isinstance(method, KVComm):
            return method.plan(spans, hits, self.profile)
        template = self._template(turn.request.system, turn.request.prompt)

        def match() -> dict[Span, Match]:
            begin = time.perf_counter()
            matches = self.anchors.match(method, template, spans, turn.acquired)
            turn.clock.rotate_s += time.perf_counter() - begin
            return matches

        turn.matches = self._loop.call(match, timeout_s=turn.remaining_s)
        candidates = {span: m.candidates for span, m in turn.matches.items()}
        return method.plan(spans, hits, self.profile, candidates)

    @torch.inference_mode()
    def _load(self, turn: Turn, plan: RectifyPlan) -> Prefill:
        """Put everything that is reused into the sequence's cache; runs on the engine's thread."""
        begin = time.perf_counter()
        pulled = turn.acquired.pulled
        prefill = Prefill(
            plan,
            turn.prompt.token_ids,
            turn.cache,
            self._shape,
            prefix_tokens=self._load_prefix(turn, plan),
            masses=self._masses(turn, plan),
        )
        prefill.load(
            {i: pulled[s.source.segment.key] for i, s in enumerate(plan.spans) if s.source is not None},
            {i: turn.matches[s.span] for i, s in enumerate(plan.spans) if s.correction is not None},
        )
        turn.clock.rotate_s += time.perf_counter() - begin
        return prefill

    def _load_prefix(self, turn: Turn, plan: RectifyPlan) -> int:
        if not plan.use_prefix_cache:
            return 0
        leading = next((s.span.start for s in plan.spans if s.source), len(turn.prompt.token_ids))
        limit = min(leading, len(turn.prompt.token_ids) - 1)
        if turn.request.prefix_limit is not None:
            limit = min(limit, turn.request.prefix_limit)
        return self.prefixes.load(turn.prompt.token_ids, turn.cache, limit=max(0, limit))

    def _masses(self, turn: Turn, plan: RectifyPlan) -> tuple[MassSpan, ...]:
        if not turn.request.publish:
            return ()
        return tuple(
            MassSpan(s.span.start, s.span.stop)
            for s in plan.spans
            if s.source is None and s.span.key is not None
        )

    def _count_fallbacks(self, turn: Turn) -> None:
        for fallback in fallbacks(turn):
            with self._lock:
                self._fallbacks[fallback.reason] += 1
            log.warning(
                "%d tokens of slot %s are computed here: %s (%s)",
                fallback.tokens,
                fallback.slot,
                fallback.reason,
                fallback.detail,
                extra={"request": turn.request.id, "worker": self.worker},
            )

    # -- decode --------------------------------------------------------------------------------------------

    def _heal(self, turn: Turn) -> Heal | None:
        """What makes the turn's cache exact after its first token, if that was asked for."""
        assert turn.prefill is not None  # _prefill ran before
        reuse, publish = turn.reuse, turn.request.publish
        if reuse.heal is HealMode.OFF:
            return None
        ids = turn.prompt.token_ids
        masses = (*self._masses(turn, turn.prefill.plan), decoded_mass(turn.prefill))
        return Heal(
            turn.cache,
            ids,
            turn.stale_from,
            mode=reuse.heal,
            rows=chunk_rows(reuse.heal_rows, reuse.heal_steps, len(ids) - (turn.stale_from or 0)),
            num_layers=self.loaded.num_layers,
            finish_rows=self.settings.heal_finish_rows if publish and reuse.heal is HealMode.ALWAYS else 0,
            checkpoint_layer=self.profile.checkpoint_layer,
            masses=masses if publish else (),
        )

    def _new_evidence(self, turn: Turn) -> Evidence | None:
        if not turn.request.shadow_tokens:
            return None
        assert turn.prefill is not None  # _prefill ran before
        # One layer where deviation is detected and the last one, where it has added up.
        layers = sorted({self.profile.detection_layer, self.loaded.num_layers - 1})
        return Evidence(turn.request.shadow_tokens, layers, relayed_positions(turn.prefill.plan))

    def _submit(
        self,
        turn: Turn,
        sampler: Sampler | None,
        max_new_tokens: int,
        forced: tuple[int, ...] = (),
        *,
        background: bool = False,
    ) -> Sequence:
        assert turn.prefill is not None  # _prefill ran before
        sequence = Sequence(
            turn.prefill,
            sampler,
            max_new_tokens,
            self._stop_ids,
            deadline=turn.deadline,
            forced=forced,
            capture_mass=turn.request.publish,
            heal=self._heal(turn),
            evidence=self._new_evidence(turn),
            background=background,
            cancelled=turn.cancelled,
        )
        turn.clock.submitted = time.perf_counter()
        self._loop.submit(sequence)
        turn.sequence = sequence
        # The engine computes meanwhile; the leases are a call to the directory away.
        self.store.release(turn.acquired)
        return sequence

    def _events(self, turn: Turn, sequence: Sequence) -> Iterator[Event]:
        """The sequence's events; a failure is raised here, in the caller's thread."""
        while True:
            try:
                # The loop ends the sequence at its deadline, after the step that runs then.
                event = sequence.events.get(timeout=turn.remaining_s + 60)
            except queue.Empty:
                raise DeadlineExceeded(
                    f"request {turn.request.id}: the engine has been silent since its deadline."
                ) from None
            if isinstance(event, FailedEvent):
                if isinstance(event.error, RelayError):
                    raise event.error
                what = f"request {turn.request.id} failed in a step: {event.error!r}"
                raise RelayError(what) from event.error
            yield event
            if isinstance(event, FinishedEvent):
                return

    def _start(self, turn: Turn) -> Sequence:
        """Submit a turn that decodes."""
        sampling = turn.request.sampling
        sampler = Sampler(sampling, withheld=self._stop_ids | self._special_ids)
        return self._submit(turn, sampler, sampling.max_new_tokens)

    def _answer(self, turn: Turn, sequence: Sequence, on_token: OnToken | None) -> Reply:
        text, reason = self._decode(turn, sequence, on_token)
        return self._reply(turn, sequence, text, reason)

    def _reply(self, turn: Turn, sequence: Sequence, text: str, reason: str) -> Reply:
        if turn.request.publish and turn.heal is not None:
            self._publish_inputs(turn, held_back=True)
        output = self._publish_output(turn, sequence, reason)
        if sequence.evidence is not None:
            self._evidence.put(
                turn.request.id,
                sequence.evidence,
                now=time.monotonic(),
                keep_s=self.settings.request_timeout_s,
            )
        return build_reply(
            turn,
            worker=self.worker,
            node=self.node,
            model=self.loaded.name,
            text=text,
            reason=reason,
            output=output,
        )

    def _wait(self, turn: Turn, sequence: Sequence) -> None:
        """Until the sequence has ended."""
        for event in self._events(turn, sequence):
            if isinstance(event, FinishedEvent):
                return

    def _decode(self, turn: Turn, sequence: Sequence, on_token: OnToken | None) -> tuple[str, str]:
        stream = TokenStream(self.loaded.tokenizer)
        pieces: list[str] = []
        reason = ""
        for event in self._events(turn, sequence):
            if isinstance(event, FinishedEvent):
                reason = event.reason
                break
            assert isinstance(event, TokenEvent)  # failures are raised in _events
            piece = "" if event.token in self._stop_ids else stream.push(event.token)
            pieces.append(piece)
            if on_token is not None:
                on_token(event.token, piece)
            turn.clock.last_token = event.at
            if event.first:
                turn.clock.first_token = event.at
                if turn.request.publish:
                    self._remember_prompt(turn)
        pieces.append(stream.finish())
        return "".join(pieces), reason

    # -- publishing ----------------------------------------------------------------------------------------

    def _remember_prompt(self, turn: Turn) -> None:
        """Publish shared inputs that were computed here and keep the exact prefix: after the first token."""
        assert turn.prefill is not None
        relayed = [s.span.start for s in turn.prefill.plan.spans if s.source]
        exact = min(relayed, default=len(turn.prompt.token_ids))
        try:
            self.on_engine(lambda: self.prefixes.store(turn.prompt.token_ids[:exact], turn.cache))
        except RelayError as error:
            turn.notes.append(f"the exact prefix was not kept: {error}")
        self._learn_anchors(turn)
        self._publish_inputs(turn, held_back=False)

    def _publish_inputs(self, turn: Turn, *, held_back: bool) -> None:
        """Publish shared inputs that were computed here.

        held_back: False: those that can be published at once. True: those that healing was going to make
            exact, which is worth waiting for until the answer is there.
        """
        assert turn.prefill is not None
        if not turn.request.publish_inputs:
            return
        for plan in turn.prefill.plan.spans:
            span = plan.span
            stale = turn.stale_from is not None and span.start > turn.stale_from
            if (stale and turn.heal is not None) is not held_back:
                continue
            # A prefix-cached token has no checkpoint or mass here, so only spans that were computed whole
            # qualify. (Nor does a slot that ends the prompt, whose key covers one token more than its span.)
            whole = span.key is not None and span.key.digest == digest_tokens(turn.prompt.tokens_of(span))
            # A span that was computed although it is there (a stranger to its anchors) stays as it is: two
            # variants of one base would not be near each other.
            whole = whole and span.key not in turn.acquired.hits
            if plan.source is None and span.key and whole and span.start >= turn.prefill.prefix_tokens:
                self._publish(turn, span.key, span.start, len(span), span.slot)

    def _learn_anchors(self, turn: Turn) -> None:
        """Let `kvcomm` keep what computed spans showed, and exchange anchors with other workers: after the
        first token."""
        method, matches = turn.reuse.method, turn.matches
        assert turn.prefill is not None
        if not isinstance(method, KVComm) or not matches:
            return
        plan = turn.prefill.plan
        try:
            learned = self.on_engine(lambda: self.anchors.learn(method, plan, matches, turn.cache))
        except RelayError as error:
            turn.notes.append(f"no anchor was learned: {error}")
            return
        turn.matches = {}
        self.anchors.sync(method, {m.context for m in matches.values()}, learned)

    def _publish_output(self, turn: Turn, sequence: Sequence, reason: str) -> SlotValue:
        output = splice(
            tuple(sequence.tokens),
            stop_ids=self._stop_ids,
            special_ids=self._special_ids,
            tokenizer=self.loaded.tokenizer,
            finish_reason=reason,
        )
        if turn.request.publish and output.kv_tokens >= self.settings.min_segment_tokens:
            assert output.token_ids is not None  # a splice is made of ids
            key = SegmentKey(self.loaded.space, digest_tokens(output.token_ids[: output.kv_tokens]))
            self._publish(turn, key, len(turn.prompt.token_ids), output.kv_tokens, None)
        return output

    def _publish(self, turn: Turn, key: SegmentKey, start: int, tokens: int, slot: str | None) -> None:
        try:
            segment = self.store.publish(
                key,
                lambda blocks: self.on_engine(lambda: copy_out(turn.cache, start, tokens, blocks)),
                start=start,
                num_tokens=tokens,
                producer=f"{turn.request.agent}@{self.worker}",
                variant=_variant(turn, start, tokens),
            )
        except RelayError as error:
            # The answer is still right; downstream agents will compute this text themselves.
            what = f"slot {slot}" if slot else "the answer"
            log.warning("%s not published: %s", what, error, extra={"request": turn.request.id})
            turn.notes.append(f"{what} was not published ({type(error).__name__}): {error}")
            return
        turn.published.append(Published(slot, key, tokens, len(segment.blocks), segment.nbytes))


def _variant(turn: Turn, start: int, tokens: int) -> str:
    """Names the context under which a segment was made; marked where that context was itself only
    rectified, and has not been healed since."""
    exact = turn.exact_up_to(start + tokens)
    return digest_tokens(turn.prompt.token_ids[:start]).hex() + ("" if exact else f"~{turn.reuse.text}")


def _inverse_frequencies(loaded: LoadedModel) -> torch.Tensor:
    """[L, rotary_dim / 2], or [1, rotary_dim / 2] when all layers share one RoPE."""
    rows = torch.stack([inverse_frequencies(loaded.model, i) for i in range(loaded.num_layers)])
    return rows[:1] if bool((rows == rows[:1]).all()) else rows


def _scaling(loaded: LoadedModel) -> float | None:
    """Factor of attention scores where the model has one of its own (Gemma's query_pre_attn_scalar)."""
    return getattr(loaded.model.model.layers[0].self_attn, "scaling", None)
