"""Kernels: one signature, several implementations. `reference` is the oracle and the CPU path; on CUDA
flash-attn serves dense prefill and decode when it is installed. Which one serves is decided once, here, and
can be asked.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from workers.kernels.reference import (
    attend,
    attend_explicit,
    attend_with_lse,
    log_sum_exp,
    position_mask,
    rotate_keys,
    rotation,
    value_deviation,
)

__all__ = [
    "attend",
    "attend_causal",
    "attend_explicit",
    "attend_with_lse",
    "flash_attn_installed",
    "log_sum_exp",
    "position_mask",
    "rotate_keys",
    "rotation",
    "value_deviation",
]


@functools.cache
def flash_attn_installed() -> bool:
    """Whether flash-attn can be imported (it needs CUDA to build)."""
    return importlib.util.find_spec("flash_attn") is not None


def attend_causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, scaling: float, window: int | None
) -> torch.Tensor:
    """Attention of the *last* rows of a sequence over all its keys, causal and aligned at the end.

    Args:
        query: [heads, rows, head_dim], positions tokens - rows .. tokens - 1.
        keys, values: [kv_heads, tokens, head_dim].
        window: sliding window in tokens, or None.

    Returns:
        [heads, rows, head_dim]. On CUDA in half precision flash-attn does it when installed.
    """
    rows, tokens = query.shape[1], keys.shape[1]
    if query.is_cuda and query.dtype != torch.float32 and flash_attn_installed():
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        out = flash_attn_func(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            softmax_scale=scaling,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return out[0].transpose(0, 1)
    if rows == tokens and window is None:
        return attend(query, keys, values, scaling=scaling, causal=True)
    positions = torch.arange(tokens - rows, tokens, device=query.device)
    mask = position_mask(positions, 0, tokens, window, query.dtype)
    return attend(query, keys, values, scaling=scaling, mask=mask)
