"""What a worker is asked and what it answers: frozen dataclasses of plain values, so they may cross a Ray
call.

No tensor is ever part of a message. Durations are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from transport.types import NodeId, SegmentKey, Transfer, WorkerId
from workers.segment import Message, SlotValue
from workers.settings import SamplingSettings


class TokenScore(NamedTuple):
    """A token that might come next: its text alone, and the natural logarithm of its probability."""

    text: str
    logprob: float


class Token(NamedTuple):
    """A token of an answer while it is made.

    Attributes:
        id: of the model's vocabulary.
        text: what has become certain of the answer's text with it; often more or less than its own.
        score: its own, where log-probabilities were asked for; top: of the most likely ones, best first.
    """

    id: int
    text: str
    score: TokenScore | None = None
    top: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One agent's turn.

    Attributes:
        id: unique; names the request in logs and for `cancel`.
        agent: name of the agent, for reports.
        system, prompt: the agent's template; `{slot}` marks the slots of `prompt`.
        messages: a whole chat instead of these two.
        raw: `prompt` is continued as it is, without the chat template around it.
        tenant: whose request it is; KV is shared within a tenant only. "": of nobody in particular.
        values: slot -> content.
        method: reuse method, as users write it.
        sampling: how tokens are drawn.
        publish: leave segments and prefixes behind for others.
        publish_inputs: and copies of the slots that were computed here. False for a request that a probe will
            judge: the probe is to relay what the upstream agents made, as a new request would.
        only_keys: relay only these segments (None: any); used to repeat a run exactly.
        prefix_first: relay nothing that the worker's exact prefix cache has.
        prefix_limit: most tokens to take from the prefix cache (None: no limit).
        consumers: requests that are expected to relay the answer (0: unknown); once they have, its segment is
            the first to be evicted.
        open_answer: let others follow the answer while it is written.
        shadow_tokens: keep what `AgentWorker.shadow` needs to judge so many first tokens (0: nothing).
        traceparent: W3C context of the caller's trace, for the log; "" where there is none.
    """

    id: str
    agent: str
    prompt: str = ""
    system: str | None = None
    messages: tuple[Message, ...] = ()
    raw: bool = False
    tenant: str = ""
    values: dict[str, SlotValue] = field(default_factory=dict[str, SlotValue])
    method: str = "auto"
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    publish: bool = True
    publish_inputs: bool = True
    only_keys: frozenset[SegmentKey] | None = None
    prefix_first: bool = False
    prefix_limit: int | None = None
    consumers: int = 0
    open_answer: bool = False
    shadow_tokens: int = 0
    traceparent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is known of a request before it can be made.

    A newer draft of a request says all that an older one said: one that is lost costs nothing.

    Attributes:
        request: as it will be asked, its id included. `values` of open slots are what they have so far (no
            ids at all: nothing).
        open_slots: whose values may still grow.
        room_tokens: most tokens that they may still get together.
        group: whose work it is; groups share what time a worker has.
        follow: slot -> id of the request whose answer fills it, for slots whose KV is to be relayed: they are
            not computed ahead, but pulled as it is published.
        may_follow: the same, for slots that are pulled so only where the worker has no time to compute them.
    """

    request: Request
    open_slots: frozenset[str]
    room_tokens: int
    group: str = ""
    follow: dict[str, str] = field(default_factory=dict[str, str])
    may_follow: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where the time to first token went inside the worker; the fields add up to it. pull_s: waiting for
    bytes, those that travel while others are computed with not counted."""

    queue_s: float = 0.0
    lookup_s: float = 0.0
    lease_s: float = 0.0
    pull_s: float = 0.0
    rotate_s: float = 0.0
    rectify_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SlotTransfer:
    """A pull, and the slot that it was for. variant: names the context under which the segment was made."""

    slot: str
    key: SegmentKey
    source_node: NodeId
    transfer: Transfer
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Fallback:
    """A slot that was computed although its KV should have been reusable. reason: an Outcome, "not_found",
    "arena_full", "directory_down", "transport_error" or "not_promoted"."""

    slot: str
    reason: str
    detail: str
    tokens: int


@dataclass(frozen=True, slots=True)
class SpanCost:
    """What a span was expected to take by either way, and what it took.

    Attributes:
        relayed: False when it was computed only because that was predicted to be faster (not a fallback).
        predicted_pull_s, predicted_relay_s: the pull alone; pull, rotation and rectification. Pulls of a
            segment that several spans share are counted at each. predicted_prefill_s: computing it in full.
            All None while too little had been measured.
        actual_relay_s: the same as predicted_relay_s, measured (the request's rotation shared out by tokens,
            its rectification by FLOPs); None when it was not relayed.
    """

    slot: str
    tokens: int
    relayed: bool
    predicted_pull_s: float | None
    predicted_relay_s: float | None
    predicted_prefill_s: float | None
    actual_relay_s: float | None


