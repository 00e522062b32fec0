"""The owner's end of the ucx backend: one thread that answers requests for one arena.

UCX's Python binding has no remote read, so the owner takes part: a request comes as an active message (a
frame of `frames`), the answer goes back as one, and the bytes follow as tagged messages straight from the
arena. The thread polls while there is work and sleeps in epoll otherwise.

ucxx cannot be told an address to listen on: the port is open on every device, also where the worker's address
is loopback and no data is taken from elsewhere (`auto` therefore leaves ucx out there). What a stranger may
read is bounded by the token of a lease.
"""

from __future__ import annotations

import logging
import select
import threading
import time
from typing import Any, Final

import numpy as np

from transport.arena import Arena
from transport.errors import TransportError
from transport.frames import (
    FRAME,
    KIND_DATA,
    KIND_READ,
    MAX_BLOCKS,
    MAX_BODY,
    FrameError,
    admit,
    decode_body,
    decode_header,
    encode,
    encode_refusal,
    is_count,
    parse_request,
)
from transport.types import BlockId
from transport.ucx_binding import Binding, close_endpoint

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
_SPINS: Final = 200  # polls without sleep: the next request of a pull is there by then
_SLEEP_S: Final = 0.1  # longest sleep; traffic ends it at once
_SEND_TIMEOUT_S: Final = 30.0  # to a reader that does not receive
_STRANGER_TIMEOUT_S: Final = 5.0  # until the first request with a good token
_CLOSE_TIMEOUT_S: Final = 5.0


def tag_of(api: Any, ticket: int, block: int) -> Any:
    """Tag of a block's bytes. A ticket is the reader's name for one of its requests."""
    return api.UCXXTag((ticket * MAX_BLOCKS + block) % (1 << 64))


def frame_of(data: Any) -> tuple[int, dict[str, Any]]:
    """(kind, body) of an active message.

    Raises:
        FrameError: it is not one of our frames.
    """
    raw = bytes(memoryview(data))
    if not FRAME.size <= len(raw) <= FRAME.size + MAX_BODY:
        raise FrameError("malformed", f"a message of {len(raw)} bytes is no frame")
    kind, nbytes = decode_header(raw[: FRAME.size])
    if len(raw) != FRAME.size + nbytes:
        raise FrameError("malformed", f"a frame of {len(raw)} bytes announces a body of {nbytes}")
    return kind, decode_body(raw[FRAME.size :])


class _Connection:
    """One reader."""

    def __init__(self, endpoint: Any) -> None:
        self.endpoint = endpoint
        self.receiving: Any = None
        self.sending: list[Any] = []
        self.sending_until = float("inf")
        self.refused = False
        # Infinite once it has shown a good token.
        self.stranger_until = time.monotonic() + _STRANGER_TIMEOUT_S


