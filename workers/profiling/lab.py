"""The profiler's bench: one model with the product's engine, step loop, cache pool and prefill executor, and
no transport.

    answers()   decode many prompts at once after a full prefill, as upstream agents do
    segment()   what an upstream agent would publish of its answer, with a checkpoint at every layer
    reference() what full prefill makes of a downstream prompt: KV of the spans, logits of its continuation
    run()       a downstream prompt under method texts, several of them sharing each step

All tensor work runs on the step loop's thread (see `workers/scheduler.py` for why). Knows nothing of texts,
tasks or statistics.
"""

from __future__ import annotations

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import torch

from transport.errors import ConfigError, RelayError
from transport.types import Incarnation, Located, NodeId, Owner, Segment, SegmentKey, WorkerId
from workers import kernels
from workers.costs import full_prefill_flops
from workers.engine import Engine, Part
from workers.kv_cache import CachePool, SequenceCache, copy_out
from workers.layout import BlockViews, KVLayout
from workers.methods import parse_reuse
from workers.methods.base import ModelProfile, RectifyPlan, SpanPlan
from workers.prefill import Prefill, PrefillModel
from workers.pulled import PulledSegment
from workers.sampling import Sampler
from workers.scheduler import FailedEvent, FinishedEvent, StepLoop
from workers.scheduler import Sequence as LoopSequence
from workers.segment import Prompt
from workers.settings import SamplingSettings

T = TypeVar("T")

BATCH = 16
"""Prompts decoded at once."""

_GROUP_TOKENS = 4096
"""Prompt tokens of the candidates that share a step."""

_DEADLINE_S = 3600.0
_OWNER = Owner(WorkerId("upstream"), Incarnation(1), NodeId("profiler"))


@dataclass(frozen=True, slots=True)
class Upstream:
    """An upstream answer as published, and what only the profiler knows of it.

    Attributes:
        located: what a directory would say of it.
        blocks: its bytes, as `copy_out` wrote them.
        inputs: [layers, tokens, hidden_size]; the input of every layer, of which a product segment carries
            one. Row 0 is zero: a token that joins at layer 0 starts from its embedding.
    """

    located: Located
    blocks: tuple[BlockViews, ...]
    inputs: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.located.segment.num_tokens

    def gather(self, part: str) -> torch.Tensor:
        """The field "mass" or "checkpoint" of all tokens, as the product reads it."""
        return PulledSegment(self.blocks, self.num_tokens, self.located.segment.start).gather(part)

    def pulled(self, checkpoint_layer: int) -> PulledSegment:
        """As a worker whose layout carries `checkpoint_layer` would have pulled it."""
        at, blocks = 0, []
        for views in self.blocks:
            size = views.checkpoint.shape[0]
            checkpoint = torch.zeros_like(views.checkpoint)
            rows = self.inputs[checkpoint_layer, at : at + size]
            checkpoint[: rows.shape[0]] = rows
            blocks.append(dataclasses.replace(views, checkpoint=checkpoint))
            at += size
        return PulledSegment(tuple(blocks), self.num_tokens, self.located.segment.start)


@dataclass(frozen=True, slots=True)
class Answer:
    """A decoded answer, while its cache lives. reason: "stop" or "length"."""

    prompt: Prompt
    tokens: tuple[int, ...]
    reason: str
    cache: SequenceCache


