"""Bytes of a segment in local memory, all of them or as many as have arrived.

Written by pulling threads, read by the engine's. Knows nothing of leases, plans or rows.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from transport.errors import RelayError
from workers.layout import BlockViews


class SegmentLost(RelayError):
    """A pull broke off after its first part had been used: what was computed with it is to be thrown away."""


class Arrival:
    """How far the pull of one segment has come.

    The pulling thread calls `landed` and `lost`, in this order of events; any thread reads. `layers` only
    grows, and the bytes of a layer do not change any more once it counts.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._layers = 0
        self._lost = ""

    @property
    def layers(self) -> int:
        """Layers [0, layers) are here and verified."""
        return self._layers

    @property
    def why_lost(self) -> str:
        """Why no more will come; "" as long as it may."""
        return self._lost

    def landed(self, layers: int) -> None:
        """Layers [0, layers) are here and verified."""
        with self._lock:
            self._layers = max(self._layers, layers)

    def lost(self, why: str) -> None:
        """No more will come, and what has come must not be used."""
        with self._lock:
            self._lost = why or "lost"


@dataclass(frozen=True, slots=True)
class PulledSegment:
    """Segment bytes in local memory.

    Attributes:
        blocks: views, in token order.
        num_tokens: tokens stored; start: position at which the keys were rotated.
        arrival: which layers are there already; None = all. Mass and checkpoint are there from the beginning.
    """

    blocks: tuple[BlockViews, ...]
    num_tokens: int
    start: int
    arrival: Arrival | None = None

    @property
    def landed_layers(self) -> int:
        """Layers whose keys and values are there."""
        return self.blocks[0].kv.body.shape[0] if self.arrival is None else self.arrival.layers

    @property
    def why_lost(self) -> str:
        """Why the rest will not come; "" as long as it may."""
        return "" if self.arrival is None else self.arrival.why_lost

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
