"""An owner of sealed blocks on another host, for the transport's conformance suite."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from tests.multihost.rig import Host
from tests.transport.rigs import LocalOwner, RemoteOwner, _context
from transport.arena import Arena
from transport.auto import make_transport
from transport.settings import TransportSettings
from transport.types import Incarnation, NodeId, Owner, WorkerId

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 0x40000


def move_to(init: int) -> None:
    """Move the calling thread, and what it starts, to the network, memory and name of a host.

    Its files stay ours, but for /sys, where UCX looks for network devices: in the host's own file system
    there would be no /proc/self for a process that was born outside.

    Args:
        init: the host's first process.

    Raises:
        OSError: it is gone, or we may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> None:
        if result != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{what} of {init}: {os.strerror(number)}")

    for kind in ("net", "ipc", "uts"):
        fd = os.open(f"/proc/{init}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            check(libc.setns(fd, 0), f"{kind} namespace")
        finally:
            os.close(fd)
    check(libc.unshare(_CLONE_NEWNS), "mounts")
    check(libc.mount(None, b"/", None, _MS_REC_PRIVATE, None), "private mounts")
    check(libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None), "/sys")


class _OwnerThere(LocalOwner):
    """A `LocalOwner` that peers reach at an address of its host."""

    def __init__(
        self, backend: str, budget: int, block_nbytes: int, parts: Sequence[int], address: str, name: str
    ) -> None:
        incarnation = Incarnation(7)
        self.arena = Arena(budget, block_nbytes, incarnation=incarnation, parts=parts)
        settings = TransportSettings(backend=backend)  # type: ignore[arg-type]
        self.transport = make_transport(settings, worker=name, host=address)
        self.transport.register(self.arena)
        addresses, key = self.transport.addresses(), self.arena.pull_key
        self.owner = Owner(WorkerId(name), incarnation, NodeId(address), addresses, key)


def _serve_there(conn: Connection, init: int, env: dict[str, str], args: tuple[Any, ...]) -> None:
    move_to(init)
    os.environ.update(env)  # before the first agent exists
    side = _OwnerThere(*args)
    conn.send(side.owner)
    while True:
        command, *rest = conn.recv()
        conn.send(getattr(side, command)(*rest))


class FarOwner(RemoteOwner):
    """The owner in a process on another host."""

    def __init__(
        self,
        host: Host,
        backend: str,
        budget: int,
        block_nbytes: int,
        env: dict[str, str],
        parts: Sequence[int] = (),
        name: str = "owner",
    ) -> None:
        self._conn, theirs = _context().Pipe()
        args = (backend, budget, block_nbytes, tuple(parts), host.address, name)
        self.process = _context().Process(
            target=_serve_there, args=(theirs, host.init, env, args), daemon=True
        )
        self.process.start()
        theirs.close()
        self.owner: Owner = self._reply()
