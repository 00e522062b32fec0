"""One request while it runs, and the reply that it ends in. Facts only: no decisions, no waiting."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

from transport.types import NodeId, WorkerId
from workers.anchors import Match
from workers.heal import Heal
from workers.kv_cache import SequenceCache
from workers.messages import Fallback, Published, Reply, Request, SlotTransfer, StageTimes
from workers.methods.base import Reuse, Span
from workers.prefill import Prefill
from workers.scheduler import Sequence
from workers.segment import Prompt, SlotValue
from workers.store import Acquired

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Clock:
    """Instants (time.perf_counter) and durations of one request."""

    arrived: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0
    rotate_s: float = 0.0
    submitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True)
class Turn:
    """All that one request holds.

    Attributes:
        reuse: the request's method, resolved with this worker's profile.
        deadline: time.monotonic() instant at which everything about it must be over.
        stale_from: position of the first cache entry that the plan leaves inexact; None when there is none.
        matches: relayed spans beside the anchors of `kvcomm`, until the prefill has taught what it can.
    """

    request: Request
    reuse: Reuse
    prompt: Prompt
    deadline: float
    cancelled: threading.Event
    clock: Clock
    cache: SequenceCache
    acquired: Acquired = field(default_factory=Acquired)
    prefill: Prefill | None = None
    matches: dict[Span, Match] = field(default_factory=dict[Span, Match])
    sequence: Sequence | None = None
    stale_from: int | None = None
    published: list[Published] = field(default_factory=list[Published])
    notes: list[str] = field(default_factory=list[str])

    @property
    def heal(self) -> Heal | None:
        return None if self.sequence is None else self.sequence.heal

    def exact_up_to(self, stop: int) -> bool:
        """Whether all cache entries before `stop` are full prefill's by now."""
        if self.stale_from is None or stop <= self.stale_from:
            return True
        return self.heal is not None and (self.heal.finished or stop <= self.heal.frontier)

    @property
    def remaining_s(self) -> float:
        """Seconds to the deadline, at least a little."""
        return max(0.001, self.deadline - time.monotonic())


def build_reply(
    turn: Turn, *, worker: WorkerId, node: NodeId, model: str, text: str, reason: str, output: SlotValue
) -> Reply:
    """The facts of a finished request."""
    assert turn.prefill is not None  # a finished request has been prefilled
    assert turn.sequence is not None
    counts = turn.prefill.counts
    relayed = sum(len(s.span) for s in turn.prefill.plan.spans if s.source)
    prompt_tokens = len(turn.prompt.token_ids)
    return Reply(
        request_id=turn.request.id,
        agent=turn.request.agent,
        worker=worker,
        node=node,
        model=model,
        method=turn.request.method,
        resolved_method=turn.reuse.text,
        prompt_tokens=prompt_tokens,
        fresh_tokens=prompt_tokens - relayed,
        relayed_tokens=relayed,
        prefix_tokens=turn.prefill.prefix_tokens,
        fresh_entries=counts.fresh,
        recomputed_entries=counts.rectified,
        relayed_entries=counts.relayed,
        ttft_s=turn.clock.first_token - turn.clock.arrived,
        decode_s=turn.clock.last_token - turn.clock.first_token,
        stages=stage_times(turn, turn.sequence),
        transfers=_transfers(turn),
        fallbacks=fallbacks(turn),
        published=tuple(turn.published),
        token_ids=tuple(turn.sequence.tokens),
        text=text,
        finish_reason=reason,
        output=output,
        notes=tuple(turn.notes),
        healed_entries=turn.heal.entries if turn.heal else 0,
        healed_at_token=turn.heal.finished_at if turn.heal else None,
    )


def stage_times(turn: Turn, sequence: Sequence) -> StageTimes:
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


def fallbacks(turn: Turn) -> tuple[Fallback, ...]:
    """Spans computed although their KV should exist. A shared input that nobody has computed yet is no
    fallback: somebody has to be first."""
    out: list[Fallback] = []
    for span in turn.prompt.spans:
        miss = turn.acquired.misses.get(span.key) if span.key is not None else None
        if miss is None or span.slot is None:
            continue
        if miss.reason == "not_found" and turn.request.values[span.slot].token_ids is None:
            continue
        out.append(Fallback(span.slot, str(miss.reason), miss.detail, len(span)))
    return tuple(out)


def _transfers(turn: Turn) -> tuple[SlotTransfer, ...]:
    slots = {s.key: s.slot or "" for s in turn.prompt.spans if s.key is not None}
    return tuple(
        SlotTransfer(slots[located.segment.key], located.segment.key, located.owner.node, transfer)
        for located, transfer in turn.acquired.transfers
    )
