"""Routes directory calls to shards: a ring, one batch per shard, one deadline per call.

A shard that does not answer costs hits, never correctness: with two replicas its keys are asked for at the
next shard; with one, lookups and leases omit its keys (and say which). This module does not know how a shard
decides, nor what segments contain. What an owner does is in `owning`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from transport.base import Answers
from transport.directory import wire, wire_open
from transport.directory.fleet import Calls, Fleet
from transport.directory.opening import News, Opened
from transport.directory.owning import OnEvicted, OwnerSide
from transport.errors import DirectoryUnavailable, RelayError
from transport.settings import DirectorySettings
from transport.types import Lease, LeaseId, Located, Owner, Segment, SegmentKey, WorkerId

T = TypeVar("T")

_KEYS_PER_CALL: Final = 256
"""Keys of one message to a shard; bounds its reply."""
_MOVES: Final = 2
"""Resizes that one call may meet."""
_LARGEST = ("owners", "fences", "epoch")
"""Statistics that every shard tells alike: not to be added up."""


class DirectoryClient:
    """KVDirectory over shard actors. Thread-safe.

    Args:
        shards: name -> Ray actor handle (see `shard.create_shards`), or names alone, which are looked up
            in the current Ray namespace. They may be of an earlier membership, as long as one of them is
            still there: a newer one is learnt from the first reply.
        settings: deadlines, heartbeat, replicas; the same at every client.
        calls: how to reach a shard; Ray unless a test says otherwise.
    """

    def __init__(
        self,
        shards: Mapping[str, Any] | Sequence[str],
        settings: DirectorySettings | None = None,
        *,
        calls: Calls | None = None,
    ) -> None:
        self.fleet = Fleet(shards, settings or DirectorySettings(), calls)
        self._settings = self.fleet.settings
        self._own = OwnerSide(self.fleet)

    # -- reading ---------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[SegmentKey], *, near: WorkerId | None = None) -> Answers[Located]:
        """See KVDirectory."""
        return self._read("lookup", keys, lambda part: (wire.pack_keys(part), near), wire.unpack_located)

    def lease(
        self, keys: Sequence[SegmentKey], *, holder: WorkerId, ttl_s: float, copies: int = 1
    ) -> Answers[Lease]:
        """See KVDirectory."""
        return self._read(
            "lease",
            keys,
            lambda part: (wire.pack_keys(part), holder, float(ttl_s), copies),
            lambda result, part: wire.unpack_shared(result, part, holder),
        )

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> dict[str, bool]:
        """See KVDirectory. Leases of a shard that does not answer count as lost."""
        out: dict[str, bool] = {str(x.id): False for x in leases}
        parts = _by_granter(leases)
        asked = self.fleet.ask({s: (ids, float(ttl_s)) for s, ids in parts.items()}, "renew")
        for name, answer in asked.items():
            held = wire.array(answer.result, len(parts[name]))
            out.update({str(i): wire.expect(x, bool) for i, x in zip(parts[name], held, strict=True)})
        return out

    def release(self, leases: Sequence[Lease], *, read: bool = False) -> None:
        """See KVDirectory. A shard that does not answer lets the leases expire by itself."""
        self.fleet.ask({s: (ids, read) for s, ids in _by_granter(leases).items()}, "release")

    def stats(self) -> dict[str, float]:
        """Totals over shards (with two replicas every copy counts twice), plus shards_up, epoch,
        memory_bytes_per_segment, and what this client has seen: call_failures, republished."""
        replies = self.fleet.ask(dict.fromkeys(self.fleet.shards, ()), "stats", even_down=True)
        out: dict[str, float] = {}
        for answer in replies.values():
            for name, value in wire.expect(answer.result, dict).items():
                # Every owner announces itself to every shard: do not count it once per shard.
                before = out.get(name, 0)
                out[name] = max(before, value) if name in _LARGEST else before + value
        out["memory_bytes_per_segment"] = out.get("memory_bytes", 0.0) / max(1.0, out.get("segments", 0.0))
        out["shards_up"] = float(len(replies))
        out["epoch"] = float(self.fleet.view.epoch)
        out["call_failures"] = float(self.fleet.failures)
        out["republished"] = float(self._own.republished)
        return out

    def calls(self) -> dict[str, Any]:
        """What this client has seen, without asking anybody: failures, republished, and latencies (see
        `transport.latency`) by operation."""
        return {
            "failures": self.fleet.failures,
            "republished": self._own.republished,
            "latencies": self.fleet.latencies.snapshot(),
        }

    # -- open segments ---------------------------------------------------------------------------------

    def advance(self, owner: Owner, update: Opened) -> str:
        """See KVDirectory. Raises WorkerLost."""
        return self._own.opens.advance(owner, update)

    def watch(
        self, key: SegmentKey, *, life: int, after: int, holder: WorkerId, ttl_s: float, wait_s: float
    ) -> News | None:
        """See KVDirectory. Asks the first replica that answers.

        Raises:
            DirectoryUnavailable: none did.
        """
        message = wire_open.pack_watch(key, life, after, holder, ttl_s, wait_s)
        limit_s = wait_s + self._settings.call_timeout_s
        for _ in range(self._settings.replicas + _MOVES):
            name = next((n for n in self.fleet.replicas(key) if not self.fleet.is_down(n)), None)
            if name is None:
                break
            asked = self.fleet.ask({name: message}, "watch", timeout_s=limit_s)
            if name in asked:
                return wire_open.unpack_news(asked[name].result, key, holder)
            self.fleet.refresh()
        raise DirectoryUnavailable("watch: no shard that knows the open segment answers.")

    def unwatch(self, key: SegmentKey, *, holder: WorkerId) -> None:
        """See KVDirectory."""
        for name in self.fleet.replicas(key):
            self.fleet.send(name, "unwatch", (wire.pack_keys([key]), holder))

    # -- owning ----------------------------------------------------------------------------------------

    def announce(self, owner: Owner) -> None:
        """See KVDirectory.

        Raises:
            DirectoryUnavailable: no shard answered.
            WorkerLost: a newer incarnation has taken this name.
        """
        self._own.announce(owner)

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See KVDirectory.

        Raises:
            DirectoryUnavailable: no shard took some segment (others may be in; publishing is idempotent).
            WorkerLost: a newer incarnation has taken this name.
        """
        self._own.publish(owner, segments)

    def evict(self, owner: Owner, *, nbytes: int) -> tuple[Segment, ...]:
        """See KVDirectory. In one order over all shards: each tells which of its candidates were read by all
        expected readers, and how long they were idle. What is leased at any shard stays; so does what a shard
        that cannot be reached may have leased."""
        return self._own.evict(owner, nbytes)

    def retract(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See KVDirectory. Sent even to a shard that is down, since it may only be slow, and not waited for:
        it comes behind the publish that it takes back, whose deadline has been paid already."""
        self._own.retract(owner, segments)

    def drop_owner(self, worker: WorkerId, incarnation: int) -> None:
        """See KVDirectory.

        Raises:
            DirectoryUnavailable: no shard answered. (One that missed it drops the owner for its silence.)
        """
        self._own.drop(worker, incarnation)

    def start_owner(
        self,
        owner: Owner,
        segments_source: Callable[[], Sequence[Segment]],
        on_evicted: OnEvicted | None = None,
    ) -> None:
        """Announce now and then every `heartbeat_s`; publish what `segments_source()` tells again to a shard
        that has restarted, or has become responsible; evict what operators wish, and hand it to `on_evicted`,
        which frees the blocks. Both are called from a background thread.

        Raises:
            DirectoryUnavailable: no shard answered the first announcement.
            WorkerLost: a newer incarnation has taken this name.
            RuntimeError: called twice.
        """
        self._own.start(owner, segments_source, on_evicted)

    @property
    def fenced(self) -> RelayError | None:
        """Why the heartbeat has stopped for good: this worker was replaced. None while it is live."""
        return self._own.fenced

    def close(self) -> None:
        """Stop the heartbeat. Idempotent. The owner is dropped by its silence, or by `drop_owner`."""
        self._own.close()

    # -- inside ----------------------------------------------------------------------------------------

    def _read(
        self,
        method: str,
        keys: Sequence[SegmentKey],
        pack: Callable[[list[SegmentKey]], Sequence[Any]],
        unpack: Callable[[Any, list[SegmentKey]], Mapping[SegmentKey, T]],
    ) -> Answers[T]:
        deadline = time.monotonic() + self._settings.call_timeout_s
        wanted = list(dict.fromkeys(keys))
        found: dict[SegmentKey, T] = {}
        answered: set[SegmentKey] = set()
        for at in range(0, len(wanted), _KEYS_PER_CALL):
            pending = {key: set[str]() for key in wanted[at : at + _KEYS_PER_CALL]}
            for _ in range(self._settings.replicas + _MOVES):
                parts, more = self._next_shards(pending)
                left_s = deadline - time.monotonic()
                if not parts or left_s <= 0:
                    break
                # A frozen shard must leave time for the next replica.
                asked = self.fleet.ask(
                    {s: pack(part) for s, part in parts.items()},
                    method,
                    timeout_s=left_s / 2 if more else left_s,
                )
                for shard, part in parts.items():
                    if shard in asked:
                        answered.update(part)
                        found.update(unpack(asked[shard].result, part))
                    if shard not in asked.moved:
                        for key in part:
                            pending[key].add(shard)
                if len(asked) + len(asked.moved) < len(parts):
                    self.fleet.refresh()  # a shard that failed may have been removed
                pending = {key: tried for key, tried in pending.items() if key not in found}
        return Answers[T](found, (k for k in wanted if k not in answered))

    def _next_shards(
        self, pending: Mapping[SegmentKey, set[str]]
    ) -> tuple[dict[str, list[SegmentKey]], bool]:
        """Where to ask for each key now: its first replica that answers and was not asked for it. A miss is
        believed only when every replica says so. Also whether there are further ones for some key."""
        parts: dict[str, list[SegmentKey]] = {}
        more = False
        for key, tried in pending.items():
            left = [s for s in self.fleet.replicas(key) if s not in tried and not self.fleet.is_down(s)]
            if left:
                parts.setdefault(left[0], []).append(key)
            more = more or len(left) > 1
        return parts, more


def _by_granter(leases: Sequence[Lease]) -> dict[str, list[LeaseId]]:
    """Lease ids by the shard that granted them, which is the only one that knows them."""
    out: dict[str, list[LeaseId]] = {}
    for lease in leases:
        out.setdefault(lease.id.rsplit(":", 2)[0], []).append(lease.id)
    return out
