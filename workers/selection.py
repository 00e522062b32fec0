"""Which tokens of relayed spans are recomputed: selections that the plan's facts decide, and selections that
the run decides at one layer.

    resolve_select   TopMass, Positions            -> offsets within a span, before anything is computed
    choose           TopDeviation, TopValueChange  -> a choice over all spans together, at `select.layer`

A new run-time selection is a class in `methods/base.py` and a function here. Knows nothing of rows, parts or
caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from workers import kernels
from workers.methods.base import Choice, Positions, TopDeviation, TopMass, TopValueChange


@dataclass(frozen=True, slots=True)
class Detected:
    """What a run-time selection may look at: all its spans, one behind the other.

    Attributes:
        reused, computed: [kv_heads, tokens, head_dim] values at the detection layer, before and after it was
            computed for all these tokens.
        influence: [tokens] float32 attention that they receive there from the last `probed_tokens` prompt
            tokens, summed over heads and rows; asked only by selections that are probed.
    """

    reused: torch.Tensor
    computed: torch.Tensor
    influence: Callable[[], torch.Tensor]


def resolve_select(select: TopMass | Positions, mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets within the span that `select` names, and which of them are probes.

    Args:
        mass: [tokens] float32 context mass of the span's tokens.

    Returns:
        selected: [selected] int64, ascending; probes: [probes] int64, ascending, all of them selected.
    """
    tokens = mass.shape[0]
    none = torch.empty(0, dtype=torch.long)
    if isinstance(select, Positions):
        return torch.tensor([o for o in select.offsets if o < tokens], dtype=torch.long), none
    first, probes, ranked = select.budget(tokens)
    if not first + probes + ranked:
        return none, none
    scores = mass.detach().cpu().clone()
    scores[:first] = float("inf")
    chosen = torch.zeros(tokens, dtype=torch.bool)
    chosen[torch.topk(scores, first + ranked).indices] = True
    spread = none
    if probes:
        rest = torch.nonzero(~chosen).flatten()
        # The middles of equal parts of the rest.
        spread = rest[((torch.arange(probes) + 0.5) * rest.shape[0] / probes).long()]
        chosen[spread] = True
    return torch.nonzero(chosen).flatten(), spread


def probed_tokens(select: Choice) -> int:
    """How many of the last prompt tokens must leave their queries for the selection."""
    return select.suffix if isinstance(select, TopDeviation) else 0


def choose(select: Choice, found: Detected) -> torch.Tensor:
    """[tokens] bool on the CPU: which of its tokens go on behind the detection layer."""
    return _CHOOSERS[type(select)](select, found)


def _deviating(select: TopDeviation, found: Detected) -> torch.Tensor:
    """I = I_dev + I_inf (RelayCaching, methods.md section 2)."""
    if select.tau_diff < 0:
        return torch.ones(found.reused.shape[1], dtype=torch.bool)
    deviation = kernels.value_deviation(found.reused, found.computed).cpu()
    influence = found.influence()
    deviates = deviation > select.tau_diff * deviation.mean()
    return deviates | (influence > select.tau_down * influence.mean())


def _most_changed(select: TopValueChange, found: Detected) -> torch.Tensor:
    """Squared difference of the values, summed over heads and channels; the largest `ratio` of all."""
    change = (found.computed.float() - found.reused.float()).square_().sum(dim=(0, 2)).cpu()
    chosen = torch.zeros(change.shape[0], dtype=torch.bool)
    chosen[torch.topk(change, _budget(select.ratio, change.shape[0])).indices] = True
    return chosen


_CHOOSERS: dict[type, Callable[[Any, Detected], torch.Tensor]] = {
    TopDeviation: _deviating,
    TopValueChange: _most_changed,
}


def _budget(ratio: float, tokens: int) -> int:
    return min(tokens, math.ceil(ratio * tokens))
