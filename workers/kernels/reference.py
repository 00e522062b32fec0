"""Kernels in plain torch: the oracle for faster ones, and the CPU path. No knowledge of models, caches or
plans.

`relocate`, `attend_rows`, `value_deviation` and `context_mass` are the signatures that
`workers/kernels/triton.py` implements too; here they are written to be read, in float32, with masks and
scores spelled out.
"""

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


def relocate(
    source: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write the KV of relayed tokens into a cache at their new positions: keys re-rotated, values copied.

    Args:
        source, out: [layers, 2, kv_heads, tokens, head_dim] strided views (of a block, of a sequence's
            cache); index 0 of the second axis holds keys. They may not overlap.
        cos, sin: [layers or 1, rotary_dim / 2] float32 from `rotation`, or None for both: no shift.
    """
    if cos is None or sin is None:
        out.copy_(source)
        return
    rotate_keys(source[:, 0], cos, sin, out[:, 0])
    out[:, 1] = source[:, 1]


def _hidden(positions: torch.Tensor, start: int, stop: int, window: int | None) -> torch.Tensor:
    """[rows, stop - start] bool: row i must not see the key at position start + j."""
    keys = torch.arange(start, stop, device=positions.device)
    hidden = keys[None, :] > positions[:, None]
    if window is not None:
        hidden |= keys[None, :] <= positions[:, None] - window
    return hidden


def position_mask(
    positions: torch.Tensor, start: int, stop: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask [rows, stop - start]: row i sees key j iff pos_j <= pos_i and pos_j > pos_i - window.

    Args:
        positions: [rows] int64 query positions.
        start, stop: keys at positions start .. stop - 1.
        window: sliding window in tokens, or None.
    """
    hidden = _hidden(positions, start, stop, window)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(hidden, NEG_INF)


def attend_explicit(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows over keys by explicit scores: for soft-capped logits, and where probabilities are
    wanted.

    Args:
        query: [heads, rows, head_dim]; keys, values: [kv_heads, tokens, head_dim].
        mask: [rows, tokens] additive, or None. softcap: of the scores, or None.

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
    """log of the sum over keys of exp(score). Shapes as in `attend_explicit`.

    Returns:
        [heads, rows] float32
    """
    heads, rows, dim = query.shape
    kv_heads = keys.shape[0]
    scores = torch.matmul(query.reshape(kv_heads, -1, dim), keys.transpose(1, 2)).mul_(scaling).float()
    if mask is not None:
        scores = scores + mask.repeat(heads // kv_heads, 1)
    return torch.logsumexp(scores, dim=-1).reshape(heads, rows)


def _row_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    first: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """[heads, rows, tokens] float32; -inf where a row does not see a key."""
    heads, rows, dim = query.shape
    kv_heads, tokens, _ = keys.shape
    folded = query.reshape(kv_heads, heads // kv_heads * rows, dim).float()
    scores = torch.matmul(folded, keys.float().transpose(1, 2)).mul_(scaling).reshape(heads, rows, tokens)
    if softcap is not None:
        scores = torch.tanh(scores / softcap).mul_(softcap)
    return scores.masked_fill_(_hidden(positions, first, first + tokens, window), NEG_INF)


def attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    *,
    first: int = 0,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of rows at arbitrary positions over a whole cache, causal by position.

    Args:
        query: [heads, rows, head_dim]; keys, values: [kv_heads, tokens, head_dim], strided views allowed.
        positions: [rows] int64, in any order. Key j stands at position first + j; row i sees it iff
            first + j <= positions[i] and, with a window, first + j > positions[i] - window.
        scaling: factor on the dot products; softcap: c in c * tanh(score / c), or None.

    Returns:
        out: [heads, rows, head_dim] in the query's dtype, accumulated in float32; lse: [heads, rows] float32,
        log of the sum of exp(score). A row that sees no key gets zeros and -inf.
    """
    scores = _row_scores(query, keys, positions, first=first, scaling=scaling, window=window, softcap=softcap)
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - lse.masked_fill(lse == NEG_INF, 0.0)[..., None]).exp_()
    kv_heads, tokens, _ = values.shape
    folded = weights.reshape(kv_heads, query.shape[0] // kv_heads * query.shape[1], tokens)
    return torch.matmul(folded, values.float()).reshape(query.shape).to(query.dtype), lse


def context_mass(
    query: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    *,
    first: int = 0,
    start: int,
    stop: int,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Share of each row's attention that goes to the keys at positions start .. stop - 1, mean over heads.

    Args:
        query, keys, positions, first, scaling, window, softcap: as in `attend_rows`.
        lse: [heads, rows] float32 over all keys, as `attend_rows` returns it.
        start, stop: positions, half-open; positions without a key in `keys` count nothing.

    Returns:
        [rows] float32: mean over heads of exp(lse over start .. stop - 1, minus lse). 0 where lse is -inf.
    """
    lo = max(0, start - first)
    hi = max(lo, min(keys.shape[1], stop - first))
    scores = _row_scores(
        query,
        keys[:, lo:hi],
        positions,
        first=first + lo,
        scaling=scaling,
        window=window,
        softcap=softcap,
    )
    # A row without any key has nothing to share; its scores are -inf, so 0 in place of lse gives mass 0.
    shares = (scores - lse.masked_fill(lse == NEG_INF, 0.0)[..., None]).exp_()
    return shares.sum(-1).mean(0)


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
