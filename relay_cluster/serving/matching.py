"""Finds remembered texts inside a longer one, exactly and in linear time.

Every remembered text has a *seed*: `SEED` of its characters in a row, chosen so that as few other texts as
possible share it. All seeds of a prompt are hashed at once (a polynomial hash modulo 2^64, vectorised), a
table tells which of them may be somebody's, and each of those few is compared character by character:

    prompt -> hash of every SEED characters -> table of counts -> seed's texts -> compare

So no match is ever wrong, whatever the hashes do; and the number of comparisons for one prompt is bounded, so
that a prompt made to collide loses matches instead of taking time. Knows nothing of tokens, requests or
tenants. Not thread-safe: the service uses it on its event loop.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from relay_cluster.serving.seeds import SEED, SeedHashes, cuts_word, high_bits, high_bits_of

_TABLE_BITS = 20
_MOST_CHECKS = 4_000
"""Comparisons that one prompt may cost; each is a few hundred nanoseconds."""
_CHAR_BYTES = 4
_ENTRY_BYTES = 400
"""About what an entry takes beside its text."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Match(Generic[T]):
    """A remembered text at [start, stop) of a prompt."""

    start: int
    stop: int
    value: T


@dataclass(eq=False, slots=True)
class _Entry(Generic[T]):
    text: str
    value: T
    seed: int
    offset: int


class TextIndex(Generic[T]):
    """Texts with a value each; the least recently used go when there are too many.

    Args:
        max_texts: most texts. max_bytes: most memory for them, estimated at four bytes a character.
    """

    def __init__(self, *, max_texts: int, max_bytes: int) -> None:
        self._max_texts = max_texts
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        self._by_seed: dict[int, list[_Entry[T]]] = {}
        self._counts = np.zeros(1 << _TABLE_BITS, dtype=np.uint32)
        self._hashes = SeedHashes()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Estimated memory of what is remembered."""
        return self._nbytes

    def get(self, text: str) -> T | None:
        """The value of exactly this text."""
        entry = self._entries.get(text)
        return None if entry is None else entry.value

    def put(self, text: str, value: T) -> bool:
        """Remember a text, or give it a new value. False when it is too short or larger than the budget."""
        if len(text) < SEED or _size(text) > self._max_bytes:
            return False
        if text in self._entries:
            self._entries[text].value = value
            self._entries.move_to_end(text)
            return True
        seeds = self._hashes.of(text)
        offset = int(
            self._counts.take(high_bits(seeds, _TABLE_BITS)).argmin()
        )  # the seed that fewest others have
        entry = _Entry(text, value, int(seeds[offset]), offset)
        self._entries[text] = entry
        self._by_seed.setdefault(entry.seed, []).append(entry)
        self._counts[high_bits_of(entry.seed, _TABLE_BITS)] += 1
        self._nbytes += _size(text)
        while len(self._entries) > self._max_texts or self._nbytes > self._max_bytes:
            self.drop(next(iter(self._entries)))
        return True

    def drop(self, text: str) -> None:
        """Forget a text; nothing when it is not remembered."""
        entry = self._entries.pop(text, None)
        if entry is None:
            return
        same = self._by_seed[entry.seed]
        same.remove(entry)
        if not same:
            del self._by_seed[entry.seed]
        self._counts[high_bits_of(entry.seed, _TABLE_BITS)] -= 1
        self._nbytes -= _size(text)

    def find(self, prompt: str, accept: Callable[[T], bool] | None = None) -> list[Match[T]]:
        """Remembered texts in `prompt`, in order, none overlapping another.

        Args:
            accept: only texts whose value it is true of; None takes any.

        Where several could stand, the longest is taken first, and the earliest of equally long ones. A text
        whose first or last word would be cut in two by what stands beside it is not a match: a tokenizer
        would make other tokens of it. What is found counts as used.
        """
        found = sorted(
            (
                (entry, start)
                for entry, start in self._occurrences(prompt)
                if _whole(prompt, start, entry) and (accept is None or accept(entry.value))
            ),
            key=lambda hit: (-len(hit[0].text), hit[1]),
        )
        taken: list[Match[T]] = []
        for entry, start in found:
            stop = start + len(entry.text)
            at = bisect.bisect_left(taken, start, key=lambda m: m.start)
            if (at and taken[at - 1].stop > start) or (at < len(taken) and taken[at].start < stop):
                continue
            taken.insert(at, Match(start, stop, entry.value))
            self._entries.move_to_end(entry.text)
        return taken

    def _occurrences(self, prompt: str) -> Iterator[tuple[_Entry[T], int]]:
        if not self._entries:
            return
        left = _MOST_CHECKS
        for first, seeds in self._hashes.blocks(prompt):
            likely = np.flatnonzero(self._counts.take(high_bits(seeds, _TABLE_BITS)) != 0)
            for at, seed in zip(likely.tolist(), seeds[likely].tolist(), strict=True):
                for entry in self._by_seed.get(seed, ()):
                    left -= 1
                    if left < 0:
                        return
                    start = first + at - entry.offset
                    if start >= 0 and prompt.startswith(entry.text, start):
                        yield entry, start


def _size(text: str) -> int:
    return _CHAR_BYTES * len(text) + _ENTRY_BYTES


def _whole(prompt: str, start: int, entry: _Entry[T]) -> bool:
    return not (cuts_word(prompt, start) or cuts_word(prompt, start + len(entry.text)))
