"""`relay bench directory`: what the directory's shards do per second, with many segments in them.

Real shard actors and real clients in processes of their own, over Ray, as in a cluster; only the segments'
blocks do not exist, since the directory never sees them. Every phase is one kind of call: all clients start
it together and repeat it for the same time, so that keys_per_s is what the shards sustain.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import ray

from relay_cluster.bench.common import Document, progress, quantile
from relay_cluster.bench.directory_rows import DirectoryRow
from transport.directory import wire
from transport.directory.client import DirectoryClient
from transport.directory.operate import DirectoryOperator
from transport.directory.shard import create_shards, kill_shards
from transport.errors import RelayError
from transport.settings import DirectorySettings, TransportSettings
from transport.tokens import PullKey
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    Lease,
    Located,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

_PREFIX = "relay-directory-bench"
_SPACE = blake2b(b"a model, its layout and a tenant", digest_size=16).hexdigest()
_PHASE_TIMEOUT_S = 300.0
_READERS = ("lookup", "lookup_miss", "lease", "renew", "release")


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySettingsOfBench:
    """What is measured.

    Attributes:
        segments: copies in the directory, spread over the clients as owners.
        blocks: block references of one segment.
        clients: processes that call at once.
        shards, replicas: of the directory.
        batches: keys per call.
        seconds: how long each reading phase runs.
    """

    segments: int
    blocks: int
    clients: int
    shards: int
    replicas: int
    batches: tuple[int, ...]
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Measured:
    """What one client did in a phase: seconds of every call, keys, and the phase's own length."""

    calls_s: tuple[float, ...]
    keys: int
    took_s: float


def _checksums(digest: bytes, block: int) -> tuple[int, ...]:
    """One for every part of a block, as many as workers make by default; of the size of real ones."""
    number = int.from_bytes(digest[:8], "big")
    return tuple((number + block * 31 + part) % (1 << 64) for part in range(TransportSettings().layer_groups))


def bench_segment(client: int, index: int, blocks: int) -> Segment:
    """A segment as a worker publishes it: 64 tokens per block, identity by digest."""
    digest = blake2b(f"{client}/{index}".encode(), digest_size=16).digest()
    refs = tuple(
        BlockRef(BlockId(index * blocks + n), index + 1, 786_432, _checksums(digest, n))
        for n in range(blocks)
    )
    return Segment(
        SegmentKey(_SPACE, digest),
        num_tokens=64 * blocks - 1,
        start=index % 4096,
        blocks=refs,
        variant=blake2b(digest, digest_size=8).hexdigest(),
        layout="6f1d2a",
        producer=f"agent@b{client}",
    )


