"""Backend over plain TCP sockets: works on any machine, and is what the others are downgraded to.

The owner runs a small server; the reader asks for (block, generation) pairs and receives header + payload
bytes straight into its arena memory. Plain threads and not asyncio: one blocking `sendall` per block releases
the GIL for the whole block and needs no hop through an event loop, and the number of connections is small
(one per concurrent reader, bounded by MAX_CONNECTIONS).

Frames are a fixed binary header, then a msgpack body of bounded size; there is no pickle. Hostile bytes get a
typed refusal and a closed connection. The reader presents the owner's random token, which it can only know
from the directory. This module does not know what a lease is worth, nor what the payload means.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from transport.arena import Arena
from transport.errors import TransportError
from transport.pulling import ReadFailed, run_pull, time_out
from transport.types import BlockId, BlockRef, Lease, Outcome, Transfer

logger = logging.getLogger(__name__)

SCHEMA: Final = 1
MAX_BODY: Final = 128 * 1024
"""Bytes of a msgpack body; both sides refuse a frame that announces more, before reading it."""
MAX_BLOCKS: Final = 1024
"""Blocks of one request; a larger pull is several requests on one connection."""
MAX_CONNECTIONS: Final = 64
FRAME: Final = struct.Struct("<4sBBHI")
"""magic, schema, kind, reserved (0), body bytes."""
MAGIC: Final = b"RLYT"
KIND_READ, KIND_DATA, KIND_REFUSED = 1, 2, 3

_FRAME_TIMEOUT_S: Final = 5.0  # from the first byte of a request to its last
_IDLE_TIMEOUT_S: Final = 60.0  # a silent connection is closed; the reader reconnects
_SEND_TIMEOUT_S: Final = 30.0  # one block into the socket of a reader that does not read
_JOIN_TIMEOUT_S: Final = 5.0

_REFUSALS: Final = {
    "stale": Outcome.STALE,
    "incarnation": Outcome.STALE,
    "layout": Outcome.LAYOUT_MISMATCH,
    "token": Outcome.PEER_GONE,
    "busy": Outcome.PEER_GONE,
    "malformed": Outcome.PEER_GONE,
}


class FrameError(Exception):
    """Bytes that are not one of our frames. `code` goes into the refusal."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What a reader asks for: blocks as (index, generation), of one life of the owner."""

    token: bytes
    incarnation: int
    stride: int
    blocks: tuple[tuple[int, int], ...]


# -- frames (pure) -----------------------------------------------------------------------------------------


def encode(kind: int, body: dict[str, Any]) -> bytes:
    """A frame of `kind` with a msgpack body."""
    packed = bytes(msgpack.packb(body, use_bin_type=True) or b"")
    return FRAME.pack(MAGIC, SCHEMA, kind, 0, len(packed)) + packed


def decode_header(data: bytes) -> tuple[int, int]:
    """(kind, body bytes) of a frame header.

    Raises:
        FrameError: wrong magic, schema or kind, or a body over MAX_BODY.
    """
    magic, schema, kind, reserved, nbytes = FRAME.unpack(data)
    if magic != MAGIC or reserved != 0:
        raise FrameError("malformed", "this is not a relay_cluster peer")
    if schema != SCHEMA:
        raise FrameError("malformed", f"frame schema {schema}, ours is {SCHEMA}: upgrade the older worker")
    if kind not in (KIND_READ, KIND_DATA, KIND_REFUSED):
        raise FrameError("malformed", f"unknown frame kind {kind}")
    if nbytes > MAX_BODY:
        raise FrameError("malformed", f"a body of {nbytes} bytes exceeds the limit of {MAX_BODY}")
    return kind, nbytes


def decode_body(data: bytes) -> dict[str, Any]:
    """The msgpack map of a frame.

    Raises:
        FrameError: not msgpack, not a map with string keys, or too large in any dimension.
    """
    try:
        body = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_BLOCKS,
            max_map_len=16,
            max_str_len=1024,
            max_bin_len=1024,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as fault:
        raise FrameError("malformed", f"the frame's body is not valid msgpack: {fault}") from fault
    if not isinstance(body, dict) or not all(isinstance(k, str) for k in body):
        raise FrameError("malformed", "the frame's body is not a map with text keys")
    return body


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64


def parse_request(body: dict[str, Any]) -> ReadRequest:
    """Check every field of a read request.

    Raises:
        FrameError: a field is missing or of another type.
    """
    token, incarnation, stride = body.get("token"), body.get("incarnation"), body.get("stride")
    blocks = body.get("blocks")
    if not isinstance(token, bytes) or not _is_count(incarnation) or not _is_count(stride):
        raise FrameError("malformed", "a read request needs token, incarnation and stride")
    if not isinstance(blocks, list) or not blocks:
        raise FrameError("malformed", "a read request needs a list of blocks")
    pairs: list[tuple[int, int]] = []
    for pair in blocks:
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_count(x) for x in pair)):
            raise FrameError("malformed", "a block is a pair [index, generation]")
        pairs.append((pair[0], pair[1]))
    return ReadRequest(token, int(incarnation or 0), int(stride or 0), tuple(pairs))


