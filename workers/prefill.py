"""One executor for every plan: turns a `RectifyPlan` and pulled KV into the parts of ragged steps.

    load()       rotate the pulled keys by the shift and scatter K, V into the sequence's cache
    next_part()  rows to compute next, in ascending positions, at most `max_rows` of them unless a span
                 drifts
    done()       takes a part's result; after the last part the first logits are there

A selection that only the run can make (`workers/selection.py`) cuts the prefill in two stages: all rows up to
the detection layer, then the chosen ones and the fresh ones. So does a plan that looks ahead: the fresh rows
alone, then the chosen ones and the fresh ones again. Chunks may be cut anywhere: a row only sees earlier
positions. Knows nothing of transport, time or other requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from transport.errors import ConfigError
from workers import kernels
from workers.attention import MassSpan, Probe
from workers.costs import ModelCosts, detection_cut, full_prefill_flops, plan_flops, rows_flops
from workers.drift import Drift, span_drift
from workers.engine import Part, PartResult
from workers.kv_cache import SequenceCache
from workers.layout import BlockViews
from workers.methods.base import Choice, Positions, RectifyPlan, Span, SpanPlan, TopMass
from workers.selection import Detected, choose, probed_tokens, resolve_select


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

    def rows(self, part: str, offsets: torch.Tensor) -> torch.Tensor:
        """The per-token field "mass" or "checkpoint" at `offsets`, which ascend: [offsets, ...]."""
        size = getattr(self.blocks[0], part).shape[0]
        bounds = torch.searchsorted(offsets, torch.arange(len(self.blocks) + 1) * size).tolist()
        return torch.cat(
            [
                getattr(block, part)[offsets[a:b] - i * size]
                for i, (block, a, b) in enumerate(zip(self.blocks, bounds[:-1], bounds[1:], strict=True))
                if a < b
            ]
        )

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
        costs: its sizes, for counting FLOPs.
        scaling: factor of attention scores; None = head_dim ** -0.5.
    """

    num_layers: int
    checkpoint_layer: int
    inv_freq: torch.Tensor
    costs: ModelCosts
    scaling: float | None = None


@dataclass(slots=True)
class _Rows:
    """All rows that a prefill may compute, by ascending position.

    Attributes:
        positions, enter, end: [rows] int64; a row is computed in the layers [enter, end).
        relayed: [rows] bool; whether it lies in a relayed span.
        pending: [rows] bool; whether the run has yet to choose if it goes on behind the detection layer.
        hidden: [rows, hidden_size] input of layer `enter` where that is above 0, else undefined; None when
            all rows start from their embeddings.
    """

    positions: torch.Tensor
    enter: torch.Tensor
    end: torch.Tensor
    relayed: torch.Tensor
    pending: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(slots=True)
class _Stage:
    """Rows that go through layers together; `cursor` of them are already handed out.

    Attributes:
        index: [rows] int64 into `_Rows`; None = all of them.
        watch: layers in which the queries of the `suffix` last prompt tokens are kept.
        keep_hidden: whether a stage follows that goes on from here; `kept` then collects the states with
            which rows leave.
        looks: whether the fresh rows look ahead, and start again in the next stage.
    """

    positions: torch.Tensor
    enter: torch.Tensor
    exit: torch.Tensor
    relayed: torch.Tensor
    hidden: torch.Tensor | None
    index: torch.Tensor | None = None
    watch: tuple[int, ...] = ()
    suffix: int = 0
    keep_hidden: bool = False
    looks: bool = False
    cursor: int = 0
    kept: list[torch.Tensor] = field(default_factory=list[torch.Tensor])


