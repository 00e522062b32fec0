"""Routes directory calls to shards: a ring, one batch per shard, one deadline per call.

A shard that does not answer costs hits, never correctness: lookups and leases omit its keys (and say which),
and it is left alone for a moment, so that not every request pays the deadline again. A background thread
announces the owner of this process and publishes again to shards that have restarted. This module does not
know how a shard decides, nor what segments contain.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import ray
import ray.exceptions

from transport.base import Answers
from transport.directory.local import refuse_fenced
from transport.directory.ring import Ring
from transport.directory.shard import ShardReply
from transport.directory.table import Candidate, CopyId
from transport.errors import DirectoryUnavailable, RelayError
from transport.settings import DirectorySettings
from transport.types import Lease, LeaseId, Located, Owner, Segment, SegmentKey, WorkerId

logger = logging.getLogger(__name__)
T = TypeVar("T")

_JOIN_TIMEOUT_S: Final = 5.0
_EVICTED_MEMORY: Final = 65_536
_PUBLISH_BATCH: Final = 512
"""Segments of one publish call; bounds the message when an owner publishes everything again."""


class ShardFailed(Exception):
    """A shard did not answer in time, or is not there."""


class Calls(Protocol):
    """How to reach shards. Ray in production; tests pass plain objects."""

    def send(self, shard: Any, method: str, args: tuple[Any, ...]) -> Any:
        """Start a call, and return something for `wait`."""
        ...

    def wait(self, pending: Any, timeout_s: float) -> Any:
        """The call's result. Raises ShardFailed."""
        ...


class RayCalls:
    """Calls over Ray actor handles."""

    def send(self, shard: Any, method: str, args: tuple[Any, ...]) -> Any:
        """Submit without waiting. Raises ShardFailed."""
        try:
            return getattr(shard, method).remote(*args)
        except ray.exceptions.RayError as fault:
            raise ShardFailed(str(fault)) from fault

    def wait(self, pending: Any, timeout_s: float) -> Any:
        """Wait for the reply. Raises ShardFailed."""
        try:
            return ray.get(pending, timeout=max(timeout_s, 0.0))
        except ray.exceptions.GetTimeoutError as fault:
            raise ShardFailed("no reply within the deadline") from fault
        except ray.exceptions.RayTaskError as fault:
            raise RelayError(f"a directory shard failed inside a call, which is a bug: {fault}") from fault
        except ray.exceptions.RayError as fault:
            raise ShardFailed(type(fault).__name__) from fault


