"""The kernel of `checksums.on_device`. Importable only where triton is; CPU tensors go through its
interpreter (TRITON_INTERPRET=1), which is how it is tested without a GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

_WORDS = 2048  # of one program's turn
_TURNS = 8


@triton.jit
def _sum_words_kernel(words, starts, sums, count, WORDS: tl.constexpr, TURNS: tl.constexpr):
    """Adds the share of one program, TURNS * WORDS words of one range, to the range's sum."""
    one = tl.program_id(0)
    first = tl.program_id(1).to(tl.int64) * (WORDS * TURNS)
    base = words + tl.load(starts + one)
    total = tl.zeros([WORDS], tl.int64)
    for turn in range(TURNS):
        i = first + turn * WORDS + tl.arange(0, WORDS)
        inside = i < count
        x = tl.load(base + i, mask=inside, other=0).to(tl.uint64, bitcast=True)
        x += (i + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        x ^= x >> 33
        x *= 0xFF51AFD7ED558CCD
        x ^= x >> 33
        x *= 0xC4CEB9FE1A85EC53
        x ^= x >> 33
        total += tl.where(inside, x.to(tl.int64, bitcast=True), 0)
    # Sums modulo 2^64 do not depend on the order in which they are added.
    tl.atomic_add(sums + one, tl.sum(total, axis=0))


def _launch(grid: tuple[int, int], *args: Any) -> None:
    kernel: Any = _sum_words_kernel
    kernel[grid](*args, WORDS=_WORDS, TURNS=_TURNS)


def sum_words(words: torch.Tensor, starts: torch.Tensor, count: int) -> torch.Tensor:
    """Sum over mixed words of `count` words from each of `starts`; see `transport.checksums`.

    Args:
        words: flat int64. starts: [ranges] int64, in words.

    Returns:
        [ranges] int64, modulo 2^64.
    """
    sums = torch.zeros(len(starts), dtype=torch.int64, device=words.device)
    if len(starts):
        grid = (len(starts), triton.cdiv(count, _WORDS * _TURNS))
        # A launch goes to the current device.
        with torch.cuda.device(words.device) if words.is_cuda else contextlib.nullcontext():
            _launch(grid, words, starts, sums, count)
    return sums