class UcxServer:
    """Serves one arena.

    Args:
        loopback: see `Binding.make_worker`.

    Raises:
        TransportError: UCX does not come up.

    Attributes:
        port: where readers connect.
    """

    def __init__(self, binding: Binding, arena: Arena, *, loopback: bool = True) -> None:
        self._binding, self._arena = binding, arena
        self._worker = binding.make_worker(loopback=loopback)
        self._connections: list[_Connection] = []
        self._closing = False
        try:
            self._listener: Any = binding.api.UCXListener.create(
                worker=self._worker, port=0, cb_func=self._connected
            )
        except (binding.api.UCXError, RuntimeError) as fault:
            raise TransportError(f"ucx: cannot listen: {fault}.") from fault
        self.port: int = self._listener.port
        self._thread = threading.Thread(target=self._run, name=f"relay-ucx-{self.port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread and all connections. Idempotent."""
        self._closing = True
        self._thread.join(_CLOSE_TIMEOUT_S)

    # -- inside the thread -----------------------------------------------------------------------------

    def _connected(self, request: Any) -> None:
        endpoint = self._listener.create_endpoint_from_conn_request(request, endpoint_error_handling=True)
        self._connections.append(_Connection(endpoint))

    def _run(self) -> None:
        idle = 0
        while not self._closing:
            try:
                idle = 0 if self._round() else idle + 1
                if idle > _SPINS and self._worker.arm():
                    select.select([self._worker.epoll_file_descriptor], [], [], _SLEEP_S)
            except (self._binding.api.UCXError, RuntimeError) as fault:
                logger.warning("ucx: the owner's thread goes on after: %r", fault)
                time.sleep(_SLEEP_S)
        for connection in self._connections:
            close_endpoint(connection.endpoint)
        self._worker.progress()
        self._connections.clear()
        self._listener = None

    def _round(self) -> bool:
        """Serve what is there; whether there was anything."""
        self._worker.progress()
        busy = False
        for connection in list(self._connections):
            try:
                busy = self._serve(connection) or busy
            except FrameError as fault:
                logger.warning("ucx: request refused (%s): %s", fault.code, fault)
                self._send(connection, encode_refusal(fault))
                connection.refused = True
            except (self._binding.api.UCXError, RuntimeError) as fault:
                logger.debug("ucx: connection ended: %r", fault)
                self._drop(connection)
        return busy

    def _serve(self, connection: _Connection) -> bool:
        endpoint = connection.endpoint
        had = len(connection.sending)
        connection.sending = [sent for sent in connection.sending if not sent.completed]
        now = time.monotonic()
        stuck = bool(connection.sending) and now > connection.sending_until
        late = stuck or now > connection.stranger_until
        if not endpoint.alive or late or (connection.refused and not connection.sending):
            self._drop(connection)
            return True
        if connection.receiving is None and not connection.refused and endpoint.am_probe():
            connection.receiving = endpoint.am_recv()
        received = connection.receiving
        if received is None or not received.completed:
            return had > 0
        connection.receiving = None
        received.check_error()
        data = received.recv_buffer  # to be taken once
        if data is None:  # the reader closed
            self._drop(connection)
        else:
            self._answer(connection, data)
        return True

    def _answer(self, connection: _Connection, data: Any) -> None:
        # ucxx sorts active messages by an endpoint's handle, and a new endpoint may get the handle of a dead
        # one, with what that had sent and nobody had taken. Answers therefore carry the request's ticket.
        if len(self._connections) > MAX_CONNECTIONS:
            raise FrameError("busy", f"{MAX_CONNECTIONS} readers are connected already")
        kind, body = frame_of(data)
        ticket = body.get("ticket")
        if kind != KIND_READ or not isinstance(ticket, int) or not is_count(ticket):
            raise FrameError("malformed", f"not a read request with a ticket (frame of kind {kind})")
        request = parse_request(body)
        try:
            admit(request, self._arena, int(time.monotonic() * 1e3))
        except FrameError as fault:
            # An honest reader with an old view; or a request of a dead endpoint, which must not cost the new
            # one its connection. Who never shows a good token has little time anyway.
            logger.log(
                logging.WARNING if fault.code == "token" else logging.DEBUG,
                "ucx: refused (%s): %s",
                fault.code,
                fault,
            )
            self._send(connection, encode_refusal(fault, ticket=ticket))
            return
        connection.stranger_until = float("inf")
        self._send(connection, encode(KIND_DATA, {"blocks": len(request.blocks), "ticket": ticket}))
        if request.start == request.stop:
            return
        for at, (index, _) in enumerate(request.blocks):
            view = self._arena.outgoing(BlockId(index), request.start, request.stop)
            array = self._binding.array(np.frombuffer(view, dtype=np.uint8))
            sent = connection.endpoint.tag_send(array, tag=tag_of(self._binding.api, ticket, at))
            connection.sending.append(_Sending(sent, array))

    def _send(self, connection: _Connection, frame: bytes) -> None:
        array = self._binding.array(np.frombuffer(frame, dtype=np.uint8))
        connection.sending.append(_Sending(connection.endpoint.am_send(array), array))
        connection.sending_until = time.monotonic() + _SEND_TIMEOUT_S

    def _drop(self, connection: _Connection) -> None:
        close_endpoint(connection.endpoint)
        self._connections.remove(connection)


class _Sending:
    """A message on its way; keeps its bytes."""

    def __init__(self, request: Any, array: Any) -> None:
        self._request, self._array = request, array

    @property
    def completed(self) -> bool:
        return self._request.completed
