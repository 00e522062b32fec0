"""The row of `relay bench stream`. Plain; the benchmark is in `stream.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRow:
    """One way to answer a reader whose prompt ends in what a writer has just written.

    Attributes:
        mode: "full_prefill" and "relay" begin when the writer has ended; "exact" and "auto" are prepared,
            "busy" as "exact" beside another request on the reader's worker.
        method: reuse method of the reader's request.
        known_tokens: in the prompt before the writer begins, template included; streamed_tokens: of the
            writer's answer; fresh_tokens: behind it.
        samples: timed rounds.
        ttft_after_last_token_s: median seconds from the writer's last token to the reader's first, both as
            the caller sees them; *_min, *_max over the rounds.
        speedup: median of full_prefill in the same run / median.
        upstream_tokens_per_s_ratio: the writer's decoding speed while it is followed / alone just before
            and after; None where nobody follows.
        other_interval_ratio: mean time between the tokens of another request on the reader's worker while
            it prepares / while it does not; None where there is no other request.
        prepared_tokens, relayed_tokens: of the prompt, medians.
        logits_max_diff, kl_first: of the first token's logits, against full prefill on the same worker; worst
            of the rounds, KL in nats.
        extra_flops_ratio: FLOPs of preparing and answering / full prefill's - 1, counted as rows x layers.
    """

    mode: str
    method: str
    known_tokens: int
    streamed_tokens: int
    fresh_tokens: int
    samples: int
    ttft_after_last_token_s: float
    ttft_s_min: float
    ttft_s_max: float
    speedup: float
    upstream_tokens_per_s_ratio: float | None
    other_interval_ratio: float | None
    prepared_tokens: float
    relayed_tokens: float
    logits_max_diff: float
    kl_first: float
    extra_flops_ratio: float


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


STREAM_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("known", lambda r: str(r.known_tokens)),
    ("streamed", lambda r: str(r.streamed_tokens)),
    ("fresh", lambda r: str(r.fresh_tokens)),
    ("n", lambda r: str(r.samples)),
    ("after last token", lambda r: f"{r.ttft_after_last_token_s:.3f} s"),
    ("min", lambda r: f"{r.ttft_s_min:.3f} s"),
    ("max", lambda r: f"{r.ttft_s_max:.3f} s"),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
    ("writer", lambda r: _optional(r.upstream_tokens_per_s_ratio)),
    ("other", lambda r: _optional(r.other_interval_ratio)),
    ("prepared", lambda r: f"{r.prepared_tokens:.0f}"),
    ("relayed", lambda r: f"{r.relayed_tokens:.0f}"),
    ("logits differ", lambda r: f"{r.logits_max_diff:.1e}"),
    ("KL first", lambda r: f"{r.kl_first:.5f}"),
    ("extra work", lambda r: f"{r.extra_flops_ratio:+.1%}"),
)
