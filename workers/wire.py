"""Formats in which a block carries keys and values: as the model has them, in bfloat16, or in 8 bits.

    raw    the model's own dtype: exact
    bf16   bfloat16: half of float32's bytes, 8 significant bits
    int8   8 bits: keys with a scale per channel and block, values with a scale per token (KIVI, arXiv
           2402.02750: channels of keys differ far more than their tokens); about a quarter of float32's bytes

A one-sided read moves what lies in the owner's arena, so a segment is encoded once, when it is published, and
every reader, the owner itself included, decodes. Knows nothing of blocks' other fields, nor of links.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch

from transport.settings import WireFormat

WIRE_FORMATS: tuple[WireFormat, ...] = get_args(WireFormat)

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LayerBytes:
    """How one layer's keys and values lie in a block.

    Attributes:
        heads, tokens, dim: KV heads, tokens of a block, head dimension.
        dtype: of the model.
        wire: the format.
    """

    heads: int
    tokens: int
    dim: int
    dtype: torch.dtype
    wire: WireFormat

    @property
    def stored(self) -> torch.dtype:
        """dtype of the elements in the block."""
        return {"raw": self.dtype, "bf16": torch.bfloat16, "int8": torch.int8}[self.wire]

    @property
    def lossy(self) -> bool:
        """Whether what comes out may differ from what went in."""
        return self.stored != self.dtype

    @property
    def body_nbytes(self) -> int:
        return 2 * self.heads * self.tokens * self.dim * self.stored.itemsize

    @property
    def key_scale_nbytes(self) -> int:
        return self.heads * self.dim * 4 if self.wire == "int8" else 0

    @property
    def value_scale_nbytes(self) -> int:
        return self.heads * self.tokens * 4 if self.wire == "int8" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of a layer, scales included."""
        return self.body_nbytes + self.key_scale_nbytes + self.value_scale_nbytes


class KVView:
    """Keys and values of a block: what is stored, and what it means.

    Attributes:
        body: [layers, 2, kv_heads, block_tokens, head_dim] of the stored dtype; a view of the block.
        key_scale: [layers, kv_heads, 1, head_dim], value_scale: [layers, kv_heads, block_tokens, 1] float32
            views; None where the format has none.
    """

    def __init__(self, payload: torch.Tensor, layers: int, stride: int, form: LayerBytes) -> None:
        """payload: uint8 [layers * stride], aligned to 64 as is stride, the bytes from layer to layer."""
        rows = payload.view(layers, stride)
        body, at = form.body_nbytes, form.body_nbytes + form.key_scale_nbytes
        shape = (2, form.heads, form.tokens, form.dim)
        self.body = rows[:, :body].view(form.stored).unflatten(1, shape)
        self.key_scale: torch.Tensor | None = None
        self.value_scale: torch.Tensor | None = None
        if form.wire == "int8":
            self.key_scale = rows[:, body:at].view(torch.float32).unflatten(1, (form.heads, 1, form.dim))
            scales = rows[:, at : form.nbytes].view(torch.float32)
            self.value_scale = scales.unflatten(1, (form.heads, form.tokens, 1))
        self._form = form

    def put(self, kv: torch.Tensor) -> None:
        """Store the KV of the block's first tokens, [layers, 2, kv_heads, n, head_dim]; zeros behind them:
        what the block held before may have been another tenant's."""
        n = kv.shape[3]
        self.body[:, :, :, n:] = 0
        if self.key_scale is None or self.value_scale is None:
            self.body[:, :, :, :n] = kv
            return
        keys, values = kv[:, 0].float(), kv[:, 1].float()
        self.key_scale[:] = keys.abs().amax(dim=2, keepdim=True).div_(127)
        self.value_scale[:, :, :n] = values.abs().amax(dim=3, keepdim=True).div_(127)
        self.value_scale[:, :, n:] = 0
        self.body[:, 0, :, :n] = _to_int8(keys, self.key_scale)
        self.body[:, 1, :, :n] = _to_int8(values, self.value_scale[:, :, :n])

    def take(self, count: int, low: int = 0, high: int | None = None) -> torch.Tensor:
        """KV of the first `count` tokens in the layers [low, high): [layers, 2, kv_heads, count, head_dim] of
        the model's dtype; a view where the format is raw."""
        body = self.body[low:high, :, :, :count]
        if self.key_scale is None or self.value_scale is None:
            return body.to(self._form.dtype)
        out = body.to(torch.float32)
        out[:, 0] *= self.key_scale[low:high]
        out[:, 1] *= self.value_scale[low:high, :, :count]
        return out.to(self._form.dtype)


def _to_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale.clamp_min(_TINY)).round_().clamp_(-127, 127).to(torch.int8)
