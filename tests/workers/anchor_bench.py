"""A span of a prompt on a tiny model, dense and corrected by anchors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.workers import tiny
from workers.anchoring import source_of
from workers.anchors import AnchorPool, Context, Match, frame_of_segment
from workers.methods.base import RectifyPlan, Span, SpanPlan
from workers.prefill import Prefill

SLOT = Context("template", "solver")
BIG = 1 << 30


@dataclass
class Bench:
    """A prompt `before + span + after` on a tiny model, dense and corrected."""

    rig: tiny.Rig
    pool: AnchorPool
    before: list[int]
    span_ids: list[int]
    after: list[int]

    def __post_init__(self) -> None:
        self.located, self.pulled = self.rig.segment(tiny.tokens(11, 3), self.span_ids)
        self.span = Span(
            len(self.before), len(self.before) + len(self.span_ids), "solver", self.located.segment.key
        )

    @property
    def ids(self) -> list[int]:
        return [*self.before, *self.span_ids, *self.after]

    def dense(self) -> torch.Tensor:
        """[layers, 2, kv_heads, tokens, head_dim] of the span after full prefill."""
        self.rig.model.set_attn_implementation("relay_cluster")
        cache = self.rig.compute(self.ids)
        return cache.kv[:, :, :, self.span.start : self.span.stop].clone()

    def match(self) -> Match:
        base = frame_of_segment(self.pulled, len(self.span), self.rig.shape.inv_freq)
        return self.pool.match(SLOT, source_of(self.located), base)

    def learn(self, bits: int = 32) -> None:
        anchor = self.pool.learn(self.match(), self.dense(), self.span.start, bits=bits, exact=True)
        assert self.pool.insert(anchor, max_anchors=20, window=5) == ()

    def corrected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the span's entries, logits) of a prefill that uses whatever anchors there are."""
        self.rig.model.set_attn_implementation("relay_cluster")
        end = len(self.ids)
        match = self.match()
        correction = "kvcomm" if match.anchors else None
        plan = RectifyPlan(
            (
                SpanPlan(Span(0, self.span.start)),
                SpanPlan(self.span, self.located, correction=correction),
                SpanPlan(Span(self.span.stop, end)),
            )
        )
        cache = self.rig.pool.allocate(end, timeout_s=5)
        prefill = Prefill(plan, self.ids, cache, self.rig.shape)
        prefill.load({1: self.pulled}, {1: match})
        while not prefill.finished:
            part = prefill.next_part(1 << 20)
            prefill.done(part, self.rig.engine.step([part])[0])
        assert prefill.logits is not None
        return cache.kv[:, :, :, self.span.start : self.span.stop].clone(), prefill.logits
