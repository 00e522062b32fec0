"""One executor for every plan: turns a `RectifyPlan` and pulled KV into the parts of ragged steps.

    load()       rotate the pulled keys by the shift and scatter K, V into the sequence's cache
    next_part()  rows to compute next, in ascending positions, at most `max_rows` of them
    done()       takes a part's result; after the last part the first logits are there

A run-time selection (`TopDeviation`) makes two stages: all rows up to the detection layer, then the chosen
ones.
Chunks may be cut anywhere: a row only sees earlier positions. Knows nothing of transport, time or other
requests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from transport.errors import ConfigError
from workers import kernels
from workers.attention import MassSpan, Probe
from workers.engine import Part, PartResult
from workers.kv_cache import SequenceCache
from workers.layout import BlockViews
from workers.methods.base import Positions, RectifyPlan, Span, SpanPlan, TopDeviation, TopMass


@dataclass(frozen=True, slots=True)
class PulledSegment:
    """Segment bytes in local memory.

    Attributes:
        blocks: views, in token order.
        num_tokens: tokens stored; start: position at which the keys were rotated.
    """

    blocks: tuple[BlockViews, ...]
    num_tokens: int
    start: int

    def gather(self, part: str) -> torch.Tensor:
        """The per-token field "mass" or "checkpoint" of all tokens: [num_tokens, ...]."""
        return torch.cat([getattr(b, part) for b in self.blocks])[: self.num_tokens]


class Correction(Protocol):
    """What a method adds to the reused KV of a span (`SpanPlan.correction`)."""

    def apply(self, kv: torch.Tensor, start: int) -> None:
        """Change `kv`, [layers, 2, kv_heads, tokens, head_dim], in place: the span's entries, keys rotated at
        positions start .. start + tokens - 1."""
        ...


@dataclass(frozen=True, slots=True)
class PrefillModel:
    """What the executor needs to know of a model.

    Attributes:
        num_layers: L.
        checkpoint_layer: layer at which segment tokens may join without starting at layer 0.
        inv_freq: [L or 1, rotary_dim / 2] float32.
        scaling: factor of attention scores; None = head_dim ** -0.5.
    """

    num_layers: int
    checkpoint_layer: int
    inv_freq: torch.Tensor
    scaling: float | None = None


@dataclass(slots=True)
class _Stage:
    """Rows of one stage, sorted by position; `cursor` rows are already handed out."""

    positions: torch.Tensor
    enter: torch.Tensor
    exit: torch.Tensor
    hidden: torch.Tensor | None
    keep_hidden: bool = False
    cursor: int = 0
    kept: list[torch.Tensor] = field(default_factory=list[torch.Tensor])


@dataclass(slots=True)
class _Relayed:
    """A relayed span and what is needed of its segment after its blocks are gone."""

    plan: SpanPlan
    selected: torch.Tensor
    checkpoint: torch.Tensor | None
    values_before: torch.Tensor | None = None

    @property
    def span(self) -> Span:
        return self.plan.span


@dataclass(slots=True)
class PrefillCounts:
    """Work in (token, layer) entries.

    Attributes:
        fresh: computed for tokens that no segment covers.
        rectified: recomputed for tokens of relayed spans.
        relayed: all entries of relayed spans, recomputed or not.
        cached: taken from the exact local prefix cache.
    """

    fresh: int = 0
    rectified: int = 0
    relayed: int = 0
    cached: int = 0

    @property
    def reuse(self) -> float | None:
        """Share of the relayed spans' entries that were not recomputed."""
        return None if not self.relayed else 1 - self.rectified / self.relayed


