"""What lies between simulated workers: links, the directory's shards, and every worker's arena.

    Fabric      ports that carry one transfer at a time, first come first served
    Directory   the real `Table` of each shard behind a queue; keys find shards by the real ring
    Arenas      bytes that workers hold; room is made as owners make it, over all shards in one order

Nothing waits here: a call says when it will be done, and what it counted. Time is an argument.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from relay_cluster.simulation.settings import DirectoryCosts, LinkSettings, LinksSettings
from transport.directory.ring import Ring
from transport.directory.table import Table
from transport.settings import DirectorySettings
from transport.types import Lease, LeaseId, Located, Owner, Segment, SegmentKey, WorkerId

LinkKind = Literal["local", "same_node", "remote"]
_MOST_LOAD: Final = 0.99
"""Heartbeats may take so much of a shard; beyond it calls would never be served."""


@dataclass(slots=True)
class Port:
    """One end of a link, in one direction."""

    free_at: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Passage:
    """A transfer: over what, and when its first part and all of it have come; never, where it is given up at
    its deadline."""

    kind: LinkKind
    begin: float
    first: float
    end: float

    @property
    def lost(self) -> bool:
        return self.end == math.inf


class Fabric:
    """The links of a cluster.

    Args:
        links: of both kinds. parts: in which a segment travels. timeout_s: after which a pull is given up.
    """

    def __init__(self, links: LinksSettings, parts: int, timeout_s: float) -> None:
        self._links = links
        self._parts = parts
        self._timeout_s = timeout_s
        self.timed_out = 0
        self._ports: dict[tuple[str, str, str], Port] = {}
        self.nbytes: Counter[str] = Counter()

    def kind(self, source: Owner, to: Owner) -> LinkKind:
        """Over what two workers reach each other."""
        if source.worker == to.worker:
            return "local"
        return "same_node" if source.node == to.node else "remote"

    def pull(self, source: Owner, to: Owner, nbytes: int, now: float) -> Passage:
        """A transfer that is asked for now, and takes its turn at both ports."""
        kind = self.kind(source, to)
        if kind == "local":
            self.nbytes[kind] += nbytes
            return Passage(kind, now, now, now)
        link: LinkSettings = getattr(self._links, kind)
        out, in_ = self._port(kind, link, source, "out"), self._port(kind, link, to, "in")
        begin = max(now, out.free_at, in_.free_at)
        whole_s = nbytes / link.bytes_per_s
        # Bytes that come too late are sent all the same, up to the deadline.
        seconds = min(whole_s, max(0.0, now + self._timeout_s - begin - link.latency_s))
        self.nbytes[kind] += round(seconds * link.bytes_per_s)
        for port in (out, in_):
            if seconds > 0:
                port.free_at = begin + seconds
                port.busy_s += seconds
        if seconds < whole_s:
            self.timed_out += 1
            return Passage(kind, begin, math.inf, math.inf)
        arrives = begin + link.latency_s
        return Passage(kind, begin, arrives + seconds / self._parts, arrives + seconds)

    def utilisation(self, kind: LinkKind, seconds: float) -> tuple[float, float]:
        """(mean, highest) share of `seconds` for which ports of a kind that were used had something to
        carry."""
        busy = [port.busy_s for (k, _, _), port in self._ports.items() if k == kind]
        if not busy or seconds <= 0:
            return 0.0, 0.0
        return min(1.0, sum(busy) / len(busy) / seconds), min(1.0, max(busy) / seconds)

    def _port(self, kind: LinkKind, link: LinkSettings, owner: Owner, way: str) -> Port:
        end = str(owner.node if link.port == "node" else owner.worker)
        return self._ports.setdefault((kind, way, end), Port())


@dataclass(slots=True)
class _Shard:
    table: Table
    free_at: float = 0.0
    busy_s: float = 0.0
    calls: int = 0
    waited_s: float = 0.0


@dataclass(slots=True)
class DirectoryCounts:
    """Calls of all shards, by operation."""

    calls: Counter[str] = field(default_factory=Counter[str])
    hits: int = 0
    misses: int = 0


class Directory:
    """The shards as callers find them: calls go to all shards that are responsible for some of their keys at
    once, and each answers one call at a time. Heartbeats of all workers take their share of every shard.

    Args:
        workers: that announce themselves.
    """

    def __init__(self, settings: DirectorySettings, costs: DirectoryCosts, workers: int) -> None:
        names = [f"shard-{i}" for i in range(settings.shards)]
        self._ring = Ring(names)
        # Silence is not simulated: owners that nobody restarts would otherwise be dropped.
        self._shards = {n: _Shard(Table(owner_timeout_s=math.inf, lease_prefix=f"{n}-")) for n in names}
        self._costs = costs
        self._ttl_s = settings.lease_ttl_s
        beats_per_s = workers / settings.beat_s(workers)  # at every shard
        self.heartbeats_per_s = beats_per_s * settings.shards
        self.heartbeat_load = beats_per_s * costs.announce_s
        self.counts = DirectoryCounts()

    def announce(self, owner: Owner, now: float) -> None:
        """A worker comes up."""
        for shard in self._shards.values():
            shard.table.announce(owner, now)

    def lease(
        self, keys: Sequence[SegmentKey], holder: WorkerId, now: float
    ) -> tuple[dict[SegmentKey, Lease], float]:
        """(leases, when they are there). Keys that nobody holds take a second call, as in the store."""
        leases: dict[SegmentKey, Lease] = {}
        done = now
        for name, wanted in self._ring.split(keys).items():
            shard = self._shards[name]
            end = self._call(shard, "lease", len(wanted), now)
            leases |= shard.table.lease(wanted, end, holder=holder, ttl_s=self._ttl_s)
            done = max(done, end)
        missed = [key for key in keys if key not in leases]
        self.counts.hits += len(leases)
        self.counts.misses += len(missed)
        if missed:
            asked = done
            for name, wanted in self._ring.split(missed).items():
                done = max(done, self._call(self._shards[name], "lookup", len(wanted), asked))
        return leases, done

    def publish(self, owner: Owner, segment: Segment, now: float) -> float:
        """When the segment can be found."""
        shard = self._shards[self._ring.shard(segment.key)]
        end = self._call(shard, "publish", 1, now)
        shard.table.publish(owner, [segment], end)
        return end

    def release(self, leases: Iterable[Lease], now: float) -> None:
        """Nobody waits for it."""
        by_shard: dict[str, list[LeaseId]] = {}
        for lease in leases:
            by_shard.setdefault(self._ring.shard(lease.located.segment.key), []).append(lease.id)
        for name, ids in by_shard.items():
            end = self._call(self._shards[name], "release", len(ids), now)
            self._shards[name].table.release(ids, end, read=True)

    def evict(self, owner: Owner, nbytes: int, now: float) -> tuple[list[Segment], float]:
        """(what an owner gives up for `nbytes` of room, when it knows): in one order over all shards."""
        done = now
        found = []
        for shard in self._shards.values():
            done = max(done, self._call(shard, "evict", 1, now))
            found += [
                (not c.consumed, -c.idle_s, shard, c) for c in shard.table.candidates(owner, nbytes, now)
            ]
        gone: list[Segment] = []
        found.sort(key=lambda row: row[:2])
        for _, _, shard, candidate in found:
            if nbytes <= 0:
                break
            gone += shard.table.evict_copies(owner, [(candidate.key, candidate.variant)], now)
            nbytes -= candidate.nbytes
        return gone, done

    def utilisation(self, seconds: float) -> tuple[float, float]:
        """(mean, highest) share of `seconds` for which shards computed, heartbeats included."""
        if seconds <= 0:
            return 0.0, 0.0
        busy = [shard.busy_s / seconds + self.heartbeat_load for shard in self._shards.values()]
        return min(1.0, sum(busy) / len(busy)), min(1.0, max(busy))

    def mean_wait_s(self) -> float:
        """In a shard's queue, per call."""
        calls = sum(shard.calls for shard in self._shards.values())
        return sum(shard.waited_s for shard in self._shards.values()) / calls if calls else 0.0

    def _call(self, shard: _Shard, op: str, keys: int, now: float) -> float:
        """When a call that is made now is answered."""
        costs = self._costs
        service_s = costs.call_s + keys * costs.key_s
        # Heartbeats come in between all the time: what is left of the shard is slower by their share.
        taken_s = service_s / (1 - min(self.heartbeat_load, _MOST_LOAD))
        arrives = now + costs.latency_s / 2
        begin = max(arrives, shard.free_at)
        shard.free_at = begin + taken_s
        shard.busy_s += service_s
        shard.calls += 1
        shard.waited_s += begin - arrives
        self.counts.calls[op] += 1
        return shard.free_at + costs.latency_s / 2


class Arenas:
    """Who holds how many bytes."""

    def __init__(self, directory: Directory, limit_bytes: int) -> None:
        self._directory = directory
        self._limit = limit_bytes
        self.used: Counter[WorkerId] = Counter()
        self.highest = 0
        self.evictions = 0
        self.evicted_bytes = 0
        self.refused = 0

    def publish(self, owner: Owner, segment: Segment, now: float) -> float | None:
        """When others can find a segment that its worker has just copied out; None where there is no room
        even after eviction."""
        nbytes = segment.nbytes
        lacking = self.used[owner.worker] + nbytes - self._limit
        if lacking > 0:
            gone, now = self._directory.evict(owner, lacking, now)
            freed = sum(s.nbytes for s in gone)
            self.evictions += len(gone)
            self.evicted_bytes += freed
            self.used[owner.worker] -= freed
            if freed < lacking:
                self.refused += 1
                return None
        self.used[owner.worker] += nbytes
        self.highest = max(self.highest, self.used[owner.worker])
        return self._directory.publish(owner, segment, now)


def owners_of(leases: Iterable[Lease]) -> dict[SegmentKey, Located]:
    """What was leased, and where it is."""
    return {lease.located.segment.key: lease.located for lease in leases}
