"""Prompts of a workload, as spans: prefix, what the agent reads in order, fresh text. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

from relay_cluster.simulation.settings import Workload
from transport.types import SegmentKey
from workers.methods.base import Span

_SPACE = "simulated"


def key_of(run: int, slot: str) -> SegmentKey:
    return SegmentKey(_SPACE, hashlib.blake2b(f"{run} {slot}".encode(), digest_size=16).digest())


def spans_of(
    workload: Workload, name: str, run: int, lengths: Mapping[str, int], least: int
) -> tuple[Span, ...]:
    """The spans of an agent's prompt. An answer's last token has no KV.

    Args:
        run: number of the run, whose texts are its own. lengths: agent -> tokens of its answer.
        least: shorter texts are no segments.
    """
    agent = workload.agents[name]
    spans: list[Span] = []
    at = 0

    def add(tokens: int, slot: str | None = None, key: SegmentKey | None = None) -> None:
        nonlocal at
        if tokens > 0:
            spans.append(Span(at, at + tokens, slot, key))
            at += tokens

    add(agent.prefix_tokens)
    for read in agent.reads:
        tokens, rest = (workload.inputs[read], 0) if read in workload.inputs else (lengths[read] - 1, 1)
        add(tokens, read, key_of(run, read) if tokens >= least else None)
        add(rest)
    add(agent.fresh_tokens)
    return tuple(spans)


def known_tokens(workload: Workload, name: str, written: Mapping[str, int], ended: Collection[str]) -> int:
    """Leading tokens of an agent's prompt that are certain: up to the end of what the first agent that still
    writes has written.

    Args:
        written: agent -> tokens so far. ended: agents that have answered.
    """
    agent = workload.agents[name]
    known = agent.prefix_tokens
    for read in agent.reads:
        if read in workload.inputs:
            known += workload.inputs[read]
            continue
        known += written.get(read, 0)
        if read not in ended:
            return known
    return known
