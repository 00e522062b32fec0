"""What a request leaves behind for later ones: exact prefixes, anchors, and segments of shared inputs and of
the answer.

    first token   remember(): the prompt's exact prefix, anchors of `kvcomm`, inputs that were computed here
    answer out    answer(): inputs that healing has made exact meanwhile, then the answer itself

Nothing here can fail a request: what could not be kept or published becomes a note in its reply. It knows
nothing of steps, slots or how the answer was made.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence

from transport.errors import ArenaFull, DirectoryUnavailable, RelayError, WorkerLost
from transport.types import BlockRef, Segment, SegmentKey, WorkerId
from workers.anchoring import Anchoring, OnEngine
from workers.attention import MassSpan
from workers.kv_cache import copy_out
from workers.layout import BlockViews
from workers.messages import Published
from workers.methods.base import RectifyPlan
from workers.methods.kvcomm import KVComm
from workers.opening import OpenAnswer
from workers.prefix_cache import PrefixCache
from workers.segment import SlotValue, digest_tokens, open_key, tenant_space
from workers.store import SegmentStore
from workers.turn import Turn

log = logging.getLogger(__name__)


class Publishing:
    """Publishes for the requests of one worker.

    Args:
        worker: who publishes.
        space: of the model's segments.
        wire: format in which published KV travels, where that is lossy; else "".
        min_segment_tokens: shorter answers are not published.
        on_engine: runs tensor work on the engine's thread.
    """

    def __init__(
        self,
        worker: WorkerId,
        space: str,
        store: SegmentStore,
        prefixes: PrefixCache,
        anchors: Anchoring,
        *,
        wire: str,
        min_segment_tokens: int,
        on_engine: OnEngine,
    ) -> None:
        self._worker = worker
        self._space = space
        self._store = store
        self._prefixes = prefixes
        self._anchors = anchors
        self._wire = wire
        self._min_segment_tokens = min_segment_tokens
        self._on_engine = on_engine
        self._unpublished: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def unpublished(self) -> dict[str, int]:
        """Segments that were not published, by reason: "arena_full" (no room even after eviction),
        "directory_down", "fenced", or the name of an error."""
        with self._lock:
            return dict(self._unpublished)

    def open(self, turn: Turn) -> None:
        """At the first token: let others follow the answer, if they want to."""
        sequence = turn.sequence
        assert sequence is not None  # it has drawn a token
        if not turn.request.open_answer or not turn.request.publish:
            return
        start = len(turn.prompt.token_ids)

        def copy(first: int, count: int, blocks: Sequence[BlockViews]) -> None:
            self._on_engine(lambda: copy_out(turn.cache, start + first, count, blocks))

        turn.opened = self._store.opening.begin(
            OpenAnswer(
                open_key(self._space, turn.request.tenant, turn.request.id),
                start,
                f"{turn.request.agent}@{self._worker}",
                sequence.tokens,
                copy,
            )
        )

    def grew(self, turn: Turn, tokens: int) -> None:
        """The answer has so many tokens now."""
        if turn.opened is not None:
            self._store.opening.grew(turn.opened, tokens)

    def end(self, turn: Turn) -> None:
        """The turn is over: whoever follows an answer that was not published is told. Idempotent."""
        if turn.opened is not None:
            self._store.opening.abort(turn.opened, "ended")

    def remember(self, turn: Turn) -> None:
        """After the first token: keep the exact prefix, learn anchors, publish inputs computed here."""
        assert turn.prefill is not None  # there is a first token
        relayed = [s.span.start for s in turn.prefill.plan.spans if s.source]
        exact = min(relayed, default=len(turn.prompt.token_ids))
        tenant = turn.request.tenant
        try:
            self._on_engine(lambda: self._prefixes.store(turn.prompt.token_ids[:exact], turn.cache, tenant))
        except RelayError as error:
            turn.notes.append(f"the exact prefix was not kept: {error}")
        self.learn_anchors(turn)
        self._inputs(turn, held_back=False)

    def learn_anchors(self, turn: Turn) -> None:
        """After the first token: let `kvcomm` keep what computed spans showed, and exchange anchors with
        other workers."""
        method, matches = turn.reuse.method, turn.matches
        assert turn.prefill is not None  # there is a first token
        if not isinstance(method, KVComm) or not matches:
            return
        plan = turn.prefill.plan
        try:
            learned = self._on_engine(lambda: self._anchors.learn(method, plan, matches, turn.cache))
        except RelayError as error:
            turn.notes.append(f"no anchor was learned: {error}")
            return
        turn.matches = {}
        self._anchors.sync(method, {m.context for m in matches.values()}, learned)

    def answer(self, turn: Turn, output: SlotValue) -> None:
        """After the last token: publish the inputs that were waiting for healing, and the answer."""
        if turn.heal is not None:
            self._inputs(turn, held_back=True)
        if output.kv_tokens >= self._min_segment_tokens:
            assert output.token_ids is not None  # an answer is made of ids
            space = tenant_space(self._space, turn.request.tenant)
            key = SegmentKey(space, digest_tokens(output.token_ids[: output.kv_tokens]))
            readers, start = turn.request.consumers, len(turn.prompt.token_ids)
            first: tuple[BlockRef, ...] = ()
            if turn.opened is not None:
                first = self._store.opening.stop(turn.opened, output.token_ids[: output.kv_tokens])
            segment = self._publish(turn, key, start, output.kv_tokens, None, readers, first)
            if turn.opened is not None and segment is not None:
                self._store.opening.closed(turn.opened, segment)

    def _inputs(self, turn: Turn, *, held_back: bool) -> None:
        """Publish shared inputs that were computed here.

        held_back: False: those that can be published at once. True: those that healing was going to make
            exact, which is worth waiting for until the answer is there.
        """
        assert turn.prefill is not None  # there is a first token
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

    def _publish(
        self,
        turn: Turn,
        key: SegmentKey,
        start: int,
        tokens: int,
        slot: str | None,
        consumers: int = 0,
        first: tuple[BlockRef, ...] = (),
    ) -> Segment | None:
        """first: sealed blocks with which it begins. None, and a note, where that fails."""
        done = len(first) * self._store.block_tokens
        try:
            segment = self._store.publish(
                key,
                lambda blocks: self._on_engine(
                    lambda: copy_out(turn.cache, start + done, tokens - done, blocks)
                ),
                first=first,
                start=start,
                num_tokens=tokens,
                producer=f"{turn.request.agent}@{self._worker}",
                variant=_variant(turn, start, tokens, self._wire),
                consumers=consumers,
            )
        except RelayError as error:
            # The answer is still right; downstream agents will compute this text themselves.
            with self._lock:
                self._unpublished[_reason(error)] += 1
            what = f"slot {slot}" if slot else "the answer"
            log.warning("%s not published: %s", what, error, extra={"request": turn.request.id})
            turn.notes.append(f"{what} was not published ({type(error).__name__}): {error}")
            return None
        turn.published.append(Published(slot, key, tokens, len(segment.blocks), segment.nbytes))
        return segment


def _reason(error: RelayError) -> str:
    """Why something was not published, for counting."""
    if isinstance(error, ArenaFull):
        return "arena_full"
    if isinstance(error, DirectoryUnavailable):
        return "directory_down"
    return "fenced" if isinstance(error, WorkerLost) else type(error).__name__


def input_masses(plan: RectifyPlan) -> tuple[MassSpan, ...]:
    """Spans of a plan whose context mass is needed if they are to be published: shared inputs that are
    computed here."""
    return tuple(
        MassSpan(s.span.start, s.span.stop) for s in plan.spans if s.source is None and s.span.key is not None
    )


def _variant(turn: Turn, start: int, tokens: int, wire: str) -> str:
    """Names the context under which a segment was made; marked where that context was itself only
    rectified, and has not been healed since, or where the format on the wire loses bits."""
    marks = ([] if turn.exact_up_to(start + tokens) else [turn.reuse.text]) + ([wire] if wire else [])
    return "~".join([digest_tokens(turn.prompt.token_ids[:start]).hex(), *marks])
