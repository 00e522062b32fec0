"""The Ray shell of one directory shard: a named actor that restarts empty. It decides nothing.

It tells its own incarnation in every reply to an announcement, so that owners notice a restart and publish
again what they hold. Tensors never pass through here. It does not know which keys are its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from transport.directory.table import Announced, Candidate, CopyId, Table
from transport.settings import DirectorySettings
from transport.types import Lease, LeaseId, Located, Owner, Segment, SegmentKey, WorkerId


@dataclass(frozen=True, slots=True)
class ShardReply:
    """Reply to announce and publish: the table's verdict, and which life of the shard gave it."""

    shard_incarnation: int
    verdict: Announced


class Shard:
    """One table behind method calls, on this process's monotonic clock. Run as a Ray actor by
    `create_shards`; usable as a plain object in tests, which may bring a clock of their own."""

    def __init__(
        self, name: str, owner_timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.incarnation = time.time_ns()
        self._clock = clock
        self._table = Table(owner_timeout_s=owner_timeout_s, lease_prefix=f"{name}:{self.incarnation}:")

    def announce(self, owner: Owner) -> ShardReply:
        """See Table.announce."""
        return ShardReply(self.incarnation, self._table.announce(owner, self._clock()))

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> ShardReply:
        """See Table.publish."""
        return ShardReply(self.incarnation, self._table.publish(owner, segments, self._clock()))

    def lookup(self, keys: Sequence[SegmentKey], near: WorkerId | None) -> dict[SegmentKey, Located]:
        """See Table.lookup."""
        return self._table.lookup(keys, self._clock(), near=near)

    def lease(self, keys: Sequence[SegmentKey], holder: WorkerId, ttl_s: float) -> dict[SegmentKey, Lease]:
        """See Table.lease."""
        return self._table.lease(keys, self._clock(), holder=holder, ttl_s=ttl_s)

    def renew(self, leases: Sequence[LeaseId], ttl_s: float) -> dict[LeaseId, bool]:
        """See Table.renew."""
        return self._table.renew(leases, self._clock(), ttl_s=ttl_s)

    def release(self, leases: Sequence[LeaseId], read: bool = False) -> None:
        """See Table.release."""
        self._table.release(leases, self._clock(), read=read)

    def candidates(self, owner: Owner, nbytes: int) -> list[Candidate]:
        """See Table.candidates."""
        return self._table.candidates(owner, nbytes, self._clock())

    def evict_copies(self, owner: Owner, copies: Sequence[CopyId]) -> tuple[Segment, ...]:
        """See Table.evict_copies."""
        return self._table.evict_copies(owner, copies, self._clock())

    def retract(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See Table.retract."""
        self._table.retract(owner, segments, self._clock())

    def drop_owner(self, worker: WorkerId, incarnation: int) -> None:
        """See Table.drop_owner."""
        self._table.drop_owner(worker, incarnation, self._clock())

    def stats(self) -> dict[str, float]:
        """See Table.stats."""
        return self._table.stats(self._clock())


def create_shards(
    settings: DirectorySettings,
    *,
    prefix: str = "relay-directory",
    detached: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Start (or find) the shard actors of a running Ray cluster.

    Args:
        prefix: actor names are "<prefix>-<i>", in the current Ray namespace.
        detached: outlive the driver that starts them.
        options: further actor options, for example scheduling.

    Returns:
        name -> actor handle, as `DirectoryClient` takes it.
    """
    actor = ray.remote(Shard)
    shards: dict[str, Any] = {}
    for i in range(settings.shards):
        name = f"{prefix}-{i}"
        shards[name] = actor.options(
            name=name,
            get_if_exists=True,
            lifetime="detached" if detached else None,
            max_restarts=-1,
            # A retried publish could revive what its owner has evicted meanwhile; callers decide themselves.
            max_task_retries=0,
            num_cpus=0,
            **(options or {}),
        ).remote(name, settings.owner_timeout_s)
    return shards


def find_shards(settings: DirectorySettings, *, prefix: str = "relay-directory") -> dict[str, Any]:
    """Handles of shards that `create_shards` has started, by name.

    Raises:
        ValueError: (from Ray) no actor of that name in this namespace.
    """
    names = [f"{prefix}-{i}" for i in range(settings.shards)]
    return {name: ray.get_actor(name) for name in names}
