"""A row of `ttft` or `chain` from the samples of one method on one shape of prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relay_cluster.bench.common import TimingRow, mean, median, quantile, split_method
from workers.messages import Distance

POSITIONS = 32
"""Teacher-forced positions that go into `kl32_mean` and `top1_32`."""


def timing_row(
    asked: str,
    resolved: str,
    distances: Sequence[Distance],
    ttft_s: Sequence[float],
    *,
    base_s: float,
    quoted: tuple[str, float],
    flops: tuple[float | None, float | None],
    **shape: Any,
) -> TimingRow:
    """The row.

    Args:
        asked: the method as the user wrote it; resolved: with every parameter.
        distances: one for every prompt; may be empty.
        ttft_s: the timed rounds.
        base_s: median of full_prefill.
        quoted: (name, median) of what speed-ups are quoted against.
        flops: (predicted, actual) share of full prefill's FLOPs.
        shape: the fields of TimingRow that are not computed here.
    """
    method, params = split_method(asked, resolved)
    middle = median(ttft_s)
    predicted, actual = flops
    return TimingRow(
        method=method,
        params=params,
        samples=len(ttft_s),
        ttft_s_median=middle,
        ttft_s_p90=quantile(ttft_s, 0.9),
        ttft_s_min=min(ttft_s),
        ttft_s_max=max(ttft_s),
        speedup=base_s / middle,
        speedup_quoted=quoted[1] / middle,
        quoted_against=quoted[0],
        flop_ratio_predicted=predicted,
        flop_ratio=actual,
        over_bound=middle / (base_s * actual) if actual else None,
        kl_first=mean([d.kl[0] for d in distances]) if distances else None,
        kl32_mean=mean([mean(d.kl[:POSITIONS]) for d in distances]) if distances else None,
        top1_32=mean([mean(d.same[:POSITIONS]) for d in distances]) if distances else None,
        **shape,
    )