class BenchClient:
    """One process: an owner of its share of the segments, and a reader of everybody's."""

    def __init__(self, index: int, names: Sequence[str], settings: DirectorySettings, seed: int) -> None:
        self._index = index
        self._client = DirectoryClient(list(names), settings)
        self._chance = random.Random(f"{seed}/{index}")
        # As long as a NIXL agent's: replies carry it once per owner.
        addresses = {"nixl": bytes(452), "tcp": b"127.0.0.1:40000"}
        key = PullKey.random()
        self._owner = Owner(WorkerId(f"b{index}"), Incarnation(1), NodeId("node"), addresses, key)
        self._blocks = 1
        self._all: list[SegmentKey] = []

    def ready(self) -> int:
        """Announce this client as an owner; returns its process id."""
        self._client.announce(self._owner)
        return os.getpid()

    def publish(self, count: int, blocks: int, batch: int) -> Measured:
        """Enter this client's share."""
        self._blocks = blocks
        made = [bench_segment(self._index, i, blocks) for i in range(count)]
        parts = [made[at : at + batch] for at in range(0, count, batch)]
        return self._timed(parts, lambda part: self._client.publish(self._owner, part), None)

    def know(self, shares: Mapping[int, int]) -> None:
        """Learn the keys of all clients (index -> how many)."""
        self._all = [bench_segment(c, i, 1).key for c, n in shares.items() for i in range(n)]

    def read(self, op: str, batch: int, seconds: float) -> Measured:
        """Repeat one kind of call on random keys for so long."""
        near = self._owner.worker
        client = self._client
        if op == "lookup":
            return self._timed(
                self._samples(batch), lambda keys: _full(client.lookup(keys, near=near), keys), seconds
            )
        if op == "lookup_miss":
            absent = ([_absent(k) for k in keys] for keys in self._samples(batch))
            return self._timed(absent, lambda keys: client.lookup(keys, near=near), seconds)
        if op == "lease":
            kept: list[Lease] = []
            done = self._timed(
                self._samples(batch),
                lambda keys: kept.extend(client.lease(keys, holder=near, ttl_s=60.0).values()),
                seconds,
                limit=8192 // batch,
            )
            client.release(kept)
            return done
        return self._with_leases(op, batch, seconds)

    def _with_leases(self, op: str, batch: int, seconds: float) -> Measured:
        """Renew the same leases over and over, or release ever new ones, whose granting is not timed."""
        near = self._owner.worker

        def leased() -> list[Lease]:
            keys = self._chance.sample(self._all, batch)
            return list(self._client.lease(keys, holder=near, ttl_s=60.0).values())

        if op == "renew":
            held = leased()
            done = self._timed(_forever(held), lambda x: self._client.renew(x, ttl_s=60.0), seconds)
            self._client.release(held)
            return done
        return self._timed((leased() for _ in _forever(0)), self._client.release, seconds)

    def evict(self, batch: int, calls: int) -> Measured:
        """Give up this client's oldest segments, `batch` at a time."""
        nbytes = batch * self._blocks * 786_432
        return self._timed(
            [[None] * batch] * calls, lambda _: _full(self._client.evict(self._owner, nbytes=nbytes), _), None
        )

    def _samples(self, batch: int) -> Iterator[list[SegmentKey]]:
        while True:
            yield self._chance.sample(self._all, batch)

    @staticmethod
    def _timed(
        parts: Any, call: Callable[[Any], object], seconds: float | None, *, limit: int | None = None
    ) -> Measured:
        """Call with every part until `seconds` have passed; only the calls are timed, one by one."""
        took: list[float] = []
        keys = 0
        begin = time.perf_counter()
        for part in parts:
            at = time.perf_counter()
            call(part)
            took.append(time.perf_counter() - at)
            keys += len(part)
            if seconds is not None and time.perf_counter() - begin > seconds:
                break
            if limit is not None and len(took) >= limit:
                break
        return Measured(tuple(took), keys, time.perf_counter() - begin)


def _forever(value: Any) -> Iterator[Any]:
    while True:
        yield value


def _absent(key: SegmentKey) -> SegmentKey:
    return SegmentKey(key.space, bytes(reversed(key.digest)))


def _full(found: Any, keys: Sequence[Any]) -> None:
    """Hold a benchmark to what it claims to measure. Raises RelayError."""
    if len(found) < len(keys):
        raise RelayError(f"the directory gave {len(found)} of {len(keys)} segments that are in it.")


# --- the benchmark ------------------------------------------------------------------------------------------


def run_directory(settings: DirectorySettingsOfBench) -> Document:
    """Measure every kind of call and return the document.

    Raises:
        RelayError: Ray or a shard failed, or the directory lost a segment.
    """
    directory = DirectorySettings(
        shards=settings.shards,
        replicas=settings.replicas,
        # Owners here announce themselves only once: they must not be dropped while a phase runs.
        owner_timeout_s=3600.0,
        call_timeout_s=60.0,
        max_lease_s=600.0,
        max_leases=1 << 20,
    )
    rows: list[DirectoryRow] = []
    steps = len(settings.batches) * (len(_READERS) + 1) + 2
    with _ray(settings.clients), progress("directory", steps) as advance:
        try:
            shards = create_shards(directory, prefix=_PREFIX)  # they live as long as these handles
            bench = _Bench(settings, directory, list(shards))
            rows.append(bench.publish())
            advance("publish")
            for batch in settings.batches:
                for op in _READERS:
                    rows.append(bench.read(op, batch))
                    advance(f"{op} x {batch}")
            rows.append(bench.list_all())
            advance("list")
            for batch in settings.batches:
                rows.append(bench.evict(batch))
                advance(f"evict x {batch}")
        finally:
            kill_shards(_PREFIX)
    about = {**dataclasses.asdict(settings), "model": "none", "data": ["segments without bytes"]}
    return Document("directory", about, rows)


