"""Hashes of all runs of `SEED` characters of a text at once, and where a text may be cut.

Knows nothing of what is looked for with them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

SEED = 32
"""Characters of a seed; shorter texts cannot be found."""

# Where one character of a script that writes no blanks between words meets another, no word is cut.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff"
_IN_WORD = re.compile(rf"[^\W{_UNSPACED}]{{2}}")
_MIX = 0x9E3779B97F4A7C15

_BLOCK = 8192

Words = npt.NDArray[np.uint64]


def cuts_word(text: str, at: int) -> bool:
    """Whether a cut before `text[at]` goes through a word."""
    return at > 0 and _IN_WORD.match(text, at - 1) is not None


def high_bits(seeds: Words, count: int) -> npt.NDArray[np.int64]:
    """`count` bits of each hash, mixed: the low bits of such a hash depend on little."""
    return ((seeds * np.uint64(_MIX)) >> np.uint64(64 - count)).view(np.int64)


def high_bits_of(seed: int, count: int) -> int:
    """As `high_bits`, of one hash."""
    return ((seed * _MIX) & (1 << 64) - 1) >> (64 - count)


class SeedHashes:
    """Polynomial hashes modulo 2^64 of all SEED characters in a row of a text. The base is drawn anew in
    every process, so nobody can prepare collisions; an odd number has an inverse, so differences of the
    running sum can be brought to position 0."""

    def __init__(self) -> None:
        self._base = np.uint64(secrets.randbits(64) | 1)
        self._inverse = np.uint64(pow(int(self._base), -1, 1 << 64))
        self._powers = np.ones(1, dtype=np.uint64)
        self._inverses = np.ones(1, dtype=np.uint64)

    def blocks(self, text: str) -> Iterator[tuple[int, Words]]:
        """(position, hashes from there on) of a text, in blocks that fit into a processor's cache."""
        for at in range(0, len(text) - SEED + 1, _BLOCK):
            yield at, self.of(text[at : at + _BLOCK + SEED - 1])

    def of(self, text: str) -> Words:
        """[len(text) - SEED + 1]; len(text) is at least SEED."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        self._grow(len(codes))
        sums = np.cumsum(codes * self._powers[: len(codes)], dtype=np.uint64)
        windows = sums[SEED - 1 :].copy()
        windows[1:] -= sums[: len(codes) - SEED]
        return windows * self._inverses[: len(windows)]

    def _grow(self, count: int) -> None:
        if count <= len(self._powers):
            return
        size = 1 << (count - 1).bit_length()
        self._powers = _powers(self._base, size)
        self._inverses = _powers(self._inverse, size)


def _powers(base: np.uint64, count: int) -> Words:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)
