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
from transport.backend import Backend
from transport.pulling import ReadFailed, Reading, plan_steps, time_out
from transport.types import BlockId, Lease, Outcome

_ARENAS: Final[dict[bytes, Arena]] = {}
_ARENAS_LOCK: Final = threading.Lock()
_STEP_BYTES: Final = 256 << 10  # verified while still in the processor's cache


class InProcessTransport(Backend):
    """Copies blocks between arenas that live in this process."""

    name = "inprocess"

    def __init__(self) -> None:
        self._token = secrets.token_bytes(16)

    def _start(self, arena: Arena) -> None:
        with _ARENAS_LOCK:
            _ARENAS[self._token] = arena

    def _address(self) -> bytes:
        """A random token, known to this process only."""
        return self._token

    def close(self) -> None:
        """Withdraw the arena from the registry."""
        with _ARENAS_LOCK:
            _ARENAS.pop(self._token, None)

    def read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> Reading:
        """Copy without verifying: see `transport.pulling.Read`."""
        owner = lease.located.owner
        mine, token = self._ends(lease)
        with _ARENAS_LOCK:
            theirs = _ARENAS.get(token)
        if theirs is None:
            raise ReadFailed(Outcome.PEER_GONE, f"{owner.worker} has closed, or lives in another process.")
        if theirs.stride != mine.stride:
            raise ReadFailed(Outcome.LAYOUT_MISMATCH, f"strides {theirs.stride} and {mine.stride} differ.")
        refs = lease.located.segment.blocks
        for step in plan_steps(mine, len(into), _STEP_BYTES, len(into)):
            start, stop = mine.part_range(step.part)
            for at in range(step.first, step.stop):
                if time.monotonic() >= deadline:
                    raise time_out(mine, into, f"{owner.worker}: the copy exceeded its deadline.")
                if not 0 <= refs[at].block < theirs.num_blocks:
                    raise ReadFailed(Outcome.STALE, f"{owner.worker} has no block {refs[at].block}.")
                view = mine.landing(into[at], start, stop)
                view[:] = theirs.outgoing(refs[at].block, start, stop)
                mine.landed(into[at], view, start)
                # Part 0 brought the header, which tells as well; later a block may have been freed meanwhile.
                if step.part and theirs.generation(refs[at].block) != refs[at].generation:
                    raise ReadFailed(Outcome.STALE, f"block {refs[at].block} was freed during the pull.")
            yield step