class _Bench:
    """The clients, and what the phases share."""

    def __init__(
        self, settings: DirectorySettingsOfBench, directory: DirectorySettings, names: Sequence[str]
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._watch = DirectoryClient(list(names), directory)
        self._operator = DirectoryOperator.of(list(names), timeout_s=60.0)
        actor: Any = ray.remote(num_cpus=0)(BenchClient)
        each, rest = divmod(settings.segments, settings.clients)
        self._shares = {c: each + (c < rest) for c in range(settings.clients)}
        self._clients = [actor.remote(c, names, directory, settings.seed) for c in self._shares]
        ray.get([c.ready.remote() for c in self._clients], timeout=_PHASE_TIMEOUT_S)

    def publish(self) -> DirectoryRow:
        batch = 64
        calls = [
            client.publish.remote(self._shares[c], self._settings.blocks, batch)
            for c, client in enumerate(self._clients)
        ]
        row = self._row("publish", batch, ray.get(calls, timeout=_PHASE_TIMEOUT_S))
        ray.get([c.know.remote(self._shares) for c in self._clients], timeout=_PHASE_TIMEOUT_S)
        return row

    def read(self, op: str, batch: int) -> DirectoryRow:
        seconds = self._settings.seconds
        calls = [c.read.remote(op, batch, seconds) for c in self._clients]
        return self._row(op, batch, ray.get(calls, timeout=_PHASE_TIMEOUT_S))

    def evict(self, batch: int) -> DirectoryRow:
        count = max(1, min(50, min(self._shares.values()) // (4 * batch * len(self._settings.batches))))
        calls = [c.evict.remote(batch, count) for c in self._clients]
        return self._row("evict", batch, ray.get(calls, timeout=_PHASE_TIMEOUT_S))

    def list_all(self) -> DirectoryRow:
        """An operator's whole listing, page by page, as `relay ls` makes it."""
        begin = time.perf_counter()
        rows = sum(1 for _ in self._operator.rows())
        took = time.perf_counter() - begin
        return self._row("list", rows, [Measured((took,), rows, took)])

    def _row(self, op: str, batch: int, done: Sequence[Measured]) -> DirectoryRow:
        stats = self._watch.stats()
        calls_s = [s for m in done for s in m.calls_s]
        keys = sum(m.keys for m in done)
        # Clients overlap for nearly all of their time; the longest one stands for the phase.
        seconds = max(m.took_s for m in done)
        if op == "release":  # between the calls, leases are taken
            seconds = max(sum(m.calls_s) for m in done)
        return DirectoryRow(
            op=op,
            batch=batch,
            clients=1 if op == "list" else self._settings.clients,
            shards=self._settings.shards,
            replicas=self._settings.replicas,
            segments=int(stats["segments"]),
            calls=len(calls_s),
            keys=keys,
            keys_per_s=keys / seconds,
            p50_ms=1e3 * quantile(calls_s, 0.5),
            p99_ms=1e3 * quantile(calls_s, 0.99),
            bytes_per_segment=stats["memory_bytes_per_segment"],
            message_bytes=self._message_bytes(op, batch),
        )

    def _message_bytes(self, op: str, batch: int) -> int | None:
        if op not in ("lookup", "publish"):
            return None
        made = [bench_segment(0, i, self._settings.blocks) for i in range(batch)]
        owner = Owner(WorkerId("b0"), Incarnation(1), NodeId("node"), {"nixl": bytes(452)})
        if op == "publish":
            return len(wire.pack([wire.OWNER.pack(owner), wire.pack_segments(made)]))
        keys = [s.key for s in made]
        reply = wire.pack_located({s.key: Located(s, owner) for s in made}, keys)
        return len(wire.pack(wire.pack_keys(keys))) + len(wire.pack(reply))


@contextmanager
def _ray(clients: int) -> Iterator[None]:
    """A Ray of our own, unless this process has one."""
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        num_cpus=max(2, clients),
        include_dashboard=False,
        namespace="relay-bench",
        logging_level=logging.ERROR,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        yield
    finally:
        ray.shutdown()
