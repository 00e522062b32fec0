"""Stores without a model: real arenas, transports, directory table and spill; blocks of a toy layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transport.arena import Arena
from transport.auto import AutoTransport, make_transport
from transport.base import KVDirectory
from transport.directory.local import LocalDirectory
from transport.settings import SpillSettings, TransportSettings
from transport.types import Incarnation, NodeId, Owner, Segment, SegmentKey, WorkerId
from workers.layout import BlockViews, KVLayout
from workers.store import Acquired, SegmentStore

LAYOUT = KVLayout(
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    hidden_size=16,
    dtype="float32",
    block_tokens=16,
    checkpoint_layer=0,
)
HEADER_NBYTES = 128
"""More than an arena adds to a block."""


def key(name: str) -> SegmentKey:
    return SegmentKey("space", name.encode())


def names(keys: Sequence[Segment] | Any) -> list[str]:
    """Names of segments or keys, sorted."""
    return sorted((k.key if isinstance(k, Segment) else k).digest.decode() for k in keys)


@dataclass
class Desk:
    """One worker's store and its parts."""

    store: SegmentStore
    arena: Arena
    transport: AutoTransport
    owner: Owner
    block_tokens: int

    def put(self, name: str, blocks: int = 1, value: float = 1.0, **options: Any) -> Segment:
        """Publish a segment whose every number is `value`."""

        def fill(views: Sequence[BlockViews]) -> None:
            for v in views:
                v.kv.body.fill_(value)
                v.checkpoint.fill_(value)
                v.mass.fill_(value)

        tokens = self.block_tokens * blocks
        return self.store.publish(key(name), fill, start=0, num_tokens=tokens, producer="t", **options)

    def get(self, *wanted: str) -> Acquired:
        return self.store.acquire({key(n): 1 for n in wanted})

    def read(self, *wanted: str) -> dict[str, set[float]]:
        """Get, look at every number, and give back."""
        got = self.get(*wanted)
        try:
            return {name: numbers(got, name) for name in wanted if key(name) in got.pulled}
        finally:
            self.store.release(got)

    def misses(self, *wanted: str) -> dict[str, str]:
        """Get and give back at once: what could not be had, and why."""
        got = self.get(*wanted)
        self.store.release(got)
        return reasons(got)

    def stats(self) -> dict[str, Any]:
        return self.store.stats()

    def flush(self) -> None:
        assert self.store.holding._spilling.flush(10.0)


def numbers(got: Acquired, name: str) -> set[float]:
    """Every number of a segment's bytes."""
    pulled = got.pulled[key(name)]
    fields = [part for b in pulled.blocks for part in (b.kv.body, b.checkpoint, b.mass)]
    return {float(x) for part in fields for x in part.unique()}


def reasons(got: Acquired) -> dict[str, str]:
    assert not got.misses.keys() & got.hits.keys()
    return {k.digest.decode(): str(m.reason) for k, m in got.misses.items()}


class Cluster:
    """Some workers around one directory, in this process.

    Args:
        backend: how they pull.
        disk_dir: folder of spilled files.
        layout: of the blocks.
    """

    def __init__(
        self, backend: str = "inprocess", disk_dir: Path | None = None, layout: KVLayout = LAYOUT
    ) -> None:
        self.layout = layout
        self.directory: KVDirectory = LocalDirectory()
        self.desks: dict[WorkerId, Desk] = {}
        self._backend = backend
        self._disk_dir = disk_dir

    def desk(self, name: str, blocks: int = 8, *, host_blocks: int = 0, disk_blocks: int = 0) -> Desk:
        incarnation = Incarnation(len(self.desks) + 1)
        nbytes = self.layout.block_nbytes
        arena = Arena(blocks * (nbytes + HEADER_NBYTES), nbytes, incarnation=incarnation)
        settings = TransportSettings(backend=self._backend)  # type: ignore[arg-type]
        transport = make_transport(settings, worker=name)
        transport.register(arena)
        owner = Owner(WorkerId(name), incarnation, NodeId("n"), transport.addresses(), arena.pull_key)
        self.directory.announce(owner)
        spill = SpillSettings(
            host_bytes=host_blocks * nbytes,
            disk_bytes=disk_blocks * (nbytes + HEADER_NBYTES),
            disk_dir="" if self._disk_dir is None else str(self._disk_dir),
        )
        store = SegmentStore(
            owner,
            self.layout,
            arena,
            transport,
            self.directory,
            lease_ttl_s=10.0,
            pull_timeout_s=5.0,
            spill=spill,
            ask_owner=self.ask_owner,
        )
        self.desks[owner.worker] = Desk(store, arena, transport, owner, self.layout.block_tokens)
        return self.desks[owner.worker]

    def ask_owner(self, owner: Owner, keys: Sequence[SegmentKey]) -> frozenset[SegmentKey]:
        """What a call on the owner's actor does."""
        return self.desks[owner.worker].store.holding.promote(keys)

    def check(self) -> None:
        """Nobody holds anything but published segments, and the directory lists just what is there."""
        assert self.directory.stats()["leases"] == 0
        held = 0
        for desk in self.desks.values():
            stats = desk.stats()
            assert (stats["pins"], stats["leases"], stats["landing_blocks"], stats["doomed_blocks"]) == (
                0,
            ) * 4
            assert stats["held_blocks"] == desk.arena.stats().used
            held += len(desk.store.segments())
        assert self.directory.stats()["segments"] == held

    def close(self) -> None:
        for desk in self.desks.values():
            desk.store.close()
            desk.transport.close()
