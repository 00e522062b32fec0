"""The kernels of `reference.py` in Triton, for CUDA: same names, same signatures, same results within the
tolerances of docs/kernels.md.

Importable only where triton is installed. On CPU tensors the kernels run under Triton's interpreter
(`TRITON_INTERPRET=1`, set before triton is first imported), which is how they are tested without a GPU. They
know nothing of models, caches or plans, and never wait for the device: ranges that depend on positions are
worked out inside the kernels.

Layout of an attention tile: the rows of all heads that share a kv head are folded into one axis, row-major
(index m is row m // groups, head m % groups of the group), so every key and value is loaded once per kv head
and tile, and neighbouring rows, which see nearly the same keys, share a tile.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from transport.errors import ConfigError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Keys of one split are at least this many blocks: shorter ones cost more to merge than they gain.
MIN_BLOCKS_PER_SPLIT = 4
MAX_SPLITS = 32
ROOMY_BYTES = 225 << 10
"""Shared memory of a program on sm_90, nearly: what the largest tiles take."""


# ------------------------------------------------------------------------------------------------ relocate


@triton.jit
def _relocate_kernel(
    source,
    out,
    cos,
    sin,
    tokens,
    kv_heads,
    s_layer,
    s_kind,
    s_head,
    s_token,
    s_dim,
    o_layer,
    o_kind,
    o_head,
    o_token,
    o_dim,
    c_layer,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of tokens of one (layer, kind, kv head); kind 0 holds keys. HALF = 0: plain copy."""
    plane = tl.program_id(1)
    head = (plane % kv_heads).to(tl.int64)
    kind = (plane // kv_heads % 2).to(tl.int64)
    layer = (plane // kv_heads // 2).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = (token < tokens)[:, None]
    token = token.to(tl.int64)[:, None]
    from_ = source + layer * s_layer + kind * s_kind + head * s_head + token * s_token
    to = out + layer * o_layer + kind * o_kind + head * o_head + token * o_token
    # Dimensions [begin, DIM) are copied: all of them, or for keys what lies behind the rotated ones.
    begin = tl.where(kind == 0, 2 * HALF, 0)
    dim = tl.arange(0, BLOCK_D)[None, :]
    copied = inside & (dim >= begin) & (dim < DIM)
    x = tl.load(from_ + dim * s_dim, mask=copied)
    tl.store(to + dim * o_dim, x.to(out.dtype.element_ty), mask=copied)
    if HALF > 0:
        pair = tl.arange(0, BLOCK_H)[None, :]
        wanted = pair < tl.where(kind == 0, HALF, 0)
        c = tl.load(cos + layer * c_layer + pair, mask=wanted, other=1.0)
        s = tl.load(sin + layer * c_layer + pair, mask=wanted, other=0.0)
        rotated = inside & wanted
        a = tl.load(from_ + pair * s_dim, mask=rotated, other=0.0).to(tl.float32)
        b = tl.load(from_ + (pair + HALF) * s_dim, mask=rotated, other=0.0).to(tl.float32)
        tl.store(to + pair * o_dim, (a * c - b * s).to(out.dtype.element_ty), mask=rotated)
        tl.store(to + (pair + HALF) * o_dim, (b * c + a * s).to(out.dtype.element_ty), mask=rotated)


def relocate(
    source: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, out: torch.Tensor
) -> None:
    """See `reference.relocate`. One launch for all layers, keys and values."""
    layers, kinds, kv_heads, tokens, dim = source.shape
    if out.shape != source.shape or kinds != 2:
        raise ValueError(
            f"relocate: source {list(source.shape)} and out {list(out.shape)} must both be "
            "[layers, 2, kv_heads, tokens, head_dim]."
        )
    half, layer_stride = 0, 0
    if cos is not None and sin is not None:
        half = cos.shape[-1]
        if cos.shape != sin.shape or cos.shape[0] not in (1, layers) or 2 * half > dim:
            raise ValueError(
                f"relocate: cos {list(cos.shape)} and sin {list(sin.shape)} must both be [{layers} or 1, at "
                f"most {dim // 2}]."
            )
        cos, sin = cos.float().contiguous(), sin.float().contiguous()
        layer_stride = half if cos.shape[0] > 1 else 0
    _check("relocate", source, out, *(t for t in (cos, sin) if t is not None))
    if not source.numel():
        return
    block_t = 32
    _launch(
        _relocate_kernel,
        (triton.cdiv(tokens, block_t), layers * 2 * kv_heads),
        source,
        out,
        source if cos is None else cos,
        source if sin is None else sin,
        tokens,
        kv_heads,
        *source.stride(),
        *out.stride(),
        layer_stride,
        DIM=dim,
        HALF=half,
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_H=triton.next_power_of_2(max(1, half)),
        BLOCK_T=block_t,
    )


# --------------------------------------------------------------------------------------------- attend_rows


@triton.jit
def _tile_rows(positions, rows, first, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(row, head in the group, whether it exists, position relative to key 0) of a tile's folded rows."""
    index = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (index // GROUPS).to(tl.int64)
    exists = row < rows
    at = tl.load(positions + row, mask=exists, other=0).to(tl.int32) - first
    return row, index % GROUPS, exists, at


@triton.jit
def _key_range(at, exists, begin, end, window, WINDOWED: tl.constexpr):
    """Keys [lo, hi) within [begin, end) that at least one row of the tile may see."""
    hi = tl.minimum(end, tl.max(tl.where(exists, at + 1, 0), axis=0))
    lo = begin
    if WINDOWED:
        lo = tl.maximum(lo, tl.min(tl.where(exists, at, 2147483647), axis=0) - window + 1)
    return lo, hi


@triton.jit
def _split_range(lo, hi, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's share of keys [lo, hi): whole blocks, equal for all splits but the last."""
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_N), SPLITS) * BLOCK_N
        lo = lo + tl.program_id(2) * share
        hi = tl.minimum(hi, lo + share)
    return lo, hi


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    """float32 sums of products; ieee: float32 operands must not be rounded to tf32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile_scores(
    q,
    keys,
    key,
    end,
    at,
    k_token,
    k_dim,
    scaling,
    window,
    softcap,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[rows, keys] float32 scores of a tile over the keys `key` < `end`; -inf where not seen. Not MASKED:
    every row sees every one of these keys, and all of them are there."""
    dim = tl.arange(0, BLOCK_D)
    at_keys = keys + key.to(tl.int64)[None, :] * k_token + dim[:, None] * k_dim
    if MASKED:
        mask = (key < end)[None, :]
        if DIM != BLOCK_D:
            mask = mask & (dim < DIM)[:, None]
        k = tl.load(at_keys, mask=mask, other=0.0)
    elif DIM != BLOCK_D:
        k = tl.load(at_keys, mask=(dim < DIM)[:, None], other=0.0)
    else:
        k = tl.load(at_keys)
    scores = _dot(q, k, WIDEN) * scaling
    if CAPPED:
        # c * tanh(x / c), from an exp that cannot overflow.
        decay = tl.exp(-2.0 * tl.abs(scores) / softcap)
        capped = softcap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(scores < 0, -capped, capped)
    if MASKED:
        seen = (key < end)[None, :] & (key[None, :] <= at[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > at[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _seen_by_all(at, exists, lo, hi, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where in [lo, hi) the whole blocks end that every row of the tile sees: no mask is needed up to there.
    With a window there are few, and none is looked for."""
    every = lo
    if not WINDOWED:
        lowest = tl.min(tl.where(exists, at + 1, 2147483647), axis=0)
        every = lo + tl.maximum(tl.minimum(hi, lowest) - lo, 0) // BLOCK_N * BLOCK_N
    return every


@triton.jit
def _attend_block(
    q,
    keys,
    values,
    begin,
    hi,
    at,
    top,
    total,
    acc,
    k_token,
    k_dim,
    v_token,
    v_dim,
    scaling,
    window,
    softcap,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax, over the keys of one block; returns (top, total, acc)."""
    key = begin + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    scores = _tile_scores(
        q,
        keys,
        key,
        hi,
        at,
        k_token,
        k_dim,
        scaling,
        window,
        softcap,
        DIM,
        BLOCK_D,
        WINDOWED,
        CAPPED,
        WIDEN,
        MASKED,
    )
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has seen no key yet keeps -inf; 0 in its place avoids -inf minus -inf.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.exp(scores - base[:, None])
    shrink = tl.exp(top - base)
    at_values = values + key.to(tl.int64)[:, None] * v_token + dim[None, :] * v_dim
    if MASKED:
        v = tl.load(at_values, mask=(key < hi)[:, None] & (dim < DIM)[None, :], other=0.0)
    elif DIM != BLOCK_D:
        v = tl.load(at_values, mask=(dim < DIM)[None, :], other=0.0)
    else:
        v = tl.load(at_values)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None] + _dot(weights.to(v.dtype), v, WIDEN)
    return new_top, total, acc


@triton.jit(do_not_specialize=["rows", "tokens", "first", "window", "count"])
def _attend_rows_kernel(
    query,
    keys,
    values,
    positions,
    out,
    lse,
    rows,
    tokens,
    first,
    scaling,
    window,
    softcap,
    q_head,
    q_row,
    q_dim,
    k_head,
    k_token,
    k_dim,
    v_head,
    v_token,
    v_dim,
    count,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online softmax (FlashAttention-2, arXiv 2307.08691) of one tile of folded rows over its keys, or over
    one split of them (flash decoding): each split leaves its own normalised output and log-sum-exp."""
    row, group, exists, at = _tile_rows(positions, rows, first, GROUPS, BLOCK_M)
    kv_head = tl.program_id(1)
    head = (kv_head * GROUPS + group).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    row_mask = exists[:, None] & (dim < DIM)[None, :]
    q = tl.load(
        query + (head * q_head + row * q_row)[:, None] + dim[None, :] * q_dim, mask=row_mask, other=0.0
    )
    keys += kv_head.to(tl.int64) * k_head
    values += kv_head.to(tl.int64) * v_head
    lo, hi = _key_range(at, exists, 0, tokens, window, WINDOWED)
    lo, hi = _split_range(lo, hi, SPLITS, BLOCK_N)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    every = _seen_by_all(at, exists, lo, hi, WINDOWED, BLOCK_N)
    for begin in range(lo, every, BLOCK_N):
        top, total, acc = _attend_block(
            q,
            keys,
            values,
            begin,
            hi,
            at,
            top,
            total,
            acc,
            k_token,
            k_dim,
            v_token,
            v_dim,
            scaling,
            window,
            softcap,
            DIM,
            BLOCK_N,
            BLOCK_D,
            WINDOWED,
            CAPPED,
            WIDEN,
            MASKED=False,  # pyright: ignore[reportArgumentType]
        )
    for begin in range(every, hi, BLOCK_N):
        top, total, acc = _attend_block(
            q,
            keys,
            values,
            begin,
            hi,
            at,
            top,
            total,
            acc,
            k_token,
            k_dim,
            v_token,
            v_dim,
            scaling,
            window,
            softcap,
            DIM,
            BLOCK_N,
            BLOCK_D,
            WINDOWED,
            CAPPED,
            WIDEN,
            MASKED=True,  # pyright: ignore[reportArgumentType]
        )

    blind = total == 0.0
    divisor = tl.where(blind, 1.0, total)
    result = acc / divisor[:, None]
    result_lse = tl.where(blind, float("-inf"), top + tl.log(divisor))
    # out and lse are contiguous [splits, heads, rows(, DIM)]; count = heads * rows.
    flat = tl.program_id(2).to(tl.int64) * count + head * rows + row
    tl.store(lse + flat, result_lse, mask=exists)
    tl.store(
        out + (flat * DIM)[:, None] + dim[None, :],
        result.to(out.dtype.element_ty),
        mask=row_mask,
    )


@triton.jit(do_not_specialize=["count"])
def _merge_kernel(
    partial,
    partial_lse,
    out,
    lse,
    count,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join the splits of `count` (head, row) results: weights exp(lse_split - lse)."""
    index = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = index < count
    dim = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (dim < DIM)[None, :]
    index = index.to(tl.int64)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    for split in range(SPLITS):
        part = tl.load(partial_lse + split * count + index, mask=exists, other=float("-inf"))
        top = tl.maximum(top, part)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for split in range(SPLITS):
        at = (split * count + index).to(tl.int64)
        weight = tl.exp(tl.load(partial_lse + at, mask=exists, other=float("-inf")) - base)
        total += weight
        acc += weight[:, None] * tl.load(partial + (at * DIM)[:, None] + dim[None, :], mask=mask, other=0.0)
    blind = total == 0.0
    divisor = tl.where(blind, 1.0, total)
    tl.store(lse + index, tl.where(blind, float("-inf"), base + tl.log(divisor)), mask=exists)
    tl.store(
        out + (index * DIM)[:, None] + dim[None, :],
        (acc / divisor[:, None]).to(out.dtype.element_ty),
        mask=mask,
    )


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
    """See `reference.attend_rows`. No mask tensor; keys that no row of a tile can see are not loaded."""
    _check_rows("attend_rows", query, keys, positions)
    _check("attend_rows", values, query)
    if values.shape != keys.shape:
        raise ValueError(f"attend_rows: keys {list(keys.shape)} and values {list(values.shape)} differ.")
    splits = _splits(query, keys)
    return _attend_rows(query, keys, values, positions, first, scaling, window, softcap, splits)


def _attend_rows(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    first: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    splits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_rows` with the keys of every tile cut into `splits` shares that run in parallel."""
    heads, rows, dim = query.shape
    kv_heads, tokens, _ = keys.shape
    out = torch.empty((heads, rows, dim), dtype=query.dtype, device=query.device)
    lse = torch.empty((heads, rows), dtype=torch.float32, device=query.device)
    if not out.numel():
        return out, lse
    groups = heads // kv_heads
    tile = _tile(query.dtype, dim, groups * rows, roomy=_roomy(query.device))
    partial, partial_lse = out, lse
    if splits > 1:
        partial = torch.empty((splits, heads, rows, dim), dtype=torch.float32, device=query.device)
        partial_lse = torch.empty((splits, heads, rows), dtype=torch.float32, device=query.device)
    _launch(
        _attend_rows_kernel,
        (triton.cdiv(groups * rows, tile["BLOCK_M"]), kv_heads, splits),
        query,
        keys,
        values,
        positions,
        partial,
        partial_lse,
        rows,
        tokens,
        first,
        float(scaling),
        0 if window is None else window,
        1.0 if softcap is None else float(softcap),
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        heads * rows,
        GROUPS=groups,
        DIM=dim,
        SPLITS=splits,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        WIDEN=_widens(query.dtype),
        **tile,
    )
    if splits > 1:
        block_r = 16
        _launch(
            _merge_kernel,
            (triton.cdiv(heads * rows, block_r),),
            partial,
            partial_lse,
            out,
            lse,
            heads * rows,
            DIM=dim,
            SPLITS=splits,
            BLOCK_R=block_r,
            BLOCK_D=tile["BLOCK_D"],
        )
    return out, lse


# -------------------------------------------------------------------------------------------- context_mass


@triton.jit(do_not_specialize=["rows", "first", "begin_key", "end_key", "window", "count"])
def _context_mass_kernel(
    query,
    keys,
    lse,
    positions,
    shares,
    rows,
    first,
    begin_key,
    end_key,
    scaling,
    window,
    softcap,
    q_head,
    q_row,
    q_dim,
    k_head,
    k_token,
    k_dim,
    l_head,
    l_row,
    count,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of exp(score - lse) of one tile of folded rows over keys [begin_key, end_key), or one split."""
    row, group, exists, at = _tile_rows(positions, rows, first, GROUPS, BLOCK_M)
    kv_head = tl.program_id(1)
    head = (kv_head * GROUPS + group).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(
        query + (head * q_head + row * q_row)[:, None] + dim[None, :] * q_dim,
        mask=exists[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    total = tl.load(lse + head * l_head + row * l_row, mask=exists, other=0.0)
    total = tl.where(total == float("-inf"), 0.0, total)
    keys += kv_head.to(tl.int64) * k_head
    lo, hi = _key_range(at, exists, begin_key, end_key, window, WINDOWED)
    lo, hi = _split_range(lo, hi, SPLITS, BLOCK_N)
    share = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(lo, hi, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        scores = _tile_scores(
            q,
            keys,
            key,
            hi,
            at,
            k_token,
            k_dim,
            scaling,
            window,
            softcap,
            DIM,
            BLOCK_D,
            WINDOWED,
            CAPPED,
            WIDEN,
            MASKED=True,  # pyright: ignore[reportArgumentType]
        )
        share += tl.sum(tl.exp(scores - total[:, None]), axis=1)
    flat = tl.program_id(2).to(tl.int64) * count + head * rows + row  # [splits, heads, rows]
    tl.store(shares + flat, share, mask=exists)


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
    """See `reference.context_mass`. Sums are per head first, so that the result does not depend on timing."""
    heads, rows, dim = query.shape
    _check_rows("context_mass", query, keys, positions)
    _check("context_mass", lse, query)
    if lse.shape != (heads, rows) or lse.dtype != torch.float32:
        raise ValueError(
            f"context_mass: lse is {list(lse.shape)} {lse.dtype}; it must be [{heads}, {rows}] float32."
        )
    kv_heads, tokens, _ = keys.shape
    lo, hi = max(0, start - first), min(tokens, stop - first)
    if not rows or lo >= hi:
        return torch.zeros(rows, dtype=torch.float32, device=query.device)
    groups = heads // kv_heads
    tile = _tile(query.dtype, dim, groups * rows, roomy=_roomy(query.device))
    splits = _splits(query, keys[:, lo:hi])
    shares = torch.empty((splits, heads, rows), dtype=torch.float32, device=query.device)
    _launch(
        _context_mass_kernel,
        (triton.cdiv(groups * rows, tile["BLOCK_M"]), kv_heads, splits),
        query,
        keys,
        lse,
        positions,
        shares,
        rows,
        first,
        lo,
        hi,
        float(scaling),
        0 if window is None else window,
        1.0 if softcap is None else float(softcap),
        *query.stride(),
        *keys.stride(),
        *lse.stride(),
        heads * rows,
        GROUPS=groups,
        DIM=dim,
        SPLITS=splits,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        WIDEN=_widens(query.dtype),
        **tile,
    )
    return shares.sum(0).mean(0)


# ----------------------------------------------------------------------------------------- value_deviation


@triton.jit(do_not_specialize=["tokens"])
def _value_deviation_kernel(
    reused,
    computed,
    out,
    tokens,
    kv_heads,
    a_head,
    a_token,
    a_dim,
    b_head,
    b_token,
    b_dim,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """1 - cosine of a tile of tokens, over all kv heads together."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < tokens
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (dim < DIM)
    a_at = reused + token.to(tl.int64)[:, None] * a_token + dim * a_dim
    b_at = computed + token.to(tl.int64)[:, None] * b_token + dim * b_dim
    dot = tl.zeros([BLOCK_T], tl.float32)
    a_norm = tl.zeros([BLOCK_T], tl.float32)
    b_norm = tl.zeros([BLOCK_T], tl.float32)
    for _ in range(kv_heads):
        a = tl.load(a_at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_at, mask=mask, other=0.0).to(tl.float32)
        dot += tl.sum(a * b, axis=1)
        a_norm += tl.sum(a * a, axis=1)
        b_norm += tl.sum(b * b, axis=1)
        a_at += a_head
        b_at += b_head
    # Norms are held at 1e-12 from below, as in the reference: a zero vector deviates by 1 from everything.
    norms = tl.maximum(tl.sqrt(a_norm), 1e-12) * tl.maximum(tl.sqrt(b_norm), 1e-12)
    tl.store(out + token, 1.0 - dot / norms, mask=inside)


def value_deviation(reused: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
    """See `reference.value_deviation`."""
    _check("value_deviation", reused, computed)
    if reused.shape != computed.shape:
        raise ValueError(
            f"value_deviation: reused {list(reused.shape)} and computed {list(computed.shape)} differ."
        )
    kv_heads, tokens, dim = reused.shape
    out = torch.empty(tokens, dtype=torch.float32, device=reused.device)
    block_t = 16
    if tokens:
        _launch(
            _value_deviation_kernel,
            (triton.cdiv(tokens, block_t),),
            reused,
            computed,
            out,
            tokens,
            kv_heads,
            *reused.stride(),
            *computed.stride(),
            DIM=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_T=block_t,
        )
    return out


# --------------------------------------------------------------------------------------- launch and checks


def interpreted() -> bool:
    """Whether these kernels run under Triton's interpreter (decided when this module was imported)."""
    return not isinstance(_relocate_kernel, triton.JITFunction)


def _widens(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bfloat16 (triton issue 11584), so there operands
    are widened. The sum is the same: products of two bfloat16 are exact in float32."""
    return dtype == torch.bfloat16 and interpreted()


def _tile(dtype: torch.dtype, dim: int, folded_rows: int, *, roomy: bool = False) -> dict[str, Any]:
    """Tile sizes and launch options. tl.dot takes no side below 16, so small tiles are padded and masked.

    Rows of a tile take at most 32 KiB, its keys 16 KiB: with values and one more stage in flight a program
    stays within 99 KiB of shared memory, the least of the supported devices (sm_86). float32 has no tensor
    core that keeps its digits; its products are unrolled, and tiles above 32 by 32, or fewer warps, spill
    registers. The compile test of tests/workers/test_kernels_triton.py checks both.

    Args:
        roomy: the device has the shared memory of an H100, where tiles of 128 by 128 with two more stages in
            flight are 1.1 to 1.3 times as fast for many rows (`relay bench kernels`).
    """
    wide = dtype == torch.float32
    block_d = max(16, triton.next_power_of_2(dim))
    row_bytes = block_d * dtype.itemsize
    if roomy and not wide and row_bytes <= 256 and folded_rows > 512:
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 3}
    most_rows = min(32 if wide else 128, max(16, 32768 // row_bytes))
    block_m = min(most_rows, max(16, triton.next_power_of_2(folded_rows)))
    heavy = block_m > 16 and block_m * block_d >= (2048 if wide else 8192)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": min(32 if wide else 64, max(16, 16384 // row_bytes)),
        "BLOCK_D": block_d,
        "num_warps": 8 if heavy else 4,
        "num_stages": 2,
    }


def _splits(query: torch.Tensor, keys: torch.Tensor) -> int:
    """Into how many shares the keys are cut so that few rows still occupy the device; 1 on a CPU."""
    if not query.is_cuda or not query.numel():
        return 1
    kv_heads, tokens, dim = keys.shape
    folded = query.shape[0] // kv_heads * query.shape[1]
    tile = _tile(query.dtype, dim, folded, roomy=_roomy(query.device))
    programs = triton.cdiv(folded, tile["BLOCK_M"]) * kv_heads
    return _shares(programs, tokens // tile["BLOCK_N"], _multiprocessors(query.device.index or 0))


def _shares(programs: int, key_blocks: int, multiprocessors: int) -> int:
    """Splits for `programs` tiles over `key_blocks` blocks of keys: two programs per multiprocessor if the
    keys suffice. A power of two, because every number of splits is compiled apart."""
    wanted = 2 * multiprocessors // programs
    most = min(wanted, key_blocks // MIN_BLOCKS_PER_SPLIT, MAX_SPLITS)
    return 1 << (max(1, most).bit_length() - 1)


def _roomy(device: torch.device) -> bool:
    return device.type == "cuda" and _shared_bytes(device.index or 0) >= ROOMY_BYTES


@functools.cache
def _shared_bytes(device: int) -> int:
    """Shared memory that one program may have, in bytes."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run `kernel` on the device of its first argument: launches go to the *current* device otherwise."""
    # Said, because triton 3.10 changes the default; a fused multiply-add rounds once instead of twice.
    options["enable_fp_fusion"] = True
    device: torch.device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


def _check(where: str, *tensors: torch.Tensor) -> None:
    """Raise unless all tensors are on one device that the kernels can serve, in a supported dtype."""
    device = tensors[0].device
    if any(t.device != device for t in tensors):
        found = ", ".join(str(t.device) for t in tensors)
        raise ValueError(f"{where}: all tensors must be on one device, got {found}.")
    if not tensors[0].is_cuda and not interpreted():
        raise ConfigError(
            f"{where}: a Triton kernel was given a tensor on {device}. Use workers.kernels.reference there, "
            "or set TRITON_INTERPRET=1 before triton is first imported (tests only: it is slow)."
        )
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{where}: {tensor.dtype} is not supported; use "
                f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}."
            )


def _check_rows(where: str, query: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor) -> None:
    _check(where, query, keys)
    heads, rows, dim = query.shape
    if keys.shape[2] != dim or heads % keys.shape[0] or keys.dtype != query.dtype:
        raise ValueError(
            f"{where}: query {list(query.shape)} {query.dtype} does not fit keys {list(keys.shape)} "
            f"{keys.dtype}: [heads, rows, head_dim] and [kv_heads, tokens, head_dim] of one dtype, heads a "
            "multiple of kv_heads."
        )
    if positions.shape != (rows,) or positions.dtype != torch.int64 or positions.device != query.device:
        raise ValueError(
            f"{where}: positions are {list(positions.shape)} {positions.dtype} on {positions.device}; they "
            f"must be [{rows}] int64 on {query.device}."
        )
