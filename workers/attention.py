"""The attention function that we register with transformers, and the row structure that it serves.

transformers hands the step description through to the function as the keyword `relay`. The function receives
post-RoPE q, k, v of all rows of the step at one layer, writes k and v into the sequences' caches and lets
every row
attend by position: row i sees key j iff pos_j <= pos_i (and within the sliding window where the layer has
one). It knows nothing of plans, prompts or schedules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from workers import kernels
from workers.kv_cache import SequenceCache

ATTENTION_NAME = "relay_cluster"

# Runs of at least this many neighbouring rows are attended as one dense block; single rows share a masked
# call.
DENSE_RUN = 16


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
    """Rows of one part that attend in one call."""

    rows: slice | torch.Tensor
    positions: torch.Tensor
    first: int
    stop: int
    dense: bool
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict[int | None, torch.Tensor])

    def mask(self, window: int | None, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """(additive mask [rows, stop - lo], lo), built once for all layers with this window."""
        lo = 0 if window is None else max(0, self.first - window + 1)
        if window not in self.masks:
            self.masks[window] = kernels.position_mask(self.positions, lo, self.stop, window, dtype)
        return self.masks[window], lo


@dataclass(slots=True)
class PartRows:
    """The active rows of one part between two changes of the row set.

    Attributes:
        start, stop: the part's slice of the step's rows.
        positions: [rows] ascending int64.
        groups: how the rows are attended.
    """

    cache: SequenceCache
    start: int
    stop: int
    positions: torch.Tensor
    groups: list[RowGroup]
    contiguous: bool
    masses: tuple[MassSpan, ...]
    probe: Probe | None


@dataclass(slots=True)
class ActiveRows:
    """What the attention function gets as `relay`: all parts' active rows at one layer."""

    parts: list[PartRows]
    num_layers: int


def group_rows(positions: torch.Tensor) -> list[RowGroup]:
    """Split ascending positions into dense runs and one group of the rest.

    Args:
        positions: [rows] int64, ascending.
    """
    rows = positions.shape[0]
    values = positions.tolist()
    if values[-1] - values[0] + 1 == rows:
        return [RowGroup(slice(0, rows), positions, values[0], values[-1] + 1, dense=True)]
    groups: list[RowGroup] = []
    rest: list[int] = []
    begin = 0
    for i in range(1, rows + 1):
        if i < rows and values[i] == values[i - 1] + 1:
            continue
        if i - begin >= DENSE_RUN:
            first, stop = values[begin], values[i - 1] + 1
            groups.append(RowGroup(slice(begin, i), positions[begin:i], first, stop, dense=True))
        else:
            rest.extend(range(begin, i))
        begin = i
    if rest:
        index = torch.tensor(rest, device=positions.device)
        sparse = positions[index]
        groups.append(RowGroup(index, sparse, values[rest[0]], values[rest[-1]] + 1, dense=False))
    return groups


