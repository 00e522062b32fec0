"""Where an answer ends because its text has reached a stop text.

Text is given out as soon as no stop text can begin in it any more. Knows neither models nor steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopText:
    """Watches one answer while its text arrives.

    All that `push` and `finish` return, joined, is the text before the first stop text.

    Args:
        stops: texts that end the answer; empty ones do not count.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(filter(None, stops))
        self._text = ""
        self._given = 0
        self.found = False

    @property
    def text(self) -> str:
        """The answer so far, up to the stop text where one was found."""
        return self._text

    def push(self, piece: str) -> str:
        """Add text; returns what is certain to be part of the answer. Nothing after `found`."""
        if self.found:
            return ""
        # A stop text may have begun in what is held back, never in what was given out.
        self._text += piece
        ends = [at for stop in self._stops if (at := self._text.find(stop, self._given)) >= 0]
        if ends:
            self.found = True
            self._text = self._text[: min(ends)]
            return self._give(len(self._text))
        return self._give(len(self._text) - self._held())

    def finish(self) -> str:
        """What was held back, once the answer is whole."""
        return self._give(len(self._text))

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop text."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._text) - self._given), longest, -1):
                if self._text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def _give(self, upto: int) -> str:
        piece, self._given = self._text[self._given : upto], max(self._given, upto)
        return piece


def tokens_before(ids: Sequence[int], text: str, decode: Callable[[Sequence[int]], str], first: int) -> int:
    """How many leading ids are wholly in `text`, an answer that was cut at a stop text.

    Args:
        decode: ids -> their text.
        first: a count at which the stop text had certainly not been reached whole.
    """
    count = min(len(ids), first)
    while count and not text.startswith(decode(ids[:count])):
        count -= 1
    return count
