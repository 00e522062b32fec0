"""One prompt under two methods on one worker: times interleaved, distributions compared token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from workers.messages import Comparison, Reply, Request

if TYPE_CHECKING:
    from workers.agent import AgentWorker

POSITIONS = 32
"""Teacher-forced positions that are compared, if the base's answer is that long."""


def compare_methods(
    agent: AgentWorker, request: Request, reply: Reply, base_method: str, *, repeats: int
) -> Comparison:
    """Run the prompt of `reply` again under both methods, and compare them.

    Args:
        request: the request that gave `reply`.
        base_method: the reference, usually "full_prefill".
        repeats: samples of each TTFT, at least 2; the first is the run itself and one full run of the base.
    """
    again = replace(
        request,
        publish=False,
        only_keys=reply.relayed_keys,
        prefix_limit=reply.prefix_tokens,
    )
    other = replace(request, id=f"{request.id}-base", method=base_method, publish=False, prefix_limit=None)
    base = agent.generate(other)
    samples = [(reply.ttft_s, base.ttft_s)]
    # The last token of a short answer is its stop token: it is predicted, but nothing after it.
    forced = base.token_ids[: min(POSITIONS, len(base.token_ids)) - 1]
    notes: list[str] = []
    kl: list[float] = []
    top1 = 0.0
    for i in range(max(1, repeats - 1)):
        ours = agent.score(replace(again, id=f"{request.id}-again{i}"), forced)
        theirs = agent.score(replace(other, id=f"{request.id}-base{i}"), forced)
        samples.append((ours.ttft_s, theirs.ttft_s))
        if ours.relayed_tokens != reply.relayed_tokens:
            notes.append(
                f"repeat {i + 1} of the comparison relayed {ours.relayed_tokens} tokens, the run itself "
                f"{reply.relayed_tokens}: a segment was no longer there"
            )
        kl, top1 = agent.on_engine(lambda a=theirs.logits, b=ours.logits: _measure(a, b))
    return Comparison(
        method=base_method,
        samples=tuple(samples),
        top1=top1,
        kl_first=kl[0],
        kl_mean=sum(kl) / len(kl),
        kl_p90=sorted(kl)[min(len(kl) - 1, int(0.9 * len(kl)))],
        positions=len(kl),
        base=base,
        notes=tuple(notes),
    )


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(softmax(reference) || softmax(other)) in nats per row; logits [rows, vocab] -> [rows] float32."""
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0).float()


def _measure(reference: torch.Tensor, other: torch.Tensor) -> tuple[list[float], float]:
    """(KL per position, share of positions with the same most likely token)."""
    same = (reference.argmax(-1) == other.argmax(-1)).float().mean()
    return kl_divergence(reference, other).tolist(), float(same)
