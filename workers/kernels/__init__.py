"""Kernels: one signature, several implementations.

    reference   plain torch, written to be read: the oracle
    cpu         torch's blocked CPU kernel
    triton      CUDA, and the Triton interpreter in tests
    flash       CUDA, dense rows in half precision: flash-attn where it is installed, else torch's own

Which one serves is decided here, by the device of the tensors: CUDA tensors go to Triton, and nothing falls
back silently. No knowledge of models, caches or plans.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch

from transport.errors import ConfigError
from workers.kernels import cpu, reference
from workers.kernels.cpu import attend_causal, attend_masked
from workers.kernels.reference import (
    attend_explicit,
    log_sum_exp,
    position_mask,
    rotate_keys,
    rotation,
)

__all__ = [
    "attend_causal",
    "attend_explicit",
    "attend_masked",
    "attend_rows",
    "context_mass",
    "flash_attn_installed",
    "flash_causal",
    "flash_serves",
    "log_sum_exp",
    "position_mask",
    "relocate",
    "rotate_keys",
    "rotation",
    "value_deviation",
]


@functools.cache
def _implementation(device_type: str) -> Any:
    if device_type != "cuda":
        return reference
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "kernels for CUDA need triton, which is not installed. Install it (pip install "
            "'relay-cluster[gpu]'), or set worker.device: cpu."
        )
    return importlib.import_module("workers.kernels.triton")


def relocate(
    source: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Copy KV of one block into a cache, keys re-rotated; see `reference.relocate`."""
    serves = cpu if out.device.type == "cpu" else _implementation(out.device.type)
    serves.relocate(source, cos, sin, out)


def attend_rows(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows at any positions; see `reference.attend_rows`."""
    return _implementation(query.device.type).attend_rows(query, keys, values, positions, **options)


def value_deviation(reused: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """1 - cos per token; see `reference.value_deviation`."""
    return _implementation(reused.device.type).value_deviation(reused, computed)


def context_mass(
    query: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, positions: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Attention given to a range of keys; see `reference.context_mass`."""
    return _implementation(query.device.type).context_mass(query, keys, lse, positions, **options)


@functools.cache
def flash_attn_installed() -> bool:
    """Whether flash-attn can be imported (it needs CUDA to build)."""
    return importlib.util.find_spec("flash_attn") is not None


def flash_serves(query: torch.Tensor) -> bool:
    """Whether `flash_causal` takes rows [heads, rows, head_dim]: on CUDA, half precision, heads up to 256."""
    dim = query.shape[-1]
    return query.is_cuda and query.dtype != torch.float32 and dim <= 256 and dim % 8 == 0


def flash_causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashAttention-2 (arXiv 2307.08691) for the last rows of one sequence.

    Returns:
        out: [heads, rows, head_dim]; lse: [heads, rows] float32.
    """
    if not flash_attn_installed():
        return _torch_flash(query, keys, values, scaling, window)
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    out, lse, _ = flash_attn_func(
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        return_attn_probs=True,
    )
    return out[0].transpose(0, 1), lse[0].float()


def _torch_flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The FlashAttention-2 that torch is built with: as scaled_dot_product_attention calls it, but heads that
    share keys are not copied out, the last row sees the last key, and the log-sum-exp comes along."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001
        query.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        None,
        None,
        query.shape[1],
        keys.shape[1],
        0.0,
        True,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out[0].transpose(0, 1), lse[0]
