"""The owner's end of the tcp backend: a small server for one arena.

One accept thread, one thread per connection, all daemons, all joined by close. Plain threads and not asyncio:
one blocking send releases the GIL for many blocks and needs no hop through an event loop, and the number of
connections is small (one per concurrent reader, bounded by MAX_CONNECTIONS). Hostile bytes get a typed
refusal and a closed connection.

A connection is a stranger's until a request with a good token has come over it. Strangers have little time,
and make room for newcomers when all places are taken: they cannot keep readers out by merely being there.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from transport.arena import Arena
from transport.errors import TransportError
from transport.frames import (
    FRAME,
    KIND_DATA,
    KIND_READ,
    FrameError,
    admit,
    decode_body,
    decode_header,
    encode,
    encode_refusal,
    parse_request,
)
from transport.types import BlockId

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
_FRAME_TIMEOUT_S: Final = 5.0  # from the first byte of a request to its last
_STRANGER_TIMEOUT_S: Final = 5.0  # until a stranger's first request
_IDLE_TIMEOUT_S: Final = 60.0  # a silent connection is closed; the reader reconnects
_SEND_TIMEOUT_S: Final = 30.0  # one send to a reader that does not read
_REFUSE_TIMEOUT_S: Final = 1.0
_JOIN_TIMEOUT_S: Final = 5.0
_MOST_BUFFERS: Final = 256  # of one sendmsg; the kernel's limit is 1024


def tune(sock: socket.socket) -> None:
    """Options of both ends."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def shut(sock: socket.socket) -> None:
    """Close a socket, and wake whoever waits on it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as fault:
        logger.debug("tcp: shutdown: %s", fault)
    sock.close()


def recv_exact(sock: socket.socket, view: memoryview, deadline: float) -> None:
    """Fill `view` from the socket.

    Raises:
        TimeoutError: the time.monotonic() deadline passed.
        ConnectionError: the peer closed.
    """
    got = 0
    while got < len(view):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("deadline passed while receiving")
        sock.settimeout(left)
        n = sock.recv_into(view[got:])
        if n == 0:
            raise ConnectionResetError("the peer closed the connection")
        got += n


def recv_frame(sock: socket.socket, deadline: float) -> tuple[int, dict[str, Any]]:
    """One frame as (kind, body). Raises what `recv_exact`, `decode_header` and `decode_body` raise."""
    header = bytearray(FRAME.size)
    recv_exact(sock, memoryview(header), deadline)
    kind, nbytes = decode_header(bytes(header))
    body = bytearray(nbytes)
    recv_exact(sock, memoryview(body), deadline)
    return kind, decode_body(bytes(body))


def send_all(sock: socket.socket, buffers: Sequence[memoryview | bytes]) -> None:
    """Send all buffers, many of them with one system call. The socket's timeout bounds each call.

    Raises:
        OSError: the peer is gone, or does not read.
    """
    for at in range(0, len(buffers), _MOST_BUFFERS):
        views = [memoryview(b) for b in buffers[at : at + _MOST_BUFFERS]]
        while views:
            sent = sock.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if sent:
                views[0] = views[0][sent:]


@dataclass(slots=True)
class _Connection:
    """Who serves it; proven: a good token has come over it."""

    thread: threading.Thread
    proven: bool = False


class TcpServer:
    """Serves one arena.

    Args:
        host: address to listen on; the port is chosen by the system.

    Raises:
        TransportError: the address cannot be bound.

    Attributes:
        port: where it listens.
    """

    def __init__(self, arena: Arena, host: str) -> None:
        self._arena = arena
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._listener.bind((host, 0))
            self._listener.listen(MAX_CONNECTIONS)
        except OSError as fault:
            self._listener.close()
            raise TransportError(
                f"tcp: cannot listen on {host}: {fault}. Set transport.bind_host to an address of this node."
            ) from fault
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, _Connection] = {}  # oldest first
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept, name=f"relay-tcp-{self.port}", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """End all threads and connections. Idempotent."""
        self._closing = True
        # shutdown() wakes a thread blocked in accept() on Linux, close() does it elsewhere.
        shut(self._listener)
        with self._lock:
            open_now = list(self._connections.items())
        for sock, _ in open_now:
            shut(sock)
        self._acceptor.join(_JOIN_TIMEOUT_S)
        for _, connection in open_now:
            connection.thread.join(_JOIN_TIMEOUT_S)

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError as fault:
                if self._closing:
                    return
                logger.warning("tcp: accept failed: %s", fault)
                time.sleep(0.1)  # out of file descriptors: do not spin
                continue
            thread = threading.Thread(
                target=self._serve, args=(sock,), name=f"relay-tcp-{self.port}-conn", daemon=True
            )
            if self._take_in(sock, thread):
                thread.start()
            else:
                _refuse(sock, FrameError("busy", f"{MAX_CONNECTIONS} readers are connected already"))
                shut(sock)

    def _take_in(self, sock: socket.socket, thread: threading.Thread) -> bool:
        """Whether there is a place for a new connection, if need be that of the stranger who came first."""
        leaving: socket.socket | None = None
        with self._lock:
            if self._closing:
                return False
            if len(self._connections) >= MAX_CONNECTIONS:
                leaving = next((s for s, c in self._connections.items() if not c.proven), None)
                if leaving is None:
                    return False
                del self._connections[leaving]
            self._connections[sock] = _Connection(thread)
        if leaving is not None:
            shut(leaving)  # its thread ends by that
        return True

    def _is_proven(self, sock: socket.socket) -> bool:
        with self._lock:
            connection = self._connections.get(sock)
            return connection is not None and connection.proven

    def _note_proven(self, sock: socket.socket) -> None:
        with self._lock:
            if (connection := self._connections.get(sock)) is not None:
                connection.proven = True

    def _serve(self, sock: socket.socket) -> None:
        try:
            tune(sock)
            while not self._closing:
                self._serve_one(sock)
        except FrameError as fault:
            logger.warning("tcp: request refused (%s): %s", fault.code, fault)
            _refuse(sock, fault)
        except OSError as fault:  # TimeoutError and ConnectionError are OSErrors
            logger.debug("tcp: connection ended: %s", fault)
        finally:
            shut(sock)
            with self._lock:
                self._connections.pop(sock, None)

    def _serve_one(self, sock: socket.socket) -> None:
        sock.settimeout(_IDLE_TIMEOUT_S if self._is_proven(sock) else _STRANGER_TIMEOUT_S)
        if not sock.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the reader closed the connection")
        kind, body = recv_frame(sock, time.monotonic() + _FRAME_TIMEOUT_S)
        if kind != KIND_READ:
            raise FrameError("malformed", f"a reader may not send frames of kind {kind}")
        request = parse_request(body)
        try:
            admit(request, self._arena, int(time.monotonic() * 1e3))
        except FrameError as fault:
            if fault.code == "token":
                raise
            _refuse(sock, fault)  # an honest reader with an old view: keep its connection
            return
        self._note_proven(sock)
        sock.settimeout(_SEND_TIMEOUT_S)
        buffers: list[memoryview | bytes] = [encode(KIND_DATA, {"blocks": len(request.blocks)})]
        if request.stop > request.start:
            for index, _ in request.blocks:
                buffers.append(self._arena.outgoing(BlockId(index), request.start, request.stop))
        send_all(sock, buffers)


def _refuse(sock: socket.socket, fault: FrameError) -> None:
    try:
        sock.settimeout(_REFUSE_TIMEOUT_S)
        sock.sendall(encode_refusal(fault))
    except OSError as unsent:
        logger.debug("tcp: refusal not delivered: %s", unsent)
