"""Decoder layers prepared for ragged steps: projections fused once at load, norms and rotation in few
operators, residuals added in place.

    prepare_layers(model)   -> one `FusedLayer` per decoder layer, checked against transformers' own

Fusing is by structure (names of projections and norms), which covers the families that `check_structure`
admits. Every fused layer is compared with the module it came from before it is used; one that differs, or
whose structure is not known, is driven through transformers' own forward (`ModuleLayer`), slower and just as
right. The fused weights *are* the module's parameters (these become views), so no memory is spent twice.
Knows nothing of caches, plans or schedules; attention is a callable.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

log = logging.getLogger(__name__)

Rotary = tuple[torch.Tensor, torch.Tensor]
"""cos, sin of the rows' positions, [1, rows, rotary_dim] each, as transformers' rotary modules give them."""


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What a layer asks of attention: factor and soft cap of the scores, sliding window in tokens."""

    scaling: float
    window: int | None
    softcap: float | None


class Attend(Protocol):
    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        settings: AttentionSettings,
    ) -> torch.Tensor:
        """query: [heads, rows, head_dim]; key, value: [kv_heads, rows, head_dim], after RoPE.

        Returns:
            [rows, heads * head_dim]
        """
        ...


class Layer(Protocol):
    settings: AttentionSettings

    def forward(self, hidden: torch.Tensor, rotary: RotaryTables, attend: Attend) -> torch.Tensor:
        """hidden: [rows, hidden_size], may be overwritten; returns the layer's output, same shape."""
        ...


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """cos and sign-folded sin, [rows, 1, rotary_dim], and the pair as transformers wants it."""

    cos: torch.Tensor
    sin: torch.Tensor
    raw: Rotary

    @classmethod
    def of(cls, raw: Rotary) -> RotaryTables:
        cos, sin = raw[0][0], raw[1][0]
        half = sin.shape[-1] // 2
        # rotate_half(x) * sin == roll(x) * signed sin: the minus of rotate_half goes into the table.
        signed = torch.cat((-sin[:, :half], sin[:, half:]), -1)
        return cls(cos[:, None], signed[:, None], raw)


class Norm:
    """RMS norm with the module's weight, or with 1 + weight (Gemma), whichever gives the module's output."""

    def __init__(self, module: Any) -> None:
        weight = module.weight.detach()
        self.eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
        sample = torch.linspace(-3, 3, 2 * weight.numel(), device=weight.device, dtype=weight.dtype)
        sample = sample.view(2, -1)
        expected = module(sample)
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        for candidate in (weight, 1 + weight):
            self.weight = candidate
            if torch.allclose(self(sample).float(), expected.float(), rtol=tolerance, atol=tolerance):
                return
        raise _Unknown(f"norm {type(module).__name__} is not an RMS norm")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class _Unknown(Exception):
    """The structure is not one that we can fuse."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension (arXiv 1910.07467). x: [..., dim]; a new tensor of the same shape."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    # torch composes it of ten operators on a CPU: 1.4x the time at 226 rows, 2.2x at 1,024.
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1 / x.shape[-1])
    scale = scale.add_(eps).rsqrt_()
    return x * scale if weight is None else (x * weight).mul_(scale)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: [rows, in]; weight: [out, in]; returns [rows, out], maybe not contiguous.

    On a CPU in float32 the usual product takes up to twice the time of reading the weights when there are a
    few rows (MKL splits the rows: there are too few). Measured for SmolLM2 on 2 cores: as a batch
    of narrow products 0.6-0.7x the time at 4 and 8 rows, transposed 0.6-0.7x at 16 and 32.
    """
    rows = x.shape[0]
    if x.device.type != "cpu" or not 3 <= rows < 48 or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    width = _block_width(weight.shape[0])
    if rows < 13 and width:
        blocks = weight.view(-1, width, weight.shape[1])
        out = torch.bmm(x.expand(blocks.shape[0], -1, -1), blocks.transpose(1, 2))
        out = out.transpose(0, 1).reshape(rows, -1)
    else:
        out = torch.mm(weight, x.t()).t()
    return out if bias is None else out.add_(bias)


@functools.cache
def _block_width(size: int) -> int:
    """The largest divisor of `size` between 32 and 96, or 0."""
    return next((w for w in range(96, 31, -1) if size % w == 0), 0)