class DirectoryClient:
    """KVDirectory over shard actors. Thread-safe.

    Args:
        shards: name -> Ray actor handle (see `shard.create_shards`), or names alone, which are looked up
            in the current Ray namespace. Every client must be given the same names.
        settings: deadlines and heartbeat.
        calls: how to reach a shard; Ray unless a test says otherwise.
    """

    def __init__(
        self,
        shards: Mapping[str, Any] | Sequence[str],
        settings: DirectorySettings | None = None,
        *,
        calls: Calls | None = None,
    ) -> None:
        handles = shards if isinstance(shards, Mapping) else {name: ray.get_actor(name) for name in shards}
        self._shards: dict[str, Any] = dict(handles)
        self._ring = Ring(tuple(sorted(self._shards)))
        self._settings = settings or DirectorySettings()
        self._calls: Calls = calls or RayCalls()
        self._lock = threading.Lock()
        self._down_until: dict[str, float] = {}
        self._failures = 0
        self._republished = 0
        # Guards publishing again against evicting: what was evicted meanwhile must not come back.
        self._owner_lock = threading.RLock()
        self._epochs: dict[str, int] = {}  # shard -> its incarnation that holds all our segments
        self._evicted: OrderedDict[CopyId, None] = OrderedDict()
        self._heart: threading.Thread | None = None
        self._stop = threading.Event()
        self._fenced: RelayError | None = None

    # -- reading ---------------------------------------------------------------------------------------

    def lookup(self, keys: Sequence[SegmentKey], *, near: WorkerId | None = None) -> Answers[Located]:
        """See KVDirectory."""
        parts = self._ring.split(keys)
        return _merge(parts, self._ask({s: (k, near) for s, k in parts.items()}, "lookup"))

    def lease(self, keys: Sequence[SegmentKey], *, holder: WorkerId, ttl_s: float) -> Answers[Lease]:
        """See KVDirectory."""
        parts = self._ring.split(keys)
        return _merge(parts, self._ask({s: (k, holder, ttl_s) for s, k in parts.items()}, "lease"))

    def renew(self, leases: Sequence[Lease], *, ttl_s: float) -> dict[str, bool]:
        """See KVDirectory. Leases of a shard that does not answer count as lost."""
        out: dict[str, bool] = {str(x.id): False for x in leases}
        parts = {s: (ids, ttl_s) for s, ids in self._by_shard(leases).items()}
        for held in self._ask(parts, "renew").values():
            out.update({str(k): v for k, v in held.items()})
        return out

    def release(self, leases: Sequence[Lease], *, read: bool = False) -> None:
        """See KVDirectory. A shard that does not answer lets the leases expire by itself."""
        self._ask({s: (ids, read) for s, ids in self._by_shard(leases).items()}, "release")

    def stats(self) -> dict[str, float]:
        """Totals over shards, plus what this client has seen: call_failures, republished."""
        replies = self._ask(dict.fromkeys(self._shards, ()), "stats", even_down=True)
        out: dict[str, float] = {}
        for reply in replies.values():
            for name, value in reply.items():
                # Every owner announces itself to every shard: do not count it once per shard.
                out[name] = max(out.get(name, 0), value) if name == "owners" else out.get(name, 0) + value
        out["shards_up"] = float(len(replies))
        out["call_failures"] = float(self._failures)
        out["republished"] = float(self._republished)
        return out

    # -- owning ----------------------------------------------------------------------------------------

    def announce(self, owner: Owner) -> None:
        """See KVDirectory.

        Raises:
            DirectoryUnavailable: no shard answered.
            WorkerLost: a newer incarnation has taken this name.
        """
        replies = self._announce(owner)
        if not replies:
            raise self._unavailable("announce", self._shards)

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See KVDirectory.

        Raises:
            DirectoryUnavailable: a shard did not take its part (the others did; publishing is idempotent).
            WorkerLost: a newer incarnation has taken this name.
        """
        with self._owner_lock:
            for segment in segments:
                self._evicted.pop((segment.key, segment.variant), None)
        failed: set[str] = set()
        for at in range(0, len(segments), _PUBLISH_BATCH):
            failed |= self._publish(owner, segments[at : at + _PUBLISH_BATCH])
        if failed:
            raise self._unavailable("publish", failed)

    def evict(self, owner: Owner, *, nbytes: int) -> tuple[Segment, ...]:
        """See KVDirectory. In one order over all shards: each tells which of its candidates were read by all
        expected readers, and how long they were idle."""
        with self._owner_lock:
            offers = self._ask(dict.fromkeys(self._shards, (owner, nbytes)), "candidates")
            ranked = sorted(
                ((c, s) for s, cs in offers.items() for c in cs),
                key=lambda pair: (not pair[0].consumed, -pair[0].idle_s),
            )
            out: list[Segment] = []
            covered = 0
            while covered < nbytes and ranked:
                parts, ranked = _take(ranked, nbytes - covered)
                removed = self._evict_parts(owner, parts)
                out.extend(removed)
                # A candidate may have been leased meanwhile: go on with the next ones.
                covered += sum(s.nbytes for s in removed)
            self._remember_evicted(out)
            return tuple(out)

    def retract(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See KVDirectory. Sent even to a shard that is down, since it may only be slow, and not waited for:
        it comes behind the publish that it takes back, whose deadline has been paid already."""
        with self._owner_lock:
            self._remember_evicted(segments)
            for name, part in self._segments_by_shard(segments).items():
                try:
                    self._calls.send(self._shards[name], "retract", (owner, part))
                except ShardFailed as fault:
                    self._mark_down(name, "retract", fault)

    def drop_owner(self, worker: WorkerId, incarnation: int) -> None:
        """See KVDirectory.

        Raises:
            DirectoryUnavailable: no shard answered. (One that missed it drops the owner for its silence.)
        """
        if not self._ask(dict.fromkeys(self._shards, (worker, incarnation)), "drop_owner", even_down=True):
            raise self._unavailable("drop_owner", self._shards)

    def start_owner(self, owner: Owner, segments_source: Callable[[], Sequence[Segment]]) -> None:
        """Announce now and then every `heartbeat_s`, and publish all of `segments_source()` again to a shard
        that has restarted. `segments_source` is called from a background thread.

        Raises:
            DirectoryUnavailable: no shard answered the first announcement.
            WorkerLost: a newer incarnation has taken this name.
            RuntimeError: called twice.
        """
        if self._heart is not None:
            raise RuntimeError("start_owner() was called twice; a client speaks for one owner")
        if not self._beat(owner, segments_source):
            raise self._unavailable("announce", self._shards)
        self._heart = threading.Thread(
            target=self._run, args=(owner, segments_source), name="relay-directory-heartbeat", daemon=True
        )
        self._heart.start()

    @property
    def fenced(self) -> RelayError | None:
        """Why the heartbeat has stopped for good: this worker was replaced. None while it is live."""
        return self._fenced

    def close(self) -> None:
        """Stop the heartbeat. Idempotent. The owner is dropped by its silence, or by `drop_owner`."""
        self._stop.set()
        if self._heart is not None and self._heart is not threading.current_thread():
            self._heart.join(_JOIN_TIMEOUT_S + self._settings.call_timeout_s)

    # -- heartbeat -------------------------------------------------------------------------------------

    def _run(self, owner: Owner, source: Callable[[], Sequence[Segment]]) -> None:
        while not self._stop.wait(self._settings.heartbeat_s):
            try:
                self._beat(owner, source)
            except RelayError as fault:
                if isinstance(fault, DirectoryUnavailable):
                    continue
                self._fenced = fault
                logger.error("heartbeat of %s stops: %s", owner.worker, fault)  # noqa: TRY400 - no trace
                return
            except Exception:  # a fault of the source must not silence this worker for good
                logger.exception("heartbeat of %s failed; trying again", owner.worker)

    def _beat(self, owner: Owner, source: Callable[[], Sequence[Segment]]) -> bool:
        replies = self._announce(owner)
        stale = {
            name
            for name, reply in replies.items()
            if not reply.verdict.known or self._epochs.get(name) != reply.shard_incarnation
        }
        if stale:
            self._republish(owner, source, stale, replies)
        return bool(replies)

    def _republish(
        self,
        owner: Owner,
        source: Callable[[], Sequence[Segment]],
        stale: set[str],
        replies: Mapping[str, ShardReply],
    ) -> None:
        with self._owner_lock:
            held = [
                s
                for s in source()
                if self._ring.shard(s.key) in stale and (s.key, s.variant) not in self._evicted
            ]
            failed: set[str] = set()
            for at in range(0, len(held), _PUBLISH_BATCH):
                failed |= self._publish(owner, held[at : at + _PUBLISH_BATCH])
            for name in stale - failed:
                self._epochs[name] = replies[name].shard_incarnation
            self._republished += len(held)
        if held:
            logger.info("published %d segments again to %s", len(held), ", ".join(sorted(stale)))

    def _announce(self, owner: Owner) -> dict[str, ShardReply]:
        replies = self._ask(dict.fromkeys(self._shards, (owner,)), "announce", even_down=True)
        for reply in replies.values():
            refuse_fenced(owner, reply.verdict)
        return replies

    # -- calls -----------------------------------------------------------------------------------------

    def _publish(self, owner: Owner, segments: Sequence[Segment]) -> set[str]:
        parts = self._segments_by_shard(segments)
        replies = self._ask({s: (owner, part) for s, part in parts.items()}, "publish", even_down=True)
        for name, reply in replies.items():
            refuse_fenced(owner, reply.verdict)
            if not reply.verdict.known:
                self._epochs.pop(name, None)  # the shard knew nothing of us: the next beat sends the rest
        return set(parts) - set(replies)

    def _evict_parts(self, owner: Owner, parts: Mapping[str, list[CopyId]]) -> list[Segment]:
        replies = self._ask({s: (owner, copies) for s, copies in parts.items()}, "evict_copies")
        for name in set(parts) - set(replies):
            # It may have evicted without our hearing of it: publish again, so that it knows what we hold.
            self._epochs.pop(name, None)
        return [segment for removed in replies.values() for segment in removed]

    def _remember_evicted(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            self._evicted[(segment.key, segment.variant)] = None
        while len(self._evicted) > _EVICTED_MEMORY:
            self._evicted.popitem(last=False)

    def _segments_by_shard(self, segments: Sequence[Segment]) -> dict[str, list[Segment]]:
        out: dict[str, list[Segment]] = {}
        for segment in segments:
            out.setdefault(self._ring.shard(segment.key), []).append(segment)
        return out

    def _by_shard(self, leases: Sequence[Lease]) -> dict[str, list[LeaseId]]:
        out: dict[str, list[LeaseId]] = {}
        for lease in leases:
            out.setdefault(self._ring.shard(lease.located.segment.key), []).append(lease.id)
        return out

    def _ask(
        self, parts: Mapping[str, tuple[Any, ...]], method: str, *, even_down: bool = False
    ) -> dict[str, Any]:
        """Call `method` on several shards at once; those that fail are missing from the reply."""
        deadline = time.monotonic() + self._settings.call_timeout_s
        pending: dict[str, Any] = {}
        replies: dict[str, Any] = {}
        for name, args in parts.items():
            if even_down or not self._is_down(name):
                try:
                    pending[name] = self._calls.send(self._shards[name], method, args)
                except ShardFailed as fault:
                    self._mark_down(name, method, fault)
        for name, call in pending.items():
            try:
                replies[name] = self._calls.wait(call, deadline - time.monotonic())
            except ShardFailed as fault:
                self._mark_down(name, method, fault)
            else:
                self._mark_up(name)
        return replies

    def _is_down(self, name: str) -> bool:
        with self._lock:
            return self._down_until.get(name, 0.0) > time.monotonic()

    def _mark_down(self, name: str, method: str, fault: ShardFailed) -> None:
        with self._lock:
            self._failures += 1
            first = name not in self._down_until
            self._down_until[name] = time.monotonic() + self._settings.heartbeat_s
        log = logger.warning if first else logger.debug
        log("directory shard %s did not answer %s (%s); its keys count as misses", name, method, fault)

    def _mark_up(self, name: str) -> None:
        with self._lock:
            if self._down_until.pop(name, None) is not None:
                logger.info("directory shard %s answers again", name)

    def _unavailable(self, method: str, shards: Any) -> DirectoryUnavailable:
        return DirectoryUnavailable(
            f"{method}: no answer from directory shard(s) {', '.join(sorted(shards))} within "
            f"{self._settings.call_timeout_s:g} s. Requests go on without hits; see `relay doctor`."
        )


def _merge(
    parts: Mapping[str, Sequence[SegmentKey]], replies: Mapping[str, Mapping[SegmentKey, T]]
) -> Answers[T]:
    """One answer from those of the shards; the keys of a shard without a reply are `unanswered`."""
    out = Answers[T](unanswered=(k for s, keys in parts.items() if s not in replies for k in keys))
    for found in replies.values():
        out.update(found)
    return out


def _take(
    ranked: Sequence[tuple[Candidate, str]], nbytes: int
) -> tuple[dict[str, list[CopyId]], list[tuple[Candidate, str]]]:
    """The first candidates that cover `nbytes`, by shard, and the rest."""
    parts: dict[str, list[CopyId]] = {}
    covered = 0
    for at, (candidate, shard) in enumerate(ranked):
        if covered >= nbytes:
            return parts, list(ranked[at:])
        parts.setdefault(shard, []).append((candidate.key, candidate.variant))
        covered += candidate.nbytes
    return parts, []
