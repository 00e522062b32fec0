"""Attention of a ragged step over the sequences' caches, and the row structure that it serves.

For every layer: write k and v of the step's rows into their sequences' caches, then let every row attend by
position: row i sees key j iff pos_j <= pos_i (and within the sliding window where the layer has one). Rows
are grouped so that each call does little beyond what is visible. It knows nothing of plans, prompts or
schedules.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workers import kernels
from workers.drift import Drift
from workers.kv_cache import SequenceCache
from workers.layers import AttentionSettings

# Runs of at least this many neighbouring rows are attended as one dense block.
DENSE_RUN = 48
# Other rows go together in calls of so many, in ascending order: a call reads keys up to its last row only.
SPARSE_ROWS = 32
# From so many rows on, a run that does not begin at position 0 is attended in two halves without a mask.
DENSE_MERGE = 128


@dataclass(frozen=True, slots=True)
class MassSpan:
    """Rows at positions [start, stop) add the attention mass they give to [sinks, start) to the cache's
    `mass`.

    Attention sinks, the first few positions, take mass from every token alike and are left out.
    """

    start: int
    stop: int
    sinks: int = 4


@dataclass(slots=True)
class Probe:
    """Keeps the queries of rows at positions >= `start` at `layer` ([heads, rows, head_dim], after RoPE)."""

    layer: int
    start: int
    query: torch.Tensor | None = None


@dataclass(slots=True)
class RowGroup:
    """Rows of one part that attend in one call.

    Attributes:
        rows: the group's rows within its part.
        positions: [rows] int64 ascending; first and last position are `first` and `stop` - 1.
        dense: whether the positions have no gap.
    """

    rows: slice
    positions: torch.Tensor
    first: int
    stop: int
    dense: bool
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict[int | None, torch.Tensor])

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start

    def within(self, span: MassSpan) -> slice:
        """The group's rows (from 0) whose positions lie in the span."""
        if self.dense:
            a, b = max(span.start, self.first), min(span.stop, self.stop)
            return slice(a - self.first, b - self.first)
        bounds = torch.tensor([span.start, span.stop], device=self.positions.device)
        a, b = torch.searchsorted(self.positions, bounds).tolist()
        return slice(a, b)

    def low(self, window: int | None) -> int:
        """First key position that any row may see."""
        return 0 if window is None else max(0, self.first - window + 1)

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [rows, stop - low(window)], built once for all layers with this window."""
        if window not in self.masks:
            self.masks[window] = kernels.position_mask(
                self.positions, self.low(window), self.stop, window, dtype
            )
        return self.masks[window]


@dataclass(slots=True)
class PartRows:
    """The active rows of one part between two changes of the row set.

    Attributes:
        start, stop: the part's slice of the step's rows.
        positions: [rows] ascending int64.
        groups: how the rows are attended.
        contiguous: first position when the positions have no gap, else None.
        drifts: (drift, rows of its probes within the part).
    """

    cache: SequenceCache
    start: int
    stop: int
    positions: torch.Tensor
    groups: list[RowGroup]
    contiguous: int | None
    masses: tuple[MassSpan, ...]
    probes: tuple[Probe, ...]
    drifts: list[tuple[Drift, torch.Tensor]]


@dataclass(slots=True)
class SingleRow:
    """A part with one row (decoding) on a CPU. Its views of the cache are cut once per step, not per layer:
    at eight sequences, cutting them anew took as long as the products.

    Attributes:
        row: its row in the step; position: its token's.
        slots: per layer, where its key and value [kv_heads, head_dim] go.
        seen: per window, (low, keys transposed per layer, values per layer) that it may see.
        masses: as in `PartRows`.
        given: attention mass of all layers so far, summed over heads.
    """

    cache: SequenceCache
    row: int
    position: int
    masses: tuple[MassSpan, ...]
    slots: list[tuple[torch.Tensor, torch.Tensor]]
    seen: dict[int | None, tuple[int, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]
    given: list[torch.Tensor]

    @classmethod
    def of(cls, cache: SequenceCache, row: int, position: int, masses: tuple[MassSpan, ...]) -> SingleRow:
        at = cache.kv[:, :, :, position]
        slots = list(zip(at[:, 0].unbind(0), at[:, 1].unbind(0), strict=True))
        wanted = tuple(m for m in masses if m.sinks < m.start <= position < m.stop)
        return cls(cache, row, position, wanted, slots, {}, [])

    def visible(self, window: int | None) -> tuple[int, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """(low, keys [kv_heads, head_dim, tokens] per layer, values [kv_heads, tokens, head_dim])."""
        if window not in self.seen:
            low = 0 if window is None else max(0, self.position - window + 1)
            kv = self.cache.kv[:, :, :, low : self.position + 1]
            keys = kv[:, 0].transpose(-1, -2).unbind(0)
            self.seen[window] = low, keys, kv[:, 1].unbind(0)
        return self.seen[window]

    def attend(self, layer: int, query: torch.Tensor, settings: AttentionSettings, out: torch.Tensor) -> None:
        """Two batched matrix-vector products, and the probabilities come for free.

        Args:
            query, out: [kv_heads, groups, head_dim].
        """
        low, keys, values = self.visible(settings.window)
        if settings.softcap is None:
            scores = torch.baddbmm(query[:, :1, :1], query, keys[layer], beta=0, alpha=settings.scaling)
        else:
            scores = torch.bmm(query, keys[layer]).mul_(settings.scaling / settings.softcap)
            scores = scores.tanh_().mul_(settings.softcap)
        shares = torch.softmax(scores, -1)
        for span in self.masses:
            first, stop = max(0, span.sinks - low), max(0, span.start - low)
            if first < stop:
                self.given.append(shares[..., first:stop].sum())
        torch.bmm(shares, values[layer], out=out)

    def finish(self, heads: int, num_layers: int) -> None:
        """Note the mass that the row gave, in all layers."""
        if self.given:
            self.cache.mass[self.position] += torch.stack(self.given).sum().float() / (heads * num_layers)
            self.given.clear()


@dataclass(slots=True)
class RaggedAttention:
    """The `Attend` of one step: all parts' active rows, at any layer.

    Attributes:
        parts: in order of their rows. singles: parts of one row, which are not among `parts`.
    """

    parts: list[PartRows]
    singles: list[SingleRow]
    positions: torch.Tensor
    num_layers: int

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        settings: AttentionSettings,
    ) -> torch.Tensor:
        """See `workers.layers.Attend`; the order of rows is the order of the step's parts."""
        heads, rows, dim = query.shape
        out = query.new_empty((rows, heads, dim))
        if self.singles:
            self._write_singles(layer, key, value)
        for part in self.parts:
            a, b = part.start, part.stop
            for drift, probed in part.drifts:
                if drift.band[0] <= layer < drift.band[1]:
                    drift.follow(part.cache, layer, key[:, a:b][:, probed], value[:, a:b][:, probed])
            _write(part, layer, key[:, a:b], value[:, a:b])
            for probe in part.probes:
                if probe.layer == layer:
                    probe.query = query[:, a:b][:, part.positions >= probe.start].clone()
            for group in part.groups:
                r = slice(a + group.rows.start, a + group.rows.stop)
                self._attend(part, group, layer, query[:, r], settings, out[r])
        if self.singles:
            folded = (rows, key.shape[0], -1, dim)
            queries = query.transpose(0, 1).reshape(folded).unbind(0)
            outs = out.view(folded).unbind(0)
            for one in self.singles:
                one.attend(layer, queries[one.row], settings, outs[one.row])
        return out.view(rows, heads * dim)

    def _write_singles(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        keys, values = key.unbind(1), value.unbind(1)
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]  (one call, not two a sequence)
            [t for one in self.singles for t in one.slots[layer]],
            [t for one in self.singles for t in (keys[one.row], values[one.row])],
        )

    def finish(self, heads: int) -> None:
        """After the last layer of this set of rows."""
        for one in self.singles:
            one.finish(heads, self.num_layers)

    def _attend(
        self,
        part: PartRows,
        group: RowGroup,
        layer: int,
        query: torch.Tensor,
        settings: AttentionSettings,
        out: torch.Tensor,
    ) -> None:
        """query: [heads, rows, head_dim] -> out: [rows, heads, head_dim]."""
        masses = [
            m for m in part.masses if m.start > m.sinks and group.first < m.stop and group.stop > m.start
        ]
        if query.is_cuda:
            _attend_cuda(part, group, layer, query, settings, masses, self.num_layers, out)
        elif settings.softcap is not None:
            _attend_capped(part, group, layer, query, settings, masses, self.num_layers, out)
        else:
            _attend_rows(part, group, layer, query, settings, masses, self.num_layers, out)


