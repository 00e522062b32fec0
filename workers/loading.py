"""From a rendered prompt to a sequence's cache that holds all that is reused:

    look-up, lease, pull -> plan -> rotate and scatter -> rows left to compute (`Prefill`)

Spans that are predicted to be computed faster than pulled are left out of the pull; what went wrong with a
segment is counted, and its text computed. It measures what all of that took, for later predictions. It knows
nothing of slots, steps or answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch

from transport.errors import DeadlineExceeded
from transport.types import Located, Outcome, SegmentKey, WorkerId
from workers.ahead_choice import LITTLE_ROWS, WORTH_A_PULL
from workers.anchoring import Anchoring
from workers.anchors import Match
from workers.break_even import Speeds, estimate_relays
from workers.budget import Urgency
from workers.costs import model_costs
from workers.heal import first_stale
from workers.messages import Request
from workers.methods.base import ModelProfile, RectifyPlan, Span
from workers.methods.kvcomm import KVComm
from workers.model import LoadedModel
from workers.prefill import Prefill, PrefillModel
from workers.prefix_cache import PrefixCache
from workers.publishing import input_masses
from workers.pulled import PulledSegment, SegmentLost
from workers.relayable import inverse_frequencies
from workers.scheduler import StepLoop
from workers.segment import PromptTemplate
from workers.store import SegmentStore
from workers.turn import Turn, fallbacks, log_costs

log = logging.getLogger(__name__)


class Loading:
    """Loads for the requests of one worker.

    Args:
        worker: where that is.
        model: what the executor needs to know of it.
        loop: whose thread does tensor work.
        template_of: the parsed template of a request.
        break_even: leave out pulls that are predicted not to pay.

    Attributes:
        speeds: what pulls and prefills took so far.
    """

    def __init__(
        self,
        worker: WorkerId,
        model: PrefillModel,
        profile: ModelProfile,
        store: SegmentStore,
        prefixes: PrefixCache,
        anchors: Anchoring,
        loop: StepLoop,
        *,
        template_of: Callable[[Request], PromptTemplate],
        break_even: bool,
    ) -> None:
        self.speeds = Speeds()
        self._worker = worker
        self._model = model
        self._profile = profile
        self._store = store
        self._prefixes = prefixes
        self._anchors = anchors
        self._loop = loop
        self._template_of = template_of
        self._break_even = break_even
        self._fallbacks: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def fallbacks(self) -> dict[str, int]:
        """Spans computed although their KV should exist, by reason."""
        with self._lock:
            return dict(self._fallbacks)

    def load(self, turn: Turn, *, pipelined: bool = False) -> None:
        """Pull, plan, scatter. Landing blocks are free again as soon as everything is scattered, which is now
        unless pulls are pipelined: then the engine's thread does the rest, layer by layer as they come.

        Args:
            pipelined: let the request begin with the first layers; what it computes in one step then depends
                on when bytes come, and so may the last bits.
        """
        request, prompt = turn.request, turn.prompt
        method = turn.reuse.method
        wanted: dict[SegmentKey, int] = {}
        tokens: dict[SegmentKey, tuple[int, ...]] = {}
        if method.uses_segments:
            known = self._prefixes.match(prompt.token_ids, request.tenant) if request.prefix_first else 0
            known = max(known, turn.prepared)
            for span in prompt.spans:
                if span.stop <= known or nearly_prepared(turn.prepared, span):
                    continue  # it is here already, exact
                if span.key is not None and (request.only_keys is None or span.key in request.only_keys):
                    wanted[span.key] = max(len(span), wanted.get(span.key, 0))
                    tokens[span.key] = prompt.tokens_of(span)
        # A prompt that is repeated relays what it relayed before, whatever was measured since.
        free = self._break_even and request.only_keys is None
        turn.acquired = self._store.acquire(
            wanted,
            partial(self._worth, turn) if free else None,
            # Anchors are compared with whole segments.
            pipelined=pipelined and not isinstance(method, KVComm),
            on_landed=self._loop.wake,
            keep=request.publish,
            token_ids=tokens,
        )
        self._start(turn)

    def load_again(self, turn: Turn) -> None:
        """After `SegmentLost`: wait for the other pulls, and start over with what has come.

        Raises:
            DeadlineExceeded: the pulls do not end before the request must.
        """
        if not turn.acquired.settle(timeout_s=turn.remaining_s):
            raise DeadlineExceeded(
                f"request {turn.request.id}: a pull broke off, and the others did not end by its deadline."
            )
        if turn.clock.submitted:  # what was computed meanwhile is as lost as if the bytes had been waited for
            turn.acquired.pull_s += time.perf_counter() - turn.clock.submitted
            turn.clock.submitted = 0.0
        log.warning(
            "a pull broke off while its first layers were in use: starting again without it",
            extra=self._ids(turn),
        )
        self._start(turn)

    def _start(self, turn: Turn) -> None:
        """Plan and scatter with what has come, or begun to come."""
        begin, before = time.perf_counter(), turn.clock.rotate_s
        hits, pulled = turn.acquired.snapshot()
        self._count_fallbacks(turn)
        plan = self._plan(turn, hits, pulled)
        try:
            prefill = self._loop.call(
                lambda: self._scatter(turn, plan, pulled),
                timeout_s=turn.remaining_s,
                polite=turn.urgency is not Urgency.NOW,
            )
        except SegmentLost:
            self.load_again(turn)  # a segment less each time
            return
        turn.prefill = prefill
        turn.stale_from = first_stale(plan, turn.prompt.token_ids)
        # The rest of the time was waiting for a step of other requests to end.
        turn.clock.queue_s += time.perf_counter() - begin - (turn.clock.rotate_s - before)

    def measure(self, turn: Turn) -> None:
        """Let a finished prefill count for later predictions, and say how this one's came out."""
        if turn.prefill is None or turn.sequence is None or not turn.prefill.finished:
            return
        prefill, now = turn.prefill, time.monotonic()
        done = [(at, t) for at, t in turn.acquired.transfers if t.outcome is Outcome.PULLED]
        nbytes = sum(t.nbytes for _, t in done)
        for located, transfer in done:
            # Several that shared the time share it by bytes.
            alone = transfer.nbytes == nbytes
            seconds = transfer.seconds if alone else turn.acquired.moving_s * transfer.nbytes / nbytes
            node, backend = located.owner.node, transfer.backend
            self.speeds.observe_pull(node, backend, transfer.nbytes, seconds, now)
        for located, transfer in turn.acquired.transfers:
            if transfer.outcome is Outcome.TIMED_OUT:
                wanted = located.segment.nbytes
                self.speeds.gave_up(located.owner.node, transfer.backend, wanted, transfer.seconds, now)
        relayed = sum(len(s.span) for s in prefill.plan.spans if s.source)
        scattered = prefill.scatter_s - turn.clock.scattered_s
        self.speeds.observe_rotate(relayed, turn.clock.rotate_s + scattered)
        self.speeds.observe_prefill(prefill.actual_flops, turn.sequence.prefill_seconds)
        if log.isEnabledFor(logging.DEBUG):
            log_costs(turn, prefill, turn.sequence)

    def _worth(self, turn: Turn, found: Mapping[SegmentKey, Located]) -> set[SegmentKey]:
        """Which of the found segments are to be pulled: all but those that are faster to compute."""
        plan = turn.reuse.method.plan(turn.prompt.spans, found, self._profile)
        turn.estimates = estimate_relays(
            self.speeds, self._model.costs, plan, found, here=self._worker, now=time.monotonic()
        )
        return {key for key in found if key not in turn.estimates or turn.estimates[key].worth}

    def _plan(
        self, turn: Turn, hits: Mapping[SegmentKey, Located], pulled: Mapping[SegmentKey, PulledSegment]
    ) -> RectifyPlan:
        method, spans = turn.reuse.method, turn.prompt.spans
        if not isinstance(method, KVComm):
            return method.plan(spans, hits, self._profile)
        template = self._template_of(turn.request)

        def match() -> dict[Span, Match]:
            begin = time.perf_counter()
            matches = self._anchors.match(method, template, spans, hits, pulled)
            turn.clock.rotate_s += time.perf_counter() - begin
            return matches

        turn.matches = self._loop.call(match, timeout_s=turn.remaining_s)
        candidates = {span: m.candidates for span, m in turn.matches.items()}
        return method.plan(spans, hits, self._profile, candidates)

    @torch.inference_mode()
    def _scatter(self, turn: Turn, plan: RectifyPlan, pulled: Mapping[SegmentKey, PulledSegment]) -> Prefill:
        """Put everything that is reused into the sequence's cache; runs on the engine's thread."""
        begin = time.perf_counter()
        # Attention adds to the mass: a prefill that was broken off has left some there.
        turn.cache.mass[: len(turn.prompt.token_ids)] = 0
        prefill = Prefill(
            plan,
            turn.prompt.token_ids,
            turn.cache,
            self._model,
            prefix_tokens=self._load_prefix(turn, plan),
            masses=input_masses(plan) if turn.request.publish else (),
        )
        prefill.load(
            {i: pulled[s.source.segment.key] for i, s in enumerate(plan.spans) if s.source is not None},
            {i: turn.matches[s.span] for i, s in enumerate(plan.spans) if s.correction is not None},
            on_loaded=partial(self._store.release_bytes, turn.acquired),
        )
        turn.clock.scattered_s = prefill.scatter_s
        turn.clock.rotate_s += time.perf_counter() - begin
        return prefill

    def _load_prefix(self, turn: Turn, plan: RectifyPlan) -> int:
        leading = next((s.span.start for s in plan.spans if s.source), len(turn.prompt.token_ids))
        limit = min(leading, len(turn.prompt.token_ids) - 1)
        if turn.prepared:  # exact as well, and there is nothing to copy
            return min(turn.prepared, limit)
        if not plan.use_prefix_cache:
            return 0
        if turn.request.prefix_limit is not None:
            limit = min(limit, turn.request.prefix_limit)
        return self._prefixes.load(
            turn.prompt.token_ids, turn.cache, limit=max(0, limit), tenant=turn.request.tenant
        )

    def _ids(self, turn: Turn) -> dict[str, str]:
        """Who a line of the log is about."""
        trace = {"trace": turn.request.traceparent} if turn.request.traceparent else {}
        return {"request": turn.request.id, "worker": self._worker, **trace}

    def _count_fallbacks(self, turn: Turn) -> None:
        for fallback in fallbacks(turn):
            if fallback in turn.counted:
                continue  # before the request started again
            turn.counted.add(fallback)
            with self._lock:
                self._fallbacks[fallback.reason] += 1
            log.warning(
                "%d tokens of slot %s are computed here: %s (%s)",
                fallback.tokens,
                fallback.slot,
                fallback.reason,
                fallback.detail,
                extra=self._ids(turn),
            )


def nearly_prepared(prepared: int, span: Span) -> bool:
    """Whether so much of a span has been computed ahead, of `prepared` leading tokens, that relaying the
    whole of it would not be less work: a pull and its rectification cost about a seventh of computing it."""
    rest = span.stop - prepared
    return span.start < prepared and rest <= max(LITTLE_ROWS, len(span) // WORTH_A_PULL)


def prefill_model(loaded: LoadedModel, profile: ModelProfile) -> PrefillModel:
    """What the executor of plans needs to know of a loaded model."""
    rows = torch.stack([inverse_frequencies(loaded.model, i) for i in range(loaded.num_layers)])
    shared = bool((rows == rows[:1]).all())  # all layers have one RoPE
    return PrefillModel(
        loaded.num_layers,
        profile.checkpoint_layer,
        (rows[:1] if shared else rows).to(loaded.device),
        model_costs(loaded.model),
        # Gemma's query_pre_attn_scalar; most models have no factor of their own.
        scaling=getattr(loaded.model.model.layers[0].self_attn, "scaling", None),
    )
