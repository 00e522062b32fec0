"""How far a method's distributions are from full prefill's, on one prompt of one worker.

The reference is full prefill's own greedy answer: every method is teacher-forced on it, so position i of
two methods has the same tokens before it. Plain values go in and out (a measurement may cross a Ray call);
tensors stay here. Knows nothing of time or of data sets.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from workers.compare import agreement
from workers.messages import Distance, Request
from workers.settings import SamplingSettings

if TYPE_CHECKING:
    from workers.agent import AgentWorker
    from workers.turn import Scored

BASE = "full_prefill"


def reference_answer(agent: AgentWorker, request: Request, tokens: int) -> tuple[int, ...]:
    """Full prefill's greedy answer to a prompt, at most `tokens` ids, its stop token included."""
    sampling = SamplingSettings(max_new_tokens=tokens)
    return agent.generate(again(request, BASE, sampling=sampling)).token_ids


def reference_logits(agent: AgentWorker, request: Request, answer: Sequence[int]) -> torch.Tensor:
    """Full prefill's logits before every token of `answer`: [len(answer), vocab] float32."""
    return agent.score(again(request, BASE), tuple(answer[:-1])).logits


def again(request: Request, method: str, *, sampling: SamplingSettings | None = None) -> Request:
    """The same prompt under another method, leaving nothing behind."""
    return replace(
        request,
        id=f"{request.id}-{uuid.uuid4().hex[:8]}",
        method=method,
        publish=False,
        sampling=sampling or request.sampling,
    )


def distance(agent: AgentWorker, method: str, scored: Scored, reference: torch.Tensor) -> Distance:
    """Compare what `score` gave for a method with the reference logits of the same prompt and answer."""
    found = agent.on_engine(lambda: agreement(reference, scored.logits))
    return Distance(
        method,
        found.kl,
        found.same,
        scored.reuse,
        scored.relayed_tokens,
        scored.flop_ratio_predicted,
        scored.flop_ratio,
    )


def distances(
    agent: AgentWorker, request: Request, methods: Sequence[str], *, tokens: int = 32
) -> tuple[Distance, ...]:
    """The distance of every method on one prompt.

    Args:
        methods: as users write them.
        tokens: most tokens of the reference answer; the distributions before each of them are compared.
    """
    answer = reference_answer(agent, request, tokens)
    reference = reference_logits(agent, request, answer)
    return tuple(
        distance(agent, method, agent.score(again(request, method), answer[:-1]), reference)
        for method in methods
    )
