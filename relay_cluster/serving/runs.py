"""Long runs of text that an earlier text had as well, wherever they stand: a document that every agent's
template wraps in other words.

Some positions are sampled by what stands there (one in 16, by hash), so the same text is sampled at the same
places wherever it occurs. A run that begins at a sample is compared character by character in both
directions. Knows nothing of what was remembered whole. Not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from relay_cluster.serving.seeds import SEED, SeedHashes, cuts_word, high_bits, high_bits_of

_SAMPLE_BITS = 4
_TABLE_BITS = 21
_BLANKS = " \t\r\n"


class Run(NamedTuple):
    """Half-open range of characters."""

    start: int
    stop: int


class CommonRuns:
    """Texts, of which later ones may share long runs; the oldest go first.

    Args:
        min_chars: shortest run. It is found if one of its positions is sampled: at 128 characters 99.8 % are,
            at 256 all but one in a million.
        max_chars: of all texts together.
    """

    def __init__(self, *, min_chars: int, max_chars: int) -> None:
        self._min_chars = min_chars
        self._max_chars = max_chars
        self._chars = 0
        self._texts: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._samples: dict[int, tuple[str, int]] = {}
        self._counts = np.zeros(1 << _TABLE_BITS, dtype=np.uint16)  # of them; most hashes of a text have none
        self._hashes = SeedHashes()

    @property
    def chars(self) -> int:
        """Characters of the texts that are kept."""
        return self._chars

    def add(self, text: str) -> None:
        """Keep a text; what it shares with an earlier one is from now on found in it."""
        if text in self._texts:
            self._texts.move_to_end(text)
            return
        if not self._min_chars <= len(text) <= self._max_chars:
            return
        sampled = self._sampled(text, known=False)
        self._texts[text] = tuple(seed for _, seed in sampled)
        self._chars += len(text)
        for at, seed in reversed(sampled):  # of what it repeats, the first place: most follows there
            if seed not in self._samples:
                self._counts[_bucket(seed)] += 1
            self._samples[seed] = (text, at)
        while self._chars > self._max_chars:
            self._drop_oldest()

    def find(self, text: str) -> list[Run]:
        """Runs of at least min_chars characters that are in a kept text too: from the first line, or else
        word, that begins in them to the last that ends in them; in order, none overlapping another."""
        runs: list[Run] = []
        done = 0
        if not self._samples:
            return runs
        for at, seed in self._sampled(text, known=True):
            other = self._samples.get(seed)
            if at < done or other is None:
                continue
            run = _extended(text, done, at, *other)
            if run.stop - run.start < self._min_chars:
                continue
            done = run.stop
            neat = _neat(text, run)
            if neat.stop - neat.start >= self._min_chars:
                runs.append(neat)
        return runs

    def _sampled(self, text: str, *, known: bool) -> list[tuple[int, int]]:
        """(position, hash) of the sampled positions. known: only of those whose hash may have been kept."""
        out: list[tuple[int, int]] = []
        for first, seeds in self._hashes.blocks(text):
            # A hash is sampled when its highest bits are zero; those after them are its place in the table.
            buckets = high_bits(seeds, _SAMPLE_BITS + _TABLE_BITS)
            places = np.flatnonzero(buckets < 1 << _TABLE_BITS)
            if known:
                places = places[self._counts.take(buckets[places]) != 0]
            out += zip((places + first).tolist(), seeds[places].tolist(), strict=True)
        return out

    def _drop_oldest(self) -> None:
        text, seeds = self._texts.popitem(last=False)
        self._chars -= len(text)
        for seed in seeds:
            if self._samples.get(seed, ("", 0))[0] is text:
                del self._samples[seed]
                self._counts[_bucket(seed)] -= 1


def _bucket(seed: int) -> int:
    return high_bits_of(seed, _SAMPLE_BITS + _TABLE_BITS)


def _extended(text: str, least: int, at: int, other: str, there: int) -> Run:
    """The longest run around text[at] and other[there] that is in both, not before text[least]."""
    room = min(at - least, there)
    back = _common(room, lambda a, b: text[at - b : at - a] == other[there - b : there - a])
    room = min(len(text) - at, len(other) - there)
    ahead = _common(room, lambda a, b: text[at + a : at + b] == other[there + a : there + b])
    return Run(at - back, at + ahead)


def _common(room: int, same: Callable[[int, int], bool]) -> int:
    """How far two texts agree: steps that double while they do, and halve where they do not."""
    done, step = 0, SEED
    while done < room and step:
        size = min(step, room - done)
        if same(done, done + size):
            done += size
            step *= 2
        else:
            step = size // 2
    return done


def _neat(text: str, run: Run) -> Run:
    """The part of a run between its outermost line breaks, or where those take much of it, without the words
    that it cuts."""
    start, stop = run
    first = text.find("\n", start, stop) + 1 if start and text[start - 1] != "\n" else start
    last = text.rfind("\n", start, stop) if stop < len(text) and text[stop] != "\n" else stop
    if first >= start and last >= 0 and 4 * (last - max(first, start)) >= 3 * (stop - start):
        start, stop = max(first, start), last
    while start < stop and (text[start] in _BLANKS or cuts_word(text, start)):
        start += 1
    while start < stop and (text[stop - 1] in _BLANKS or cuts_word(text, stop)):
        stop -= 1
    return Run(start, stop)