@dataclass(slots=True)
class _Relayed:
    """A relayed span, and what is needed of its segment after its blocks are gone.

    Attributes:
        selected: [selected] int64 offsets of the tokens that are recomputed (may be, where the run chooses).
        checkpoint: [selected, hidden_size] their states at band[0]; None where that is layer 0.
        values: [kv_heads, tokens, head_dim] reused values at the detection layer, where the run chooses.
        drift: what entries that are not recomputed follow, if anything.
        mass: [tokens] context mass while the prefill looks ahead; nothing is selected yet, and `checkpoint`
            has the states of all tokens.
    """

    plan: SpanPlan
    selected: torch.Tensor
    checkpoint: torch.Tensor | None
    values: torch.Tensor | None = None
    drift: Drift | None = None
    mass: torch.Tensor | None = None

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
    """The prefill of one prompt under one plan.

    Attributes:
        counts: entries computed so far.
        predicted_flops: of the whole prefill, from the plan alone; actual_flops: of the parts done so far.
        logits: [vocab] of the last prompt token, once it is finished.
    """

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
        self.predicted_flops = plan_flops(model.costs, plan, prefix_tokens)
        self.actual_flops = 0.0
        self._ids = torch.tensor(token_ids, dtype=torch.long)
        self._model = model
        self._masses = masses
        self._choice = _run_time_choice(plan)
        self._cut = None if self._choice is None else detection_cut(self._choice)
        self._relayed: dict[int, _Relayed] = {}
        self._probes: list[Probe] = []
        self._rows: _Rows | None = None
        self._stage: _Stage | None = None

    def load(
        self, pulled: Mapping[int, PulledSegment], corrections: Mapping[int, Correction] | None = None
    ) -> None:
        """Scatter the relayed spans into the cache and lay out the rows.

        Args:
            pulled: index of the span in the plan -> its bytes; they may be freed when this returns.
            corrections: index of every span whose plan names a correction -> that correction.
        """
        for i, span_plan in enumerate(self.plan.spans):
            span = span_plan.span
            if span_plan.source is not None:
                self._scatter(span_plan, pulled[i])
            if span_plan.correction is not None:
                (corrections or {})[i].apply(self.cache.kv[:, :, :, span.start : span.stop], span.start)
            if span_plan.source is not None:
                self._relayed[i] = self._keep(span_plan, pulled[i])
        self.counts.relayed = self._model.num_layers * sum(len(r.span) for r in self._relayed.values())
        self._rows = self._lay_out()
        looks = any(r.mass is not None for r in self._relayed.values())
        self._stage = self._looking_stage(self._rows) if looks else self._first_stage(self._rows)

    @property
    def finished(self) -> bool:
        return self.logits is not None

    @property
    def costs(self) -> ModelCosts:
        """Sizes of the model."""
        return self._model.costs

    @property
    def flop_ratio_predicted(self) -> float:
        """Predicted FLOPs, as a share of full prefill's of the same prompt."""
        return self.predicted_flops / full_prefill_flops(self._model.costs, self.num_tokens)

    @property
    def flop_ratio(self) -> float:
        """FLOPs of the parts done so far, as a share of full prefill's."""
        return self.actual_flops / full_prefill_flops(self._model.costs, self.num_tokens)

    @property
    def rows_left(self) -> int:
        """Rows of the current stage that are not computed yet."""
        stage = self._current
        return stage.positions.shape[0] - stage.cursor

    def next_part(self, max_rows: int) -> Part:
        """The next rows: at most `max_rows`, or all rows of one span that drifts where they are more (they
        are never cut). Call `done` with its result before asking again."""
        stage = self._current
        a = stage.cursor
        b, drifts = self._part_end(stage, a, min(a + max_rows, stage.positions.shape[0]))
        positions = stage.positions[a:b]
        last = int(positions[-1]) == self.num_tokens - 1 and int(stage.exit[b - 1]) == self._model.num_layers
        probes = tuple(Probe(layer, max(0, self.num_tokens - stage.suffix)) for layer in stage.watch)
        self._probes += probes
        return Part(
            cache=self.cache,
            positions=positions,
            token_ids=self._ids[positions],
            enter=stage.enter[a:b],
            exit=stage.exit[a:b],
            hidden=None if stage.hidden is None else stage.hidden[a:b],
            logits_rows=(b - a - 1,) if last else (),
            checkpoint_layer=self._model.checkpoint_layer,
            # Rows that are computed again would add their mass twice.
            masses=() if stage.looks else self._masses,
            probes=probes,
            drifts=drifts,
            keep_hidden=stage.keep_hidden,
        )

    def _part_end(self, stage: _Stage, a: int, b: int) -> tuple[int, tuple[Drift, ...]]:
        """Where a part that begins at row `a` ends, about `b`: rows of a span that drifts stay together, for
        its entries move when its probes are computed, once. And the drifts of the part's spans."""
        spans = [r.drift for r in self._relayed.values() if r.drift is not None]
        for drift in spans:
            first, stop = torch.searchsorted(
                stage.positions, torch.tensor([drift.start, drift.stop])
            ).tolist()
            if first < b < stop:
                b = first if first > a else stop
        low, high = int(stage.positions[a]), int(stage.positions[b - 1])
        return b, tuple(d for d in spans if low < d.stop and d.start <= high)

    def done(self, part: Part, result: PartResult) -> tuple[int, int]:
        """Take a part's result.

        Returns:
            (fresh, rectified) entries that the part computed, for sharing out its time.
        """
        stage = self._current
        a, b = stage.cursor, stage.cursor + part.rows
        stage.cursor = b
        enter, exit_ = stage.enter[a:b], stage.exit[a:b]
        entries = exit_ - enter
        rectified = int(entries[stage.relayed[a:b]].sum()) if self._relayed else 0
        fresh = int(entries.sum()) - rectified
        self.counts.fresh += fresh
        self.counts.rectified += rectified
        costs = self._model.costs
        self.actual_flops += rows_flops(costs, part.positions.numpy(), enter.numpy(), exit_.numpy())
        self.actual_flops += len(part.logits_rows) * costs.head_flops
        if stage.keep_hidden:
            assert result.hidden is not None  # the part asked for them
            stage.kept.append(result.hidden)
            if b == stage.positions.shape[0]:
                self._stage = self._second_stage(stage)
        elif stage.looks and b == stage.positions.shape[0]:
            self._stage = self._stage_after_look()
        if part.logits_rows:
            self.logits = result.logits[-1]
        return fresh, rectified

    @property
    def _current(self) -> _Stage:
        assert self._stage is not None  # `load` comes first
        return self._stage

    # -- reuse ---------------------------------------------------------------------------------------------

    def _scatter(self, plan: SpanPlan, pulled: PulledSegment) -> None:
        span, count = plan.span, len(plan.span)
        if pulled.num_tokens < count:
            raise ConfigError(f"a segment of {pulled.num_tokens} tokens cannot fill a span of {count}.")
        shift = span.start - pulled.start
        cos, sin = kernels.rotation(self._model.inv_freq, shift) if shift else (None, None)
        at, left = span.start, count
        for block in pulled.blocks:
            n = min(left, block.kv.shape[3])
            if n <= 0:
                break
            kernels.relocate(block.kv[:, :, :, :n], cos, sin, self.cache.kv[:, :, :, at : at + n])
            at, left = at + n, left - n

    def _keep(self, plan: SpanPlan, pulled: PulledSegment) -> _Relayed:
        """Resolve the selection where it is known now, and copy what later stages need."""
        count, start, select = len(plan.span), plan.band[0], plan.select
        values = drift = mass = None
        if plan.band[1] <= start:
            wanted = selected = _NONE
        elif isinstance(select, TopMass) and self.plan.look is not None:
            wanted, selected = torch.arange(count), _NONE
            mass = pulled.gather("mass")[:count]
        elif isinstance(select, TopMass | Positions):
            selected, drift = self._select(plan, pulled.gather("mass")[:count])
            wanted = selected
        else:
            wanted = selected = torch.arange(count)
            values = self.cache.values(select.layer)[:, plan.span.start : plan.span.stop].clone()
        if wanted.numel() and start not in (0, self._model.checkpoint_layer):
            raise ConfigError(
                f"a band cannot start at layer {start}: rows join at layer 0 or at the checkpoint "
                f"(layer {self._model.checkpoint_layer} in this model's profile)."
            )
        checkpoint = pulled.rows("checkpoint", wanted) if wanted.numel() and start > 0 else None
        return _Relayed(plan, selected, checkpoint, values, drift, mass)

    def _select(self, plan: SpanPlan, scores: torch.Tensor) -> tuple[torch.Tensor, Drift | None]:
        """Offsets to recompute by `scores` [tokens], and what the other entries follow."""
        assert isinstance(plan.select, TopMass | Positions)  # the others are chosen in `_chosen`
        selected, probes = resolve_select(plan.select, scores)
        if not plan.drift or not probes.numel():
            return selected, None
        span, model = plan.span, self._model
        drift = span_drift(span.start, len(span), selected, probes, plan.band, plan.drift, model.inv_freq)
        return selected, drift

    # -- rows ----------------------------------------------------------------------------------------------

    def _lay_out(self) -> _Rows:
        """Rows of all spans in the plan's order, which is that of their positions."""
        positions, counts, facts = list[torch.Tensor](), list[int](), list[tuple[int, int, bool, bool]]()
        states: list[tuple[int, torch.Tensor]] = []
        total = 0
        for i, plan in enumerate(self.plan.spans):
            span, found = plan.span, self._relayed.get(i)
            if found is None:
                rows = torch.arange(max(span.start, self.prefix_tokens), max(span.stop, self.prefix_tokens))
                facts.append((0, self._model.num_layers, False, False))
            else:
                rows = span.start + found.selected
                facts.append((*plan.band, True, found.values is not None))
                if found.checkpoint is not None and found.selected.numel():
                    states.append((total, found.checkpoint))
            positions.append(rows)
            counts.append(rows.shape[0])
            total += rows.shape[0]
        table = torch.repeat_interleave(torch.tensor(facts), torch.tensor(counts), dim=0).T.contiguous()
        hidden = None
        if states:
            hidden = states[0][1].new_empty((total, states[0][1].shape[1]))
            for at, state in states:
                hidden[at : at + state.shape[0]] = state
        return _Rows(torch.cat(positions), table[0], table[1], table[2].bool(), table[3].bool(), hidden)

    def _first_stage(self, rows: _Rows) -> _Stage:
        cut = self._cut
        if cut is None or cut >= self._model.num_layers or not self._relayed:
            return _Stage(rows.positions, rows.enter, rows.end, rows.relayed, rows.hidden)
        index = torch.nonzero(rows.enter < cut).flatten()
        assert self._choice is not None  # it makes the cut
        suffix = probed_tokens(self._choice)
        return _Stage(
            rows.positions[index],
            rows.enter[index],
            rows.end[index].clamp_max(cut),
            rows.relayed[index],
            None if rows.hidden is None else rows.hidden[index.to(rows.hidden.device)],
            index,
            watch=(self._choice.layer,) if suffix else (),
            suffix=suffix,
            keep_hidden=True,
        )

    def _looking_stage(self, rows: _Rows) -> _Stage:
        """The fresh rows, up to where attention was seen."""
        look = self.plan.look
        assert look is not None  # only then does anything wait for it
        exit_ = torch.full_like(rows.enter, look.layers[-1] + 1)
        return _Stage(
            rows.positions,
            rows.enter,
            exit_,
            rows.relayed,
            None,
            watch=look.layers,
            suffix=look.suffix,
            looks=True,
        )

    def _stage_after_look(self) -> _Stage:
        """The rows that a look selects, and the fresh ones again."""
        look = self.plan.look
        assert look is not None  # this is behind a look
        attended = torch.stack([self._influence(layer) for layer in look.layers]).mean(0)
        self._probes.clear()
        for i, waiting in self._relayed.items():
            if waiting.mass is None:
                continue
            span, states = waiting.span, waiting.checkpoint
            scores = waiting.mass.cpu() * attended[span.start : span.stop].sqrt()
            selected, drift = self._select(waiting.plan, scores)
            checkpoint = None if states is None else states[selected.to(states.device)]
            self._relayed[i] = _Relayed(waiting.plan, selected, checkpoint, drift=drift)
        rows = self._rows = self._lay_out()
        if look.back and not self._masses:
            # With masses wanted, the layers below count towards them, so they are computed again too.
            fresh = torch.nonzero(~rows.relayed).flatten()
            states = self.cache.checkpoint[rows.positions[fresh].to(self.cache.checkpoint.device)]
            if rows.hidden is None:
                rows.hidden = states.new_empty((rows.positions.shape[0], states.shape[1]))
            rows.hidden[fresh.to(states.device)] = states
            rows.enter[fresh] = look.back
        return _Stage(rows.positions, rows.enter, rows.end, rows.relayed, rows.hidden)

    def _second_stage(self, first: _Stage) -> _Stage:
        """Rows that go on behind the detection layer, or start there: all but the ones not chosen."""
        rows, cut = self._rows, self._cut
        assert rows is not None  # laid out by `load`
        assert cut is not None  # only then is there a second stage
        assert first.index is not None
        states = torch.cat(first.kept)
        first.kept.clear()
        hidden = states.new_empty((rows.positions.shape[0], states.shape[1]))
        if rows.hidden is not None:
            hidden.copy_(rows.hidden)
        hidden[first.index.to(states.device)] = states
        goes_on = rows.end > cut
        goes_on[rows.pending] &= self._chosen()
        index = torch.nonzero(goes_on).flatten()
        return _Stage(
            rows.positions[index],
            rows.enter[index].clamp_min(cut),
            rows.end[index],
            rows.relayed[index],
            hidden[index.to(states.device)],
            index,
        )

    def _chosen(self) -> torch.Tensor:
        """[pending rows] bool, over all spans that left the choice to the run."""
        choice = self._choice
        assert choice is not None  # only then is there a second stage
        spans = [r for r in self._relayed.values() if r.values is not None]
        now = self.cache.values(choice.layer)
        found = Detected(
            torch.cat([r.values for r in spans if r.values is not None], dim=1),
            torch.cat([now[:, r.span.start : r.span.stop] for r in spans], dim=1),
            lambda: self._influence(choice.layer)[
                torch.cat([torch.arange(r.span.start, r.span.stop) for r in spans])
            ],
        )
        chosen = choose(choice, found)
        self._probes.clear()
        return chosen

    def _influence(self, layer: int) -> torch.Tensor:
        """[num_tokens] attention received from the probed rows, summed over heads and rows."""
        first = self._current
        probes = [p for p in self._probes if p.layer == layer]
        probed = (first.positions >= probes[0].start) & (first.enter <= layer)
        query = torch.cat([p.query for p in probes if p.query is not None], dim=1)
        positions = first.positions[probed].to(query.device)
        mask = kernels.position_mask(positions, 0, self.num_tokens, None, query.dtype)
        keys = self.cache.keys(layer)[:, : self.num_tokens]
        scaling = query.shape[-1] ** -0.5 if self._model.scaling is None else self._model.scaling
        _, probabilities = kernels.attend_explicit(query, keys, keys, scaling=scaling, mask=mask)
        return probabilities.sum(dim=(0, 1)).cpu()


_NONE = torch.empty(0, dtype=torch.long)


def _run_time_choice(plan: RectifyPlan) -> Choice | None:
    """The selection that the run makes, if any; it is one for all spans."""
    choices = {s.select for s in plan.spans if s.source and not isinstance(s.select, TopMass | Positions)}
    if len(choices) > 1:
        raise ConfigError(f"spans of one prompt select at run time in different ways: {choices}.")
    return next(iter(choices), None)


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
