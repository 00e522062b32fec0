"""Helpers of the transport tests: an owner of sealed blocks, in this process or in another one."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch

from transport.arena import Arena
from transport.auto import make_transport
from transport.directory.granting import Granter, blocks_digest
from transport.loopback import is_loopback
from transport.settings import TransportSettings
from transport.tokens import PullKey
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    Lease,
    LeaseId,
    Located,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

REPLY_S = 30.0

# A key refuses to be pickled. Only the pipes of these tests may carry it: the test is the directory of an
# owner in another process.
ForkingPickler.register(PullKey, lambda key: (PullKey, (key.reveal(),)))


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Poll until `condition()`; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.005)


def fill(arena: Arena, block: BlockId, seed: int, valid: int | None = None) -> None:
    """Random payload from `seed`; bytes from `valid` on are zero (a ragged tail)."""
    arena.payload(block).copy_(torch.from_numpy(content(arena.block_nbytes, seed, valid)))


def content(nbytes: int, seed: int, valid: int | None = None) -> np.ndarray:
    """What `fill` writes. numpy and not torch: its threads fight over two busy cores."""
    out = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), dtype=np.uint8).copy()
    if valid is not None:
        out[valid:] = 0
    return out


def make_segment(refs: list[BlockRef], name: str = "seg") -> Segment:
    return Segment(SegmentKey("space", name.encode()), num_tokens=len(refs), start=0, blocks=tuple(refs))


def make_lease(owner: Owner, refs: list[BlockRef], ttl_s: float = 30.0) -> Lease:
    """As the directory grants it, with its token where the owner has a key."""
    segment, reader = make_segment(refs), WorkerId("reader")
    token = b""
    if owner.pull_key is not None:  # monotonic clocks of one machine are one
        granter = Granter(owner.incarnation, owner.pull_key, int(time.monotonic() * 1e3), 0.0)
        token = granter.token(segment, blocks_digest(segment), reader, 0.0, ttl_s)
    return Lease(LeaseId("l1"), Located(segment, owner), reader, ttl_s, token=token)


def own_address() -> str | None:
    """An address of this machine that others may reach as well; None where it has none."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family is socket.AF_INET and not is_loopback(address.address):
                return str(address.address)
    return None


class OwnerSide(Protocol):
    """An arena behind a transport, wherever it runs."""

    owner: Owner

    def publish(self, n: int, seed: int, valid: int | None = None) -> list[BlockRef]: ...
    def free(self, refs: list[BlockRef]) -> None: ...
    def corrupt(self, ref: BlockRef, at: int = 17) -> None: ...
    def close(self) -> None: ...


class LocalOwner:
    """The owner in this process."""

    def __init__(
        self,
        backend: str,
        budget: int,
        block_nbytes: int,
        parts: Sequence[int] = (),
        incarnation: int = 7,
        name: str = "owner",
        host: str = "127.0.0.1",
        device: str = "cpu",
    ) -> None:
        self.arena = Arena(budget, block_nbytes, device, incarnation, parts)
        settings = TransportSettings(backend=backend)  # type: ignore[arg-type]
        self.transport = make_transport(settings, worker=name, host=host)
        self.transport.register(self.arena)
        addresses, key = self.transport.addresses(), self.arena.pull_key
        self.owner = Owner(WorkerId(name), Incarnation(incarnation), NodeId("n0"), addresses, key)

    def publish(self, n: int, seed: int, valid: int | None = None) -> list[BlockRef]:
        ids = self.arena.allocate(n)
        for at, block in enumerate(ids):
            fill(self.arena, block, seed + at, valid if at == n - 1 else None)
        return [self.arena.seal(block) for block in ids]

    def free(self, refs: list[BlockRef]) -> None:
        self.arena.free([r.block for r in refs])

    def corrupt(self, ref: BlockRef, at: int = 17) -> None:
        self.arena.payload(ref.block)[at] ^= 1

    def close(self) -> None:
        self.transport.close()


def _threads_are_stopped(pid: int) -> bool:
    """By the state behind the name, which may contain spaces; where there is no /proc: hopefully."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)


def _serve(conn: Connection, env: dict[str, str], args: tuple[Any, ...]) -> None:
    os.environ.update(env)  # before the first agent exists
    side = LocalOwner(*args)
    conn.send(side.owner)
    while True:
        command, *rest = conn.recv()
        if command == "close":
            side.close()
            conn.send(None)
            return
        conn.send(getattr(side, command)(*rest))


def _context() -> Any:
    # A fork server that has torch loaded starts an owner in 0.1 s instead of 3 s.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.transport.rigs"])
    return context


class RemoteOwner:
    """The owner in another process, which tests may stop and kill."""

    def __init__(
        self,
        backend: str,
        budget: int,
        block_nbytes: int,
        env: dict[str, str],
        parts: Sequence[int] = (),
        name: str = "owner",
        device: str = "cpu",
    ) -> None:
        self._conn, theirs = _context().Pipe()
        args = (backend, budget, block_nbytes, parts, 7, name, "127.0.0.1", device)
        self.process = _context().Process(target=_serve, args=(theirs, env, args), daemon=True)
        self.process.start()
        theirs.close()
        self.owner: Owner = self._reply()

    def _reply(self) -> Any:
        if not self._conn.poll(REPLY_S):
            raise AssertionError(f"the owner process {self.process.pid} does not answer")
        return self._conn.recv()

    def _ask(self, *command: Any) -> Any:
        self._conn.send(command)
        return self._reply()

    def publish(self, n: int, seed: int, valid: int | None = None) -> list[BlockRef]:
        return self._ask("publish", n, seed, valid)

    def free(self, refs: list[BlockRef]) -> None:
        self._ask("free", refs)

    def corrupt(self, ref: BlockRef, at: int = 17) -> None:
        self._ask("corrupt", ref, at)

    def signal(self, number: int) -> None:
        pid = int(self.process.pid or 0)
        os.kill(pid, number)
        if number == signal.SIGSTOP:  # on a busy machine its threads may go on for a moment
            wait_for(lambda: _threads_are_stopped(pid), f"process {pid} has stopped")

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def close(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGCONT)
            self.kill()
        self._conn.close()
        self.process.close()
