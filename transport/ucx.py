"""Backend over UCX through ucxx, for clusters that standardise on UCX without NIXL (optional: extra [ucx]).

Tagged messages only: the owner takes part in every read (`ucx_server`). Each connection has a UCX worker of
its own, driven by the pulling thread alone, so there is no lock and no second thread at the reader. Messages
land in buffers of the connection and are copied into the arena from there: a message that arrives after its
deadline can then only write into a buffer that nobody reads. This module does not know what a lease is worth,
nor what the payload means.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import numpy as np

from transport.arena import Arena
from transport.backend import Backend
from transport.errors import TransportError
from transport.frames import MAX_BLOCKS, Asking, FrameError, decode_body, expect_data
from transport.loopback import is_loopback
from transport.pulling import Landed, ReadFailed, Reading, plan_steps, time_out
from transport.types import BlockId, Lease, Outcome
from transport.ucx_binding import Binding, close_endpoint, load_binding
from transport.ucx_server import UcxServer, frame_of, tag_of

logger = logging.getLogger(__name__)

_STEP_BYTES: Final = 1 << 20
_SPINS: Final = 200  # polls without sleep
_NAP_S: Final = 20e-6


class _Late(Exception):
    """An answer did not come before the deadline."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request on its way.

    Attributes:
        ticket: its name, which the answer repeats.
        step: what it asks for; None: only whether the blocks still are the leased ones.
        buffer: where the bytes land; receiving: one request of UCX for each block.
        keep: what UCX still reads from or writes into.
    """

    ticket: int
    step: Landed | None
    blocks: int
    buffer: np.ndarray
    receiving: list[Any]
    keep: list[Any]


class _Connection:
    """A worker and an endpoint, used by one pull at a time.

    Raises:
        TransportError: UCX does not come up here.
        UCXError: the address cannot be used.
    """

    def __init__(self, binding: Binding, host: str, port: int, *, loopback: bool) -> None:
        self._binding = binding
        self._worker = binding.make_worker(loopback=loopback)
        self._endpoint: Any = binding.api.UCXEndpoint.create(self._worker, host, port, True)
        # Apart from those of any other connection: see `UcxServer`.
        self._tickets = secrets.randbits(30) << 20
        self._closed = False
        self.asked: deque[_Ask] = deque()

    def ticket(self) -> int:
        """A name for the next request."""
        self._tickets += 1
        return self._tickets

    def ask(self, frame: bytes, ticket: int, step: Landed | None, blocks: int, nbytes: int) -> None:
        """Send a READ frame for `nbytes` of each block, and make room for the answer."""
        array, api = self._binding.array, self._binding.api
        buffer = np.empty(blocks * nbytes, dtype=np.uint8)
        ask = _Ask(ticket, step, blocks, buffer, [], [])
        if nbytes:
            for at in range(blocks):
                target = array(buffer[at * nbytes : (at + 1) * nbytes])
                ask.receiving.append(self._endpoint.tag_recv(target, tag=tag_of(api, ticket, at)))
                ask.keep.append(target)
        message = array(np.frombuffer(frame, dtype=np.uint8))
        ask.keep.extend((message, self._endpoint.am_send(message)))
        self.asked.append(ask)

    def finish(self, deadline: float) -> _Ask:
        """Wait for the oldest answer and its bytes.

        Raises:
            ReadFailed: the owner refused.
            FrameError, ConnectionError, UCXError: the peer is gone or talks nonsense.
            _Late: not within the deadline.
        """
        ask = self.asked[0]
        kind, body = self._receive_frame(deadline)
        while body.get("ticket", ask.ticket) != ask.ticket:  # meant for an endpoint that is dead
            kind, body = self._receive_frame(deadline)
        expect_data(kind, body, ask.blocks)
        for receiving in ask.receiving:
            self._wait(lambda receiving=receiving: receiving.completed, deadline)
            receiving.check_error()
        return self.asked.popleft()

    def _receive_frame(self, deadline: float) -> tuple[int, dict[str, Any]]:
        self._wait(self._endpoint.am_probe, deadline)
        answer = self._endpoint.am_recv()
        self._wait(lambda: answer.completed, deadline)
        answer.check_error()
        data = answer.recv_buffer  # to be taken once
        if data is None:
            raise ConnectionResetError("the owner closed the connection")
        return frame_of(data)

    def close(self) -> bool:
        """Cancel what is in flight; whether nothing is left that could write into a buffer. May be called
        again to find out."""
        if not self._closed:
            close_endpoint(self._endpoint)
            self._closed = True
        self._worker.progress()
        return all(r.completed for ask in self.asked for r in ask.receiving)

    def _wait(self, done: Any, deadline: float) -> None:
        polls = 0
        while not done():
            self._worker.progress()
            if not self._endpoint.alive:
                self._endpoint.raise_on_error()
                raise ConnectionResetError("the owner closed the connection")
            if time.monotonic() >= deadline:
                raise _Late
            polls += 1
            if polls > _SPINS:
                time.sleep(_NAP_S)


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int


def _parse_address(data: bytes) -> _Address:
    try:
        body = decode_body(data)
    except FrameError as fault:
        raise ReadFailed(Outcome.NO_ROUTE, f"unreadable ucx address: {fault}") from fault
    host, port = body.get("host"), body.get("port")
    if not isinstance(host, str) or not isinstance(port, int) or not 0 < port < 1 << 16:
        raise ReadFailed(Outcome.NO_ROUTE, "a ucx address needs host and port.")
    return _Address(host, port)


class UcxTransport(Backend):
    """Reads blocks with UCX messages; serves its own arena.

    Args:
        advertise_host: this node's address as peers see it.

    Raises:
        TransportError: ucxx is not installed.
    """

    name = "ucx"

    def __init__(self, advertise_host: str = "127.0.0.1") -> None:
        self._binding = load_binding()
        self._advertise_host = advertise_host
        self._loopback = is_loopback(advertise_host)
        self._server: UcxServer | None = None
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, int], list[_Connection]] = {}
        self._lost: list[_Connection] = []
        self._closed = False

    def _start(self, arena: Arena) -> None:
        """Start the server. Raises TransportError: UCX does not come up."""
        self._server = UcxServer(self._binding, arena, loopback=self._loopback)

    def _address(self) -> bytes:
        """Host and port as msgpack."""
        assert self._server is not None
        fields = {"host": self._advertise_host, "port": self._server.port}
        return bytes(msgpack.packb(fields, use_bin_type=True) or b"")

    def close(self) -> None:
        """Stop the server and close every connection."""
        with self._lock:
            self._closed = True
            idle = [c for kept in self._idle.values() for c in kept]
            self._idle.clear()
        for connection in idle:
            self._abandon(connection)
        if self._server is not None:
            self._server.close()

    def read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> Reading:
        """Receive without verifying: see `transport.pulling.Read`."""
        arena, raw = self._ends(lease)
        peer = _parse_address(raw)
        where = f"{lease.located.owner.worker} at {peer.host}:{peer.port}"
        try:
            yield from self._receive(arena, peer, lease, into, deadline)
        except _Late:
            # Late bytes land in buffers of the connection, never in the arena.
            raise time_out(arena, into, f"{where} did not answer within the deadline.") from None
        except (OSError, RuntimeError, ValueError, self._binding.api.UCXError) as fault:
            raise ReadFailed(Outcome.PEER_GONE, f"{where}: {fault!r}") from fault
        except FrameError as fault:
            raise ReadFailed(Outcome.PEER_GONE, f"{where} sent bytes we cannot read: {fault}") from fault
        except TransportError as fault:
            raise ReadFailed(Outcome.NO_ROUTE, str(fault)) from fault

    def _receive(
        self, arena: Arena, peer: _Address, lease: Lease, into: Sequence[BlockId], deadline: float
    ) -> Reading:
        """Two requests at a time: while one is copied and verified, the next one is answered."""
        steps: list[Landed | None] = [*plan_steps(arena, len(into), _STEP_BYTES, MAX_BLOCKS)]
        if not steps:
            return
        checks = [(at, min(at + MAX_BLOCKS, len(into))) for at in range(0, len(into), MAX_BLOCKS)]
        if len(arena.parts) > 1:  # do the generations still hold after the last part?
            steps.extend(None for _ in checks)
        asking = Asking(lease, arena)
        connection = self._take(peer)
        held_back: Landed | None = None
        whole = False
        try:
            for number, step in enumerate(steps):
                blocks = (step.first, step.stop) if step else checks[number - len(steps)]
                start, stop = arena.part_range(step.part) if step else (0, 0)
                ticket = connection.ticket()
                frame = asking.encode(blocks, start, stop, ticket=ticket)
                connection.ask(frame, ticket, step, blocks[1] - blocks[0], stop - start)
                while len(connection.asked) > 1 or (connection.asked and number + 1 == len(steps)):
                    landed = _copy(arena, connection.finish(deadline), into)
                    if landed is None:
                        continue
                    if len(arena.parts) > 1 and landed == _last(steps):
                        held_back = landed
                    else:
                        yield landed
            whole = True
        finally:
            self._put_back(connection, peer, whole)
        if held_back is not None:
            yield held_back

    def _take(self, peer: _Address) -> _Connection:
        with self._lock:
            self._lost = [lost for lost in self._lost if not lost.close()]
            kept = self._idle.get((peer.host, peer.port))
            if kept:
                return kept.pop()
        return _Connection(self._binding, peer.host, peer.port, loopback=self._loopback)

    def _put_back(self, connection: _Connection, peer: _Address, whole: bool) -> None:
        with self._lock:
            if whole and not self._closed:
                self._idle.setdefault((peer.host, peer.port), []).append(connection)
                return
        self._abandon(connection)

    def _abandon(self, connection: _Connection) -> None:
        """Close it; its buffers are kept for as long as UCX may write into them."""
        if not connection.close():
            with self._lock:
                self._lost.append(connection)


def _last(steps: Sequence[Landed | None]) -> Landed | None:
    return next((step for step in reversed(steps) if step is not None), None)


def _copy(arena: Arena, ask: _Ask, into: Sequence[BlockId]) -> Landed | None:
    """Bytes that have landed in a buffer -> arena."""
    if ask.step is None:
        return None
    start, stop = arena.part_range(ask.step.part)
    nbytes = stop - start
    for at, block in enumerate(into[ask.step.first : ask.step.stop]):
        view = arena.landing(block, start, stop)
        # numpy lets other threads run while it copies
        np.copyto(np.frombuffer(view, dtype=np.uint8), ask.buffer[at * nbytes : (at + 1) * nbytes])
        arena.landed(block, view, start)
    return ask.step
