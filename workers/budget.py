"""How many rows of work that can wait ride along in a step, and whose they are.

    urgent   decode rows and the prefill of requests that somebody waits for, rectification of what they relay
             included: never held back here
    AHEAD    prefill ahead: prompts whose request has yet to come
    IDLE     shadow checks and the like: only in steps in which nobody else wants rows

A step that decodes may carry rows of AHEAD as long as it is predicted to take at most `share` longer for
them, by what steps with and without such rows took lately. Pipelines share those rows: whoever has got the
fewest comes next. Pure: times are arguments; it knows nothing of sequences, tensors or threads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

_WEIGHT = 0.2
"""Of the latest measurement."""
_FRESH_STEPS = 16
"""After so many steps with rows that ride along, one goes without, to see what a step takes alone now."""
_LEAST_SHARE = 0.001
"""A row is never taken to cost less than this share of a step: a lucky measurement must not open the gate."""
_GROWTH = 2
"""A step carries at most so many times the rows that the last one of its kind has shown to be affordable."""


class Urgency(IntEnum):
    """Who waits for a sequence's rows; the lower, the sooner it gets them."""

    NOW = 0
    AHEAD = 1
    IDLE = 2


@dataclass(slots=True)
class RideAlong:
    """The rows that steps may carry beside those of decoding requests.

    Args:
        share: by how much of its time alone a step may grow; 0 carries nothing.
        most: rows per step.

    A step of one row may grow by more than its share where even one row costs more than that: then one rides
    in every so many steps, so that they grow by that share on average.
    """

    share: float
    most: int
    _alone_s: dict[int, float] = field(default_factory=dict[int, float])
    _row_s: float | None = None
    _since: int = 0
    _credit_s: float = 0.0
    _last: int = 0

    def rows(self, urgent: int) -> int:
        """How many may ride in the next step, beside `urgent` rows that decode."""
        alone_s = self._alone_s.get(urgent)
        if self.share <= 0 or self.most < 1 or alone_s is None or self._since >= _FRESH_STEPS:
            return 0
        if self._row_s is None:
            return 1
        affordable = int((self.share * alone_s + self._credit_s) / self._row_s)
        return min(affordable, self.most, max(1, _GROWTH * self._last))

    def observe(self, urgent: int, extra: int, seconds: float) -> None:
        """A step of `urgent` rows that decode and `extra` that rode along took `seconds`."""
        alone_s = self._alone_s.get(urgent)
        if not extra:
            # What a new number of requests takes is not yet known, and the oldest one is of no use any more.
            self._alone_s = {urgent: seconds if alone_s is None else _mixed(alone_s, seconds)}
            if alone_s is not None and self._row_s is not None:
                self._credit_s = min(self._row_s, self._credit_s + self.share * alone_s)
            self._since = 0
            return
        self._since += 1
        if alone_s is None:
            return
        grown = max(seconds - alone_s, 0.0)
        row_s = max(grown / extra, _LEAST_SHARE * alone_s)
        self._row_s = row_s if self._row_s is None else _mixed(self._row_s, row_s)
        # What one step was over its share, the next ones have less.
        self._credit_s = min(self._row_s, self._credit_s + self.share * alone_s - self._row_s * extra)
        self._last = extra


class Turns:
    """Whose turn it is: the group that has got the fewest rows among those that want some."""

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}

    def order(self, groups: Iterable[Hashable]) -> list[int]:
        """Indices of `groups`, who comes first first; within a group, in the order given. Groups that are no
        longer among them are forgotten."""
        wanted = list(groups)
        known = [self._served[g] for g in wanted if g in self._served]
        # One that comes anew has no claim to what others got before.
        start = min(known, default=0.0)
        self._served = {g: self._served.get(g, start) for g in wanted}
        return sorted(range(len(wanted)), key=lambda i: self._served[wanted[i]])

    def took(self, group: Hashable, rows: int) -> None:
        """The group got so many rows."""
        self._served[group] = self._served.get(group, 0.0) + rows


def deal(wanted: Iterable[int], room: int) -> list[int]:
    """Rows for each of those who want so many, in order, of `room` in all."""
    out: list[int] = []
    for rows in wanted:
        given = max(0, min(rows, room))
        room -= given
        out.append(given)
    return out


def _mixed(before: float, now: float) -> float:
    return (1 - _WEIGHT) * before + _WEIGHT * now
