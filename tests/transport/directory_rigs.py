"""Shards as plain objects behind a real client: real tables, real messages, and faults to order."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from transport.directory import wire
from transport.directory.client import DirectoryClient
from transport.directory.fleet import ShardFailed
from transport.directory.operate import DirectoryOperator
from transport.directory.shard import Shard
from transport.directory.view import View
from transport.settings import DirectorySettings
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

W0, W1 = WorkerId("w0"), WorkerId("w1")
ME = Owner(W0, Incarnation(1), NodeId("n0"), {"tcp": b"x"})
SETTINGS = DirectorySettings(shards=3, heartbeat_s=0.02, call_timeout_s=5.0, owner_timeout_s=60.0)


def segment(i: int, nbytes: int = 100, generation: int = 1) -> Segment:
    return Segment(SegmentKey("s", bytes([i])), 1, 0, (BlockRef(BlockId(i), generation, nbytes, (0,)),))


def wait_for_shards(handles: dict[str, Any], timeout_s: float = 90.0) -> None:
    """Until the actors are up, which takes longer than a call's deadline on a busy machine."""
    ray.get([h.serve.remote("view", wire.pack_request(0, [])) for h in handles.values()], timeout=timeout_s)


class PlainCalls:
    """Shards as plain objects; those in `dead` do not answer, those in `lossy` act without answering, and
    those in `killed` are known to be dead."""

    def __init__(self, shards: dict[str, Shard]) -> None:
        self.shards = shards
        self.dead: set[str] = set()
        self.lossy: set[str] = set()
        self.killed: set[str] = set()
        self.sent: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def find(self, name: str) -> Any:
        if name not in self.shards:
            raise ShardFailed("no shard of that name", gone=True)
        return name  # so that a restarted shard is reached under its old handle, as an actor is

    def send(self, shard: Any, method: str, request: bytes) -> Any:
        self.sent.append((shard, method))
        if shard in self.dead or shard in self.killed or shard not in self.shards:
            return (shard,)
        with self.lock:  # an actor does one call at a time
            result = self.shards[shard].serve(method, request)
        return (shard,) if shard in self.lossy else (shard, result)

    def wait(self, pending: Any, timeout_s: float) -> Any:
        if len(pending) == 1:
            name = pending[0]
            raise ShardFailed("no reply", gone=name in self.killed or name not in self.shards)
        return pending[1]


class Rig:
    """Three shards, or as many as are named, and one client that may own segments."""

    def __init__(
        self, settings: DirectorySettings = SETTINGS, names: tuple[str, ...] = ("a", "b", "c")
    ) -> None:
        self.passed_s = 0.0  # time that a test lets pass without waiting for it
        self.settings = settings
        self.shards: dict[str, Shard] = {}
        self.calls = PlainCalls(self.shards)
        for name in names:
            self.shards[name] = Shard(name, settings, self.clock, first=names)
        self.client = self.reader()

    def clock(self) -> float:
        return time.monotonic() + self.passed_s

    def start(self, name: str) -> None:
        self.shards[name] = Shard(name, self.settings, self.clock)

    restart = start

    def end(self, name: str) -> None:
        del self.shards[name]

    def reader(self) -> DirectoryClient:
        """One more client, which knows the first list of shards."""
        names = sorted(self.shards) if not hasattr(self, "client") else list(self.client.fleet.shards)
        return DirectoryClient(names, self.settings, calls=self.calls)

    def operator(self) -> DirectoryOperator:
        return DirectoryOperator.of(list(self.shards), calls=self.calls)

    def resize(self, *names: str, drain_s: float = 5.0) -> View:
        return self.operator().resize(names, start=self.start, end=self.end, drain_s=drain_s)