def group_rows(positions: torch.Tensor) -> list[RowGroup]:
    """Split ascending positions into dense runs and, in between, groups of single rows.

    Args:
        positions: [rows] int64, ascending, on the CPU.
    """
    values: list[int] = positions.tolist()
    groups: list[RowGroup] = []

    def add(a: int, b: int) -> None:
        first, stop = values[a], values[b - 1] + 1
        groups.append(RowGroup(slice(a, b), positions[a:b], first, stop, dense=stop - first == b - a))

    begin = 0
    for a, b in _dense_runs(values):
        for at in range(begin, a, SPARSE_ROWS):
            add(at, min(a, at + SPARSE_ROWS))
        if a < b:
            add(a, b)
        begin = b
    return groups


def _dense_runs(values: list[int]) -> list[tuple[int, int]]:
    """[a, b) of the runs without a gap that are long enough; and an empty one at the end."""
    rows = len(values)
    if values[-1] - values[0] + 1 == rows:
        return [(0, rows)]
    runs = []
    begin = 0
    for i in range(1, rows + 1):
        if i == rows or values[i] != values[i - 1] + 1:
            if i - begin >= DENSE_RUN:
                runs.append((begin, i))
            begin = i
    return [*runs, (rows, rows)]


def _write(part: PartRows, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    keys, values = part.cache.keys(layer), part.cache.values(layer)
    if part.contiguous is not None:
        stop = part.contiguous + key.shape[1]
        keys[:, part.contiguous : stop] = key
        values[:, part.contiguous : stop] = value
    else:
        keys.index_copy_(1, part.positions, key)
        values.index_copy_(1, part.positions, value)


def _attend_capped(
    part: PartRows,
    group: RowGroup,
    layer: int,
    query: torch.Tensor,
    settings: AttentionSettings,
    masses: list[MassSpan],
    num_layers: int,
    out: torch.Tensor,
) -> None:
    """Several rows with soft-capped scores on a CPU (Gemma 2): explicit scores."""
    lo = group.low(settings.window)
    mixed, probabilities = kernels.attend_explicit(
        query,
        part.cache.keys(layer)[:, lo : group.stop],
        part.cache.values(layer)[:, lo : group.stop],
        scaling=settings.scaling,
        mask=group.mask(settings.window, query.dtype),
        softcap=settings.softcap,
    )
    for span in masses:
        seen = probabilities[..., max(0, span.sinks - lo) : max(0, span.start - lo)].sum(-1)
        mass = seen.reshape(-1, group.count).mean(0) / num_layers
        rows = group.within(span)
        _add_mass(part, group, rows, mass[rows])
    out.copy_(mixed.transpose(0, 1))


def _attend_rows(
    part: PartRows,
    group: RowGroup,
    layer: int,
    query: torch.Tensor,
    settings: AttentionSettings,
    masses: list[MassSpan],
    num_layers: int,
    out: torch.Tensor,
) -> None:
    """Several rows on a CPU."""
    lo = group.low(settings.window)
    keys = part.cache.keys(layer)[:, lo : group.stop]
    values = part.cache.values(layer)[:, lo : group.stop]
    if group.dense and settings.window is None and (group.first == 0 or group.count >= DENSE_MERGE):
        mixed, lse = kernels.attend_causal(query, keys, values, scaling=settings.scaling)
    else:
        mask = group.mask(settings.window, query.dtype)
        mixed, lse = kernels.attend_masked(query, keys, values, scaling=settings.scaling, mask=mask)
    out.copy_(mixed.transpose(0, 1))
    for span in masses:
        first, stop = max(lo, span.sinks), span.start
        if first >= stop:
            continue
        rows, mask = group.within(span), None
        if settings.window is not None:
            mask = group.mask(settings.window, query.dtype)[rows, first - lo : stop - lo]
        before = kernels.log_sum_exp(
            query[:, rows], keys[:, first - lo : stop - lo], scaling=settings.scaling, mask=mask
        )
        _add_mass(part, group, rows, (before - lse[:, rows]).exp().mean(0).div_(num_layers))


def _attend_cuda(
    part: PartRows,
    group: RowGroup,
    layer: int,
    query: torch.Tensor,
    settings: AttentionSettings,
    masses: list[MassSpan],
    num_layers: int,
    out: torch.Tensor,
) -> None:
    """Any rows on CUDA: flash-attn for dense ones where it is installed and fits, else our kernel."""
    lo = group.low(settings.window)
    keys = part.cache.keys(layer)[:, lo : group.stop]
    values = part.cache.values(layer)[:, lo : group.stop]
    if group.dense and settings.softcap is None and kernels.flash_serves(query):
        mixed, lse = kernels.flash_causal(query, keys, values, settings.scaling, settings.window)
    else:
        mixed, lse = kernels.attend_rows(
            query,
            keys,
            values,
            group.positions,
            first=lo,
            scaling=settings.scaling,
            window=settings.window,
            softcap=settings.softcap,
        )
    out.copy_(mixed.transpose(0, 1))
    for span in masses:
        rows = group.within(span)
        mass = kernels.context_mass(
            query[:, rows],
            keys,
            lse[:, rows],
            group.positions[rows],
            first=lo,
            start=span.sinks,
            stop=span.start,
            scaling=settings.scaling,
            window=settings.window,
            softcap=settings.softcap,
        )
        _add_mass(part, group, rows, mass / num_layers)


def _add_mass(part: PartRows, group: RowGroup, rows: slice, mass: torch.Tensor) -> None:
    """Add `mass` [rows] to those rows of the group."""
    if group.dense:
        part.cache.mass[group.first + rows.start : group.first + rows.stop] += mass
    else:
        part.cache.mass.index_add_(0, group.positions[rows], mass)
