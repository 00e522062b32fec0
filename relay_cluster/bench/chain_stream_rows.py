"""The row of `relay bench chain --stream`. Plain; the benchmark is in `chain_stream.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainStreamRow:
    """One way to run a whole chain of agents.

    Attributes:
        mode: "full_prefill" computes every prompt when the agents before have ended; "off", "exact", "auto"
            and "relay" are values of `--stream`, "off" being relay alone.
        method: reuse method that the run asked for.
        agents: length of the chain; output_tokens: of every answer; prompt_tokens: of the last agent.
        samples: timed rounds.
        ttft_after_last_token_s: median seconds from the last token that the last agent waits for to its own
            first token, both as the caller sees them; *_min, *_max over the rounds.
        speedup: median of full_prefill in the same run / median.
        wall_s: median seconds of the whole pipeline; *_min, *_max over the rounds.
        wall_ratio: that / full_prefill's in the same run.
        writers_tokens_per_s: of all agents' decoding, median; upstream_tokens_per_s_ratio: that /
            full_prefill's.
        prepared_tokens, relayed_tokens: of the last agent's prompt, medians.
        same_tokens: share of the answers' tokens up to their first difference from full prefill's.
        wasted_tokens: computed ahead in vain, by all workers, per run.
    """

    mode: str
    method: str
    agents: int
    output_tokens: int
    prompt_tokens: int
    samples: int
    ttft_after_last_token_s: float
    ttft_s_min: float
    ttft_s_max: float
    speedup: float
    wall_s: float
    wall_s_min: float
    wall_s_max: float
    wall_ratio: float
    writers_tokens_per_s: float
    upstream_tokens_per_s_ratio: float
    prepared_tokens: float
    relayed_tokens: float
    same_tokens: float
    wasted_tokens: float


CHAIN_STREAM_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("agents", lambda r: str(r.agents)),
    ("prompt", lambda r: str(r.prompt_tokens)),
    ("answers", lambda r: str(r.output_tokens)),
    ("n", lambda r: str(r.samples)),
    ("last agent", lambda r: f"{r.ttft_after_last_token_s:.3f} s"),
    ("min", lambda r: f"{r.ttft_s_min:.3f} s"),
    ("max", lambda r: f"{r.ttft_s_max:.3f} s"),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
    ("pipeline", lambda r: f"{r.wall_s:.2f} s"),
    ("of full", lambda r: f"{r.wall_ratio:.3f}"),
    ("decode", lambda r: f"{r.writers_tokens_per_s:.1f}/s"),
    ("of full", lambda r: f"{r.upstream_tokens_per_s_ratio:.3f}"),
    ("prepared", lambda r: f"{r.prepared_tokens:.0f}"),
    ("relayed", lambda r: f"{r.relayed_tokens:.0f}"),
    ("same tokens", lambda r: f"{r.same_tokens:.3f}"),
    ("in vain", lambda r: f"{r.wasted_tokens:.0f}"),
)
