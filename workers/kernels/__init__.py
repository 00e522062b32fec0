"""Kernels: one signature, several implementations. `reference` is the oracle and the CPU path; on CUDA
flash-attn serves dense prefill and decode when it is installed. Which one serves is decided once, here, and
can be asked.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch

from workers.kernels.reference import (
    attend,
    attend_explicit,
    attend_with_lse,
    log_sum_exp,
    position_mask,
    relocate,
    rotate_keys,
    rotation,
    value_deviation,
)

__all__ = [
    "attend",
    "attend_causal",
    "attend_causal_with_lse",
    "attend_explicit",
    "attend_with_lse",
    "flash_attn_installed",
    "log_sum_exp",
    "position_mask",
    "relocate",
    "rotate_keys",
    "rotation",
    "value_deviation",
]


@functools.cache
def flash_attn_installed() -> bool:
    """Whether flash-attn can be imported (it needs CUDA to build)."""
    return importlib.util.find_spec("flash_attn") is not None


def _flash_serves(query: torch.Tensor) -> bool:
    """flash-attn needs CUDA and half precision."""
    return query.is_cuda and query.dtype != torch.float32 and flash_attn_installed()


def attend_causal(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    mask: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Attention of the *last* rows of a sequence over all its keys, causal and aligned at the end.

    Args:
        query: [heads, rows, head_dim], positions tokens - rows .. tokens - 1.
        keys, values: [kv_heads, tokens, head_dim].
        window: sliding window in tokens, or None.
        mask: gives the additive mask [rows, tokens]; asked only where a kernel needs one.

    Returns:
        [heads, rows, head_dim]. On CUDA in half precision flash-attn does it when installed.
    """
    if _flash_serves(query):
        return _flash(query, keys, values, scaling, window)[0]
    if query.shape[1] == keys.shape[1] and window is None:
        return attend(query, keys, values, scaling=scaling, causal=True)
    return attend(query, keys, values, scaling=scaling, mask=mask())


def attend_causal_with_lse(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    window: int | None,
    mask: Callable[[], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `attend_causal`, and the log-sum-exp of every row: [heads, rows] float32."""
    if _flash_serves(query):
        return _flash(query, keys, values, scaling, window)
    if query.shape[1] == keys.shape[1] and window is None:
        return attend_with_lse(query, keys, values, scaling=scaling, causal=True)
    return attend_with_lse(query, keys, values, scaling=scaling, mask=mask())


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """flash-attn over one sequence: (out [heads, rows, head_dim], lse [heads, rows])."""
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
