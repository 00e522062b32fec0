"""Backend between workers of one host: the reader copies straight out of the owner's memory.

The owner's arena is a sealed memfd (`memory`), of which its server hands a read-only descriptor to readers of
the same kernel and user (`shm_server`). From then on the owner takes no part: a leased block is one copy from
a read-only mapping into the reader's own arena, verified there while it is still in the processor's cache.

An owner that stops, or dies in the middle of a pull, does not end it: its memory outlives it for as long as
a reader holds the descriptor, nobody can write there any more, and generation and checksum say what the bytes
are worth. Its death is told by the connection, at once: then no new pull begins (PEER_GONE), and the memory
is given back when the last one under way has ended.

This module does not know what a lease is worth, nor what the payload means.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

import msgpack
import numpy as np

from transport.arena import HEADER_NBYTES, Arena
from transport.backend import Backend
from transport.errors import TransportError
from transport.host import Host, probe, this_host
from transport.memory import map_readonly
from transport.pulling import Landed, ReadFailed, Reading, expect_pulled, plan_steps, time_out
from transport.shm_server import (
    ACCEPTED,
    ANSWER,
    BUSY,
    HELLO,
    MAGIC,
    SCHEMA,
    WRONG_LIFE,
    WRONG_TOKEN,
    ShmServer,
    abstract,
    peer_uid,
)
from transport.types import BlockId, BlockRef, Lease, Outcome, Owner

__all__ = ["Address", "ShmTransport", "probe"]

logger = logging.getLogger(__name__)

STEP_BYTES: Final = 512 << 10
"""Copied at once, and verified while still in the processor's cache."""
MAX_PEERS: Final = 64
"""Owners whose memory is kept open; the least recently used is closed first."""
_SHUT: Final = "this worker's shm transport is closed."
_REFUSALS: Final = {
    WRONG_TOKEN: (Outcome.PEER_GONE, "wrong token"),
    WRONG_LIFE: (Outcome.STALE, "another life of this worker"),
    BUSY: (Outcome.PEER_GONE, "too many readers"),
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where an arena is.

    Attributes:
        host: the owner's.
        name: of its server's socket, new in every life; token: what to present there.
        stride: bytes of a block with header; blocks: their number.
    """

    host: Host
    name: str
    token: bytes
    stride: int
    blocks: int

    def pack(self) -> bytes:
        """As msgpack."""
        host = (self.host.boot, self.host.network, self.host.uid)
        fields = (SCHEMA, *host, self.name, self.token, self.stride, self.blocks)
        return bytes(msgpack.packb(fields, use_bin_type=True) or b"")

    @classmethod
    @lru_cache(maxsize=256)  # every pull asks
    def unpack(cls, data: bytes) -> Address:
        """Raises ReadFailed(NO_ROUTE) for bytes that are not such an address."""
        try:
            fields = msgpack.unpackb(
                data, raw=False, use_list=False, max_bin_len=64, max_str_len=256, max_ext_len=0
            )
        except (ValueError, RecursionError, msgpack.UnpackException) as fault:
            raise ReadFailed(Outcome.NO_ROUTE, f"unreadable shm address: {fault}") from fault
        types = (int, str, str, int, str, bytes, int, int)
        if not isinstance(fields, tuple) or [type(f) for f in fields] != list(types) or fields[0] != SCHEMA:
            raise ReadFailed(Outcome.NO_ROUTE, f"this is no shm address of schema {SCHEMA}.")
        _, boot, network, uid, name, token, stride, blocks = fields
        if len(token) != 16 or not name:
            raise ReadFailed(Outcome.NO_ROUTE, "a shm address needs a name and a token of 16 bytes.")
        return cls(Host(boot, network, uid), name, token, stride, blocks)


class ShmTransport(Backend):
    """Reads the memory of workers on the same host; lets them read its own.

    Args:
        connect_timeout_s: deadline for a peer's answer, the first time.

    Raises:
        TransportError: this system has nothing of the kind.
    """

    name = "shm"

    def __init__(self, connect_timeout_s: float = 3.0) -> None:
        usable, why = probe()
        if not usable:
            raise TransportError(f"shm: {why}. Set transport.backend: auto.")
        self._connect_timeout_s = connect_timeout_s
        self._server: ShmServer | None = None
        self._peers: Peers | None = None
        self._packed = b""

    def _start(self, arena: Arena) -> None:
        """Start the server. Raises TransportError: the arena does not lie in shared memory."""
        fd = arena.shared_fd()
        if fd is None:
            raise TransportError(
                f"shm: an arena on {arena.device} in memory of its own cannot be shared. It needs the CPU, "
                "and transport.shared_memory: true."
            )
        self._server = ShmServer(arena, fd)
        self._peers = Peers(self._server, self._connect_timeout_s)
        self._packed = Address(
            this_host(), self._server.name, self._server.token, arena.stride, arena.num_blocks
        ).pack()

    def _address(self) -> bytes:
        """See `Address`."""
        return self._packed

    def out_of_reach(self, owner: Owner) -> str:
        """See `Backend.out_of_reach`."""
        try:
            return Address.unpack(owner.addresses[self.name]).host.apart(this_host())
        except (KeyError, ReadFailed):
            return ""  # the pull says what is wrong

    def stats(self) -> dict[str, int]:
        """peers: owners whose memory is open here."""
        return {"peers": 0 if self._peers is None else len(self._peers)}

    def close(self) -> None:
        """Stop the server and give the peers' memory back; pulls in flight give it back when they leave."""
        if self._server is not None and self._peers is not None:
            self._peers.shut()
            self._server.close()
            self._peers.close()

    def read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> Reading:
        """Copy without verifying: see `transport.pulling.Read`."""
        arena, raw = self._ends(lease)
        address, owner = Address.unpack(raw), lease.located.owner
        if apart := address.host.apart(this_host()):
            raise ReadFailed(Outcome.NO_ROUTE, f"{owner.worker} is on {apart}.")
        if address.stride != arena.stride:
            raise ReadFailed(Outcome.LAYOUT_MISMATCH, f"strides {address.stride} and {arena.stride} differ.")
        if any(not 0 <= r.block < address.blocks for r in lease.located.segment.blocks):
            raise ReadFailed(Outcome.STALE, f"{owner.worker} has no such block.")
        if self._peers is None:
            raise TransportError("shm: read before register()")
        try:
            with self._peers.attached(address, owner, deadline) as peer:
                for step in plan_steps(arena, len(into), STEP_BYTES, max(1, len(into))):
                    fetch = partial(_fetch, arena, peer.memory, lease, into, step, deadline)
                    yield step._replace(fetch=fetch)
        except TimeoutError as fault:
            # Nobody but this thread writes into the destination: no late writes.
            raise time_out(arena, into, f"{owner.worker}: not within the deadline ({fault}).") from fault
        except OSError as fault:
            raise ReadFailed(Outcome.PEER_GONE, f"{owner.worker}: {fault}.") from fault


def _fetch(
    arena: Arena, memory: np.ndarray, lease: Lease, into: Sequence[BlockId], step: Landed, deadline: float
) -> None:
    """Copy one step.

    Args:
        memory: [blocks, stride] of the owner's arena.

    Raises:
        TimeoutError: the time.monotonic() deadline has passed.
        ReadFailed: a block is not the leased one any more.
    """
    refs, incarnation = lease.located.segment.blocks, lease.located.owner.incarnation
    rows, columns = arena.rows(), slice(*arena.part_range(step.part))
    for first, stop in _runs(refs, into, step):
        if time.monotonic() >= deadline:
            raise TimeoutError("the copy did not end within the deadline.")
        source, target, n = refs[first].block, into[first], stop - first
        # One call for many blocks: numpy lets other threads run until it has copied them all.
        np.copyto(rows[target : target + n, columns], memory[source : source + n, columns])
    if step.part and step.part + 1 == len(arena.parts):
        # The header came with part 0: is it still the leased block?
        for ref in refs[step.first : step.stop]:
            header = memory[ref.block, :HEADER_NBYTES].tobytes()
            expect_pulled(arena.judge_header(header, ref, incarnation), ref, lease)


def _runs(refs: Sequence[BlockRef], into: Sequence[BlockId], step: Landed) -> Iterator[tuple[int, int]]:
    """[first, stop) of blocks that follow one another on both sides."""
    first = step.first
    for at in range(step.first + 1, step.stop):
        if refs[at].block - refs[at - 1].block != 1 or into[at] - into[at - 1] != 1:
            yield first, at
            first = at
    yield first, step.stop


@dataclass(slots=True, eq=False)
class Peer:
    """An owner's memory, open here.

    Attributes:
        memory: [blocks, stride] of its arena, mapped read-only; unmapped when the last view is gone.
        sock: connection to its server.
        users: pulls that read it now; `gone`: nobody may begin to.
    """

    name: str
    memory: np.ndarray
    sock: socket.socket
    users: int = 0
    gone: bool = False


class Peers:
    """The owners whose memory is open here.

        attached --its end is heard, or it is the least recently used--> gone --last pull leaves--> closed

    Args:
        connect_timeout_s: longest wait for an owner's answer.
    """

    def __init__(self, server: ShmServer, connect_timeout_s: float) -> None:
        self._server = server
        self._connect_timeout_s = connect_timeout_s
        self._lock = threading.Lock()
        self._peers: OrderedDict[str, Peer] = OrderedDict()
        self._open: set[Peer] = set()
        self._shut = False

    def __len__(self) -> int:
        """Those in use by a pull included."""
        return len(self._open)

    @contextmanager
    def attached(self, address: Address, owner: Owner, deadline: float) -> Iterator[Peer]:
        """The owner's memory, for as long as the block lasts.

        Raises:
            ReadFailed: the owner refused.
            TimeoutError: it did not answer before the time.monotonic() deadline.
            OSError: it cannot be reached.
        """
        peer = self._enter(address.name) or self._add(self._attach(address, owner, deadline))
        try:
            yield peer
        finally:
            with self._lock:
                peer.users -= 1
                self._close_if_unused(peer)

    def shut(self) -> None:
        """Let nobody in any more."""
        with self._lock:
            self._shut = True
            for peer in list(self._peers.values()):
                self._dismiss(peer)

    def close(self) -> None:
        """After `shut`, when the server's thread has ended: close what is not in use."""
        with self._lock:
            peers = list(self._open)
        for peer in peers:
            self._lost(peer)

    # -- inside ----------------------------------------------------------------------------------------

    def _enter(self, name: str) -> Peer | None:
        with self._lock:
            if self._shut:
                raise ReadFailed(Outcome.NO_ROUTE, _SHUT)
            peer = self._peers.get(name)
            if peer is not None:
                peer.users += 1
                self._peers.move_to_end(name)
            return peer

    def _add(self, peer: Peer) -> Peer:
        """The new one, or the one that another pull has attached meanwhile."""
        known = self._enter_or_insert(peer)
        if known is peer:
            self._server.watch(peer.sock, lambda: self._lost(peer))
        else:
            peer.sock.close()
        if known is None:
            raise ReadFailed(Outcome.NO_ROUTE, _SHUT)
        return known

    def _enter_or_insert(self, peer: Peer) -> Peer | None:
        with self._lock:
            if self._shut:
                return None
            known = self._peers.setdefault(peer.name, peer)
            known.users += 1
            self._open.add(known)
            idle = [p for p in self._peers.values() if not p.users]
            for other in idle[: max(0, len(self._peers) - MAX_PEERS)]:
                self._dismiss(other)
            return known

    def _attach(self, address: Address, owner: Owner, deadline: float) -> Peer:
        limit = time.monotonic() + self._connect_timeout_s
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            try:
                sock.settimeout(max(min(limit, deadline) - time.monotonic(), 1e-3))
                sock.connect(abstract(address.name))
                if peer_uid(sock) != os.geteuid():
                    raise ReadFailed(Outcome.NO_ROUTE, f"{owner.worker}: its socket is of another user.")
                sock.sendall(HELLO.pack(MAGIC, SCHEMA, owner.incarnation, address.token))
                answer, fds, _, _ = socket.recv_fds(sock, ANSWER.size + 1, 1, socket.MSG_CMSG_CLOEXEC)
            except TimeoutError as fault:
                if time.monotonic() >= deadline:
                    raise
                raise ConnectionError(f"no answer within {self._connect_timeout_s:g} s") from fault
            try:
                memory = _accept(answer, fds, address, owner)
            finally:
                for fd in fds:
                    os.close(fd)
            sock.setblocking(False)
            return Peer(address.name, memory, socket.socket(fileno=sock.detach()))

    def _dismiss(self, peer: Peer) -> None:
        """Let nobody enter; the server's thread hears the end of the connection and closes the rest. The
        caller holds the lock."""
        self._peers.pop(peer.name, None)
        peer.gone = True
        try:
            peer.sock.shutdown(socket.SHUT_RDWR)
        except OSError as fault:  # the owner was faster
            logger.debug("shm: shutdown: %s", fault)

    def _lost(self, peer: Peer) -> None:
        """The connection has ended."""
        with self._lock:
            if self._peers.get(peer.name) is peer:
                del self._peers[peer.name]
            peer.gone = True
            peer.sock.close()
            self._close_if_unused(peer)

    def _close_if_unused(self, peer: Peer) -> None:
        if peer.gone and not peer.users and peer.sock.fileno() < 0:
            self._open.discard(peer)


def _accept(answer: bytes, fds: Sequence[int], address: Address, owner: Owner) -> np.ndarray:
    """Map what the owner has handed over.

    Raises:
        ReadFailed: it refused, or this is not its arena.
        OSError: it cannot be mapped.
    """
    if len(answer) != ANSWER.size:
        raise ReadFailed(Outcome.PEER_GONE, f"{owner.worker} closed the connection.")
    magic, status, incarnation, nbytes = ANSWER.unpack(answer)
    if magic != MAGIC:
        raise ReadFailed(Outcome.PEER_GONE, f"{owner.worker}: this is not a relay_cluster peer.")
    if status != ACCEPTED:
        outcome, why = _REFUSALS.get(status, (Outcome.PEER_GONE, "malformed request"))
        raise ReadFailed(outcome, f"{owner.worker} refused: {why}.")
    needed = address.blocks * address.stride
    if incarnation != owner.incarnation or len(fds) != 1 or nbytes < needed:
        raise ReadFailed(Outcome.STALE, f"{owner.worker} handed over something else.")
    return map_readonly(fds[0], needed).reshape(address.blocks, address.stride)