class Prefill:
    """The prefill of one prompt under one plan."""

    def __init__(
        self,
        plan: RectifyPlan,
        token_ids: Sequence[int],
        cache: SequenceCache,
        model: PrefillModel,
        *,
        prefix_tokens: int = 0,
        masses: tuple[MassSpan, ...] = (),
    ) -> None:
        _check_tiling(plan, len(token_ids))
        self.plan = plan
        self.cache = cache
        self.num_tokens = len(token_ids)
        self.prefix_tokens = prefix_tokens
        self.logits: torch.Tensor | None = None
        self.counts = PrefillCounts(cached=prefix_tokens * model.num_layers)
        self._ids = torch.tensor(token_ids, dtype=torch.long)
        self._model = model
        self._masses = masses
        self._relayed: list[_Relayed] = []
        self._stages: list[_Stage] = []
        self._probes: list[Probe] = []
        detect = [s.select for s in plan.spans if s.source and isinstance(s.select, TopDeviation)]
        self._detect = max(detect, key=lambda s: s.layer) if detect else None

    def load(
        self, pulled: Mapping[int, PulledSegment], corrections: Mapping[int, Correction] | None = None
    ) -> None:
        """Scatter the relayed spans into the cache and lay out the rows.

        Args:
            pulled: index of the span in the plan -> its bytes; they may be freed when this returns.
            corrections: index of every span whose plan names a correction -> that correction.
        """
        for i, span_plan in enumerate(self.plan.spans):
            if span_plan.source is not None:
                self._relayed.append(self._scatter(span_plan, pulled[i]))
            if span_plan.correction is not None:
                span = span_plan.span
                (corrections or {})[i].apply(self.cache.kv[:, :, :, span.start : span.stop], span.start)
        first = self._first_stage()
        self._stages.append(first)
        self.counts.relayed = self._model.num_layers * sum(len(r.span) for r in self._relayed)

    @property
    def finished(self) -> bool:
        return self.logits is not None

    @property
    def rows_left(self) -> int:
        """Rows of the current stage that are not computed yet."""
        stage = self._stages[-1]
        return stage.positions.shape[0] - stage.cursor

    def next_part(self, max_rows: int) -> Part:
        """The next at most `max_rows` rows. Call `done` with its result before asking again."""
        stage = self._stages[-1]
        a = stage.cursor
        b = min(a + max_rows, stage.positions.shape[0])
        positions = stage.positions[a:b]
        last = int(positions[-1]) == self.num_tokens - 1 and int(stage.exit[b - 1]) == self._model.num_layers
        probe = None
        if stage.keep_hidden and self._detect is not None:
            probe = Probe(self._detect.layer, max(0, self.num_tokens - self._detect.suffix))
            self._probes.append(probe)
        return Part(
            cache=self.cache,
            positions=positions,
            token_ids=self._ids[positions],
            enter=stage.enter[a:b],
            exit=stage.exit[a:b],
            hidden=None if stage.hidden is None else stage.hidden[a:b],
            logits_rows=(b - a - 1,) if last else (),
            checkpoint_layer=self._model.checkpoint_layer,
            masses=self._masses,
            probe=probe,
            keep_hidden=stage.keep_hidden,
        )

    def done(self, part: Part, result: PartResult) -> tuple[int, int]:
        """Take a part's result.

        Returns:
            (fresh, rectified) entries that the part computed, for sharing out its time.
        """
        stage = self._stages[-1]
        stage.cursor += part.rows
        assert part.enter is not None  # next_part always sets both
        assert part.exit is not None
        entries = part.exit - part.enter
        in_span = self._in_relayed(part.positions)
        rectified = int(entries[in_span].sum())
        fresh = int(entries.sum()) - rectified
        self.counts.fresh += fresh
        self.counts.rectified += rectified
        if result.hidden is not None:
            stage.kept.append(result.hidden)
        if stage.cursor == stage.positions.shape[0] and stage.keep_hidden:
            self._stages.append(self._second_stage(stage))
        if part.logits_rows:
            self.logits = result.logits[-1]
        return fresh, rectified

    def _scatter(self, plan: SpanPlan, pulled: PulledSegment) -> _Relayed:
        span, count = plan.span, len(plan.span)
        if pulled.num_tokens < count:
            raise ConfigError(f"a segment of {pulled.num_tokens} tokens cannot fill a span of {count}.")
        cos, sin = kernels.rotation(self._model.inv_freq, span.start - pulled.start)
        shifted = span.start != pulled.start
        at, left = span.start, count
        for block in pulled.blocks:
            n = min(left, block.kv.shape[3])
            if n <= 0:
                break
            target = self.cache.kv[:, :, :, at : at + n]
            target[:, 1] = block.kv[:, 1, :, :n]
            if shifted:
                kernels.rotate_keys(block.kv[:, 0, :, :n], cos, sin, target[:, 0])
            else:
                target[:, 0] = block.kv[:, 0, :, :n]
            at, left = at + n, left - n
        return self._keep(plan, pulled, count)

    def _keep(self, plan: SpanPlan, pulled: PulledSegment, count: int) -> _Relayed:
        """Resolve the selection where it is known now, and clone what later stages need."""
        start = plan.band[0]
        select = plan.select
        if isinstance(select, TopDeviation):
            selected = torch.arange(count)
            values = self.cache.values(select.layer)[:, plan.span.start : plan.span.stop].clone()
        else:
            selected, values = resolve_select(select, pulled.gather("mass")[:count]), None
        if plan.band[1] <= start:
            selected = selected[:0]
        if selected.numel() and start not in (0, self._model.checkpoint_layer):
            raise ConfigError(
                f"a band cannot start at layer {start}: rows join at layer 0 or at the checkpoint "
                f"(layer {self._model.checkpoint_layer} in this model's profile)."
            )
        needs = bool(selected.numel()) and start > 0
        checkpoint = pulled.gather("checkpoint")[:count][selected] if needs else None
        return _Relayed(plan, selected, checkpoint, values)

    def _first_stage(self) -> _Stage:
        layers = self._model.num_layers
        cut = None if self._detect is None or not self._relayed else self._detect.layer + 1
        positions, enter, exit_, states = [], [], [], []
        for plan in self.plan.spans:
            if plan.source is None:
                a, b = max(plan.span.start, self.prefix_tokens), plan.span.stop
                if a < b:
                    positions.append(torch.arange(a, b))
                    enter.append(torch.zeros(b - a, dtype=torch.long))
                    exit_.append(torch.full((b - a,), cut or layers))
                    states.append(None)
        for relayed in self._relayed:
            n = relayed.selected.shape[0]
            if n:
                positions.append(relayed.span.start + relayed.selected)
                enter.append(torch.full((n,), relayed.plan.band[0]))
                exit_.append(torch.full((n,), cut or relayed.plan.band[1]))
                states.append(relayed.checkpoint)
        where = torch.cat(positions)
        order = torch.argsort(where)
        return _Stage(
            where[order],
            torch.cat(enter)[order],
            torch.cat(exit_)[order],
            _stack_states(positions, states, order),
            keep_hidden=cut is not None,
        )

    def _second_stage(self, first: _Stage) -> _Stage:
        """Rows that go on after the detection layer: all fresh ones and the chosen ones of the spans."""
        assert self._detect is not None  # only then is there a second stage
        chosen = self._chosen_positions(self._detect)
        in_span = self._in_relayed(first.positions)
        is_chosen = torch.isin(first.positions, chosen)
        end = torch.full_like(first.exit, self._model.num_layers)
        for relayed in self._relayed:
            inside = (first.positions >= relayed.span.start) & (first.positions < relayed.span.stop)
            end[inside] = relayed.plan.band[1]
        keep = torch.nonzero((~in_span | is_chosen) & (end > self._detect.layer + 1)).flatten()
        hidden = torch.cat(first.kept)
        first.kept.clear()
        return _Stage(
            first.positions[keep],
            torch.full((keep.shape[0],), self._detect.layer + 1),
            end[keep],
            hidden[keep.to(hidden.device)],
        )

    def _chosen_positions(self, detect: TopDeviation) -> torch.Tensor:
        """I = I_dev + I_inf over all relayed spans together (RelayCaching, methods.md section 2)."""
        positions = torch.cat([torch.arange(r.span.start, r.span.stop) for r in self._relayed])
        if detect.tau_diff < 0:
            return positions
        deviations = []
        for relayed in self._relayed:
            assert relayed.values_before is not None  # set for every TopDeviation span
            now = self.cache.values(detect.layer)[:, relayed.span.start : relayed.span.stop]
            deviations.append(kernels.value_deviation(relayed.values_before, now))
        deviation = torch.cat(deviations).cpu()
        influence = self._influence(detect)[positions]
        deviates = deviation > detect.tau_diff * deviation.mean()
        return positions[deviates | (influence > detect.tau_down * influence.mean())]

    def _influence(self, detect: TopDeviation) -> torch.Tensor:
        """[num_tokens] attention received from the last `suffix` computed prompt tokens, mean over heads."""
        query = torch.cat([p.query for p in self._probes if p.query is not None], dim=1)
        self._probes.clear()
        rows = query.shape[1]
        positions = torch.arange(self.num_tokens - rows, self.num_tokens, device=query.device)
        mask = kernels.position_mask(positions, 0, self.num_tokens, None, query.dtype)
        keys = self.cache.keys(detect.layer)[:, : self.num_tokens]
        scaling = query.shape[-1] ** -0.5 if self._model.scaling is None else self._model.scaling
        _, probabilities = kernels.attend_explicit(query, keys, keys, scaling=scaling, mask=mask)
        return probabilities.sum(dim=(0, 1)).cpu()

    def _in_relayed(self, positions: torch.Tensor) -> torch.Tensor:
        inside = torch.zeros(positions.shape[0], dtype=torch.bool)
        for relayed in self._relayed:
            inside |= (positions >= relayed.span.start) & (positions < relayed.span.stop)
        return inside


