"""Contracts of the transport room. `tests/transport/conformance.py` runs one suite over every backend.

A pull is: lease -> read -> verify -> commit. `Transport.pull` takes a `Lease`, so an unleased pull cannot
be written. Verify means: the block's generation (in the block's own header, read together with the payload)
is the leased one, and the checksum of every part of the payload equals the published one. Only then do the
destination blocks belong to the caller; after a timeout they are quarantined in the arena, because late
writes are real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from transport.types import (
    BlockId,
    Lease,
    Located,
    Owner,
    Segment,
    SegmentKey,
    Transfer,
    WorkerId,
)

if TYPE_CHECKING:  # the directory's clients and shards start without torch
    from transport.arena import Arena
    from transport.directory.opening import News, Opened

T = TypeVar("T")


class Answers(dict[SegmentKey, T]):
    """What the directory says, by key. A key that is neither here nor in `unanswered` is not held by anyone.

    Attributes:
        unanswered: keys that could not be asked for: their shard did not answer, or is left alone for a
            moment because it did not answer before.
    """

    def __init__(
        self, found: Mapping[SegmentKey, T] | None = None, unanswered: Iterable[SegmentKey] = ()
    ) -> None:
        super().__init__(found or {})
        self.unanswered = frozenset(unanswered)


class Transport(Protocol):
    """Moves sealed blocks between arenas. Thread-safe: several pulls may run at once."""

    name: str

    def register(self, arena: Arena) -> None:
        """Make the arena readable by peers. Called once, before `address`."""
        ...

    def address(self) -> bytes:
        """What a peer's `pull` needs to reach this arena; opaque outside the backend."""
        ...

    def pull(
        self,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        timeout_s: float,
        lease_deadline: float | None = None,
        on_part: Callable[[int], None] | None = None,
    ) -> Transfer:
        """Read every block of the leased segment into `into` (same length, allocated by the caller in the
        registered arena), verify, and report. Never raises for a remote fault: the `Transfer` says it.
        `lease_deadline` is the time.monotonic() instant at which the lease ends, counted by the caller from
        before its lease request (None: `lease.ttl_s` from the start of the pull).

        `on_part(i)` is called in this thread, once and in order for every part i of the arena's blocks, when
        that part of *all* blocks has been verified and the lease is still live; later parts travel meanwhile.
        It should be quick (set an event, queue an index). Bytes that were handed over are the published ones
        whatever comes after; whether they are of use without the rest is the caller's decision. After
        TIMED_OUT the blocks are not the caller's any more: whoever may still read them in another thread must
        throw away what it read. What `on_part` raises ends the pull and comes out of it.

        On any outcome other than PULLED the caller must not use parts that were not handed over. Blocks are
        returned to the arena by the caller, except after TIMED_OUT, when the backend has quarantined them
        itself."""
        ...

    def close(self) -> None:
        """Stop threads and sockets. Idempotent."""
        ...


class KVDirectory(Protocol):
    """Finds and pins segments. All operations are batched and have a deadline
    (`DirectorySettings.call_timeout_s`); a shard that does not answer costs hits, never correctness:
    lookups and leases omit its keys and name them in `Answers.unanswered`; writes raise
    DirectoryUnavailable."""

    def announce(self, owner: Owner) -> None:
        """Heartbeat of an owner; a newer incarnation fences the older one and drops its segments. It tells
        the directory the owner's pull key and clock, with which tokens are made for its blocks."""
        ...

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """Enter segments whose blocks are all sealed."""
        ...

    def retract(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """Take back segments whose blocks `owner` is about to free, leased or not: for a publish that failed
        after the directory may have accepted it. Other blocks entered under the same key stay. Best effort,
        without waiting and without raising DirectoryUnavailable: what stays behind reads as stale."""
        ...

    def lookup(self, keys: Sequence[SegmentKey], *, near: WorkerId | None = None) -> Answers[Located]:
        """Find segments; prefers a copy held by `near`, then its node, then any. Never extends a lease,
        and does not count as a use for LRU. Where their owners can be reached is told with leases only."""
        ...

    def lease(
        self, keys: Sequence[SegmentKey], *, holder: WorkerId, ttl_s: float, copies: int = 1
    ) -> Answers[Lease]:
        """Pin segments for `holder`; absent keys are omitted. Counts as a use for LRU. copies: pin so many
        owners' copies of each, if there are (`Lease.others`)."""
        ...

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> dict[str, bool]:
        """Lease id -> still held. The blocks stay for longer; the lease's token ends when it was to end, so
        who wants to read for longer leases again. (Nothing in the product renews.)"""
        ...

    def release(self, leases: Sequence[Lease], *, read: bool = False) -> None:
        """Unpin. Idempotent; unknown leases are ignored. read: the holder has the bytes; see
        `Segment.consumers`."""
        ...

    def evict(self, owner: Owner, *, nbytes: int) -> tuple[Segment, ...]:
        """Remove unleased segments in `owner`'s arena until at least `nbytes` are covered or none is left:
        those that all their expected consumers have read first, then the least recently used. They are out of
        the directory before this returns, so that the owner may free their blocks."""
        ...

    def drop_owner(self, worker: WorkerId, incarnation: int) -> None:
        """Forget a dead owner: its segments and every lease on them."""
        ...

    def advance(self, owner: Owner, update: Opened) -> str:
        """Tell readers what is new of a segment that `owner` writes; "" or why nobody can follow. It is told
        again to whoever missed it, until the segment ends. Raises WorkerLost."""
        ...

    def watch(
        self, key: SegmentKey, *, life: int, after: int, holder: WorkerId, ttl_s: float, wait_s: float
    ) -> News | None:
        """Wait for what comes behind the first `after` blocks of an open segment, as that life of its
        producer counts them (0: of any), for `wait_s` at most: None when nothing has come. ttl_s: of the
        lease of what is told. Raises DirectoryUnavailable."""
        ...

    def unwatch(self, key: SegmentKey, *, holder: WorkerId) -> None:
        """End the holder's watches of that segment now. Best effort, without waiting."""
        ...

    def stats(self) -> dict[str, float]:
        """Totals over shards: segments, leases, owners, bytes, shards_up."""
        ...
