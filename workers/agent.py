"""The life of one request on a worker:

    prompt to spans -> admission -> lookup, lease, pull -> plan -> rotate + scatter -> prefill rows in shared
    steps -> first token -> publish shared inputs -> decode -> publish the answer -> release leases, on every
    path

Decisions live elsewhere: spans in `segment.py`, plans in `methods/`, rows in `prefill.py`, batching in
`scheduler.py`, bytes in `store.py`. This module only puts them in order, and keeps the clock. It knows
nothing of Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from transport.errors import (
    ArenaFull,
    CacheFull,
    DeadlineExceeded,
    DirectoryUnavailable,
    RelayError,
    WorkerLost,
)
from transport.types import NodeId, Outcome, SegmentKey, WorkerId
from workers.attention import MassSpan
from workers.engine import Engine
from workers.kv_cache import CachePool, SequenceCache, copy_out
from workers.messages import (
    Comparison,
    Fallback,
    Published,
    Reply,
    Request,
    SlotTransfer,
    StageTimes,
)
from workers.methods import parse_method
from workers.methods.base import ModelProfile, RectifyPlan, Span
from workers.model import LoadedModel, inverse_frequencies
from workers.prefill import Prefill, PrefillModel
from workers.prefix_cache import PrefixCache
from workers.sampling import Sampler
from workers.scheduler import FailedEvent, FinishedEvent, Sequence, StepLoop, TokenEvent
from workers.segment import (
    Prompt,
    PromptBuilder,
    PromptTemplate,
    digest_tokens,
    special_token_ids,
    splice,
    stop_token_ids,
)
from workers.settings import WorkerSettings
from workers.store import Acquired, SegmentStore
from workers.tokens import TokenStream

log = logging.getLogger(__name__)

OnToken = Callable[[int, str], None]


@dataclass(slots=True)
class _Clock:
    """Stage times of one request; `total` is what they must add up to."""

    arrived: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0
    rotate_s: float = 0.0
    submitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True)
class _Turn:
    """All that one request holds while it runs."""

    request: Request
    prompt: Prompt
    cancelled: threading.Event
    clock: _Clock
    cache: SequenceCache
    acquired: Acquired = field(default_factory=Acquired)
    prefill: Prefill | None = None
    sequence: Sequence | None = None
    published: list[Published] = field(default_factory=list[Published])
    notes: list[str] = field(default_factory=list[str])


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
            loaded.num_layers, profile.checkpoint_layer, _inverse_frequencies(loaded).to(loaded.device)
        )
        self._templates: dict[tuple[str | None, str], PromptTemplate] = {}
        self._slots = threading.BoundedSemaphore(settings.max_sequences)
        self._running: dict[str, threading.Event] = {}
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
        turn = self._begin(request)
        try:
            self._prefill(turn)
            sequence = self._submit(turn, Sampler(request.sampling), request.sampling.max_new_tokens)
            text, reason = self._decode(turn, sequence, on_token)
            output = self._publish_output(turn, sequence, reason)
            return self._reply(turn, sequence, text, reason, output)
        finally:
            self._end(turn)

    def score(self, request: Request, continuation: tuple[int, ...]) -> tuple[float, torch.Tensor]:
        """Teacher-force `continuation` after the prompt.

        Returns:
            (seconds to the first logits, logits [1 + len(continuation), vocab] float32).
        """
        turn = self._begin(request, extra_tokens=len(continuation))
        try:
            self._prefill(turn)
            sequence = self._submit(turn, None, 0, forced=continuation)
            for event in self._events(turn, sequence):
                if isinstance(event, FinishedEvent):
                    break
            assert sequence.scored is not None  # a finished scoring sequence has its logits
            return sequence.first_logits_at - turn.clock.arrived, sequence.scored
        finally:
            self._end(turn)

    def compare(self, request: Request, reply: Reply, base_method: str, *, repeats: int = 2) -> Comparison:
        """Run the prompt of `reply` again under both methods, interleaved, and compare them.

        Args:
            request: the request that gave `reply`.
            base_method: the reference, usually "full_prefill".
            repeats: samples of each TTFT (the first is the run itself and one full run of the base).
        """
        again = replace(
            request,
            publish=False,
            only_keys=frozenset(t.key for t in reply.transfers if t.transfer.outcome is Outcome.PULLED),
            prefix_limit=reply.prefix_tokens,
        )
        other = replace(
            request, id=f"{request.id}-base", method=base_method, publish=False, prefix_limit=None
        )
        base = self.generate(other)
        samples = [(reply.ttft_s, base.ttft_s)]
        forced = base.token_ids[:31]
        forced = forced if len(base.token_ids) > 31 else base.token_ids[:-1]
        ours = theirs = torch.empty(0)
        for i in range(max(1, repeats - 1)):
            ours_s, ours = self.score(replace(again, id=f"{request.id}-again{i}"), forced)
            base_s, theirs = self.score(replace(other, id=f"{request.id}-base{i}"), forced)
            samples.append((ours_s, base_s))
        kl = self._loop.call(lambda: kl_divergence(theirs, ours))
        return Comparison(
            method=base_method,
            samples=tuple(samples),
            top1=float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
            kl_first=float(kl[0]),
            kl_mean=float(kl.mean()),
            kl_p90=float(kl.quantile(0.9)),
            positions=int(kl.shape[0]),
            base=base,
        )

    def render(self, request: Request) -> Prompt:
        """The request's token ids and spans."""
        template = self._template(request.system, request.prompt)
        return self._builder.build(template, request.values, max_new_tokens=0)

    def prepare(self, system: str | None, prompt: str) -> int:
        """Prefill the part of a template before its first slot into the prefix cache, before requests come.

        Returns:
            Number of tokens prepared.
        """
        ids = self._template(system, prompt).leading_ids
        if not ids:
            return 0
        cache = self.pool.allocate(len(ids), timeout_s=self.settings.request_timeout_s)
        try:
            plan = RectifyPlan(parse_method("full_prefill").plan([Span(0, len(ids))], {}, self.profile).spans)
            prefill = Prefill(plan, ids, cache, self._shape)
            self._loop.call(lambda: prefill.load({}))
            sequence = Sequence(
                prefill, None, 0, self._stop_ids, time.monotonic() + self.settings.request_timeout_s
            )
            self._loop.submit(sequence)
            event = sequence.events.get(timeout=self.settings.request_timeout_s)
            if isinstance(event, FailedEvent):
                raise event.error
            self._loop.call(lambda: self.prefixes.store(ids, cache))
            return len(ids)
        finally:
            self.pool.free(cache)

    def cancel(self, request_id: str) -> bool:
        """End a running request at its next step. Returns whether it was running."""
        with self._lock:
            event = self._running.get(request_id)
        if event is not None:
            event.set()
        return event is not None

    def stats(self) -> dict[str, Any]:
        """Counters and gauges of this worker."""
        c = self.engine.counters
        return {
            "weight_passes": c.weight_passes,
            "rows": c.rows,
            "row_layers": c.row_layers,
            "free_cache_blocks": self.pool.free_blocks,
            "cache_blocks": self.pool.num_blocks,
            "prefix_cache_bytes": self.prefixes.nbytes,
            "running": len(self._running),
            "segments_held": len(self.store.segments()),
        }

    def close(self) -> None:
        """Stop the step loop. Idempotent."""
        self._loop.stop()

    # -- stages --------------------------------------------------------------------------------------------

    def _begin(self, request: Request, extra_tokens: int = 0) -> _Turn:
        """Render the prompt and wait for room."""
        parse_method(request.method)
        clock = _Clock()
        answer = extra_tokens or request.sampling.max_new_tokens
        template = self._template(request.system, request.prompt)
        prompt = self._builder.build(template, request.values, max_new_tokens=answer)
        cancelled = threading.Event()
        deadline = time.monotonic() + self.settings.request_timeout_s
        with self._lock:
            self._running[request.id] = cancelled
        if not self._slots.acquire(timeout=self.settings.request_timeout_s):
            self._forget(request)
            raise CacheFull(
                f"{self.settings.max_sequences} requests are running and none ended within "
                f"{self.settings.request_timeout_s:.0f} s. Raise worker.max_sequences or add workers."
            )
        try:
            cache = self.pool.allocate(
                len(prompt.token_ids) + answer, timeout_s=deadline - time.monotonic(), cancelled=cancelled
            )
        except BaseException:
            self._slots.release()
            self._forget(request)
            raise
        clock.queue_s = time.perf_counter() - clock.arrived
        return _Turn(request, prompt, cancelled, clock, cache)

    def _end(self, turn: _Turn) -> None:
        """Give everything back, whatever happened."""
        if turn.sequence is not None and not turn.sequence.finished:
            # The loop may still be writing into the cache: let it see the cancellation first.
            turn.cancelled.set()
            self._await_exit(turn.sequence)
        self.store.release(turn.acquired)
        self.pool.free(turn.cache)
        self._slots.release()
        self._forget(turn.request)

    def _await_exit(self, sequence: Sequence, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not sequence.finished and time.monotonic() < deadline:
            time.sleep(0.005)

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._running.pop(request.id, None)

    def _template(self, system: str | None, prompt: str) -> PromptTemplate:
        key = (system, prompt)
        if key not in self._templates:
            self._templates[key] = self._builder.template(system, prompt)
        return self._templates[key]

    def _prefill(self, turn: _Turn) -> None:
        """Pull, plan, scatter; afterwards leases and landing blocks are free again."""
        request, prompt = turn.request, turn.prompt
        method = parse_method(request.method)
        wanted: dict[SegmentKey, int] = {}
        if method.uses_segments:
            for span in prompt.spans:
                if span.key is not None and (request.only_keys is None or span.key in request.only_keys):
                    wanted[span.key] = len(span)
        turn.acquired = self.store.acquire(wanted)
        plan = method.plan(prompt.spans, turn.acquired.hits, self.profile)
        begin = time.perf_counter()
        turn.prefill = self._loop.call(
            lambda: self._load(turn, plan), timeout_s=self.settings.request_timeout_s
        )
        turn.clock.rotate_s = time.perf_counter() - begin
        self.store.release(turn.acquired)

    @torch.inference_mode()
    def _load(self, turn: _Turn, plan: RectifyPlan) -> Prefill:
        """Put everything that is reused into the sequence's cache; runs on the engine's thread."""
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
            {i: pulled[s.source.segment.key] for i, s in enumerate(plan.spans) if s.source is not None}
        )
        return prefill

    def _load_prefix(self, turn: _Turn, plan: RectifyPlan) -> int:
        if not plan.use_prefix_cache:
            return 0
        leading = next((s.span.start for s in plan.spans if s.source), len(turn.prompt.token_ids))
        limit = min(leading, len(turn.prompt.token_ids) - 1)
        if turn.request.prefix_limit is not None:
            limit = min(limit, turn.request.prefix_limit)
        return self.prefixes.load(turn.prompt.token_ids, turn.cache, limit=max(0, limit))

    def _masses(self, turn: _Turn, plan: RectifyPlan) -> tuple[MassSpan, ...]:
        if not turn.request.publish:
            return ()
        return tuple(
            MassSpan(s.span.start, s.span.stop)
            for s in plan.spans
            if s.source is None and s.span.key is not None
        )

    def _submit(
        self, turn: _Turn, sampler: Sampler | None, max_new_tokens: int, forced: tuple[int, ...] = ()
    ) -> Sequence:
        assert turn.prefill is not None  # _prefill ran before
        sequence = Sequence(
            turn.prefill,
            sampler,
            max_new_tokens,
            self._stop_ids,
            deadline=time.monotonic() + self.settings.request_timeout_s,
            forced=forced,
            capture_mass=turn.request.publish,
            cancelled=turn.cancelled,
        )
        turn.clock.submitted = time.perf_counter()
        turn.sequence = sequence
        self._loop.submit(sequence)
        return sequence

    def _events(self, turn: _Turn, sequence: Sequence) -> Any:
        """The sequence's events; a failure is raised here, in the caller's thread."""
        while True:
            try:
                event = sequence.events.get(timeout=self.settings.request_timeout_s + 60)
            except Exception as error:
                raise DeadlineExceeded(f"request {turn.request.id}: the step loop went silent.") from error
            if isinstance(event, FailedEvent):
                if isinstance(event.error, RelayError):
                    raise event.error
                raise RelayError(
                    f"request {turn.request.id} failed in a step: {event.error!r}"
                ) from event.error
            yield event
            if isinstance(event, FinishedEvent):
                return

    def _decode(self, turn: _Turn, sequence: Sequence, on_token: OnToken | None) -> tuple[str, str]:
        stream = TokenStream(self.loaded.tokenizer)
        pieces: list[str] = []
        reason = ""
        for event in self._events(turn, sequence):
            if isinstance(event, FinishedEvent):
                reason = event.reason
                break
            assert isinstance(event, TokenEvent)  # failures are raised in _events
            now = time.perf_counter()
            piece = "" if event.token in self._stop_ids else stream.push(event.token)
            pieces.append(piece)
            if on_token is not None:
                on_token(event.token, piece)
            turn.clock.last_token = now
            if event.first:
                turn.clock.first_token = now
                if turn.request.publish:
                    self._remember_prompt(turn)
        pieces.append(stream.finish())
        return "".join(pieces), reason

    # -- publishing ----------------------------------------------------------------------------------------

    def _remember_prompt(self, turn: _Turn) -> None:
        """Publish shared inputs that were computed here and keep the exact prefix: after the first token."""
        assert turn.prefill is not None
        relayed = [s.span.start for s in turn.prefill.plan.spans if s.source]
        exact = min(relayed, default=len(turn.prompt.token_ids))
        self._loop.call(lambda: self.prefixes.store(turn.prompt.token_ids[:exact], turn.cache))
        for plan in turn.prefill.plan.spans:
            span = plan.span
            # A prefix-cached token has no checkpoint or mass here, so only spans that were computed whole
            # qualify. (Nor does a slot that ends the prompt, whose key covers one token more than its span.)
            whole = span.key is not None and span.key.digest == digest_tokens(turn.prompt.tokens_of(span))
            if plan.source is None and span.key and whole and span.start >= turn.prefill.prefix_tokens:
                self._publish(turn, span.key, span.start, len(span), span.slot)

    def _publish_output(self, turn: _Turn, sequence: Sequence, reason: str) -> Any:
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

    def _publish(self, turn: _Turn, key: SegmentKey, start: int, tokens: int, slot: str | None) -> None:
        producer = f"{turn.request.agent}@{self.worker}"
        variant = digest_tokens(turn.prompt.token_ids[:start]).hex()
        try:
            segment = self.store.publish(
                key,
                lambda blocks: self._loop.call(lambda: copy_out(turn.cache, start, tokens, blocks)),
                start=start,
                num_tokens=tokens,
                producer=producer,
                variant=variant,
            )
        except (ArenaFull, DirectoryUnavailable, WorkerLost) as error:
            # The answer is still right; downstream agents will compute this text themselves.
            what = f"slot {slot}" if slot else "the answer"
            log.warning("request %s: %s not published: %s", turn.request.id, what, error)
            turn.notes.append(f"{what} was not published ({type(error).__name__}): {error}")
            return
        turn.published.append(Published(slot, key, tokens, len(segment.blocks), segment.nbytes))

    # -- reporting -----------------------------------------------------------------------------------------

    def _reply(self, turn: _Turn, sequence: Sequence, text: str, reason: str, output: Any) -> Reply:
        assert turn.prefill is not None
        counts = turn.prefill.counts
        relayed = sum(len(s.span) for s in turn.prefill.plan.spans if s.source)
        prompt_tokens = len(turn.prompt.token_ids)
        return Reply(
            request_id=turn.request.id,
            agent=turn.request.agent,
            worker=self.worker,
            node=self.node,
            model=self.loaded.name,
            method=turn.request.method,
            prompt_tokens=prompt_tokens,
            fresh_tokens=prompt_tokens - relayed,
            relayed_tokens=relayed,
            prefix_tokens=turn.prefill.prefix_tokens,
            fresh_entries=counts.fresh,
            recomputed_entries=counts.rectified,
            relayed_entries=counts.relayed,
            ttft_s=turn.clock.first_token - turn.clock.arrived,
            decode_s=turn.clock.last_token - turn.clock.first_token,
            stages=_stages(turn, sequence),
            transfers=self._transfers(turn),
            fallbacks=self._fallbacks(turn),
            published=tuple(turn.published),
            token_ids=tuple(sequence.tokens),
            text=text,
            finish_reason=reason,
            output=output,
            notes=tuple(turn.notes),
        )

    def _transfers(self, turn: _Turn) -> tuple[SlotTransfer, ...]:
        slots = {s.key: s.slot or "" for s in turn.prompt.spans if s.key is not None}
        return tuple(
            SlotTransfer(slots[located.segment.key], located.segment.key, located.owner.node, transfer)
            for located, transfer in turn.acquired.transfers
        )

    def _fallbacks(self, turn: _Turn) -> tuple[Fallback, ...]:
        """Spans computed although their KV should exist. A shared input that nobody has computed yet is no
        fallback: somebody has to be first."""
        out: list[Fallback] = []
        for span in turn.prompt.spans:
            miss = turn.acquired.misses.get(span.key) if span.key is not None else None
            if miss is None or span.slot is None:
                continue
            if miss.reason == "not_found" and _is_text(turn.request.values, span.slot):
                continue
            out.append(Fallback(span.slot, str(miss.reason), miss.detail, len(span)))
            log.warning(
                "request %s computes %d tokens of slot %s itself: %s",
                turn.request.id,
                len(span),
                span.slot,
                miss.reason,
            )
        return tuple(out)


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(softmax(reference) || softmax(other)) in nats per row; logits [rows, vocab] -> [rows] float32."""
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0).float()


def _stages(turn: _Turn, sequence: Sequence) -> StageTimes:
    """Share the time between submission and first logits out by (row, layer) entries."""
    clock, acquired = turn.clock, turn.acquired
    fresh, rectified = sequence.prefill_entries
    compute = max(0.0, sequence.first_logits_at - clock.submitted)
    # What was not spent in a step of this request was waiting for steps of others.
    waited = max(0.0, compute - sequence.prefill_seconds)
    busy = compute - waited
    share = rectified / max(1, fresh + rectified)
    total = clock.first_token - clock.arrived
    known = clock.queue_s + acquired.lookup_s + acquired.lease_s + acquired.pull_s + clock.rotate_s + compute
    return StageTimes(
        queue_s=clock.queue_s + waited,
        lookup_s=acquired.lookup_s,
        lease_s=acquired.lease_s,
        pull_s=acquired.pull_s,
        rotate_s=clock.rotate_s,
        rectify_s=busy * share,
        prefill_s=busy * (1 - share),
        first_token_s=max(0.0, total - known),
    )


def _is_text(values: Mapping[str, Any], slot: str) -> bool:
    return values[slot].token_ids is None


def _inverse_frequencies(loaded: LoadedModel) -> torch.Tensor:
    """[L, rotary_dim / 2], or [1, rotary_dim / 2] when all layers share one RoPE."""
    rows = torch.stack([inverse_frequencies(loaded.model, i) for i in range(loaded.num_layers)])
    return rows[:1] if bool((rows == rows[:1]).all()) else rows


__all__ = ["AgentWorker", "kl_divergence"]
