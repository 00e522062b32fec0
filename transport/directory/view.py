"""Which shards the directory has: a numbered list that only grows in number. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """The directory's membership.

    Attributes:
        epoch: counts resizes; of two views the one with the larger epoch holds. 0: as first configured.
        shards: names of the shard actors. Empty only at a shard that nobody has told.
    """

    epoch: int
    shards: tuple[str, ...]
