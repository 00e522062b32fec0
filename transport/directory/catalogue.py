"""What operators see and choose: one row per copy, and filters over them. Pure; knows no shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from transport.types import NodeId, SegmentKey, WorkerId

Kind = Literal["", "exact", "rectified"]
Cursor = tuple[str, bytes, str, str]
"""Where a page ended: space, digest, variant, owner. Pages are in this order at every shard."""
PIN_PREFIX = "pin:"
"""Holder of a pin is this and the pin's name; no worker may be called so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which copies are meant; every condition must hold.

    Attributes:
        key_prefix: start of the digest in hex, or "SPACE/DIGEST" with the start of each, as `relay ls` shows.
        owner: worker that holds it; "" is any.
        idle_s: unused for at least so many seconds.
        kind: "exact", "rectified" or "" for both.
        leased, pinned: only those that are leased by readers, or pinned.
    """

    key_prefix: str = ""
    owner: str = ""
    idle_s: Annotated[float, Ge(0)] = 0.0
    kind: Kind = ""
    leased: bool = False
    pinned: bool = False

    def names(self, key: SegmentKey) -> bool:
        """Whether the key has the wanted prefix."""
        if not self.key_prefix:
            return True
        space, slash, digest = self.key_prefix.partition("/")
        if not slash:
            return key.digest.hex().startswith(space)
        return key.space.startswith(space) and key.digest.hex().startswith(digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One copy of a segment, as an operator sees it.

    Attributes:
        num_tokens: tokens whose KV it holds; nbytes: of its blocks.
        owner, node: who holds it, and where.
        leases: readers that hold it now, without pins.
        pins: name of each pin -> seconds until it ends.
        idle_s: seconds since it was published or leased last.
        complete: False while its producer still appends blocks.
    """

    key: SegmentKey
    variant: str
    num_tokens: int
    nbytes: int
    owner: WorkerId
    node: NodeId
    leases: int
    pins: dict[str, float]
    idle_s: float
    complete: bool

    @property
    def rectified(self) -> bool:
        return "~" in self.variant

    @property
    def busy(self) -> bool:
        """Whether a reader or a pin keeps it from eviction now, or it is still being written."""
        return bool(self.leases or self.pins or not self.complete)

    @property
    def cursor(self) -> Cursor:
        return self.key.space, self.key.digest, self.variant, self.owner


@dataclass(frozen=True, slots=True)
class Page:
    """Some rows in order, and where the next page begins (None: that was all)."""

    rows: tuple[Listed, ...]
    after: Cursor | None