def resolve_select(select: TopMass | Positions, mass: torch.Tensor) -> torch.Tensor:
    """Offsets within the span that `select` names.

    Args:
        mass: [tokens] float32 context mass of the span's tokens.

    Returns:
        [selected] int64, ascending.
    """
    tokens = mass.shape[0]
    if isinstance(select, Positions):
        return torch.tensor([o for o in select.offsets if o < tokens], dtype=torch.long)
    budget = min(tokens, math.ceil(select.ratio * tokens))
    if budget == 0:
        return torch.empty(0, dtype=torch.long)
    scores = mass.detach().cpu().clone()
    # The first tokens count within the budget, so that `ratio` alone bounds the cost.
    scores[: min(select.first, budget)] = float("inf")
    return torch.topk(scores, budget).indices.sort().values


def _stack_states(
    positions: list[torch.Tensor], states: list[torch.Tensor | None], order: torch.Tensor
) -> torch.Tensor | None:
    """[rows, hidden] in `order`; zeros where a row starts from its embedding; None if all do."""
    given = next((s for s in states if s is not None), None)
    if given is None:
        return None
    rows = [
        given.new_zeros((p.shape[0], given.shape[1])) if s is None else s
        for p, s in zip(positions, states, strict=True)
    ]
    return torch.cat(rows)[order.to(given.device)]


def _check_tiling(plan: RectifyPlan, num_tokens: int) -> None:
    at = 0
    for span_plan in plan.spans:
        if span_plan.span.start != at:
            raise ValueError(f"plan has a gap or overlap at token {at}: next span is {span_plan.span}.")
        at = span_plan.span.stop
    if at != num_tokens or num_tokens == 0:
        raise ValueError(f"plan covers {at} of {num_tokens} tokens.")
    if plan.spans[-1].source is not None:
        raise ValueError("the last prompt token must be computed, but its span is relayed.")
