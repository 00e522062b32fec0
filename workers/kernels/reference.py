"""Kernels in plain torch: the oracle for faster ones, and the CPU path. No knowledge of models, caches or
plans."""

from __future__ import annotations

import torch
import torch.nn.functional as F

NEG_INF = float("-inf")


def rotation(inv_freq: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-magnitude cos and sin of a shift in position.

    Args:
        inv_freq: [..., rotary_dim / 2] float32, radians per position.
        shift: positions (may be negative).

    Returns:
        cos, sin: [..., rotary_dim / 2] float32. `attention_scaling` is left out on purpose: stored keys carry
        it already, and R(p) = R(s) R(q) holds for pure rotations only (RoFormer, arXiv 2104.09864).
    """
    # float64: for large shifts the product loses digits in float32, and the angle is taken modulo 2 pi.
    angle = inv_freq.double() * shift
    return angle.cos().float(), angle.sin().float()


def rotate_keys(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """Write R(s) `keys` to `out`, in fp32 arithmetic.

    Args:
        keys, out: [layers, kv_heads, tokens, head_dim]; may not overlap.
        cos, sin: [layers or 1, rotary_dim / 2] float32 from `rotation`; halves are paired the Hugging Face
            way (i, i + rotary_dim / 2). Dimensions from rotary_dim on are copied.
    """
    half = cos.shape[-1]
    c, s = cos[:, None, None, :], sin[:, None, None, :]
    first, second = keys[..., :half].float(), keys[..., half : 2 * half].float()
    out[..., :half] = torch.addcmul(first * c, second, s, value=-1).to(out.dtype)
    out[..., half : 2 * half] = torch.addcmul(second * c, first, s).to(out.dtype)
    if keys.shape[-1] > 2 * half:
        out[..., 2 * half :] = keys[..., 2 * half :]


def position_mask(
    positions: torch.Tensor, start: int, stop: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask [rows, stop - start]: row i sees key j iff pos_j <= pos_i and pos_j > pos_i - window.

    Args:
        positions: [rows] int64 query positions.
        start, stop: keys at positions start .. stop - 1.
        window: sliding window in tokens, or None.
    """
    keys = torch.arange(start, stop, device=positions.device)
    hidden = keys[None, :] > positions[:, None]
    if window is not None:
        hidden |= keys[None, :] <= positions[:, None] - window
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, NEG_INF)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Attention of rows over keys; grouped-query heads are expanded by views only.

    Args:
        query: [heads, rows, head_dim]; keys, values: [kv_heads, tokens, head_dim].
        mask: [rows, tokens] additive, or None. causal: rows == tokens and row i sees keys 0 .. i.

    Returns:
        [heads, rows, head_dim]
    """
    heads, rows, dim = query.shape
    kv_heads, tokens, _ = keys.shape
    groups = heads // kv_heads
    out = F.scaled_dot_product_attention(
        query.reshape(kv_heads, groups, rows, dim),
        keys[:, None].expand(kv_heads, groups, tokens, dim),
        values[:, None].expand(kv_heads, groups, tokens, dim),
        attn_mask=mask,
        is_causal=causal,
        scale=scaling,
    )
    return out.reshape(heads, rows, dim)


def attend_explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `attend`, by explicit scores: needed for soft-capped logits and where probabilities are wanted.

    Returns:
        out: [heads, rows, head_dim]; probabilities: [kv_heads, groups * rows, tokens] float32.
    """
    heads, rows, dim = query.shape
    kv_heads = keys.shape[0]
    folded = query.reshape(kv_heads, heads // kv_heads * rows, dim)
    scores = torch.matmul(folded, keys.transpose(1, 2)).mul_(scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap).mul_(softcap)
    if mask is not None:
        scores = scores + mask.repeat(heads // kv_heads, 1)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32)
    out = torch.matmul(probabilities.to(values.dtype), values)
    return out.reshape(heads, rows, dim), probabilities


def log_sum_exp(
    query: torch.Tensor, keys: torch.Tensor, *, scaling: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """log of the sum over keys of exp(score). Shapes as in `attend`.

    Returns:
        [heads, rows] float32
    """
    heads, rows, dim = query.shape
    kv_heads = keys.shape[0]
    scores = torch.matmul(query.reshape(kv_heads, -1, dim), keys.transpose(1, 2)).mul_(scaling).float()
    if mask is not None:
        scores = scores + mask.repeat(heads // kv_heads, 1)
    return torch.logsumexp(scores, dim=-1).reshape(heads, rows)


def attend_with_lse(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `attend`, and the log-sum-exp of every row's scores, which the flash kernel has anyway.

    Returns:
        out: [heads, rows, head_dim]; lse: [heads, rows] float32.
    """
    heads, rows, dim = query.shape
    kv_heads, tokens, _ = keys.shape
    if query.device.type != "cpu":
        out = attend(query, keys, values, scaling=scaling, mask=mask, causal=causal)
        if causal:
            mask = position_mask(torch.arange(rows, device=query.device), 0, tokens, None, query.dtype)
        return out, log_sum_exp(query, keys, scaling=scaling, mask=mask)
    groups = heads // kv_heads
    # The operator behind scaled_dot_product_attention on CPU; only this form returns the log-sum-exp.
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
    out, lse = flash(
        query.reshape(kv_heads, groups, rows, dim),
        keys[:, None].expand(kv_heads, groups, tokens, dim),
        values[:, None].expand(kv_heads, groups, tokens, dim),
        0.0,
        causal,
        attn_mask=mask,
        scale=scaling,
    )
    return out.reshape(heads, rows, dim), lse.reshape(heads, rows).float()


def value_deviation(reused: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """d_j = 1 - cos(v_reused, v_computed) per token, over all heads together (RelayCaching, arXiv
    2603.13289).

    Args:
        reused, computed: [kv_heads, tokens, head_dim].

    Returns:
        [tokens] float32
    """
    a = reused.transpose(0, 1).flatten(1).float()
    b = computed.transpose(0, 1).flatten(1).float()
    return 1 - F.cosine_similarity(a, b, dim=-1, eps=1e-12)
