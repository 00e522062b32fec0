"""One prompt under two methods on one worker: times interleaved, distributions compared token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

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
    found = Agreement((), ())
    agent.store.holding.withdraw_copies(reply.relayed_keys)  # what the run itself had to pull
    for i in range(max(1, repeats - 1)):
        ours = agent.score(replace(again, id=f"{request.id}-again{i}"), forced)
        theirs = agent.score(replace(other, id=f"{request.id}-base{i}"), forced)
        samples.append((ours.ttft_s, theirs.ttft_s))
        if ours.relayed_tokens != reply.relayed_tokens:
            notes.append(
                f"repeat {i + 1} of the comparison relayed {ours.relayed_tokens} tokens, the run itself "
                f"{reply.relayed_tokens}: a segment was no longer there"
            )
        found = agent.on_engine(lambda a=theirs.logits, b=ours.logits: agreement(a, b))
    return Comparison(
        method=base_method,
        samples=tuple(samples),
        top1=found.top1,
        kl_first=found.kl[0],
        kl_mean=found.kl_mean,
        kl_p90=sorted(found.kl)[min(len(found.kl) - 1, int(0.9 * len(found.kl)))],
        positions=len(found.kl),
        base=base,
        notes=tuple(notes),
    )


def kl_divergence(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(softmax(reference) || softmax(other)) in nats per row; logits [rows, vocab] -> [rows] float32."""
    p = torch.log_softmax(reference.double(), -1)
    q = torch.log_softmax(other.double(), -1)
    return (p.exp() * (p - q)).sum(-1).clamp_min(0).float()


class Agreement(NamedTuple):
    """How near distributions are to a reference, position by position.

    Attributes:
        kl: KL(reference || other) in nats; same: whether the most likely token is the same.
    """

    kl: tuple[float, ...]
    same: tuple[bool, ...]

    @property
    def kl_mean(self) -> float:
        return sum(self.kl) / len(self.kl)

    @property
    def top1(self) -> float:
        """Share of the positions with the same most likely token."""
        return sum(self.same) / len(self.same)


def agreement(reference: torch.Tensor, other: torch.Tensor) -> Agreement:
    """Compare logits [positions, vocab] with those of the reference."""
    same = (reference.argmax(-1) == other.argmax(-1)).tolist()
    return Agreement(tuple(kl_divergence(reference, other).tolist()), tuple(same))
