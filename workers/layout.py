"""The bytes of a block: context mass, then the checkpoint, then `[layer][k|v][kv_head][token][head_dim]` in
one of the formats of `workers/wire.py`.

One place computes offsets, so that writer and reader cannot disagree. Keys are stored rotated, at the
positions `Segment.start .. start + num_tokens`. What is needed to choose rows comes first, and layers in
their order, so that a block can travel in *parts*: the first has mass, checkpoint and the first layers, every
other one the next layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Final

import torch

from workers.wire import KVView, LayerBytes, WireFormat

LAYOUT_VERSION = 3
_ALIGN: Final = 64
"""Bytes to which the fields of a block are aligned: whole cache lines, and vector loads of any kernel."""


@dataclass(frozen=True)
class BlockViews:
    """Typed windows into one block's payload (no copies).

    Attributes:
        kv: keys and values of all layers.
        window: [bytes] uint8; where they lie, for what is no KV but travels like it.
        checkpoint: [block_tokens, hidden_size]; input of layer `checkpoint_layer`, in the model's dtype, or
            in bfloat16 where keys and values are not exact either.
        mass: [block_tokens] float32; context mass per token.
    """

    kv: KVView
    window: torch.Tensor
    checkpoint: torch.Tensor
    mass: torch.Tensor


@dataclass(frozen=True)
class KVLayout:
    """Shape of KV blocks of one model.

    Attributes:
        num_layers, num_kv_heads, head_dim, hidden_size: of the model.
        dtype: torch dtype name ("float32").
        block_tokens: tokens per block.
        checkpoint_layer: layer whose input is stored as checkpoint.
        layer_groups: parts in which a block travels; the layers are shared out among them.
        wire: format of keys and values in a block.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: str
    block_tokens: int
    checkpoint_layer: int
    layer_groups: int = 1
    wire: WireFormat = "raw"

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @cached_property
    def layer_bytes(self) -> LayerBytes:
        """How one layer's keys and values lie in a block."""
        return LayerBytes(self.num_kv_heads, self.block_tokens, self.head_dim, self.torch_dtype, self.wire)

    @property
    def lossy(self) -> bool:
        """Whether keys and values that went through a block may differ from those that were put in."""
        return self.layer_bytes.lossy

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.lossy else self.torch_dtype

    @property
    def window_nbytes(self) -> int:
        """Bytes of all layers' keys and values in a block."""
        return self.num_layers * self._layer_stride

    @property
    def checkpoint_numel(self) -> int:
        return self.block_tokens * self.hidden_size

    @property
    def block_nbytes(self) -> int:
        """Payload bytes of one block."""
        return self._kv_start + self.window_nbytes

    @property
    def fingerprint(self) -> str:
        """Short digest of everything above: two layouts with one fingerprint read each other's blocks."""
        text = repr((LAYOUT_VERSION, sorted(asdict(self).items())))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @cached_property
    def part_layers(self) -> tuple[int, ...]:
        """Layers that are complete when part i has come, beside all parts before it; ascending, the last one
        is all layers."""
        groups = max(1, min(self.layer_groups, self.num_layers))
        return tuple((i + 1) * self.num_layers // groups for i in range(groups))

    @cached_property
    def parts(self) -> tuple[int, ...]:
        """Bytes of every part; together `block_nbytes`."""
        before = (0, *self.part_layers[:-1])
        sizes = [(b - a) * self._layer_stride for a, b in zip(before, self.part_layers, strict=True)]
        return (self._kv_start + sizes[0], *sizes[1:])

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Byte ranges of a block before its layers that align what follows them; mostly none."""
        ends = (self.block_tokens * 4, self._checkpoint_start + self._checkpoint_nbytes)
        ranges = zip(ends, (self._checkpoint_start, self._kv_start), strict=True)
        return tuple((end, start) for end, start in ranges if end < start)

    def clear_gaps(self, payload: torch.Tensor) -> None:
        """Zeros wherever `views` does not reach: what the block held before may have been another tenant's,
        and travels with the rest."""
        for start, stop in self.gaps:
            payload[start:stop] = 0
        if self.layer_bytes.nbytes < self._layer_stride:
            window = payload[self._kv_start : self.block_nbytes].view(self.num_layers, self._layer_stride)
            window[:, self.layer_bytes.nbytes :] = 0

    def views(self, payload: torch.Tensor) -> BlockViews:
        """Windows into `payload`, a uint8 tensor of `block_nbytes` bytes, aligned to 64."""
        start = self._checkpoint_start
        stop = start + self._checkpoint_nbytes
        window = payload[self._kv_start : self.block_nbytes]
        return BlockViews(
            kv=KVView(window, self.num_layers, self._layer_stride, self.layer_bytes),
            window=window,
            checkpoint=payload[start:stop].view(self.checkpoint_dtype).unflatten(0, (self.block_tokens, -1)),
            mass=payload[: self.block_tokens * 4].view(torch.float32),
        )

    @property
    def _layer_stride(self) -> int:
        return _aligned(self.layer_bytes.nbytes)

    @property
    def _checkpoint_start(self) -> int:
        return _aligned(self.block_tokens * 4)

    @property
    def _kv_start(self) -> int:
        return _aligned(self._checkpoint_start + self._checkpoint_nbytes)

    @property
    def _checkpoint_nbytes(self) -> int:
        return self.checkpoint_numel * self.checkpoint_dtype.itemsize


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