def admit(request: ReadRequest, arena: Arena, token: bytes) -> None:
    """Decide whether a request may be served.

    Raises:
        FrameError: wrong token, incarnation, stride or generation.
    """
    if not hmac.compare_digest(request.token, token):
        raise FrameError("token", "wrong token: the reader's directory entry is not of this worker")
    if request.incarnation != arena.incarnation:
        raise FrameError("incarnation", f"this is incarnation {arena.incarnation}, not {request.incarnation}")
    if request.stride != arena.stride:
        raise FrameError("layout", f"blocks here are {arena.stride} bytes with header, not {request.stride}")
    for index, generation in request.blocks:
        if index >= arena.num_blocks:
            raise FrameError("stale", f"no block {index} in an arena of {arena.num_blocks}")
        current = arena.generation(BlockId(index))
        if current != generation:
            raise FrameError("stale", f"block {index} has generation {current}, not {generation}")


# -- sockets -----------------------------------------------------------------------------------------------


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


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


class _Server:
    """Serves one arena. One accept thread, one thread per connection, all daemons, all joined by close."""

    def __init__(self, arena: Arena, host: str) -> None:
        self._arena = arena
        self.token = secrets.token_bytes(16)
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
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._acceptor = threading.Thread(target=self._accept, name=f"relay-tcp-{self.port}", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        self._closing = True
        # shutdown() wakes a thread blocked in accept() on Linux, close() does it elsewhere.
        _shut(self._listener)
        with self._lock:
            threads = list(self._connections.items())
        for sock, _ in threads:
            _shut(sock)
        self._acceptor.join(_JOIN_TIMEOUT_S)
        for _, thread in threads:
            thread.join(_JOIN_TIMEOUT_S)

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
            with self._lock:
                full = len(self._connections) >= MAX_CONNECTIONS or self._closing
                if not full:
                    self._connections[sock] = thread
            if full:
                _refuse(sock, FrameError("busy", f"{MAX_CONNECTIONS} readers are connected already"))
                _shut(sock)
            else:
                thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            _tune(sock)
            while not self._closing:
                self._serve_one(sock)
        except FrameError as fault:
            logger.warning("tcp: request refused (%s): %s", fault.code, fault)
            _refuse(sock, fault)
        except OSError as fault:  # TimeoutError and ConnectionError are OSErrors
            logger.debug("tcp: connection ended: %s", fault)
        finally:
            _shut(sock)
            with self._lock:
                self._connections.pop(sock, None)

    def _serve_one(self, sock: socket.socket) -> None:
        sock.settimeout(_IDLE_TIMEOUT_S)
        if not sock.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError("the reader closed the connection")
        kind, body = recv_frame(sock, time.monotonic() + _FRAME_TIMEOUT_S)
        if kind != KIND_READ:
            raise FrameError("malformed", f"a reader may not send frames of kind {kind}")
        request = parse_request(body)
        try:
            admit(request, self._arena, self.token)
        except FrameError as fault:
            if fault.code == "token":
                raise
            _refuse(sock, fault)  # an honest reader with an old view: keep its connection
            return
        sock.settimeout(_SEND_TIMEOUT_S)
        sock.sendall(encode(KIND_DATA, {"blocks": len(request.blocks)}))
        for index, _ in request.blocks:
            sock.sendall(self._arena.outgoing(BlockId(index)))


def _refuse(sock: socket.socket, fault: FrameError) -> None:
    try:
        sock.settimeout(1.0)
        sock.sendall(encode(KIND_REFUSED, {"code": fault.code, "detail": str(fault)}))
    except OSError as unsent:
        logger.debug("tcp: refusal not delivered: %s", unsent)


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError as fault:
        logger.debug("tcp: shutdown: %s", fault)
    sock.close()


# -- the backend -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Address:
    host: str
    port: int
    token: bytes


def _parse_address(data: bytes) -> _Address:
    try:
        body = decode_body(data)
    except FrameError as fault:
        raise ReadFailed(Outcome.NO_ROUTE, f"unreadable tcp address: {fault}") from fault
    host, port, token = body.get("host"), body.get("port"), body.get("token")
    if not isinstance(host, str) or not isinstance(port, int) or not isinstance(token, bytes):
        raise ReadFailed(Outcome.NO_ROUTE, "a tcp address needs host, port and token.")
    return _Address(host, port, token)


class TcpTransport:
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
        self._arena: Arena | None = None
        self._server: _Server | None = None
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, int], list[socket.socket]] = {}
        self._closed = False

    def register(self, arena: Arena) -> None:
        """Start the server for this arena.

        Raises:
            TransportError: the address cannot be bound, or an arena is registered already.
        """
        if self._server is not None:
            raise TransportError("tcp: register() was called twice; use one transport per arena.")
        self._server = _Server(arena, self._bind_host)
        self._arena = arena

    def address(self) -> bytes:
        """Host, port and token as msgpack.

        Raises:
            TransportError: no arena is registered.
        """
        if self._server is None:
            raise TransportError("tcp: address() before register(). Register the worker's arena first.")
        fields = {"host": self._advertise_host, "port": self._server.port, "token": self._server.token}
        return bytes(msgpack.packb(fields, use_bin_type=True) or b"")

    def pull(
        self,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        timeout_s: float,
        lease_deadline: float | None = None,
    ) -> Transfer:
        """See `transport.base.Transport.pull`."""
        if self._arena is None:
            raise TransportError("tcp: pull() before register(). Register the worker's arena first.")
        return run_pull(
            self.name,
            self._arena,
            lease,
            into,
            self._read,
            timeout_s=timeout_s,
            lease_deadline=lease_deadline,
        )

    def close(self) -> None:
        """Stop the server and close every connection."""
        self._closed = True
        with self._lock:
            idle = [sock for socks in self._idle.values() for sock in socks]
            self._idle.clear()
        for sock in idle:
            _shut(sock)
        if self._server is not None:
            self._server.close()

    def _read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> None:
        owner = lease.located.owner
        raw = owner.addresses.get(self.name)
        if raw is None or self._arena is None:
            raise ReadFailed(Outcome.NO_ROUTE, f"{owner.worker} has no tcp address.")
        peer = _parse_address(raw)
        where = f"{owner.worker} at {peer.host}:{peer.port}"
        try:
            self._read_with_retry(peer, lease, into, deadline)
        except TimeoutError as fault:
            # Nobody but this thread writes into the destination and its socket is closed: no late writes.
            raise time_out(self._arena, into, f"{where} did not answer within the deadline.") from fault
        except OSError as fault:
            raise ReadFailed(Outcome.PEER_GONE, f"{where}: {fault}") from fault
        except FrameError as fault:
            raise ReadFailed(Outcome.PEER_GONE, f"{where} sent bytes we cannot read: {fault}") from fault

    def _read_with_retry(
        self, peer: _Address, lease: Lease, into: Sequence[BlockId], deadline: float
    ) -> None:
        kept = self._take_idle(peer)
        if kept is not None:
            try:
                self._read_on(kept, peer, lease, into, deadline)
            except ConnectionError as fault:
                # The server closes idle connections, and a restarted one knows nothing of them.
                logger.debug("tcp: kept connection to %s:%d was dead (%s)", peer.host, peer.port, fault)
            else:
                return
        self._read_on(self._connect(peer, deadline), peer, lease, into, deadline)

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
        _tune(sock)
        return sock

    def _take_idle(self, peer: _Address) -> socket.socket | None:
        with self._lock:
            kept = self._idle.get((peer.host, peer.port))
            return kept.pop() if kept else None

    def _read_on(
        self, sock: socket.socket, peer: _Address, lease: Lease, into: Sequence[BlockId], deadline: float
    ) -> None:
        refs = lease.located.segment.blocks
        reusable = False
        try:
            for at in range(0, len(refs), MAX_BLOCKS):
                part = slice(at, at + MAX_BLOCKS)
                self._read_part(sock, peer, lease.located.owner.incarnation, refs[part], into[part], deadline)
            reusable = True
        except ReadFailed as failed:
            reusable = failed.outcome is Outcome.STALE  # a refusal leaves the stream in order
            raise
        finally:
            self._put_back(sock, peer, reusable)

    def _put_back(self, sock: socket.socket, peer: _Address, reusable: bool) -> None:
        with self._lock:
            if reusable and not self._closed:
                self._idle.setdefault((peer.host, peer.port), []).append(sock)
                return
        _shut(sock)

    def _read_part(
        self,
        sock: socket.socket,
        peer: _Address,
        incarnation: int,
        refs: Sequence[BlockRef],
        into: Sequence[BlockId],
        deadline: float,
    ) -> None:
        arena = self._arena
        if arena is None:
            raise TransportError("tcp: read before register()")
        request = {
            "token": peer.token,
            "incarnation": incarnation,
            "stride": arena.stride,
            "blocks": [[r.block, r.generation] for r in refs],
        }
        sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        sock.sendall(encode(KIND_READ, request))
        kind, body = recv_frame(sock, deadline)
        if kind == KIND_REFUSED:
            code = str(body.get("code"))
            outcome = _REFUSALS.get(code, Outcome.PEER_GONE)
            raise ReadFailed(outcome, f"refused by the owner ({code}): {body.get('detail')}.")
        if kind != KIND_DATA or body.get("blocks") != len(refs):
            raise FrameError("malformed", f"expected {len(refs)} blocks, got kind {kind} with {body}")
        for block in into:
            view = arena.landing(block)
            recv_exact(sock, view, deadline)
            arena.landed(block, view)
