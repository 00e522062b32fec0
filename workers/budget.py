"""How many rows of work that can wait ride along in a step, and whose they are.

    urgent   decode rows and the prefill of requests that somebody waits for, rectification of what they relay
             included: never held back here
    AHEAD    prefill ahead: prompts whose request has yet to come
    IDLE     shadow checks and the like: only in steps in which nobody else wants rows

Steps that decode grow on average by at most `share` for rows of AHEAD, by what steps with and without such
rows took lately. A few rows in one step may cost little more than one (a pass over the weights takes as
long): then they come together, in one of several steps. Pipelines share those rows: whoever has got the
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
_MOST_GROWTH = 1.0
"""No step grows knowingly by more than this share of its time alone, unless a single row takes that."""
_BETTER = 0.8
"""Steps are saved up for, where rows that come together cost at most so much of what they cost alone."""
_FEW_ROWS = 16
"""Up to so many rows, a number that was not tried may cost as little as half as many."""
_TRY_GROWTH = 0.7
"""It is tried if those cost no more than this share of a step."""
_FORGET_STEPS = 512
"""What was not measured for so long is unknown again: an unlucky measurement must not decide for good."""


class Urgency(IntEnum):
    """Who waits for a sequence's rows; the lower, the sooner it gets them."""

    NOW = 0
    AHEAD = 1
    IDLE = 2


@dataclass(slots=True)
class RideAlong:
    """The rows that steps may carry beside those of decoding requests.

    Args:
        share: by how much of their time alone steps may grow on average; 0 carries nothing.
        most: rows per step.

    Every step earns its share, and rows spend it. What they cost is measured by how many come together, in
    powers of two.
    """

    share: float
    most: int
    _alone_s: dict[int, float] = field(default_factory=dict[int, float])
    _row_s: dict[int, float] = field(default_factory=dict[int, float])  # by bit length of the number of rows
    _tried: dict[int, int] = field(default_factory=dict[int, int])  # the step in which it was measured
    _step: int = 0
    _since: int = 0
    _credit_s: float = 0.0

    def rows(self, urgent: int) -> int:
        """How many may ride in the next step, beside `urgent` rows that decode."""
        alone_s = self._alone_s.get(urgent)
        if self.share <= 0 or self.most < 1 or alone_s is None or self._since >= _FRESH_STEPS:
            return 0
        if not self._row_s:
            return 1
        allowed_s = self.share * alone_s + self._credit_s
        untried, cost_s = self._untried(alone_s)
        if untried:
            return untried if cost_s <= allowed_s else 0
        now = self._affordable(allowed_s, alone_s)
        return now if now >= self._best(alone_s) else 0

    def observe(self, urgent: int, extra: int, seconds: float) -> None:
        """A step of `urgent` rows that decode and `extra` that rode along took `seconds`."""
        alone_s = self._alone_s.get(urgent)
        self._step += 1
        if not extra:
            # What a new number of requests takes is not yet known, and the oldest one is of no use any more.
            self._alone_s = {urgent: seconds if alone_s is None else _mixed(alone_s, seconds)}
            if alone_s is not None and self._row_s:
                self._earn(alone_s)
            self._since = 0
            return
        self._since += 1
        if alone_s is None:
            return
        size = extra.bit_length()
        row_s = max((seconds - alone_s) / extra, _LEAST_SHARE * alone_s)
        self._row_s[size] = row_s = _mixed(self._row_s.get(size, row_s), row_s)
        self._tried[size] = self._step
        for old in [s for s, step in self._tried.items() if self._step - step > _FORGET_STEPS]:
            del self._row_s[old], self._tried[old]
        self._earn(alone_s)
        # No debt of more than a step: the next ones did not make it.
        self._credit_s = max(self._credit_s - row_s * extra, -_MOST_GROWTH * alone_s)

    def _earn(self, alone_s: float) -> None:
        """What was over a step's share, the next ones have less; no more is saved than one step can spend."""
        most_s = max(_MOST_GROWTH * alone_s, self._row_s.get(1, 0.0))
        self._credit_s = min(most_s, self._credit_s + self.share * alone_s)

    def _cost_s(self, rows: int) -> float:
        """Of so many rows together; a number that was not tried is taken to cost as much for each as the next
        smaller one, or else the next larger one, that was."""
        size = rows.bit_length()
        known = max((s for s in self._row_s if s <= size), default=None) or min(self._row_s)
        return rows * self._row_s[known]

    def _affordable(self, allowed_s: float, alone_s: float) -> int:
        """The most rows for `allowed_s`, and not many more than were tried."""
        limit_s = min(allowed_s, max(_MOST_GROWTH * alone_s, self._cost_s(1)))
        most = min(self.most, (2 << max(self._row_s)) - 1)
        fitting = 0
        for size in range(1, most.bit_length() + 1):
            least = 1 << (size - 1)
            count = min(most, 2 * least - 1, int(limit_s / (self._cost_s(least) / least)))
            fitting = count if count >= least else fitting
        return fitting

    def _untried(self, alone_s: float) -> tuple[int, float]:
        """(the smallest number of rows whose cost ought to be known and is not, what it is expected to be);
        0: none."""
        size = next(s for s in range(1, len(self._row_s) + 2) if s not in self._row_s)
        rows = 1 << (size - 1)
        if rows > min(self.most, _FEW_ROWS) or self._cost_s(rows // 2) > _TRY_GROWTH * alone_s:
            return 0, 0.0
        return rows, min(self._cost_s(rows), _MOST_GROWTH * alone_s)

    def _best(self, alone_s: float) -> int:
        """The number of rows that is worth waiting for; the smallest of those that cost about as little
        each."""
        best, best_s = 1, self._cost_s(1)
        for size in sorted(self._row_s):
            rows, row_s = 1 << (size - 1), self._row_s[size]
            if rows * row_s <= _MOST_GROWTH * alone_s and row_s <= _BETTER * best_s:
                best, best_s = rows, row_s
        return best


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