@dataclass(frozen=True, slots=True)
class Published:
    """A segment that this request left in the directory. slot: None for the agent's own output."""

    slot: str | None
    key: SegmentKey
    tokens: int
    blocks: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The facts of one request.

    Attributes:
        method: as the request had it ("auto"); resolved_method: what that came to on this worker, every
            parameter included.
        ttft_s: from the request's arrival at the worker to its first token.
        decode_s: from the first token to the last.
        fresh_tokens + relayed_tokens = prompt_tokens; prefix_tokens is the part of fresh_tokens that came
        from
            the exact local prefix cache.
        fresh_entries, recomputed_entries, relayed_entries: (token, layer) entries computed for fresh tokens,
            recomputed in relayed spans, and all of relayed spans.
        flop_ratio_predicted: FLOPs of the prefill over full prefill's, predicted from the plan alone.
        flop_ratio: the same, of the rows that were computed.
        relayed_keys: segments whose KV was used; a method may compute a span although its segment was pulled.
        span_costs: of every span that was relayed, or might have been but for its cost.
        output: what downstream slots get; output_text: what its ids spell; kv_text: those with KV.
        notes: facts worth telling ("prompt segment not published: arena full").
        healed_entries: stale (token, layer) entries that were made exact after the first token.
        healed_at_token: index of the first answer token that was drawn from exact logits; the length of the
            answer where only its KV became exact; None where healing was off or did not get so far.
        pull_hidden_s: for how long bytes travelled while the engine computed with those that had come;
            `stages.pull_s` is the rest, for which the request waited.
        ahead_blocks, ahead_bytes: pulled while upstream agents still wrote; `transfers` are what was left.
        full_prefill_s: what the time to first token was predicted to be with full prefill, from this worker's
            prefills before; None while it has made too few.
    """

    request_id: str
    agent: str
    worker: WorkerId
    node: NodeId
    model: str
    method: str
    prompt_tokens: int
    fresh_tokens: int
    relayed_tokens: int
    prefix_tokens: int
    fresh_entries: int
    recomputed_entries: int
    relayed_entries: int
    ttft_s: float
    decode_s: float
    stages: StageTimes
    transfers: tuple[SlotTransfer, ...]
    fallbacks: tuple[Fallback, ...]
    published: tuple[Published, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    output: SlotValue
    output_text: str = ""
    kv_text: str = ""
    notes: tuple[str, ...] = ()
    resolved_method: str = ""
    flop_ratio_predicted: float | None = None
    flop_ratio: float | None = None
    relayed_keys: frozenset[SegmentKey] = frozenset()
    span_costs: tuple[SpanCost, ...] = ()
    healed_entries: int = 0
    healed_at_token: int | None = None
    pull_hidden_s: float = 0.0
    prepared_tokens: int = 0
    ahead: str = ""
    ahead_blocks: int = 0
    ahead_bytes: int = 0
    full_prefill_s: float | None = None

    @property
    def skipped(self) -> tuple[SpanCost, ...]:
        """Spans that were computed because a pull was predicted to take longer."""
        return tuple(cost for cost in self.span_costs if not cost.relayed)

    @property
    def reuse(self) -> float | None:
        """Share of the relayed spans' (token, layer) entries that were not recomputed."""
        return None if not self.relayed_entries else 1 - self.recomputed_entries / self.relayed_entries


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowCheck:
    """How far an answer's beginning was from full prefill's, teacher-forced on the answer itself.

    Attributes:
        method: that was judged.
        tokens: answer tokens compared.
        kl_first, kl_mean: KL(full prefill || method) in nats, at the first token and on average.
        top1: share of tokens whose most likely token is the same.
        value_errors: (layer, mean 1 - cos of the relayed tokens' values) pairs.
        logits_max_diff: the largest difference of any logit.
    """

    method: str
    tokens: int
    kl_first: float
    kl_mean: float
    top1: float
    value_errors: tuple[tuple[int, float], ...] = ()
    logits_max_diff: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt under two methods on one worker, teacher-forced on the base method's text.

    Attributes:
        samples: (ttft_s of the method, ttft_s of the base) pairs, interleaved.
        top1: share of positions with the same most likely token.
        kl_first, kl_mean, kl_p90: KL(base || method) in nats, at the first position, mean and 90th
            percentile.
        positions: how many positions were compared.
        base: the base method's own reply.
    """

    method: str
    samples: tuple[tuple[float, float], ...]
    top1: float
    kl_first: float
    kl_mean: float
    kl_p90: float
    positions: int
    base: Reply
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Distance:
    """How far one method is from full prefill on one prompt.

    Attributes:
        method: as asked for.
        kl: KL(full prefill || method) in nats before every token of the reference answer, the first one
            first.
        same: whether the most likely token is the same, per position.
        reuse: share of relayed (token, layer) entries that were not recomputed; None when none was relayed.
        relayed_tokens: tokens taken from segments.
        flop_ratio_predicted, flop_ratio: FLOPs of the prompt / full prefill's; None where they are not
            counted.
    """

    method: str
    kl: tuple[float, ...]
    same: tuple[bool, ...]
    reuse: float | None
    relayed_tokens: int
    flop_ratio_predicted: float | None
    flop_ratio: float | None
