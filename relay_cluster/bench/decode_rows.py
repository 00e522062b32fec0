"""The row of `relay bench decode`. Plain; the benchmark is in `decode.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow:
    """Decoding speed of one worker at one batch size, KV capture for publishing on.

    Attributes:
        batch: requests that decode together; prompt_tokens, new_tokens: of each.
        samples: timed rounds.
        tokens_per_s, plain_tokens_per_s: of the whole batch, ours and `transformers.generate`'s, from the
            first token of the batch to the last; medians.
        ratio: median over the rounds of ours / plain.
        ratio_min, ratio_max: over the rounds.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    samples: int
    tokens_per_s: float
    plain_tokens_per_s: float
    ratio: float
    ratio_min: float
    ratio_max: float


DECODE_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("prompt", lambda r: str(r.prompt_tokens)),
    ("new", lambda r: str(r.new_tokens)),
    ("tok/s", lambda r: f"{r.tokens_per_s:.1f}"),
    ("transformers", lambda r: f"{r.plain_tokens_per_s:.1f}"),
    ("ratio", lambda r: f"{r.ratio:.2f}x"),
    ("min", lambda r: f"{r.ratio_min:.2f}x"),
    ("max", lambda r: f"{r.ratio_max:.2f}x"),
)
