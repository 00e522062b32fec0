"""Whether a prompt is prepared exactly or left to the relay, from what this worker has measured lately.

    exact   as long as what is missing is expected to be ready when the request comes, or all but so little
            that relaying would not be less work
    relay   where this worker is too busy for that, or would take its cores from another one that computes:
            only the beginning that nobody can relay is computed

Pure: numbers in, a choice and its reason out. A wrong choice costs time, never an answer.
"""

from __future__ import annotations

from dataclasses import dataclass

LITTLE_ROWS = 64
"""So few tokens are computed in about the time that a look-up and a pull take."""
FORGET_S = 10.0
"""A rate that was not measured for so long is unknown again."""
_LEAST_TOKENS = 32
_WEIGHT = 0.3
"""Of the latest measurement."""
ENOUGH_CORES = 4
"""With so many cores left a writer decodes about as fast as with more: decode is bound by memory. (An
estimate; two cores is what was measured: a chain of three agents took 1.16 of full prefill's time with exact
preparation, and 0.81 when it relayed.)"""
WORTH_A_PULL = 6
"""Relaying a span, rectification included, costs about as much as computing a sixth of its tokens."""


@dataclass(frozen=True, slots=True)
class Coming:
    """What is still to be written of a prompt: at most so many tokens, in these slots."""

    room_tokens: int
    slots: frozenset[str]


@dataclass(slots=True)
class Pace:
    """Tokens per second of prefill ahead on one worker, waiting for its turn included."""

    _rate: float = 0.0
    _at: float | None = None

    def took(self, tokens: int, seconds: float, now: float) -> None:
        """So many tokens took so long. now: of any one clock, in seconds."""
        if tokens < _LEAST_TOKENS or seconds <= 0:
            return  # a pass over the weights takes as long for one as for several: it tells no rate
        rate = tokens / seconds
        self._rate = rate if self.rate(now) is None else (1 - _WEIGHT) * self._rate + _WEIGHT * rate
        self._at = now

    def rate(self, now: float) -> float | None:
        """None when nothing was measured lately: whoever is passed over could otherwise never recover."""
        return None if self._at is None or now - self._at > FORGET_S else self._rate


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is known of a prompt that is prepared.

    Attributes:
        missing: tokens that are known and not computed; coming: most that are yet to be written.
        rate: tokens per second that prefill ahead has got on this worker lately; None: not measured lately.
        left_s: until the request comes, as fast as its writers write; None: not known.
        relayable: whether any of it could be relayed.
        cores: that would be left to each worker of this machine that computes, if this one did too; None:
            nobody shares its cores.
    """

    missing: int
    coming: int
    rate: float | None
    left_s: float | None
    relayable: bool
    cores: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """exact: prepare all that is known. reason: for people."""

    exact: bool
    reason: str


def choose_mode(outlook: Outlook) -> Choice:
    """Exact preparation, or the relay."""
    if not outlook.relayable:
        return Choice(True, "exact: nothing of it can be relayed")
    needed = outlook.missing + outlook.coming
    if outlook.cores is not None and outlook.cores < ENOUGH_CORES and needed > LITTLE_ROWS:
        left = "a core" if outlook.cores == 1 else f"{outlook.cores} cores"
        return Choice(False, f"relay: preparing would leave {left} to others that compute on this machine")
    if outlook.rate is None or outlook.left_s is None:
        return Choice(True, "exact: how much time this worker has is not known yet")
    ready = min(float(needed), outlook.rate * outlook.left_s)
    told = f"{needed} tokens in {outlook.left_s:.1f} s at {outlook.rate:.0f} tokens/s"
    if needed - ready <= max(LITTLE_ROWS, needed / WORTH_A_PULL):
        return Choice(True, f"exact: this worker has time for {told}")
    return Choice(False, f"relay: this worker has no time for {told}")
