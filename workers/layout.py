"""The bytes of a block: `[layer][k|v][kv_head][token][head_dim]`, then the checkpoint, then the context mass.

One place computes offsets, so that writer and reader cannot disagree. Keys are stored rotated, at the
positions `Segment.start .. start + num_tokens`. The block is contiguous, so a layer group is a sub-range of
it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import cached_property

import torch

LAYOUT_VERSION = 1


@dataclass(frozen=True)
class BlockViews:
    """Typed windows into one block's payload (no copies).

    Attributes:
        kv: [layers, 2, kv_heads, block_tokens, head_dim], model dtype.
        checkpoint: [block_tokens, hidden_size], model dtype; input of layer `checkpoint_layer`.
        mass: [block_tokens] float32; context mass per token.
    """

    kv: torch.Tensor
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
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: str
    block_tokens: int
    checkpoint_layer: int

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def kv_numel(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.block_tokens * self.head_dim

    @property
    def checkpoint_numel(self) -> int:
        return self.block_tokens * self.hidden_size

    @property
    def block_nbytes(self) -> int:
        """Payload bytes of one block."""
        return (self.kv_numel + self.checkpoint_numel) * self.torch_dtype.itemsize + self.block_tokens * 4

    @property
    def fingerprint(self) -> str:
        """Short digest of everything above: two layouts with one fingerprint read each other's blocks."""
        text = repr((LAYOUT_VERSION, sorted(asdict(self).items())))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def views(self, payload: torch.Tensor) -> BlockViews:
        """Windows into `payload`, a uint8 tensor of `block_nbytes` bytes, aligned to 16."""
        item = self.torch_dtype.itemsize
        kv_end = self.kv_numel * item
        checkpoint_end = kv_end + self.checkpoint_numel * item
        return BlockViews(
            kv=payload[:kv_end]
            .view(self.torch_dtype)
            .view(self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim),
            checkpoint=payload[kv_end:checkpoint_end]
            .view(self.torch_dtype)
            .view(self.block_tokens, self.hidden_size),
            mass=payload[checkpoint_end : self.block_nbytes].view(torch.float32),
        )
