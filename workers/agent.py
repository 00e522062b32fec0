"""The life of one request on a worker:

    prompt to spans -> admission -> lookup, lease, pull -> plan -> rotate + scatter -> prefill rows in shared
    steps -> first token -> publish shared inputs -> decode -> publish the answer -> release, on every path

Decisions live elsewhere: spans in `segment.py`, room in `admission.py`, pulls and plans in `loading.py` and
`methods/`, rows in `prefill.py`, batching in `scheduler.py`, what is left behind in `publishing.py`, bytes in
`store.py`. This module only puts them in order. It knows nothing of Ray.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from transport.errors import CacheFull, RelayError
from transport.types import NodeId, WorkerId
from workers.admission import Admission, Arrival
from workers.ahead_choice import Coming
from workers.anchoring import Anchoring, template_contexts
from workers.answers import Answers, OnToken
from workers.break_even import Speeds
from workers.budget import Urgency
from workers.compare import compare_methods
from workers.cores import CoreShare
from workers.engine import Engine
from workers.heal import Heal, chunk_rows
from workers.kv_cache import CachePool
from workers.loading import Loading, prefill_model
from workers.messages import Comparison, Draft, Reply, Request, ShadowCheck
from workers.methods import parse_reuse
from workers.methods.base import HealMode, ModelProfile, Span
from workers.methods.kvcomm import KVComm
from workers.model import LoadedModel
from workers.prefix_cache import PrefixCache
from workers.preparing import Preparing
from workers.publishing import Publishing, input_masses
from workers.pulled import SegmentLost
from workers.sampling import Sampler
from workers.scheduler import Sequence, StepLoop, decoded_mass
from workers.segment import Prompt, PromptBuilder, PromptTemplate, SlotValue, open_key
from workers.settings import WorkerSettings
from workers.shadow import Evidence, EvidenceBox, judge, relayed_positions
from workers.store import SegmentStore
from workers.text_encoding import special_token_ids, stop_token_ids
from workers.tokens import TokenStream
from workers.turn import Scored, Turn, build_scored

log = logging.getLogger(__name__)

T = TypeVar("T")


_MOST_EVIDENCE = 16
"""Answered requests that can wait for a shadow check."""
_MOST_TEMPLATES = 256
"""Parsed templates that are kept. A pipeline has a handful; every chat of a service is one of its own."""


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
        cores: CoreShare | None = None,
    ) -> None:
        self.worker = worker
        self.node = node
        self.loaded = loaded
        self.profile = profile
        self.settings = settings
        self.engine = Engine(loaded.model, cores)
        self.pool = CachePool(loaded.layout, settings.cache_tokens, loaded.device)
        self.prefixes = PrefixCache(settings.prefix_cache_bytes)
        self.store = store
        self._loop = StepLoop(
            self.engine,
            max_rows=settings.max_rows_per_step,
            checkpoint_layer=profile.checkpoint_layer,
            ahead_share=settings.ahead_share,
        )
        self._builder = PromptBuilder(
            loaded.tokenizer,
            loaded.space,
            min_segment_tokens=settings.min_segment_tokens,
            max_context=loaded.max_context,
        )
        self._stop_ids = stop_token_ids(loaded.tokenizer, getattr(loaded.model, "generation_config", None))
        self._special_ids = special_token_ids(loaded.tokenizer)
        shape = prefill_model(loaded, profile)
        self.anchors = Anchoring(
            store,
            loaded.layout,
            loaded.space,
            shape.inv_freq,
            settings.anchor_bytes,
            self.on_engine,
            producer=str(worker),
        )
        self._templates: OrderedDict[tuple[object, ...], PromptTemplate] = OrderedDict()
        self._templates_lock = threading.Lock()
        self._admission = Admission(
            self.pool, max_sequences=settings.max_sequences, timeout_s=settings.request_timeout_s
        )
        self._loading = Loading(
            worker,
            shape,
            profile,
            store,
            self.prefixes,
            self.anchors,
            self._loop,
            template_of=self._template,
            break_even=settings.break_even,
        )
        self._publishing = Publishing(
            worker,
            loaded.space,
            store,
            self.prefixes,
            self.anchors,
            wire=loaded.layout.wire if loaded.layout.lossy else "",
            min_segment_tokens=settings.min_segment_tokens,
            on_engine=self.on_engine,
        )
        self._evidence = EvidenceBox(_MOST_EVIDENCE, settings.shadow_bytes)
        self._answers = Answers(
            worker,
            node,
            loaded,
            self._publishing,
            self._evidence,
            self.speeds,
            stop_ids=self._stop_ids,
            special_ids=self._special_ids,
            keep_evidence_s=settings.request_timeout_s,
        )
        self._preparing = Preparing(
            self._admission,
            self.prefixes,
            self._prefill,
            timeout_s=settings.request_timeout_s,
            shared_cores=cores.beside_others if cores else lambda: None,
        )

    # -- calls ---------------------------------------------------------------------------------------------

    def generate(self, request: Request, on_token: OnToken | None = None) -> Reply:
        """Answer one request.

        Args:
            request: what to do.
            on_token: called for every token, on this thread.

        Raises:
            ConfigError: template, values, method or length do not fit.
            DeadlineExceeded, CacheFull: out of time or memory. Cancelled: `cancel` was called.
        """
        turn = self._begin(request, request.sampling.max_new_tokens)
        try:
            self._loading.load(turn, pipelined=True)
            while True:
                try:
                    return self._answers.answer(turn, self._start(turn), on_token)
                except SegmentLost:  # before the first token; each time a segment less
                    self._loading.load_again(turn)
        finally:
            self._end(turn)

    def generate_all(self, requests: Iterable[Request]) -> list[Reply]:
        """Answer several requests in steps that they share from the first one on.

        Which rows meet in a step does not depend on how threads run, so the same requests give the same bits.
        They begin when there is room for all of them; times to first token include that wait, and the one
        for each other. Other requests go on meanwhile.

        Raises:
            CacheTooSmall: together they are more than the cache or `max_sequences` holds. Else as `generate`.
        """
        turns = self._admit([self._arrival(r, r.sampling.max_new_tokens) for r in requests])
        with ExitStack() as held:
            for turn in turns:
                held.callback(self._end, turn)
            for turn in turns:
                self._loading.load(turn)
            with self._loop.held():
                sequences = [self._start(turn) for turn in turns]
            return [self._answers.answer(t, s, None) for t, s in zip(turns, sequences, strict=True)]

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
        turn.urgency = Urgency.IDLE
        try:
            self._loading.load(turn)
            sequence = self._submit(turn, None, 0, forced=answer[: count - 1])
            self._answers.wait(turn, sequence)
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
            self._loading.load(turn)
            sequence = self._submit(turn, None, 0, forced=answer)
            self._answers.wait(turn, sequence)
            turn.clock.first_token = turn.clock.last_token = sequence.first_logits_at
            if request.publish:
                self._publishing.remember(turn)
            sequence.tokens = list(answer)
            stream = TokenStream(self.loaded.tokenizer)
            text = "".join(stream.push(i) for i in answer if i not in self._stop_ids) + stream.finish()
            reason = "stop" if answer[-1] in self._stop_ids else "length"
            return self._answers.reply(turn, sequence, text, reason)
        finally:
            self._end(turn)

    def score(self, request: Request, continuation: tuple[int, ...]) -> Scored:
        """Teacher-force `continuation` after the prompt: the distribution before each of its tokens, and
        after."""
        turn = self._begin(request, len(continuation))
        try:
            self._loading.load(turn)
            sequence = self._submit(turn, None, 0, forced=continuation)
            self._answers.wait(turn, sequence)
            if request.publish:
                self._publishing.learn_anchors(turn)
            return build_scored(turn, sequence)
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
        return self._builder.build(self._template(request), request.values, max_new_tokens=0)

    def prepare(self, system: str | None, prompt: str) -> int:
        """Prefill the part of a template before its first slot into the prefix cache, before requests come.

        Returns:
            Number of tokens prepared.
        """
        request = Request(
            id=f"prepare-{uuid.uuid4().hex[:8]}",
            agent="",
            prompt=prompt,
            system=system,
            method="full_prefill",
        )
        template = self._template(request)
        self.anchors.sync(KVComm(), template_contexts(template), ())
        ids = template.leading_ids
        if not ids:
            return 0
        whole = Prompt(ids, (Span(0, len(ids)),))
        (turn,) = self._admission.admit([Arrival(request, parse_reuse(request.method), whole, 0)])
        try:
            self._loading.load(turn)
            self._answers.wait(turn, self._submit(turn, None, 0))
            self.on_engine(lambda: self.prefixes.store(ids, turn.cache))
            return len(ids)
        finally:
            self._end(turn)

    def prepare_ahead(self, draft: Draft) -> int:
        """Compute what is certain of a request's prompt before the request can be made, while nobody else
        wants the engine. `generate` of the same id begins with it, whatever its method: it is exact.

        Returns:
            How many leading prompt tokens stand ready; 0 where there is no room, or the request is here.

        Raises:
            ConfigError: template or values do not fit. RelayError: the engine failed.
        """
        request = replace(draft.request, shadow_tokens=0)  # there is no answer yet that could be judged
        template = self._template(request)
        most = request.sampling.max_new_tokens + draft.room_tokens
        whole = self._builder.build(template, request.values, most, request.tenant)
        # What is going to be relayed is pulled as it is published, and not computed.
        self._follow(request, draft.follow)
        certain = {**request.values, **dict.fromkeys(draft.follow, SlotValue(token_ids=()))}
        known = self._builder.known(template, certain, draft.open_slots | draft.follow.keys())
        relayable = not draft.follow and parse_reuse(request.method, self.profile).method.uses_segments
        coming = Coming(draft.room_tokens, draft.open_slots) if relayable else None
        arrival = Arrival(request, parse_reuse("exact_prefix"), whole, most)
        if not known:
            return 0
        reason = "relay: as asked; what is written is pulled as it is published" if draft.follow else ""
        return self._preparing.advance(
            arrival,
            known,
            coming,
            draft.group,
            reason=reason,
            on_relay=lambda: self._follow(request, draft.may_follow),
        )

    def _follow(self, request: Request, writers: Mapping[str, str]) -> None:
        keys = [open_key(self.loaded.space, request.tenant, writer) for writer in writers.values()]
        self.store.following.follow(request.id, keys, self.settings.request_timeout_s)

    def cancel(self, request_id: str) -> bool:
        """End a request at its next step, or as soon as it arrives, and what was prepared for it. Returns
        whether it was running."""
        self.store.following.leave(request_id)
        prepared = self._preparing.discard(request_id)
        return self._admission.cancel(request_id) or prepared

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
            "running": self._admission.running,
            "segments_held": len(self.store.segments()),
            "fallbacks": self._loading.fallbacks,
            "healed_entries": self._loop.healed_entries,
            "healing_steps": self._loop.healing_steps,
            "rode_rows": self._loop.rode_rows,
            "steps_given_up": self._loop.steps_given_up,
            "evidence_bytes": self._evidence.nbytes,
            "unpublished": self._publishing.unpublished,
            "memory": self.store.stats(),
            **self._preparing.stats(),
            **self.anchors.pool.stats(),
        }

    @property
    def speeds(self) -> Speeds:
        """What pulls and prefills of this worker took so far."""
        return self._loading.speeds

    def close(self) -> None:
        """Stop the step loop. Idempotent."""
        self._loop.stop()

    # -- the beginning and the end of a turn ---------------------------------------------------------------

    def _begin(self, request: Request, answer_tokens: int, background_s: float | None = None) -> Turn:
        """Render the prompt and wait for room. background_s: for one that must not be in anybody's way, its
        deadline; it does not wait."""
        arrival = self._arrival(request, answer_tokens)
        if background_s is not None:
            return self._admission.admit([arrival], background_s)[0]
        turn = self._preparing.take(arrival) or self._admit([arrival])[0]
        turn.ahead = self._preparing.why(request.id)
        return turn

    def _admit(self, arrivals: list[Arrival]) -> list[Turn]:
        """Wait for room; what is only prepared makes room first."""
        self._preparing.sweep()
        while self._preparing.stats()["preparations"]:
            try:
                return self._admission.admit(arrivals, self.settings.request_timeout_s)
            except CacheFull:
                self._preparing.make_room()
        return self._admission.admit(arrivals)

    def _arrival(self, request: Request, answer_tokens: int) -> Arrival:
        reuse = parse_reuse(request.method, self.profile)
        template = self._template(request)
        prompt = self._builder.build(template, request.values, answer_tokens, request.tenant)
        return Arrival(request, reuse, prompt, answer_tokens)

    def _template(self, request: Request) -> PromptTemplate:
        key = (request.system, request.prompt, request.messages, request.raw)
        with self._templates_lock:
            if key in self._templates:
                self._templates.move_to_end(key)
                return self._templates[key]
        if request.messages:
            template = self._builder.chat_template(request.messages)
        elif request.raw:
            template = self._builder.raw_template(request.prompt)
        else:
            template = self._builder.template(request.system, request.prompt)
        with self._templates_lock:
            self._templates[key] = template
            while len(self._templates) > _MOST_TEMPLATES:
                self._templates.popitem(last=False)
        return template

    def _end(self, turn: Turn) -> None:
        """Give everything back, whatever happened."""
        try:
            self._publishing.end(turn)
            self._loading.measure(turn)
            self.store.release(turn.acquired)
            self.store.following.leave(turn.request.id)
        finally:
            self._admission.end(turn)

    # -- decode --------------------------------------------------------------------------------------------

    def _heal(self, turn: Turn) -> Heal | None:
        """What makes the turn's cache exact after its first token, if that was asked for."""
        assert turn.prefill is not None  # loaded before
        reuse, publish = turn.reuse, turn.request.publish
        if reuse.heal is HealMode.OFF:
            return None
        ids = turn.prompt.token_ids
        masses = (*input_masses(turn.prefill.plan), decoded_mass(turn.prefill))
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
        assert turn.prefill is not None  # loaded before
        # One layer where deviation is detected and the last one, where it has added up.
        layers = sorted({self.profile.detection_layer, self.loaded.num_layers - 1})
        return Evidence(turn.request.shadow_tokens, layers, relayed_positions(turn.prefill.plan))

    def _submit(
        self,
        turn: Turn,
        sampler: Sampler | None,
        max_new_tokens: int,
        forced: tuple[int, ...] = (),
    ) -> Sequence:
        assert turn.prefill is not None  # loaded before
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
            urgency=turn.urgency,
            group=turn.group,
            cancelled=turn.cancelled,
        )
        turn.clock.submitted = time.perf_counter()
        self._loop.submit(sequence)
        turn.sequence = sequence
        # The engine computes meanwhile; the leases are a call to the directory away.
        self.store.release_leases(turn.acquired)
        return sequence

    def _start(self, turn: Turn) -> Sequence:
        """Submit a turn that decodes."""
        sampling = turn.request.sampling
        sampler = Sampler(sampling, withheld=self._stop_ids | self._special_ids)
        return self._submit(turn, sampler, sampling.max_new_tokens)

    def _prefill(self, turn: Turn) -> None:
        """Compute the turn's prompt while nobody else wants the engine."""
        self._loading.load(turn)
        self._answers.wait(turn, self._submit(turn, None, 0))
