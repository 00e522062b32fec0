"""Tokens for the leases of one owner's copies. Pure: time is an argument.

This module does not know who may lease what.
"""

from __future__ import annotations

from typing import Final

from transport.errors import RelayError
from transport.tokens import Claim, PullKey, digest_of, make_token, pack_blocks
from transport.types import Incarnation, Segment, WorkerId

_DRIFT_MS_PER_S: Final = 1.0


class OwnerClock:
    """An owner's clock as a shard knows it: how far it is ahead of the shard's own, at least.

    Every announcement gives a bound, which is low by its time on the way. The highest one counts: a late
    announcement must not make tokens end early. It is lowered by a thousandth of the time that passes, which
    is more than clocks of machines drift apart.
    """

    __slots__ = ("_ahead_ms", "_noted_at")

    def __init__(self, clock_ms: int, now: float) -> None:
        self._ahead_ms = clock_ms - now * 1e3
        self._noted_at = now

    def note(self, clock_ms: int, now: float) -> None:
        """The owner's clock showed `clock_ms` when it announced itself; `now`: the shard's, in seconds."""
        self._ahead_ms = max(clock_ms - now * 1e3, self._ahead(now))
        self._noted_at = now

    def at(self, now: float, later_s: float = 0.0) -> int:
        """What it shows `later_s` seconds after `now` at least, in ms."""
        return int((now + later_s) * 1e3 + self._ahead(now))

    def _ahead(self, now: float) -> float:
        return self._ahead_ms - (now - self._noted_at) * _DRIFT_MS_PER_S


class Granter:
    """Makes tokens with the pull key of one life of an owner.

    Args:
        clock_ms: what the owner's clock showed when it told the key; now: the shard's, in seconds.
    """

    __slots__ = ("_clock", "_incarnation", "_key")

    def __init__(self, incarnation: Incarnation, key: PullKey, clock_ms: int, now: float) -> None:
        self._incarnation, self._key = incarnation, key
        self._clock = OwnerClock(clock_ms, now)

    def heard(self, key: PullKey, clock_ms: int, now: float) -> None:
        """A further announcement of that life."""
        self._key = key
        self._clock.note(clock_ms, now)

    def token(
        self, segment: Segment, blocks_digest: bytes, holder: WorkerId, now: float, ttl_s: float
    ) -> bytes:
        """For a lease that ends `ttl_s` seconds after `now`; empty for blocks that no token can name."""
        if not blocks_digest:
            return b""
        claim = Claim(self._incarnation, segment.key.space, segment.key.digest, holder, blocks_digest)
        return make_token(self._key, claim, self._clock.at(now, ttl_s))


def blocks_digest(segment: Segment) -> bytes:
    """What tokens say of a segment's blocks; empty where their owner has published what no token can say."""
    try:
        return digest_of(pack_blocks(segment.blocks))
    except (ValueError, RelayError):
        return b""
