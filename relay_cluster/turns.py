"""An answered request, and what a report says of it, its comparison and its quality check. Facts only."""

from __future__ import annotations

from dataclasses import dataclass

from relay_cluster.gate import Check, Decision, Edge, EdgeState, worst
from relay_cluster.pipeline import Agent
from relay_cluster.report import (
    AgentReport,
    CompareReport,
    FallbackReport,
    GateReport,
    PublishedReport,
    SpanCostReport,
    Stages,
    TransferReport,
)
from workers.messages import Comparison, Reply, Request, ShadowCheck, SlotTransfer


@dataclass(frozen=True, slots=True)
class Turn:
    """An answered request, kept for reports and comparisons. decision: of the quality gate, if there is
    one."""

    agent: Agent
    request: Request
    reply: Reply
    ttft_s: float
    retries: int
    decision: Decision | None = None


def agent_report(
    turn: Turn,
    compare: CompareReport | None = None,
    notes: tuple[str, ...] = (),
    gate: GateReport | None = None,
) -> AgentReport:
    """The public report of one turn."""
    reply = turn.reply
    stages: dict[str, float] = {k: getattr(reply.stages, k) for k in reply.stages.__slots__}
    return AgentReport(
        agent=reply.agent,
        worker=reply.worker,
        node=reply.node,
        model=reply.model,
        method=reply.method,
        resolved_method=reply.resolved_method,
        flop_ratio_predicted=reply.flop_ratio_predicted,
        flop_ratio=reply.flop_ratio,
        span_costs=tuple(
            SpanCostReport(**{name: getattr(c, name) for name in SpanCostReport.__slots__})
            for c in reply.span_costs
        ),
        prompt_tokens=reply.prompt_tokens,
        fresh_tokens=reply.fresh_tokens,
        relayed_tokens=reply.relayed_tokens,
        prefix_tokens=reply.prefix_tokens,
        prepared_tokens=reply.prepared_tokens,
        pulled_ahead_blocks=reply.ahead_blocks,
        pulled_ahead_bytes=reply.ahead_bytes,
        ahead=reply.ahead,
        reuse=reply.reuse,
        recomputed_entries=reply.recomputed_entries,
        total_entries=reply.relayed_entries,
        ttft_s=turn.ttft_s,
        stages=Stages(dispatch_s=max(0.0, turn.ttft_s - reply.ttft_s), **stages),
        transfers=tuple(_transfer(t) for t in reply.transfers),
        fallbacks=tuple(
            FallbackReport(slot=f.slot, reason=f.reason, detail=f.detail, tokens=f.tokens)
            for f in reply.fallbacks
        ),
        published=tuple(
            PublishedReport(segment=str(p.key), tokens=p.tokens, blocks=p.blocks, bytes=p.nbytes)
            for p in reply.published
        ),
        decode_tokens=len(reply.token_ids),
        decode_tokens_per_s=_rate(len(reply.token_ids) - 1, reply.decode_s),
        finish_reason=reply.finish_reason,
        text=reply.text,
        tokens=reply.token_ids,
        retries=turn.retries,
        notes=notes,
        compare=compare,
        healed_entries=reply.healed_entries,
        healed_at_token=reply.healed_at_token,
        gate=gate,
        pull_hidden_s=reply.pull_hidden_s,
    )


def gate_report(
    edge: Edge, asked: str, decision: Decision, state: EdgeState, found: ShadowCheck | None
) -> GateReport:
    """The public report of what the gate did with a request, and of its edge's state afterwards."""
    check = None if found is None else verdict(found)
    return GateReport(
        edge=str(edge),
        asked=asked,
        ladder=state.ladder,
        rung=decision.rung,
        next_rung=state.rung,
        judged="" if found is None else found.method,
        kl_mean=None if check is None else check.kl_mean,
        top1=None if check is None else check.top1,
        value_error=None if check is None else check.value_error,
        checks=state.checks,
        skipped=state.skipped,
        falls=state.falls,
        recoveries=state.recoveries,
        reason=state.reason,
    )


def verdict(found: ShadowCheck) -> Check:
    """What the gate hears of a shadow check."""
    return Check(
        kl_mean=found.kl_mean, top1=found.top1, value_error=worst(error for _, error in found.value_errors)
    )


def compare_report(reply: Reply, found: Comparison) -> CompareReport:
    """The public report of a comparison: medians and their ratio."""
    ours = _median([a for a, _ in found.samples])
    base = _median([b for _, b in found.samples])
    same = 0
    for a, b in zip(reply.token_ids, found.base.token_ids, strict=False):
        if a != b:
            break
        same += 1
    return CompareReport(
        method=found.method,
        ttft_s=ours,
        base_ttft_s=base,
        speedup=base / ours,
        samples=found.samples,
        top1=found.top1,
        kl_first=found.kl_first,
        kl_mean=found.kl_mean,
        kl_p90=found.kl_p90,
        compared_tokens=found.positions,
        text=found.base.text,
        same_text_prefix_tokens=same,
    )


def _transfer(t: SlotTransfer) -> TransferReport:
    return TransferReport(
        segment=str(t.key),
        slot=t.slot,
        source=t.transfer.source,
        destination=t.transfer.destination,
        source_node=t.source_node,
        backend=t.transfer.backend,
        blocks=t.transfer.blocks,
        bytes=t.transfer.nbytes,
        seconds=t.transfer.seconds,
        gb_s=t.transfer.gb_s,
        outcome=str(t.transfer.outcome),
        detail=t.transfer.detail,
    )


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
