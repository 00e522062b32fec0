"""Backend over plain TCP sockets: works on any machine, and is what the others are downgraded to.

The owner runs a small server (`tcp_server`); the reader asks for byte ranges of (block, generation) pairs
and receives them straight into its arena memory. The next request is on its way before the bytes of the one
before have been received, so that the owner never waits for the reader. Each request presents the lease's
token, which only the directory can make. This module does not know what a lease is worth, nor what the
payload means.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from transport.arena import Arena
from transport.backend import Backend
from transport.frames import MAX_BLOCKS, Asking, FrameError, decode_body, expect_data
from transport.pulling import Landed, ReadFailed, Reading, time_out
from transport.tcp_server import TcpServer, recv_exact, recv_frame, shut, tune
from transport.types import BlockId, Lease, Outcome

logger = logging.getLogger(__name__)

_STEP_BYTES: Final = 256 << 10  # verified while still in the processor's cache


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int


def _parse_address(data: bytes) -> _Address:
    try:
        body = decode_body(data)
    except FrameError as fault:
        raise ReadFailed(Outcome.NO_ROUTE, f"unreadable tcp address: {fault}") from fault
    host, port = body.get("host"), body.get("port")
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 1 << 16:
        raise ReadFailed(Outcome.NO_ROUTE, "a tcp address needs host and port.")
    return _Address(host, port)


class TcpTransport(Backend):
    """Reads blocks over TCP; serves its own arena.

    Args:
        bind_host: address to listen on; loopback unless told otherwise.
        advertise_host: what peers connect to. Default: `bind_host`.
        connect_timeout_s: deadline for one connection.
    """

    name = "tcp"

    def __init__(
        self,
        bind_host: str = "127.0.0.1",
        advertise_host: str | None = None,
        connect_timeout_s: float = 3.0,
    ) -> None:
        self._bind_host = bind_host
        self._advertise_host = advertise_host or bind_host
        self._connect_timeout_s = connect_timeout_s
        self._server: TcpServer | None = None
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, int], list[socket.socket]] = {}
        self._closed = False

    def _start(self, arena: Arena) -> None:
        """Start the server. Raises TransportError: the address cannot be bound."""
        self._server = TcpServer(arena, self._bind_host)

    def _address(self) -> bytes:
        """Host and port as msgpack."""
        assert self._server is not None
        fields = {"host": self._advertise_host, "port": self._server.port}
        return bytes(msgpack.packb(fields, use_bin_type=True) or b"")

    def close(self) -> None:
        """Stop the server and close every connection."""
        self._closed = True
        with self._lock:
            idle = [sock for socks in self._idle.values() for sock in socks]
            self._idle.clear()
        for sock in idle:
            shut(sock)
        if self._server is not None:
            self._server.close()

    def read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> Reading:
        """Receive without verifying: see `transport.pulling.Read`."""
        arena, raw = self._ends(lease)
        peer = _parse_address(raw)
        where = f"{lease.located.owner.worker} at {peer.host}:{peer.port}"
        try:
            yield from self._receive(arena, peer, lease, into, deadline)
        except TimeoutError as fault:
            # Nobody but this thread writes into the destination and its socket is closed: no late writes.
            raise time_out(arena, into, f"{where} did not answer within the deadline.") from fault
        except OSError as fault:
            raise ReadFailed(Outcome.PEER_GONE, f"{where}: {fault}") from fault
        except FrameError as fault:
            raise ReadFailed(Outcome.PEER_GONE, f"{where} sent bytes we cannot read: {fault}") from fault

    def _receive(
        self, arena: Arena, peer: _Address, lease: Lease, into: Sequence[BlockId], deadline: float
    ) -> Reading:
        asks = _plan_asks(arena, len(into))
        if not asks:
            return
        asking = Asking(lease, arena)
        sock, answer = self._begin(peer, _frame(asking, asks[0]), deadline)
        reusable = False
        held_back: Landed | None = None
        try:
            for number, ask in enumerate(asks):
                if number:
                    answer = recv_frame(sock, deadline)
                expect_data(*answer, ask.stop - ask.first)
                if number + 1 < len(asks):
                    _send(sock, _frame(asking, asks[number + 1]), deadline)
                for landed in _receive_blocks(sock, arena, ask, into, deadline):
                    if number + 1 < len(asks) and _is_last(landed, arena, len(into)):
                        held_back = landed  # until the owner has confirmed the generations
                    else:
                        yield landed
            reusable = True
        except ReadFailed as failed:
            # Nothing else had been asked for by then.
            reusable = failed.outcome in (Outcome.STALE, Outcome.LEASE_EXPIRED)
            raise
        finally:
            self._put_back(sock, peer, reusable)
        if held_back is not None:
            yield held_back

    def _begin(
        self, peer: _Address, frame: bytes, deadline: float
    ) -> tuple[socket.socket, tuple[int, dict[str, Any]]]:
        """A connection, and the answer to the first request on it."""
        kept = self._take_idle(peer)
        if kept is not None:
            try:
                return kept, self._ask(kept, frame, deadline)
            except ConnectionError as fault:
                # The server closes idle connections, and a restarted one knows nothing of them.
                logger.debug("tcp: kept connection to %s:%d was dead (%s)", peer.host, peer.port, fault)
        fresh = self._connect(peer, deadline)
        return fresh, self._ask(fresh, frame, deadline)

    @staticmethod
    def _ask(sock: socket.socket, frame: bytes, deadline: float) -> tuple[int, dict[str, Any]]:
        try:
            _send(sock, frame, deadline)
            return recv_frame(sock, deadline)
        except (OSError, FrameError):
            shut(sock)
            raise

    def _connect(self, peer: _Address, deadline: float) -> socket.socket:
        limit = time.monotonic() + self._connect_timeout_s
        left = min(limit, deadline) - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed before connecting")
        try:
            sock = socket.create_connection((peer.host, peer.port), timeout=left)
        except TimeoutError as fault:
            if time.monotonic() >= deadline:
                raise
            raise ConnectionError(f"no connection within {self._connect_timeout_s:g} s") from fault
        tune(sock)
        return sock

    def _take_idle(self, peer: _Address) -> socket.socket | None:
        with self._lock:
            kept = self._idle.get((peer.host, peer.port))
            return kept.pop() if kept else None

    def _put_back(self, sock: socket.socket, peer: _Address, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed:
                self._idle.setdefault((peer.host, peer.port), []).append(sock)
                return
        shut(sock)


@dataclass(frozen=True, slots=True)
class _Ask:
    """One request: bytes [start, end) of blocks into[first:stop], all of one part; empty: only check."""

    part: int
    first: int
    stop: int
    start: int
    end: int


def _plan_asks(arena: Arena, blocks: int) -> list[_Ask]:
    """Part by part; with several parts, a last question whether the generations still are the leased ones."""
    slices = [(at, min(at + MAX_BLOCKS, blocks)) for at in range(0, blocks, MAX_BLOCKS)]
    parts = range(len(arena.parts))
    asks = [_Ask(part, *s, *arena.part_range(part)) for part, s in itertools.product(parts, slices)]
    if len(parts) > 1:
        asks.extend(_Ask(parts[-1], *s, 0, 0) for s in slices)
    return asks


def _frame(asking: Asking, ask: _Ask) -> bytes:
    return asking.encode((ask.first, ask.stop), ask.start, ask.end)


def _is_last(landed: Landed, arena: Arena, blocks: int) -> bool:
    return landed.part + 1 == len(arena.parts) and landed.stop == blocks


def _send(sock: socket.socket, frame: bytes, deadline: float) -> None:
    sock.settimeout(max(deadline - time.monotonic(), 1e-3))
    sock.sendall(frame)


def _receive_blocks(
    sock: socket.socket, arena: Arena, ask: _Ask, into: Sequence[BlockId], deadline: float
) -> Iterator[Landed]:
    if ask.end == ask.start:
        return
    at_once = max(1, _STEP_BYTES // (ask.end - ask.start))
    for first in range(ask.first, ask.stop, at_once):
        stop = min(ask.stop, first + at_once)
        for block in into[first:stop]:
            view = arena.landing(block, ask.start, ask.end)
            recv_exact(sock, view, deadline)
            arena.landed(block, view, ask.start)
        yield Landed(ask.part, first, stop)