class FusedLayer:
    """One decoder layer: qkv in one product, gate and up in one."""

    def __init__(self, index: int, module: Any, config: Any, settings: AttentionSettings) -> None:
        attn, mlp = module.self_attn, module.mlp
        self.index = index
        self.settings = settings
        self._head_dim = int(attn.head_dim)
        self._heads = int(config.num_attention_heads)
        self._kv_heads = int(config.num_key_value_heads)
        self._act: Callable[[torch.Tensor], torch.Tensor] = _activation(mlp)
        self._norm_attn = Norm(module.input_layernorm)
        self._norm_after_attn, self._norm_mlp, self._norm_after_mlp = _norms(module)
        self._head_norm = _head_norms(attn, self._heads, self._kv_heads)
        self._qkv, self._qkv_bias = _fuse(attn, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"))
        self._gate_up, self._gate_up_bias = _fuse(mlp, ("gate_up_proj",), ("gate_proj", "up_proj"))
        self._out, self._out_bias = attn.o_proj.weight, attn.o_proj.bias
        self._down, self._down_bias = mlp.down_proj.weight, mlp.down_proj.bias

    def forward(self, hidden: torch.Tensor, rotary: RotaryTables, attend: Attend) -> torch.Tensor:
        rows = hidden.shape[0]
        heads, kv = self._heads, self._kv_heads
        qkv = linear(self._norm_attn(hidden), self._qkv, self._qkv_bias)
        # Attention kernels read heads as contiguous runs.
        qkv = qkv.contiguous().view(rows, heads + 2 * kv, self._head_dim)
        turned = _rotate(self._normed(qkv[:, : heads + kv]), rotary).transpose(0, 1)
        mixed = attend(
            self.index, turned[:heads], turned[heads:], qkv[:, heads + kv :].transpose(0, 1), self.settings
        )
        mixed = linear(mixed, self._out, self._out_bias)
        if self._norm_after_attn is not None:
            mixed = self._norm_after_attn(mixed)
        hidden += mixed
        up = linear(self._norm_mlp(hidden), self._gate_up, self._gate_up_bias)
        width = up.shape[1] // 2
        mixed = linear(self._act(up[:, :width]).mul_(up[:, width:]), self._down, self._down_bias)
        if self._norm_after_mlp is not None:
            mixed = self._norm_after_mlp(mixed)
        return hidden.add_(mixed)

    def _normed(self, qk: torch.Tensor) -> torch.Tensor:
        if self._head_norm is None:
            return qk
        weight, eps = self._head_norm
        return rms_norm(qk, None, eps).mul_(weight)


class ModuleLayer:
    """A layer whose structure we do not fuse: transformers' own forward, with our attention function."""

    def __init__(self, index: int, module: Any, settings: AttentionSettings) -> None:
        self.index = index
        self.settings = settings
        self._module = module

    def forward(self, hidden: torch.Tensor, rotary: RotaryTables, attend: Attend) -> torch.Tensor:
        out = self._module(
            hidden[None],
            attention_mask=None,
            past_key_values=None,
            use_cache=False,
            position_embeddings=rotary.raw,
            relay=attend,
        )
        return (out[0] if isinstance(out, tuple) else out)[0]


def module_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    relay: Attend | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that we register with transformers: hands over to `relay`.

    Args:
        query: [1, heads, rows, head_dim]; key, value: [1, kv_heads, rows, head_dim]; after RoPE.

    Returns:
        ([1, rows, heads, head_dim], None)
    """
    if relay is None:
        raise RuntimeError("the model was called without `relay=`; drive it through workers.engine.Engine.")
    head_dim = query.shape[-1]
    settings = AttentionSettings(head_dim**-0.5 if scaling is None else scaling, sliding_window, softcap)
    layer: int = module.layer_idx  # pyright: ignore[reportAssignmentType]
    out = relay(layer, query[0], key[0], value[0], settings)
    return out.view(1, out.shape[0], -1, head_dim), None


_PREPARED: WeakKeyDictionary[Any, list[Layer]] = WeakKeyDictionary()


# Not inference mode: the fused weights become the module's own, which must stay ordinary tensors.
@torch.no_grad()
def prepare_layers(model: Any, rotary_of: Callable[[int, torch.Tensor, torch.Tensor], Rotary]) -> list[Layer]:
    """Fuse every decoder layer of `model`, whose attention implementation must be `module_attention`.

    Done once per model, however many engines share it: fusing again would double the weights.

    Args:
        rotary_of: (layer, hidden [rows, hidden_size], positions [rows]) -> cos, sin.
    """
    if model in _PREPARED:
        return _PREPARED[model]
    config = model.config.get_text_config()
    weight = next(model.model.layers[0].parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((3, config.hidden_size), generator=generator).to(weight.device, weight.dtype)
    positions = torch.tensor([0, 3, 11], device=weight.device)
    layers: list[Layer] = []
    plain = []
    for index, module in enumerate(model.model.layers):
        rotary = RotaryTables.of(rotary_of(index, hidden, positions))
        layer = _prepare(index, module, config, hidden, rotary)
        plain += [index] if isinstance(layer, ModuleLayer) else []
        layers.append(layer)
    if plain:
        log.warning("%d of %d layers run unfused (slower, same results)", len(plain), len(layers))
    _PREPARED[model] = layers
    return layers


def _prepare(index: int, module: Any, config: Any, hidden: torch.Tensor, rotary: RotaryTables) -> Layer:
    """A fused layer if it gives the module's output on a sample, else the module."""
    seen: list[AttentionSettings] = []

    def mix(
        layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, settings: AttentionSettings
    ) -> torch.Tensor:
        """Anything that depends on all of q, k, v row by row."""
        seen.append(settings)
        groups = query.shape[0] // key.shape[0]
        out = query + key.repeat_interleave(groups, 0) * 0.5 + value.repeat_interleave(groups, 0) * 2
        return out.transpose(0, 1).flatten(1)

    expected = ModuleLayer(index, module, AttentionSettings(1, None, None)).forward(
        hidden.clone(), rotary, mix
    )
    try:
        layer = FusedLayer(index, module, config, seen[0])
    except (_Unknown, AttributeError) as error:
        log.debug("layer %d is not fused: %s", index, error)
        return ModuleLayer(index, module, seen[0])
    got = layer.forward(hidden.clone(), rotary, mix)
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    if seen[-1] == seen[0] and torch.allclose(got.float(), expected.float(), rtol=tolerance, atol=tolerance):
        return layer
    log.warning("layer %d differs from its module when fused: it runs unfused", index)
    return ModuleLayer(index, module, seen[0])


def _rotate(qk: torch.Tensor, rotary: RotaryTables) -> torch.Tensor:
    """RoPE in place. qk: [rows, heads, head_dim]; the first rotary_dim dimensions turn, halves paired."""
    width = rotary.cos.shape[-1]
    part = qk if width == qk.shape[-1] else qk[..., :width]
    half = width // 2
    swapped = torch.cat((part[..., half:], part[..., :half]), -1)
    part.mul_(rotary.cos).addcmul_(swapped, rotary.sin)
    return qk


def _activation(mlp: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if act is None:
        raise _Unknown("the MLP has no activation that we know")
    return F.silu if type(act).__name__ in {"SiLU", "SiLUActivation"} else act


def _norms(module: Any) -> tuple[Norm | None, Norm, Norm | None]:
    """(after attention, before the MLP, after the MLP); Gemma has all three."""
    if hasattr(module, "pre_feedforward_layernorm"):
        return (
            Norm(module.post_attention_layernorm),
            Norm(module.pre_feedforward_layernorm),
            Norm(module.post_feedforward_layernorm),
        )
    return None, Norm(module.post_attention_layernorm), None


def _head_norms(attn: Any, heads: int, kv_heads: int) -> tuple[torch.Tensor, float] | None:
    """Weights [heads + kv_heads, head_dim] of per-head norms of q and k (Qwen3, Gemma 3), and their eps."""
    if getattr(attn, "q_norm", None) is None:
        return None
    q, k = Norm(attn.q_norm), Norm(attn.k_norm)
    weight = torch.cat((q.weight.expand(heads, -1), k.weight.expand(kv_heads, -1)))
    return weight.contiguous(), float(
        getattr(attn.q_norm, "variance_epsilon", getattr(attn.q_norm, "eps", 1e-6))
    )


def _fuse(owner: Any, fused: tuple[str], parts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The stacked weight [sum of out, in] and bias. Parts become views of it."""
    if hasattr(owner, fused[0]):
        module = getattr(owner, fused[0])
        return module.weight, module.bias
    modules = [getattr(owner, name) for name in parts]
    if any(type(m) is not torch.nn.Linear for m in modules):
        raise _Unknown("a projection is not a plain linear layer")
    weight = torch.cat([m.weight for m in modules])
    biases = [m.bias for m in modules]
    bias = None if biases[0] is None else torch.cat(biases)
    at = 0
    for module in modules:
        rows = module.weight.shape[0]
        module.weight.data = weight[at : at + rows]
        if bias is not None:
            module.bias.data = bias[at : at + rows]
        at += rows
    return weight, bias
