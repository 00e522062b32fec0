"""One executor for every plan: turns a `RectifyPlan` and pulled KV into the parts of ragged steps.

    load()       rotate the pulled keys by the shift and scatter K, V into the sequence's cache
    absorb()     the same for layers that have arrived since
    next_part()  rows to compute next, in ascending positions, at most `max_rows` of them unless a span
                 drifts
    done()       takes a part's result; after the last part the first logits are there

Segments may still be on their way when they are loaded: rows are then computed in the layers that have
arrived, and wait there (`workers/stages.py`).

A selection that only the run can make (`workers/selection.py`) cuts the prefill in two stages: all rows up to
the detection layer, then the chosen ones and the fresh ones. So does a plan that looks ahead: the fresh rows
alone, then the chosen ones and the fresh ones again. Chunks may be cut anywhere: a row only sees earlier
positions. Knows nothing of transport, time or other requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from transport.errors import ConfigError
from workers import kernels
from workers.attention import MassSpan, Probe
from workers.costs import ModelCosts, detection_cut, full_prefill_flops, plan_flops, rows_flops
from workers.drift import Drift, span_drift
from workers.engine import Part, PartResult
from workers.kv_cache import SequenceCache
from workers.methods.base import Choice, Positions, RectifyPlan, Span, SpanPlan, TopMass
from workers.pulled import PulledSegment, SegmentLost
from workers.selection import Detected, choose, probed_tokens, resolve_select
from workers.stages import Rows, Slab, Stage


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
class _Relayed:
    """A relayed span, and what is needed of its segment after its blocks are gone.

    Attributes:
        selected: [selected] int64 offsets of the tokens that are recomputed (may be, where the run chooses).
        checkpoint: [selected, hidden_size] their states at band[0]; None where that is layer 0.
        detection: the layer at which the run chooses; None where the plan has chosen.
        values: [kv_heads, tokens, head_dim] reused values there, once they have arrived.
        drift: what entries that are not recomputed follow, if anything.
        mass: [tokens] context mass while the prefill looks ahead; nothing is selected yet, and `checkpoint`
            has the states of all tokens.
    """

    plan: SpanPlan
    selected: torch.Tensor
    checkpoint: torch.Tensor | None
    detection: int | None = None
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
        scatter_s: seconds that rotation and scatter took so far.
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
        self.scatter_s = 0.0
        self._relayed: dict[int, _Relayed] = {}
        self._incoming: dict[int, PulledSegment] = {}
        self._landed = 0  # layers whose relayed entries are in the cache
        self._on_loaded: Callable[[], None] | None = None
        self._probes: list[Probe] = []
        self._rows: Rows | None = None
        self._stage: Stage | None = None
        self._slab: Slab | None = None

    def load(
        self,
        pulled: Mapping[int, PulledSegment],
        corrections: Mapping[int, Correction] | None = None,
        on_loaded: Callable[[], None] | None = None,
    ) -> None:
        """Scatter the relayed spans into the cache, as far as they have arrived, and lay out the rows.

        Args:
            pulled: index of the span in the plan -> its bytes.
            corrections: index of every span whose plan names a correction -> that correction. These need all
                layers of their spans.
            on_loaded: called once the bytes may be freed, at the latest by the `absorb` that finds the last
                layer; at once when nothing is on its way.

        Raises:
            SegmentLost: one of the pulls has broken off.
            ConfigError: a correction to a span that has not arrived, or a segment that is too short.
        """
        sources = {i: pulled[i] for i, s in enumerate(self.plan.spans) if s.source is not None}
        for i, segment in sources.items():
            self._check_source(self.plan.spans[i], segment)
        self._incoming, self._on_loaded = sources, on_loaded
        for i, segment in sources.items():
            self._relayed[i] = self._keep(self.plan.spans[i], segment)
        self.absorb()
        for i, span_plan in enumerate(self.plan.spans):
            if span_plan.correction is not None:
                span = span_plan.span
                (corrections or {})[i].apply(self.cache.kv[:, :, :, span.start : span.stop], span.start)
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
    def full_flops(self) -> float:
        """Of a full prefill of the same prompt."""
        return full_prefill_flops(self._model.costs, self.num_tokens)

    @property
    def flop_ratio_predicted(self) -> float:
        """Predicted FLOPs, as a share of full prefill's of the same prompt."""
        return self.predicted_flops / self.full_flops

    @property
    def flop_ratio(self) -> float:
        """FLOPs of the parts done so far, as a share of full prefill's."""
        return self.actual_flops / self.full_flops

    @property
    def rows_left(self) -> int:
        """Rows that can be computed now; 0 while all of them wait for layers to arrive (`absorb`)."""
        slab = self._open_slab()
        return 0 if slab is None else slab.rows_left

    def absorb(self) -> bool:
        """Scatter what has arrived since the last call, as soon as a layer has come of all spans.

        Returns:
            Whether rows can be computed now.

        Raises:
            SegmentLost: a pull has broken off; start again without that segment.
        """
        if self._landed < self._model.num_layers:
            self._absorb()
        return self.finished or self._stage is None or self.rows_left > 0

    def next_part(self, max_rows: int) -> Part:
        """The next rows: at most `max_rows`, or all rows of one span that drifts where they are more (they
        are never cut). Call `done` with its result before asking again."""
        stage, slab = self._current, self._open_slab()
        assert slab is not None  # there are rows left
        a = slab.cursor
        b, drifts = self._part_end(slab, a, min(a + max_rows, slab.positions.shape[0]))
        positions = slab.positions[a:b]
        last = int(positions[-1]) == self.num_tokens - 1 and int(slab.exit[b - 1]) == self._model.num_layers
        start = max(0, self.num_tokens - stage.suffix)
        probes = tuple(Probe(layer, start) for layer in stage.watch if slab.low <= layer < slab.stop)
        self._probes += probes
        return Part(
            cache=self.cache,
            positions=positions,
            token_ids=self._ids[positions],
            enter=slab.enter[a:b],
            exit=slab.exit[a:b],
            hidden=None if slab.hidden is None else slab.hidden[a:b],
            logits_rows=(b - a - 1,) if last else (),
            checkpoint_layer=self._model.checkpoint_layer,
            # Rows that are computed again would add their mass twice.
            masses=() if stage.looks else self._masses,
            probes=probes,
            drifts=drifts,
            keep_hidden=slab.keep,
        )

    def _part_end(self, slab: Slab, a: int, b: int) -> tuple[int, tuple[Drift, ...]]:
        """Where a part that begins at row `a` ends, about `b`: rows of a span that drifts stay together, for
        its entries move when its probes are computed, once. And the drifts of the part's spans."""
        spans = [r.drift for r in self._relayed.values() if r.drift is not None]
        for drift in spans:
            bounds = torch.tensor([drift.start, drift.stop])
            first, stop = torch.searchsorted(slab.positions, bounds).tolist()
            if first < b < stop:
                b = first if first > a else stop
        low, high = int(slab.positions[a]), int(slab.positions[b - 1])
        return b, tuple(d for d in spans if low < d.stop and d.start <= high)

    def done(self, part: Part, result: PartResult) -> tuple[int, int]:
        """Take a part's result.

        Returns:
            (fresh, rectified) entries that the part computed, for sharing out its time.
        """
        slab = self._slab
        assert slab is not None  # it gave the part
        a, b = slab.cursor, slab.cursor + part.rows
        slab.cursor = b
        enter, exit_ = slab.enter[a:b], slab.exit[a:b]
        entries = exit_ - enter
        rectified = int(entries[slab.relayed[a:b]].sum()) if self._relayed else 0
        fresh = int(entries.sum()) - rectified
        self.counts.fresh += fresh
        self.counts.rectified += rectified
        costs = self._model.costs
        self.actual_flops += rows_flops(costs, part.positions.numpy(), enter.numpy(), exit_.numpy())
        self.actual_flops += len(part.logits_rows) * costs.head_flops
        if slab.keep:
            assert result.hidden is not None  # the part asked for them
            slab.kept.append(result.hidden)
        if not slab.rows_left:
            self._end_slab(slab)
        if part.logits_rows:
            self.logits = result.logits[-1]
        return fresh, rectified

    def _open_slab(self) -> Slab | None:
        if self._slab is None:
            self._slab = self._current.open(self._landed)
        return self._slab

    def _end_slab(self, slab: Slab) -> None:
        """On to the next layers, or to the next stage."""
        stage = self._current
        stage.close(slab)
        self._slab = None
        if stage.finished and stage.keep_hidden:
            self._stage = self._second_stage(stage)
        elif stage.finished and stage.looks:
            self._stage = self._stage_after_look()

    @property
    def _current(self) -> Stage:
        assert self._stage is not None  # `load` comes first
        return self._stage

    # -- reuse ---------------------------------------------------------------------------------------------

    def _check_source(self, plan: SpanPlan, pulled: PulledSegment) -> None:
        if pulled.num_tokens < len(plan.span):
            raise ConfigError(
                f"a segment of {pulled.num_tokens} tokens cannot fill a span of {len(plan.span)}."
            )
        if plan.correction is not None and pulled.landed_layers < self._model.num_layers:
            raise ConfigError("a span that is corrected must have arrived whole.")

    def _absorb(self) -> None:
        begin = time.perf_counter()
        for segment in self._incoming.values():
            if segment.why_lost:
                raise SegmentLost(segment.why_lost)
        layers = self._model.num_layers
        landed = min((s.landed_layers for s in self._incoming.values()), default=layers)
        if landed <= self._landed:
            return
        for i, segment in self._incoming.items():
            self._scatter(self._relayed[i], segment, self._landed, landed)
        self._landed = landed
        if landed == layers:
            self._incoming = {}
            if self._on_loaded is not None:
                self._on_loaded()
        self.scatter_s += time.perf_counter() - begin

    def _scatter(self, relayed: _Relayed, pulled: PulledSegment, low: int, high: int) -> None:
        """Layers [low, high) of a span into the cache."""
        span, inv_freq = relayed.span, self._model.inv_freq
        shift = span.start - pulled.start
        if inv_freq.shape[0] > 1:  # a RoPE per layer
            inv_freq = inv_freq[low:high]
        cos, sin = kernels.rotation(inv_freq, shift) if shift else (None, None)
        at, left = span.start, len(span)
        cache = self.cache.kv[low:high]
        for block in pulled.blocks:
            n = min(left, block.mass.shape[0])
            if n <= 0:
                break
            kernels.relocate(block.kv.take(n, low, high), cos, sin, cache[:, :, :, at : at + n])
            at, left = at + n, left - n
        detection = relayed.detection
        if detection is not None and low <= detection < high:
            # As they came: the rows of this layer are computed later.
            relayed.values = self.cache.values(detection)[:, span.start : span.stop].clone()

    def _keep(self, plan: SpanPlan, pulled: PulledSegment) -> _Relayed:
        """Resolve the selection where it is known now, and copy what later stages need."""
        count, start, select = len(plan.span), plan.band[0], plan.select
        detection = drift = mass = None
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
            detection = select.layer
        if wanted.numel() and start not in (0, self._model.checkpoint_layer):
            raise ConfigError(
                f"a band cannot start at layer {start}: rows join at layer 0 or at the checkpoint "
                f"(layer {self._model.checkpoint_layer} in this model's profile)."
            )
        checkpoint = None
        if wanted.numel() and start > 0:
            checkpoint = pulled.rows("checkpoint", wanted).to(self.cache.checkpoint.dtype)
        return _Relayed(plan, selected, checkpoint, detection, drift=drift, mass=mass)

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

    def _lay_out(self) -> Rows:
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
                facts.append((*plan.band, True, found.detection is not None))
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
        return Rows(torch.cat(positions), table[0], table[1], table[2].bool(), table[3].bool(), hidden)

    def _first_stage(self, rows: Rows) -> Stage:
        cut = self._cut
        if cut is None or cut >= self._model.num_layers or not self._relayed:
            return Stage(rows.positions, rows.enter, rows.end, rows.relayed, rows.hidden)
        index = torch.nonzero(rows.enter < cut).flatten()
        assert self._choice is not None  # it makes the cut
        suffix = probed_tokens(self._choice)
        return Stage(
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

    def _looking_stage(self, rows: Rows) -> Stage:
        """The fresh rows, up to where attention was seen."""
        look = self.plan.look
        assert look is not None  # only then does anything wait for it
        exit_ = torch.full_like(rows.enter, look.layers[-1] + 1)
        return Stage(
            rows.positions,
            rows.enter,
            exit_,
            rows.relayed,
            None,
            watch=look.layers,
            suffix=look.suffix,
            looks=True,
        )

    def _stage_after_look(self) -> Stage:
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
        return Stage(rows.positions, rows.enter, rows.end, rows.relayed, rows.hidden)

    def _second_stage(self, first: Stage) -> Stage:
        """Rows that go on behind the detection layer, or start there: all but the ones not chosen."""
        rows, cut = self._rows, self._cut
        assert rows is not None  # laid out by `load`
        assert cut is not None  # only then is there a second stage
        assert first.index is not None
        states = first.states
        assert states is not None  # the stage kept them
        hidden = states.new_empty((rows.positions.shape[0], states.shape[1]))
        if rows.hidden is not None:
            hidden.copy_(rows.hidden)
        hidden[first.index.to(states.device)] = states
        goes_on = rows.end > cut
        goes_on[rows.pending] &= self._chosen()
        index = torch.nonzero(goes_on).flatten()
        return Stage(
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
        spans = [r for r in self._relayed.values() if r.detection is not None]
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
