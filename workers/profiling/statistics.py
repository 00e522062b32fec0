"""Statistics of token deviations: plain numpy, no model, no torch.

A deviation table is [layers, tokens] float: how far the reused entry of a token at a layer is from full
prefill's, as 1 - cos.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FIRST_TOKENS = (8, 16, 32)
"""Heads of a span whose deviation is compared with the span's mean."""

TOP_SHARES = (0.1, 0.2)
"""Shares of tokens whose part of the deviation tells how sparse it is."""

_EPSILON = 1e-30


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 along the last axis; equal values share the mean of their ranks.

    Args:
        values: [..., tokens].

    Returns:
        [..., tokens] float64.
    """
    flat = np.asarray(values, dtype=np.float64).reshape(-1, values.shape[-1])
    out = np.empty_like(flat)
    for i, row in enumerate(flat):
        _, group, counts = np.unique(row, return_inverse=True, return_counts=True)
        first = np.cumsum(counts) - counts
        out[i] = (first + (counts - 1) / 2)[group.ravel()]
    return out.reshape(values.shape)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of every row of `a` with every row of `b`.

    Args:
        a: [rows_a, tokens]; b: [rows_b, tokens].

    Returns:
        [rows_a, rows_b] in [-1, 1]; 0 where a row is constant, so that it says nothing.
    """
    x, y = (_standardised(ranks(v)) for v in (a, b))
    return np.clip(x @ y.T, -1.0, 1.0)


def _standardised(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    length = np.sqrt((centred**2).sum(-1, keepdims=True))
    return np.divide(centred, length, out=np.zeros_like(centred), where=length > 0)


def top_share(deviation: np.ndarray, share: float) -> float:
    """Part of a span's deviation that its `share` most deviating tokens hold (rounded up to a token), mean
    over layers that deviate at all. deviation: [layers, tokens]."""
    count = max(1, int(np.ceil(share * deviation.shape[-1])))
    totals = deviation.sum(-1)
    top = np.sort(deviation, axis=-1)[:, -count:].sum(-1)
    used = totals > _EPSILON
    return float((top[used] / totals[used]).mean()) if used.any() else 0.0


def head_ratio(deviation: np.ndarray, first: int) -> float:
    """Mean deviation of a span's first tokens over the span's mean, both over all layers. 1 = like the rest;
    the whole span where it is shorter. deviation: [layers, tokens]."""
    mean = float(deviation.mean())
    return float(deviation[:, :first].mean()) / mean if mean > _EPSILON else 1.0


def tail_ratio(deviation: np.ndarray, last: int) -> float:
    """As `head_ratio`, for the last tokens."""
    return head_ratio(deviation[:, ::-1], last)


def mean_of(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over tokens of all tables together: [layers]. Longer spans count for more, as they do in use."""
    return np.concatenate([np.asarray(t, dtype=np.float64) for t in tables], axis=-1).mean(-1)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linearly interpolated."""
    return float(np.quantile(np.asarray(values, dtype=np.float64), share))
