"""Checksums of payload bytes: 64 bits, of which the highest says how the others were made.

    0   xxh3-64 of the bytes: what a CPU is fastest at
    1   a sum over 8-byte words, each mixed with its place: what a GPU computes without the bytes leaving it

Both ends may lie on different devices: whoever verifies computes the kind that the sealed value is of. The
second kind is the sum modulo 2^63 of mix(word + (i + 1) * golden) over words i, where mix is the finalizer of
MurmurHash3 (A. Appleby, fmix64): a word that changes, or changes places, changes the sum. Neither kind
withstands somebody who forges bytes on purpose; see docs/security.md.

This module does not know blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import xxhash

WORD_NBYTES: Final = 8
WORDS_BIT: Final = 1 << 63
_MASK: Final = WORDS_BIT - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX: Final = (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53)


def of_bytes(data: Any) -> int:
    """xxh3-64 of a buffer, its highest bit cleared."""
    return xxhash.xxh3_64_intdigest(data) & _MASK


def of_words(data: Any) -> int:
    """The sum over words, on the CPU.

    Args:
        data: a buffer of a multiple of 8 bytes, little-endian.
    """
    words = np.frombuffer(data, "<u8")
    x = words + (np.arange(1, len(words) + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    for factor in _MIX:
        x ^= x >> np.uint64(33)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(33)
    return int(x.sum(dtype=np.uint64)) & _MASK | WORDS_BIT


def again(data: Any, sealed: int) -> int:
    """The checksum of a buffer in CPU memory, of the kind that `sealed` is of."""
    return of_words(data) if sealed & WORDS_BIT and len(data) % WORD_NBYTES == 0 else of_bytes(data)


def on_device(
    buffer: torch.Tensor, rows: Sequence[Sequence[int]], stride: int, first: int, nbytes: int
) -> list[list[int]]:
    """Sums over words of one range of every block of CUDA memory, in one launch; with headers, each block's
    is exchanged for the one that is given.

    Args:
        buffer: flat uint8, 8-byte aligned, blocks of `stride` bytes that begin with a header of 64.
        rows: of every block its number, or its number and 8 words of its new header (signed).
        first, nbytes: the range, in bytes from the start of a block, both multiples of 8.

    Returns:
        of every block [checksum], or [checksum, 8 words of the header that it had].
    """
    from transport.checksums_triton import check

    given = torch.tensor(rows, dtype=torch.int64).to(buffer.device)
    found = check(
        buffer.view(torch.int64), given, stride // WORD_NBYTES, first // WORD_NBYTES, nbytes // WORD_NBYTES
    )
    return [[total & _MASK | WORDS_BIT, *header] for total, *header in found.tolist()]


def serves_device(device: torch.device, start: int, nbytes: int) -> bool:
    """Whether `on_device` can take such a range."""
    return device.type == "cuda" and start % WORD_NBYTES == 0 and nbytes % WORD_NBYTES == 0 and nbytes > 0
