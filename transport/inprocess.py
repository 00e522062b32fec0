"""Backend for arenas of one process: a registry and a memory copy.

It is the reference of the conformance suite, and good for tests and single-process use. It does not know
of networks; an address means nothing in another process.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Sequence
from typing import Final

from transport.arena import Arena
from transport.errors import TransportError
from transport.pulling import ReadFailed, run_pull, time_out
from transport.types import BlockId, Lease, Outcome, Transfer

_ARENAS: Final[dict[bytes, Arena]] = {}
_ARENAS_LOCK: Final = threading.Lock()


class InProcessTransport:
    """Copies blocks between arenas that live in this process."""

    name = "inprocess"

    def __init__(self) -> None:
        self._token = secrets.token_bytes(16)
        self._arena: Arena | None = None

    def register(self, arena: Arena) -> None:
        """Make the arena readable within this process.

        Raises:
            TransportError: an arena is registered already.
        """
        if self._arena is not None:
            raise TransportError("inprocess: register() was called twice; use one transport per arena.")
        self._arena = arena
        with _ARENAS_LOCK:
            _ARENAS[self._token] = arena

    def address(self) -> bytes:
        """A random token, known to this process only."""
        return self._token

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
            raise TransportError("inprocess: pull() before register(). Register the worker's arena first.")
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
        """Withdraw the arena from the registry."""
        with _ARENAS_LOCK:
            _ARENAS.pop(self._token, None)

    def _read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> None:
        owner = lease.located.owner
        mine = self._arena
        token = owner.addresses.get(self.name)
        if mine is None or token is None:
            raise ReadFailed(Outcome.NO_ROUTE, f"{owner.worker} has no inprocess address.")
        with _ARENAS_LOCK:
            theirs = _ARENAS.get(token)
        if theirs is None:
            raise ReadFailed(Outcome.PEER_GONE, f"{owner.worker} has closed, or lives in another process.")
        if theirs.stride != mine.stride:
            raise ReadFailed(Outcome.LAYOUT_MISMATCH, f"strides {theirs.stride} and {mine.stride} differ.")
        for block, ref in zip(into, lease.located.segment.blocks, strict=True):
            if time.monotonic() >= deadline:
                raise time_out(mine, into, f"{owner.worker}: the copy exceeded its deadline.")
            if not 0 <= ref.block < theirs.num_blocks:
                raise ReadFailed(Outcome.STALE, f"{owner.worker} has no block {ref.block}.")
            view = mine.landing(block)
            view[:] = theirs.outgoing(ref.block)
            mine.landed(block, view)
