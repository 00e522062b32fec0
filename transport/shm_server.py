"""The owner's end of the shm backend: hands a read-only descriptor of its arena to readers of this host.

A socket with a random name that is no file (abstract: it goes with the process, and is seen in one network
namespace only). A reader must be of the same user, which the kernel says, and must present the token from the
directory and the owner's incarnation. One message each way:

    reader                                owner
      HELLO magic, incarnation, token ---->   same user? right token? right life?
                                      <----   ANSWER status, incarnation, bytes + descriptor (SCM_RIGHTS)

The connection then stays open and idle: its end tells either side that the other is gone. One thread for all
of it; the same thread watches the connections that this worker has as a reader.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, cast

from transport.arena import Arena
from transport.errors import TransportError

logger = logging.getLogger(__name__)

HELLO: Final = struct.Struct("<4sIQ16s")
"""magic, schema, incarnation, token."""
ANSWER: Final = struct.Struct("<4sIQQ")
"""magic, status, incarnation, bytes of the arena."""
MAGIC: Final = b"RLYM"
SCHEMA: Final = 1
ACCEPTED, WRONG_TOKEN, WRONG_LIFE, BUSY, MALFORMED = range(5)
"""What an ANSWER says."""
MAX_CONNECTIONS: Final = 256
_CREDENTIALS: Final = struct.Struct("iII")  # pid, uid, gid
_HELLO_TIMEOUT_S: Final = 5.0
_JOIN_TIMEOUT_S: Final = 5.0


def peer_uid(sock: socket.socket) -> int:
    """User of the other end, as the kernel knows it."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


@dataclass(slots=True)
class _Guest:
    """A reader's connection. `until`: time.monotonic() by which its HELLO must be here; None: it was."""

    sock: socket.socket
    until: float | None


class ShmServer:
    """Serves one arena, and watches connections to other owners.

    Raises:
        TransportError: the socket cannot be had.

    Attributes:
        name: of the socket.
        token: what a reader must present.
    """

    def __init__(self, arena: Arena, fd: int) -> None:
        self._arena, self._fd = arena, fd
        self.name = f"relay-{secrets.token_hex(16)}"
        self.token = secrets.token_bytes(16)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(abstract(self.name))
            self._listener.listen(MAX_CONNECTIONS)
            self._listener.setblocking(False)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as fault:
            self._listener.close()
            raise TransportError(f"shm: no socket for readers of this host: {fault}.") from fault
        self._guests: dict[socket.socket, _Guest] = {}
        self._watched: deque[tuple[socket.socket, Callable[[], None]]] = deque()
        self._lock = threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"relay-shm-{self.name[6:14]}", daemon=True)
        self._thread.start()

    def watch(self, sock: socket.socket, on_end: Callable[[], None]) -> None:
        """Call `on_end` in this server's thread when the other end of `sock` closes; it closes `sock`. A
        closed server calls nobody."""
        with self._lock:
            if not self._closing:
                self._watched.append((sock, on_end))
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread and the connections of readers. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._thread.join(_JOIN_TIMEOUT_S)
        os.close(self._wake)

    # -- inside the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, lambda: self._accept(selector))
            selector.register(self._wake, selectors.EVENT_READ, lambda: self._awake(selector))
            while not self._closing:
                try:
                    for key, _ in selector.select(self._patience()):
                        cast("Callable[[], None]", key.data)()
                    self._show_out(selector)
                except OSError as fault:
                    logger.warning("shm: the owner's thread goes on after: %s", fault)
                    time.sleep(0.1)  # out of file descriptors: do not spin
        for sock in (self._listener, *self._guests):
            sock.close()
        self._guests.clear()
        self._watched.clear()  # never looked at: who asked holds this server, and would never be given back

    def _awake(self, selector: selectors.BaseSelector) -> None:
        os.eventfd_read(self._wake)
        while self._watched:
            sock, on_end = self._watched.popleft()
            selector.register(sock, selectors.EVENT_READ, lambda s=sock, e=on_end: _ended(selector, s, e))

    def _patience(self) -> float | None:
        """Seconds until the next HELLO is late."""
        waiting = [g.until for g in self._guests.values() if g.until is not None]
        return max(0.0, min(waiting) - time.monotonic()) if waiting else None

    def _show_out(self, selector: selectors.BaseSelector) -> None:
        now = time.monotonic()
        for guest in list(self._guests.values()):
            if guest.until is not None and guest.until <= now:
                self._drop(selector, guest)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        uid = peer_uid(sock)
        if uid != os.geteuid():
            logger.warning("shm: a process of user %d wanted to read this arena; refused", uid)
            sock.close()
            return
        guest = _Guest(sock, time.monotonic() + _HELLO_TIMEOUT_S)
        self._guests[sock] = guest
        selector.register(sock, selectors.EVENT_READ, lambda: self._hear(selector, guest))

    def _hear(self, selector: selectors.BaseSelector, guest: _Guest) -> None:
        try:
            said = guest.sock.recv(HELLO.size + 1)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said or guest.until is None or not self._answer(guest, said):
            self._drop(selector, guest)

    def _answer(self, guest: _Guest, said: bytes) -> bool:
        """Answer a HELLO; whether the reader may stay."""
        status = self._judge(said)
        answer = ANSWER.pack(MAGIC, status, self._arena.incarnation, self._arena.nbytes)
        try:
            if status != ACCEPTED:
                logger.warning("shm: a reader was refused (status %d)", status)
                guest.sock.send(answer)
                return False
            socket.send_fds(guest.sock, [answer], [self._fd])
        except OSError as fault:
            logger.debug("shm: answer not delivered: %s", fault)
            return False
        guest.until = None
        return True

    def _judge(self, said: bytes) -> int:
        if len(said) != HELLO.size:
            return MALFORMED
        magic, schema, incarnation, token = HELLO.unpack(said)
        if (magic, schema) != (MAGIC, SCHEMA):
            return MALFORMED
        if not hmac.compare_digest(token, self.token):
            return WRONG_TOKEN
        if incarnation != self._arena.incarnation:
            return WRONG_LIFE
        return BUSY if len(self._guests) > MAX_CONNECTIONS else ACCEPTED

    def _drop(self, selector: selectors.BaseSelector, guest: _Guest) -> None:
        selector.unregister(guest.sock)
        del self._guests[guest.sock]
        guest.sock.close()


def abstract(name: str) -> str:
    """The address of an abstract socket."""
    return "\0" + name


def _ended(selector: selectors.BaseSelector, sock: socket.socket, on_end: Callable[[], None]) -> None:
    selector.unregister(sock)  # whatever it is that came: an owner says nothing after its answer
    on_end()
