"""One request while it runs, and what it ends in: a reply or scores. Facts only: no decisions, no waiting."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field

import torch

from transport.types import NodeId, SegmentKey, WorkerId
from workers.anchors import Match
from workers.break_even import Estimate, Speeds
from workers.budget import Urgency
from workers.costs import span_flops
from workers.fetching import Acquired
from workers.heal import Heal
from workers.kv_cache import SequenceCache
from workers.messages import Fallback, Published, Reply, Request, SlotTransfer, SpanCost, StageTimes
from workers.methods.base import Reuse, Span
from workers.opening import OpenAnswer
from workers.prefill import Prefill
from workers.scheduler import Sequence
from workers.segment import Prompt, SlotValue

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Clock:
    """Instants (time.perf_counter) and durations of one request. scattered_s: of what the prefill spent on
    scattering, the part that is in rotate_s already."""

    arrived: float = field(default_factory=time.perf_counter)
    queue_s: float = 0.0
    rotate_s: float = 0.0
    scattered_s: float = 0.0
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
        estimates: what relaying was predicted to take, for segments of which enough is known.
        counted: fallbacks that are in the worker's counts already.
        matches: relayed spans beside the anchors of `kvcomm`, until the prefill has taught what it can.
        ahead: what was chosen while upstream agents wrote, and why.
        urgency: of its rows; group: whose work it is, among those that can wait.
        prepared: leading tokens whose KV stands in `cache` from the beginning, exact; see preparing.py.
        opened: the answer, where others may follow it while it is written.
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
    counted: set[Fallback] = field(default_factory=set[Fallback])
    matches: dict[Span, Match] = field(default_factory=dict[Span, Match])
    sequence: Sequence | None = None
    stale_from: int | None = None
    published: list[Published] = field(default_factory=list[Published])
    notes: list[str] = field(default_factory=list[str])
    estimates: dict[SegmentKey, Estimate] = field(default_factory=dict[SegmentKey, Estimate])
    prepared: int = 0
    opened: OpenAnswer | None = None
    urgency: Urgency = Urgency.NOW
    group: str = ""
    ahead: str = ""

    @property
    def skipped(self) -> frozenset[SegmentKey]:
        """Segments that were found, and not pulled because computing is predicted to be faster."""
        known = self.acquired.hits.keys() | self.acquired.misses.keys()
        return frozenset(key for key, guess in self.estimates.items() if not guess.worth and key not in known)

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
    turn: Turn,
    *,
    worker: WorkerId,
    node: NodeId,
    model: str,
    text: str,
    reason: str,
    output: SlotValue,
    output_text: str,
    kv_text: str,
    speeds: Speeds,
) -> Reply:
    """The facts of a finished request. speeds: of the worker, from earlier requests."""
    assert turn.prefill is not None  # a finished request has been prefilled
    assert turn.sequence is not None
    counts = turn.prefill.counts
    relayed = sum(len(s.span) for s in turn.prefill.plan.spans if s.source)
    prompt_tokens = len(turn.prompt.token_ids)
    stages = stage_times(turn, turn.sequence)
    full_s = speeds.prefill_s(turn.prefill.full_flops)
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
        prepared_tokens=min(turn.prepared, turn.prefill.prefix_tokens),
        ahead_blocks=turn.acquired.ahead_blocks,
        ahead_bytes=turn.acquired.ahead_bytes,
        ahead=turn.ahead,
        fresh_entries=counts.fresh,
        recomputed_entries=counts.rectified,
        relayed_entries=counts.relayed,
        ttft_s=turn.clock.first_token - turn.clock.arrived,
        decode_s=turn.clock.last_token - turn.clock.first_token,
        stages=stages,
        transfers=_transfers(turn),
        fallbacks=fallbacks(turn),
        published=tuple(turn.published),
        token_ids=tuple(turn.sequence.tokens),
        text=text,
        finish_reason=reason,
        output=output,
        output_text=output_text,
        kv_text=kv_text,
        notes=tuple(turn.notes),
        flop_ratio_predicted=turn.prefill.flop_ratio_predicted,
        flop_ratio=turn.prefill.flop_ratio,
        relayed_keys=frozenset(s.source.segment.key for s in turn.prefill.plan.spans if s.source),
        span_costs=span_costs(turn, turn.prefill, stages),
        healed_entries=turn.heal.entries if turn.heal else 0,
        healed_at_token=turn.heal.finished_at if turn.heal else None,
        pull_hidden_s=max(0.0, turn.acquired.moving_s - stages.pull_s),
        full_prefill_s=None if full_s is None else stages.queue_s + full_s + stages.first_token_s,
    )


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


def build_scored(turn: Turn, sequence: Sequence) -> Scored:
    """The facts of a sequence that was scored to its end."""
    prefill = sequence.prefill
    return Scored(
        sequence.first_logits_at - turn.clock.arrived,
        sequence.scored,
        sum(len(s.span) for s in prefill.plan.spans if s.source),
        prefix_tokens=prefill.prefix_tokens,
        reuse=prefill.counts.reuse,
        resolved_method=turn.reuse.text,
        flop_ratio_predicted=prefill.flop_ratio_predicted,
        flop_ratio=prefill.flop_ratio,
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
    # So was waiting for layers to arrive, and putting them into the cache.
    stalled = min(waited, sequence.stalled_s)
    scattered = min(waited - stalled, sequence.prefill.scatter_s - clock.scattered_s)
    return StageTimes(
        queue_s=clock.queue_s + waited - stalled - scattered,
        lookup_s=acquired.lookup_s,
        lease_s=acquired.lease_s,
        pull_s=acquired.pull_s + stalled,
        rotate_s=clock.rotate_s + scattered,
        rectify_s=busy * share,
        prefill_s=busy * (1 - share),
        first_token_s=max(0.0, total - known),
    )


def span_costs(turn: Turn, prefill: Prefill, stages: StageTimes) -> tuple[SpanCost, ...]:
    """Predicted and actual seconds of every span that was relayed or passed over for its cost."""
    pulls = {located.segment.key: transfer.seconds for located, transfer in turn.acquired.transfers}
    relayed = [p for p in prefill.plan.spans if p.source]
    tokens = sum(len(p.span) for p in relayed)
    flops = {p.span: span_flops(prefill.costs, p) for p in relayed}
    out: list[SpanCost] = []
    for plan in prefill.plan.spans:
        span = plan.span
        if span.key is None or not (plan.source or span.key in turn.skipped):
            continue
        guess = turn.estimates.get(span.key)
        actual = None
        if plan.source:
            rectify = stages.rectify_s * flops[span] / (sum(flops.values()) or 1.0)
            actual = pulls.get(span.key, 0.0) + stages.rotate_s * len(span) / tokens + rectify
        out.append(
            SpanCost(
                span.slot or "",
                len(span),
                relayed=plan.source is not None,
                predicted_pull_s=guess and guess.pull_s,
                predicted_relay_s=guess and guess.relay_s,
                predicted_prefill_s=guess and guess.prefill_s,
                actual_relay_s=actual,
            )
        )
    return tuple(out)


def log_costs(turn: Turn, prefill: Prefill, sequence: Sequence) -> None:
    """Predicted and actual cost of a prefill and of its spans, for people."""
    extra = {"request": turn.request.id}
    log.debug(
        "prefill of %d tokens: %.3f of full prefill's FLOPs predicted, %.3f computed, in %.3f s",
        prefill.num_tokens,
        prefill.flop_ratio_predicted,
        prefill.flop_ratio,
        sequence.prefill_seconds,
        extra=extra,
    )
    for cost in span_costs(turn, prefill, stage_times(turn, sequence)):
        what = "relayed" if cost.relayed else "computed, as that is predicted to be faster"
        log.debug(
            "slot %s, %d tokens, %s: relay %s s predicted, %s s actual; prefill %s s predicted",
            cost.slot,
            cost.tokens,
            what,
            _digits(cost.predicted_relay_s),
            _digits(cost.actual_relay_s),
            _digits(cost.predicted_prefill_s),
            extra=extra,
        )


def _digits(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.4f}"


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
        SlotTransfer(
            slots[located.segment.key],
            located.segment.key,
            located.owner.node,
            transfer,
            located.segment.variant,
        )
        for located, transfer in turn.acquired.transfers
    )
