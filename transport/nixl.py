"""Backend over NIXL (UCX): one-sided reads of a peer's registered arena.

Two agents per worker, because NIXL's Python API fixes the progress thread's delay at 0, which spins a core:

* the *owner* agent serves reads. Its progress thread sleeps in epoll for at most OWNER_POLL_US, which is set
  through the binding's own config object.
* the *puller* agent reads. It has no progress thread: the pulling threads poll it, under a lock.

Traps that shape this file, all measured: a read of a stopped peer hangs for ever, so each transfer has our
own deadline; a timed-out read may still land later, so its destination is quarantined until the puller agent
is destroyed; a failed peer stays failed until its metadata is removed and added again; a read of reused
memory succeeds, so generation and checksum are verified after every read (in `pulling`).

One trap is only half closed: over tcp, UCX ends the *owner's* process ("Fatal: unexpected error: Endpoint
timeout", ucp_request.inl) when it answers reads that came over a connection which has failed meanwhile; no
setting of UCX prevents that, neither its error handling mode nor its keepalives. It happens to an owner that
was stopped, or whose cable was out, when a reader gave up on it and closed the connection: it goes on, and
finds what was asked of it. So a reader that has given up keeps the connection, and takes what still comes,
for FAREWELL_S. An owner that was away for longer is ended all the same, and Ray starts its worker again.

This module does not know what a lease is worth, nor what the payload means.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from transport.arena import HEADER_NBYTES, Arena
from transport.backend import Backend
from transport.errors import TransportError
from transport.loopback import is_loopback
from transport.nixl_binding import INSTALL_HINT, load_bindings, make_agent, probe, register_arena
from transport.nixl_puller import Address, Late, Posts, Puller
from transport.pulling import ReadFailed, Reading, check_headers, plan_steps
from transport.types import BlockId, Lease, Outcome

__all__ = ["INSTALL_HINT", "Address", "NixlTransport", "load_bindings", "probe"]

logger = logging.getLogger(__name__)

STEP_BLOCKS: Final = 1024
"""Descriptors of one posted transfer."""
FAREWELL_S: Final = 30.0
"""How long a puller agent is kept after a timed-out read for what may still come; see above. Its destination
blocks stay quarantined meanwhile."""


class NixlTransport(Backend):
    """One-sided reads through NIXL.

    Args:
        worker: name of this worker; part of the agents' names, with the arena's incarnation.
        host: this node's address as peers see it. Loopback: nobody else can connect.
    """

    name = "nixl"

    def __init__(self, worker: str = "worker", host: str = "127.0.0.1") -> None:
        self._worker = worker
        self._loopback = is_loopback(host)
        self._bind = load_bindings()
        self._lock = threading.Lock()
        self._owner: Any = None
        self._packed = b""
        self._puller: Puller | None = None
        self._retiring: list[Puller] = []
        self._renewals = 0
        self._closed = False
        self._end = threading.Event()

    def _start(self, arena: Arena) -> None:
        """Create both agents and register the arena. Raises TransportError: UCX does not come up."""
        name = f"{self._worker}.{arena.incarnation}.owner"
        owner = make_agent(self._bind, name, progress=True, loopback=self._loopback)
        register_arena(self._bind, owner, arena)
        self._packed = Address(
            agent=name,
            metadata=owner.getLocalMD(),
            base=arena.base_address(),
            stride=arena.stride,
            blocks=arena.num_blocks,
            kind=arena.device.type,
            device=arena.device.index or 0,
        ).pack()
        self._owner = owner
        self._puller = self._new_puller(arena)

    def _address(self) -> bytes:
        """See `Address`."""
        return self._packed

    def stats(self) -> dict[str, int]:
        """renewals: puller agents replaced after a timeout; retiring: those not yet destroyed."""
        with self._lock:
            return {"renewals": self._renewals, "retiring": len(self._retiring)}

    def close(self) -> None:
        """End both agents; pulls in flight end theirs when they leave."""
        self._end.set()
        with self._lock:
            self._closed = True
            if self._puller is not None:
                self._retire(self._puller)
        self._reap()
        self._owner = None

    # -- reading ---------------------------------------------------------------------------------------

    def read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> Reading:
        """Read without verifying: see `transport.pulling.Read`."""
        owner = lease.located.owner
        arena, raw = self._ends(lease)
        address = Address.unpack(raw)
        if address.stride != arena.stride:
            raise ReadFailed(Outcome.LAYOUT_MISMATCH, f"strides {address.stride} and {arena.stride} differ.")
        if any(not 0 <= r.block < address.blocks for r in lease.located.segment.blocks):
            raise ReadFailed(Outcome.STALE, f"{owner.worker} has no such block.")
        puller = self._enter(arena)
        try:
            with puller.lock:
                puller.forget_other_lives(f"{owner.worker}.", address.agent)
                peer = puller.connect(address)
            try:
                yield from self._read_steps(Posts(puller, peer, address, deadline), arena, lease, into)
            finally:
                with puller.lock:
                    peer.in_flight -= 1
        finally:
            self._leave(puller)

    def _read_steps(self, posts: Posts, arena: Arena, lease: Lease, into: Sequence[BlockId]) -> Reading:
        """Several transfers at a time: while one is verified, the next ones travel."""
        refs, pace = lease.located.segment.blocks, posts.peer.pace
        steps = plan_steps(arena, len(into), pace.step_bytes, STEP_BLOCKS)
        begin = time.monotonic()
        try:
            for step in steps:
                part = slice(step.first, step.stop)
                posts.start(step, refs[part], into[part], arena.part_range(step.part))
                while posts.waiting and (posts.full or posts.first_is_done()):
                    if step is steps[-1] and len(posts.waiting) == 1:
                        break  # the very last one
                    yield posts.finish()
            while len(posts.waiting) > 1:
                yield posts.finish()
            if posts.waiting:
                last = posts.finish()
                landed = time.monotonic()
                pace.learn(len(into) * arena.stride, landed - begin)
                if last.part:  # the header came with part 0: is the block still the leased one?
                    posts.start(last, refs, into, (0, HEADER_NBYTES))
                    posts.finish()
                    pace.round_trip_s = time.monotonic() - landed
                    check_headers(arena, lease, into)
                yield last
        except posts.puller.faults as fault:
            posts.peer.poisoned = True
            raise ReadFailed(Outcome.PEER_GONE, f"{posts.address.agent}: {fault}.") from fault
        except Late:
            raise self._timed_out(posts, into) from None
        finally:
            # Ended early: what is still in flight would land in blocks that their caller gets back.
            if not posts.settle():
                raise self._timed_out(posts, into)

    def _timed_out(self, posts: Posts, into: Sequence[BlockId]) -> ReadFailed:
        arena, puller = self._arena, posts.puller
        if arena is None:
            raise TransportError("nixl: read before register()")
        posts.peer.poisoned = True
        posts.abandon()
        with self._lock:
            arena.quarantine(into)
            puller.quarantined.extend(into)
            self._retire(puller)
        return ReadFailed(
            Outcome.TIMED_OUT,
            f"{posts.address.agent} did not deliver within the deadline; {len(into)} destination blocks stay "
            "quarantined until the puller agent is renewed.",
        )

    # -- life of the puller ----------------------------------------------------------------------------

    def _new_puller(self, arena: Arena) -> Puller:
        name = f"{self._worker}.{arena.incarnation}.pull{self._renewals}"
        return Puller(self._bind, name, arena, loopback=self._loopback)

    def _enter(self, arena: Arena) -> Puller:
        with self._lock:
            if self._closed:
                raise ReadFailed(Outcome.NO_ROUTE, "this worker's nixl transport is closed.")
            if self._puller is None:
                self._renewals += 1
                try:
                    self._puller = self._new_puller(arena)
                except TransportError as fault:
                    raise ReadFailed(Outcome.NO_ROUTE, str(fault)) from fault
                logger.info("nixl: puller agent renewed (%d)", self._renewals)
            self._puller.pulls += 1
            return self._puller

    def _leave(self, puller: Puller) -> None:
        with self._lock:
            puller.pulls -= 1
        self._reap()

    def _retire(self, puller: Puller) -> None:
        """No new pull enters a retired agent. The caller holds `_lock`."""
        if not puller.retired:
            puller.retired = True
            self._retiring.append(puller)
        if self._puller is puller:
            self._puller = None

    def _reap(self) -> None:
        """Destroy retired agents that nobody uses; only then may their quarantined blocks be reused."""
        with self._lock:
            done = [p for p in self._retiring if p.pulls == 0]
            self._retiring = [p for p in self._retiring if p.pulls > 0]
        for puller in done:
            if puller.late and not self._closed:
                threading.Thread(
                    target=self._farewell, args=(puller,), name="relay-nixl-farewell", daemon=True
                ).start()
            else:
                self._destroy(puller)

    def _farewell(self, puller: Puller) -> None:
        """Take what a timed-out owner may still send before the connection goes."""
        if not puller.drain(time.monotonic() + FAREWELL_S, self._end):
            logger.info("nixl: %d late transfers have not ended", len(puller.late))
        self._destroy(puller)

    def _destroy(self, puller: Puller) -> None:
        with puller.lock:
            puller.destroy()
        if self._arena is not None and puller.quarantined:
            freed = self._arena.release_quarantine(puller.quarantined)
            logger.info("nixl: puller agent ended, %d quarantined blocks are free again", freed)