@dataclass(frozen=True, slots=True)
class Reference:
    """A downstream prompt under full prefill.

    Attributes:
        prompt: its tokens and spans.
        upstream: the segments of its relayed spans, by key.
        continuation: full prefill's own greedy continuation.
        logits: [positions, vocab] float32 before each of its tokens.
        prefix: [layers, 2, kv_heads, tokens, head_dim]; exact KV of what stands before the first relayed
            span, which a worker has in its prefix cache.
        deviations: per relayed span, in order: [3, layers, tokens] float32 on the CPU; 1 - cos of values, of
            keys at their new positions, and of layer inputs, between the upstream's and full prefill's.
        masses: per relayed span [tokens]: the context mass that was published.
    """

    prompt: Prompt
    upstream: dict[SegmentKey, Upstream]
    continuation: tuple[int, ...]
    logits: torch.Tensor
    prefix: torch.Tensor
    deviations: tuple[torch.Tensor, ...]
    masses: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A method text on one prompt.

    Attributes:
        start, end: layers [start, end) of its band; (0, 0) when it recomputes nothing.
        logits: [positions, vocab] float32, teacher-forced on the reference's continuation.
        reuse: share of the relayed spans' entries that were not recomputed.
        flops_predicted, flops: of this prompt, the prefix given.
        flops_full: of a full prefill of this prompt.
    """

    text: str
    start: int
    end: int
    logits: torch.Tensor
    reuse: float
    flops_predicted: float
    flops: float
    flops_full: float


class Lab:
    """Use as a context manager; leaving it stops the loop's thread.

    Args:
        engine: drives the model.
        layout: of its KV blocks; its own checkpoint layer does not matter here.
        shape: what the executor must know of the model; likewise.
        stop_ids: tokens that end an answer.
        cache_tokens: size of the KV pool.
        max_rows: cap on the rows of one step.
    """

    def __init__(
        self,
        engine: Engine,
        layout: KVLayout,
        shape: PrefillModel,
        *,
        stop_ids: frozenset[int],
        cache_tokens: int,
        max_rows: int = 1024,
    ) -> None:
        self.engine = engine
        self.layout = layout
        self.shape = shape
        self.num_layers = layout.num_layers
        self.cache_tokens = cache_tokens
        self._stop_ids = stop_ids
        self._max_rows = max_rows
        self._pool = CachePool(layout, cache_tokens, engine.device)
        self._loop = StepLoop(engine, max_rows=max_rows, checkpoint_layer=layout.checkpoint_layer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.stop()

    # -- upstream ------------------------------------------------------------------------------------------

    @contextmanager
    def answers(
        self, prompts: Sequence[Prompt], max_new_tokens: int, min_new_tokens: int = 0
    ) -> Iterator[list[Answer]]:
        """Decode greedily after full prefills, all prompts in shared steps from the first one on, so that the
        result does not depend on timing. The caches live until the context ends.

        Raises:
            CacheTooSmall, CacheFull: the prompts do not fit `cache_tokens`.
        """
        sampling = SamplingSettings(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
        caches: list[SequenceCache] = []
        try:
            for prompt in prompts:
                tokens = len(prompt) + max_new_tokens
                caches.append(self._pool.allocate(tokens, timeout_s=1.0))
            sequences = [self._sequence(p, c, sampling) for p, c in zip(prompts, caches, strict=True)]
            with self._loop.held():
                for sequence in sequences:
                    self._loop.submit(sequence)
            reasons = [_wait(s) for s in sequences]
            yield [
                Answer(p, tuple(s.tokens), r, c)
                for p, s, r, c in zip(prompts, sequences, reasons, caches, strict=True)
            ]
        finally:
            for cache in caches:
                self._pool.free(cache)

    def batches(self, prompts: Sequence[Prompt], max_new_tokens: int) -> Iterator[list[int]]:
        """Indices of prompts that fit the cache together, in order, at most `BATCH` at once."""
        batch: list[int] = []
        used = 0
        for i, prompt in enumerate(prompts):
            need = self._extent(len(prompt) + max_new_tokens)
            if batch and (len(batch) == BATCH or used + need > self.cache_tokens):
                yield batch
                batch, used = [], 0
            batch.append(i)
            used += need
        if batch:
            yield batch

    def _extent(self, tokens: int) -> int:
        """Tokens that a sequence takes of the pool: whole blocks."""
        return self.layout.blocks_for(tokens) * self.layout.block_tokens

    def segment(self, answer: Answer, key: SegmentKey, tokens: int) -> Upstream:
        """What the upstream agent publishes: the first `tokens` tokens of its answer, whose KV decoding left
        in its cache."""
        return self._on_engine(lambda: self._segment(answer, key, tokens))

    def _segment(self, answer: Answer, key: SegmentKey, tokens: int) -> Upstream:
        start = len(answer.prompt)
        blocks = tuple(self._empty_block() for _ in range(self.layout.blocks_for(tokens)))
        copy_out(answer.cache, start, tokens, blocks)
        # After the copy: this writes the same entries again, equal but for rounding.
        inputs = self._layer_inputs(answer.cache, start, answer.tokens[:tokens])
        located = Located(Segment(key, tokens, start, (), layout=self.layout.fingerprint), _OWNER)
        return Upstream(located, blocks, inputs)

    def _empty_block(self) -> BlockViews:
        payload = torch.zeros(self.layout.block_nbytes, dtype=torch.uint8, device=self.engine.device)
        return self.layout.views(payload)

    def _layer_inputs(self, cache: SequenceCache, start: int, ids: Sequence[int]) -> torch.Tensor:
        """[layers, tokens, hidden_size] of tokens whose left context and own KV are in the cache."""
        count = len(ids)
        positions, token_ids = torch.arange(start, start + count), torch.tensor(ids)
        states: list[torch.Tensor] = []
        hidden: torch.Tensor | None = None
        for layer in range(self.num_layers - 1):
            part = Part(
                cache=cache,
                positions=positions,
                token_ids=token_ids,
                enter=torch.full((count,), layer),
                exit=torch.full((count,), layer + 1),
                hidden=hidden,
                keep_hidden=True,
            )
            hidden = self.engine.step([part])[0].hidden
            assert hidden is not None  # asked for
            states.append(hidden)
        zero = torch.zeros((count, self.layout.hidden_size), dtype=cache.kv.dtype, device=cache.kv.device)
        return torch.stack([zero, *states])

    # -- downstream ----------------------------------------------------------------------------------------

    def reference(self, answer: Answer, upstream: dict[SegmentKey, Upstream], positions: int) -> Reference:
        """Compare full prefill's cache of a downstream prompt with what its upstream agents published.

        Args:
            answer: of the downstream agent, under full prefill.
            upstream: segments of the prompt's relayed spans.
            positions: teacher-forced positions that are compared, if the answer is that long.
        """
        return self._on_engine(lambda: self._reference(answer, upstream, positions))

    def _reference(self, answer: Answer, upstream: dict[SegmentKey, Upstream], positions: int) -> Reference:
        prompt, cache = answer.prompt, answer.cache
        forced = answer.tokens[:positions]
        # The last prompt token, whose logits give the first of them, is fed again.
        logits = self._forced(
            [(cache, len(prompt) - 1, (prompt.token_ids[-1], *forced[:-1]))],
        )[0]
        relayed = [s for s in prompt.spans if s.key in upstream]
        deviations, masses = [], []
        for span in relayed:
            assert span.key is not None  # only keyed spans are relayed
            source, count = upstream[span.key], len(span)
            size = self.layout.block_tokens
            kv = torch.cat([b.kv.take(size) for b in source.blocks], dim=3)[:, :, :, :count]
            inputs = self._layer_inputs(cache, span.start, prompt.tokens_of(span))
            deviations.append(
                self._deviations(kv, source, cache.kv[:, :, :, span.start : span.stop], inputs, span.start)
            )
            masses.append(source.gather("mass")[:count].cpu())
        lead = relayed[0].start
        return Reference(
            prompt,
            upstream,
            forced,
            logits,
            cache.kv[:, :, :, :lead].clone(),
            tuple(deviations),
            tuple(masses),
        )

    def _deviations(
        self, stored: torch.Tensor, source: Upstream, full: torch.Tensor, inputs: torch.Tensor, start: int
    ) -> torch.Tensor:
        """[3, layers, tokens]: of values, keys and layer inputs. stored, full: [layers, 2, kv_heads, tokens,
        head_dim]; inputs: [layers, tokens, hidden_size] of full prefill; start: the span's new position."""
        keys = torch.empty_like(stored[:, 0])
        cos, sin = kernels.rotation(self.shape.inv_freq, start - source.located.segment.start)
        kernels.rotate_keys(stored[:, 0], cos, sin, keys)
        layers = range(self.num_layers)
        values = [kernels.value_deviation(stored[i, 1], full[i, 1]) for i in layers]
        moved = [kernels.value_deviation(keys[i], full[i, 0]) for i in layers]
        count = inputs.shape[1]
        # The same measure, with one head as wide as the hidden state.
        states = [kernels.value_deviation(source.inputs[i, None, :count], inputs[i, None]) for i in layers]
        # At layer 0 both are the embedding.
        states[0] = torch.zeros_like(states[0])
        return torch.stack([torch.stack(s) for s in (values, moved, states)]).clamp_min_(0).cpu()

    # -- candidates ----------------------------------------------------------------------------------------

    def run(self, reference: Reference, texts: Sequence[str], profile: ModelProfile) -> list[Outcome]:
        """Prefill a downstream prompt under every method text and score the reference's continuation.

        Args:
            profile: fills the parameters that the texts leave out.

        Raises:
            ConfigError: a text does not parse or cannot be run without transport.
        """
        tokens = self._extent(len(reference.prompt) + len(reference.continuation))
        size = max(1, min(BATCH, min(_GROUP_TOKENS, self.cache_tokens) // tokens))
        out: list[Outcome] = []
        for at in range(0, len(texts), size):
            group = texts[at : at + size]
            out += self._on_engine(lambda g=group: self._run(reference, g, profile))
        return out

    def _run(self, reference: Reference, texts: Sequence[str], profile: ModelProfile) -> list[Outcome]:
        plans = [self._plan(reference, text, profile) for text in texts]
        tokens = len(reference.prompt) + len(reference.continuation)
        caches: list[SequenceCache] = []
        try:
            for _ in texts:
                caches.append(self._pool.allocate(tokens, timeout_s=1.0))
            prefills = [self._load(reference, p, c) for p, c in zip(plans, caches, strict=True)]
            self._compute(prefills)
            forced = reference.continuation[:-1]
            rest = self._forced([(c, len(reference.prompt), forced) for c in caches])
            return [
                self._outcome(text, prefill, following)
                for text, prefill, following in zip(texts, prefills, rest, strict=True)
            ]
        finally:
            for cache in caches:
                self._pool.free(cache)

    def _compute(self, prefills: Sequence[Prefill]) -> None:
        """Run prefills to their first logits in shared steps."""
        while waiting := [p for p in prefills if not p.finished]:
            parts = [p.next_part(self._max_rows) for p in waiting]
            for prefill, part, result in zip(waiting, parts, self.engine.step(parts), strict=True):
                prefill.done(part, result)

    def _plan(self, reference: Reference, text: str, profile: ModelProfile) -> RectifyPlan:
        method = parse_reuse(text, profile).method
        hits = {key: source.located for key, source in reference.upstream.items()}
        plan = method.plan(reference.prompt.spans, hits, profile)
        if any(getattr(s, "correction", None) is not None for s in plan.spans):
            raise ConfigError(
                f'"{text}" corrects KV with what it learned from earlier requests; the profiler measures '
                "methods that depend on the prompt alone. Leave it out of the candidates."
            )
        return plan

    def _load(self, reference: Reference, plan: RectifyPlan, cache: SequenceCache) -> Prefill:
        prefix = reference.prefix.shape[3] if plan.use_prefix_cache else 0
        cache.kv[:, :, :, :prefix] = reference.prefix[:, :, :, :prefix]
        start = band_of(plan.spans)[0]
        shape = dataclasses.replace(self.shape, checkpoint_layer=start)
        prefill = Prefill(plan, reference.prompt.token_ids, cache, shape, prefix_tokens=prefix)
        prefill.load(
            {
                i: reference.upstream[s.span.key].pulled(start)
                for i, s in enumerate(plan.spans)
                if s.source is not None and s.span.key is not None
            }
        )
        return prefill

    def _forced(self, feeds: Sequence[tuple[SequenceCache, int, Sequence[int]]]) -> list[torch.Tensor]:
        """[tokens, vocab] after each of the fed tokens: (cache, position of the first, ids)."""
        if not feeds[0][2]:
            return [torch.empty(0, 0) for _ in feeds]
        parts = [
            Part(
                cache=cache,
                positions=torch.arange(start, start + len(ids)),
                token_ids=torch.tensor(ids),
                logits_rows=tuple(range(len(ids))),
            )
            for cache, start, ids in feeds
        ]
        return [r.logits for r in self.engine.step(parts)]

    def _outcome(self, text: str, prefill: Prefill, following: torch.Tensor) -> Outcome:
        assert prefill.logits is not None  # it is finished
        start, end = band_of(prefill.plan.spans)
        logits = prefill.logits[None]
        return Outcome(
            text=text,
            start=start,
            end=end,
            logits=torch.cat([logits, following]) if following.numel() else logits,
            reuse=1.0 if prefill.counts.reuse is None else prefill.counts.reuse,
            flops_predicted=prefill.predicted_flops,
            flops=prefill.actual_flops,
            flops_full=full_prefill_flops(self.shape.costs, prefill.num_tokens),
        )

    # -- threads -------------------------------------------------------------------------------------------

    def _sequence(self, prompt: Prompt, cache: SequenceCache, sampling: SamplingSettings) -> LoopSequence:
        plan = RectifyPlan(tuple(SpanPlan(s) for s in prompt.spans), use_prefix_cache=False)
        prefill = Prefill(plan, prompt.token_ids, cache, self.shape)
        prefill.load({})
        return LoopSequence(
            prefill=prefill,
            sampler=Sampler(sampling, self._stop_ids),
            max_new_tokens=sampling.max_new_tokens,
            stop_ids=self._stop_ids,
            deadline=time.monotonic() + _DEADLINE_S,
        )

    def _on_engine(self, job: Callable[[], T]) -> T:
        def guarded() -> T:
            with torch.inference_mode():
                return job()

        return self._loop.call(guarded, timeout_s=_DEADLINE_S)


def band_of(spans: Sequence[SpanPlan]) -> tuple[int, int]:
    """Layers [start, end) over the relayed spans that recompute anything; (0, 0) when none does.

    Raises:
        ConfigError: two spans join at different checkpoints; a segment carries one.
    """
    bands = [s.band for s in spans if s.source is not None and s.band[1] > s.band[0]]
    starts = {a for a, _ in bands if a > 0}
    if len(starts) > 1:
        raise ConfigError(f"a plan joins at layers {sorted(starts)}, but a segment carries one checkpoint.")
    return (starts.pop() if starts else 0, max((b for _, b in bands), default=0))


def _wait(sequence: LoopSequence) -> str:
    """Why the sequence ended. Raises RelayError when it failed."""
    while True:
        try:
            event = sequence.events.get(timeout=_DEADLINE_S)
        except queue.Empty:
            raise RelayError("the engine has been silent for an hour while it decoded answers.") from None
        if isinstance(event, FailedEvent):
            raise RelayError(f"decoding an answer failed: {event.error}") from event.error
        if isinstance(event, FinishedEvent):
            return event.reason