def relay_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    relay: ActiveRows | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer for a whole ragged step.

    Args:
        query: [1, heads, rows, head_dim]; key, value: [1, kv_heads, rows, head_dim]; after RoPE.
        relay: the active rows; their order is the order of `rows`.

    Returns:
        ([1, rows, heads, head_dim], None)
    """
    if relay is None:
        raise RuntimeError("the model was called without `relay=`; drive it through workers.engine.Engine.")
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.empty_like(query[0])
    for part in relay.parts:
        q = query[0, :, part.start : part.stop]
        _write(part, layer, key[0, :, part.start : part.stop], value[0, :, part.start : part.stop])
        if part.probe is not None and part.probe.layer == layer:
            part.probe.query = q[:, part.positions >= part.probe.start].clone()
        target = out[:, part.start : part.stop]
        for group in part.groups:
            target[:, group.rows] = _attend_group(
                part, group, layer, q[:, group.rows], scale, sliding_window, softcap, relay.num_layers
            )
    return out.transpose(0, 1)[None], None


def _write(part: PartRows, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    keys, values = part.cache.keys(layer), part.cache.values(layer)
    if part.contiguous:
        first = int(part.positions[0])
        keys[:, first : first + key.shape[1]] = key
        values[:, first : first + key.shape[1]] = value
    else:
        keys.index_copy_(1, part.positions, key)
        values.index_copy_(1, part.positions, value)


def _attend_group(
    part: PartRows,
    group: RowGroup,
    layer: int,
    query: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    num_layers: int,
) -> torch.Tensor:
    keys, values = part.cache.keys(layer), part.cache.values(layer)
    masses = [m for m in part.masses if m.start > m.sinks and group.first < m.stop and group.stop > m.start]
    single = query.shape[1] == 1
    lo = 0 if window is None else max(0, group.first - window + 1)
    seen = keys[:, lo : group.stop], values[:, lo : group.stop]
    # One row on a CPU: two matrix-vector products are the fastest, and the probabilities come for free.
    if softcap is not None or (single and not query.is_cuda):
        mask = None if single else group.mask(window, query.dtype)[0]
        out, probabilities = kernels.attend_explicit(query, *seen, scaling=scale, mask=mask, softcap=softcap)
        for span in masses:
            _add_mass_from_probabilities(part, group, span, probabilities, lo, num_layers)
        return out
    if masses:
        return _attend_with_mass(part, group, layer, query, scale, window, masses, num_layers)
    if group.dense:
        return kernels.attend_causal(
            query,
            *seen,
            scaling=scale,
            window=window,
            mask=lambda: group.mask(window, query.dtype)[0],
        )
    return kernels.attend(query, *seen, scaling=scale, mask=group.mask(window, query.dtype)[0])


def _add_mass_from_probabilities(
    part: PartRows, group: RowGroup, span: MassSpan, probabilities: torch.Tensor, lo: int, num_layers: int
) -> None:
    """probabilities: [kv_heads, groups * rows, tokens] over keys lo .. ; mean over heads, added per layer."""
    if span.start - lo <= 0:
        return
    rows = group.positions.shape[0]
    mass = probabilities[..., max(0, span.sinks - lo) : span.start - lo].sum(-1)
    mass = mass.reshape(-1, rows).mean(0).div_(num_layers)
    if rows == 1:
        part.cache.mass[group.first] += mass[0]
        return
    inside = (group.positions >= span.start) & (group.positions < span.stop)
    part.cache.mass.index_add_(0, group.positions[inside], mass[inside])


def _attend_with_mass(
    part: PartRows,
    group: RowGroup,
    layer: int,
    query: torch.Tensor,
    scale: float,
    window: int | None,
    masses: list[MassSpan],
    num_layers: int,
) -> torch.Tensor:
    """Attention of prefill rows, and m = exp(lse_before - lse_all), mean over heads, added to the cache's
    mass."""
    keys, values = part.cache.keys(layer), part.cache.values(layer)
    lo = 0 if window is None else max(0, group.first - window + 1)
    seen = keys[:, lo : group.stop], values[:, lo : group.stop]
    if group.dense:
        out, lse = kernels.attend_causal_with_lse(
            query,
            *seen,
            scaling=scale,
            window=window,
            mask=lambda: group.mask(window, query.dtype)[0],
        )
    else:
        mask = group.mask(window, query.dtype)[0]
        out, lse = kernels.attend_with_lse(query, *seen, scaling=scale, mask=mask)
    for span in masses:
        first, stop = max(lo, span.sinks), span.start
        if first >= stop:
            continue
        inside = (group.positions >= span.start) & (group.positions < span.stop)
        before = kernels.log_sum_exp(
            query[:, inside],
            keys[:, first:stop],
            scaling=scale,
            mask=None
            if window is None
            else group.mask(window, query.dtype)[0][inside, first - lo : stop - lo],
        )
        mass = (before - lse[:, inside]).exp().mean(0).div_(num_layers)
        part.cache.mass.index_add_(0, group.positions[inside], mass)
    return out
