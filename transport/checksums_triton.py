"""The kernel of `checksums.on_device`. Importable only where triton is; CPU tensors go through its
interpreter (TRITON_INTERPRET=1), which is how it is tested without a GPU."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

HEADER_WORDS: Final = 8
_WORDS = 2048  # of one program's turn
_TURNS = 8


@triton.jit
def _check_kernel(
    words,
    rows,
    out,
    stride,
    first,
    count,
    columns,
    HEADER: tl.constexpr,
    WORDS: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Adds the share of one program, TURNS * WORDS words of one block, to the block's sum in out[:, 0]. The
    first program of a block also exchanges its header: the old one to out[:, 1:], the new one from rows."""
    one = tl.program_id(0)
    start = words + tl.load(rows + one * columns) * stride
    begin = tl.program_id(1).to(tl.int64) * (WORDS * TURNS)
    total = tl.zeros([WORDS], tl.int64)
    for turn in range(TURNS):
        i = begin + turn * WORDS + tl.arange(0, WORDS)
        inside = i < count
        x = tl.load(start + first + i, mask=inside, other=0).to(tl.uint64, bitcast=True)
        x += (i + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        x ^= x >> 33
        x *= 0xFF51AFD7ED558CCD
        x ^= x >> 33
        x *= 0xC4CEB9FE1A85EC53
        x ^= x >> 33
        total += tl.where(inside, x.to(tl.int64, bitcast=True), 0)
    # Sums modulo 2^64 do not depend on the order in which they are added.
    tl.atomic_add(out + one * columns, tl.sum(total, axis=0))
    if HEADER > 0:  # noqa: SIM102 - decided when it is compiled, the other when it runs
        if tl.program_id(1) == 0:
            word = tl.arange(0, HEADER)
            old = tl.load(start + word)
            new = tl.load(rows + one * columns + 1 + word)
            tl.store(out + one * columns + 1 + word, old)
            tl.store(start + word, new)


def check(words: torch.Tensor, rows: torch.Tensor, stride: int, first: int, count: int) -> torch.Tensor:
    """Sum over mixed words of `count` words of each block, from its word `first` on; see
    `transport.checksums`. Where `rows` brings headers, each is exchanged for the block's own.

    Args:
        words: flat int64; blocks of `stride` words.
        rows: [blocks, 1 or 9] int64: number of the block, and 8 words of its new header.

    Returns:
        [blocks, 1 or 9] int64: the sum modulo 2^64, and the words of the old header.
    """
    blocks, columns = rows.shape
    out = torch.zeros((blocks, columns), dtype=torch.int64, device=words.device)
    if blocks:
        kernel: Any = _check_kernel
        grid = (blocks, max(1, triton.cdiv(count, _WORDS * _TURNS)))
        # A launch goes to the current device.
        with torch.cuda.device(words.device) if words.is_cuda else contextlib.nullcontext():
            kernel[grid](
                words,
                rows,
                out,
                stride,
                first,
                count,
                columns,
                HEADER=columns - 1,
                WORDS=_WORDS,
                TURNS=_TURNS,
            )
    return out
