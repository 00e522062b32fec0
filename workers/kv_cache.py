"""KV cache memory of one worker: a fixed pool cut into extents of whole blocks.

A sequence gets one contiguous extent that holds its prompt and its longest answer, reserved at admission, so
keys and values are written in place, never concatenated, and attention reads them through a strided view
without gathering. An extent is a run of whole blocks; freeing merges neighbours. Knows nothing of models or
prompts.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from transport.errors import CacheFull, CacheTooSmall, Cancelled
from workers.layout import BlockViews, KVLayout


@dataclass(eq=False)
class SequenceCache:
    """One sequence's extent of the pool.

    Attributes:
        kv: [layers, 2, kv_heads, capacity, head_dim] view into the pool.
        checkpoint: [capacity, hidden_size]; input of the layout's checkpoint layer, for computed rows.
        mass: [capacity] float32; context mass of rows computed with capture on.
        first_block, num_blocks: the extent.
    """

    kv: torch.Tensor
    checkpoint: torch.Tensor
    mass: torch.Tensor
    first_block: int
    num_blocks: int

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.kv.shape[3]

    def keys(self, layer: int) -> torch.Tensor:
        """[kv_heads, capacity, head_dim]"""
        return self.kv[layer, 0]

    def values(self, layer: int) -> torch.Tensor:
        """[kv_heads, capacity, head_dim]"""
        return self.kv[layer, 1]


def copy_out(sequence: SequenceCache, start: int, num_tokens: int, blocks: Sequence[BlockViews]) -> None:
    """Copy KV, checkpoint and mass of tokens [start, start + num_tokens) into segment blocks.

    The rest of the last block becomes zeros: what the block held before may have been another tenant's.
    """
    size = blocks[0].mass.shape[0]
    for i, views in enumerate(blocks):
        a, n = start + i * size, min(size, num_tokens - i * size)
        views.kv.put(sequence.kv[:, :, :, a : a + n])
        views.checkpoint[:n] = sequence.checkpoint[a : a + n]
        views.mass[:n] = sequence.mass[a : a + n]
        views.checkpoint[n:] = 0
        views.mass[n:] = 0


class CachePool:
    """First-fit allocator of contiguous block extents. Thread-safe, first come first served."""

    def __init__(self, layout: KVLayout, num_tokens: int, device: str | torch.device = "cpu") -> None:
        self._layout = layout
        self.num_blocks = max(1, num_tokens // layout.block_tokens)
        tokens = self.num_blocks * layout.block_tokens
        # Filled, so that no request pays for the page faults of memory that nobody has touched yet.
        self._kv = torch.empty(
            (layout.num_layers, 2, layout.num_kv_heads, tokens, layout.head_dim),
            dtype=layout.torch_dtype,
            device=device,
        ).zero_()
        self._free: list[tuple[int, int]] = [(0, self.num_blocks)]
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()

    @property
    def free_blocks(self) -> int:
        with self._changed:
            return sum(n for _, n in self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of an extent for `num_tokens`."""
        return self._layout.blocks_for(max(1, num_tokens))

    def allocate(self, num_tokens: int, *, timeout_s: float) -> SequenceCache:
        """Reserve an extent for `num_tokens`; see `allocate_all`."""
        return self.allocate_all([num_tokens], timeout_s=timeout_s)[0]

    def allocate_all(
        self, num_tokens: Sequence[int], *, timeout_s: float, cancelled: Sequence[threading.Event] = ()
    ) -> list[SequenceCache]:
        """Reserve an extent for each of them, waiting for other sequences to end if need be. All or none: two
        that held some and waited for more would wait for each other.

        Raises:
            CacheTooSmall: they can never fit.
            CacheFull: no room within `timeout_s`.
            Cancelled: one of `cancelled` was set while waiting.
        """
        blocks = [self.blocks_for(n) for n in num_tokens]
        total = sum(num_tokens)
        if sum(blocks) > self.num_blocks:
            raise CacheTooSmall(
                f"{total} tokens need {sum(blocks)} cache blocks, the worker has {self.num_blocks} in all. "
                "Raise worker.cache_tokens or shorten the prompt."
            )
        deadline = time.monotonic() + timeout_s
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while True:
                    # Only the first in line may take, or a long prompt would starve behind short ones.
                    firsts = self._take_all(blocks) if self._waiting[0] is ticket else None
                    if firsts is not None:
                        return [self._sequence(a, n) for a, n in zip(firsts, blocks, strict=True)]
                    left = deadline - time.monotonic()
                    if any(event.is_set() for event in cancelled):
                        raise Cancelled("the request was cancelled while it waited for KV cache memory.")
                    if left <= 0:
                        raise CacheFull(
                            f"no room for {total} tokens in the KV cache within {timeout_s:.1f} s. "
                            "Raise worker.cache_tokens or send fewer requests at once."
                        )
                    self._changed.wait(min(left, 0.2))
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()

    def free(self, sequence: SequenceCache) -> None:
        """Give an extent back. The sequence must not be used afterwards."""
        with self._changed:
            merged: list[tuple[int, int]] = []
            for start, count in sorted([*self._free, (sequence.first_block, sequence.num_blocks)]):
                if merged and merged[-1][0] + merged[-1][1] == start:
                    merged[-1] = (merged[-1][0], merged[-1][1] + count)
                else:
                    merged.append((start, count))
            self._free = merged
            self._changed.notify_all()

    def _take_all(self, blocks: Sequence[int]) -> list[int] | None:
        """First blocks of extents of so many each; None, and nothing is taken, unless all of them fit."""
        before, firsts = list(self._free), list[int]()
        for count in blocks:
            first = self._take(count)
            if first is None:
                self._free = before
                return None
            firsts.append(first)
        return firsts

    def _take(self, blocks: int) -> int | None:
        for i, (start, count) in enumerate(self._free):
            if count >= blocks:
                rest = (start + blocks, count - blocks)
                self._free[i : i + 1] = [rest] if rest[1] else []
                return start
        return None

    def _sequence(self, first: int, blocks: int) -> SequenceCache:
        size = self._layout.block_tokens
        capacity = blocks * size
        return SequenceCache(
            kv=self._kv[:, :, :, first * size : first * size + capacity],
            checkpoint=torch.empty(
                (capacity, self._layout.hidden_size), dtype=self._kv.dtype, device=self._kv.device
            ),
            mass=torch.zeros(capacity, dtype=torch.float32, device=self._kv.device),
            first_block=first,
            num_blocks=blocks,
        )
