"""Backend over NIXL (UCX): one-sided reads of a peer's registered arena.

Two agents per worker, because NIXL's Python API fixes the progress thread's delay at 0, which spins a core:

* the *owner* agent serves reads. Its progress thread sleeps in epoll for at most OWNER_POLL_US, which is set
  through the binding's own config object.
* the *puller* agent reads. It has no progress thread: the pulling threads poll it, under a lock.

Traps that shape this file, all measured: a read of a stopped peer hangs for ever, so each transfer has our
own deadline; a timed-out read may still land later, so its destination is quarantined until the puller agent
is destroyed; a failed peer stays failed until its metadata is removed and added again; a read of reused
memory succeeds, so generation and checksum are verified after every read (in `pulling`).

One trap is left: over tcp, UCX ends the owner's process ("Fatal: unexpected error: Endpoint timeout") when it
has something to send on a connection that has failed: sometimes when a reader gave up while the owner was
stopped or its cable was out, and the owner then goes on. Readers that are merely killed do it no harm.

This module does not know what a lease is worth, nor what the payload means.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import msgpack
import numpy as np

from transport.arena import HEADER_NBYTES, Arena
from transport.errors import TransportError
from transport.pulling import Landed, OnPart, ReadFailed, Reading, check_headers, plan_steps, run_pull
from transport.types import BlockId, BlockRef, Lease, Outcome, Transfer

logger = logging.getLogger(__name__)

SCHEMA: Final = 2
OWNER_POLL_US: Final = 10_000
"""Longest sleep of the owner agent's progress thread; traffic wakes it at once (4 KiB over tcp: 60-260 us at
any value). Idle CPU of the owner's process, 2 cores, nixl-cu12 1.5.1: 0 us -> a full core, 100 and 1,000 us
-> 1.7-2.3 % of a core, 10,000 us -> 0.7 %, 100,000 us -> 0.1 %."""
STEP_BYTES: Final = 1 << 20
"""Bytes of one posted transfer. A post over shared memory blocks for its whole copy, holding the agent's
lock; steps let the deadline and other pulls have their turn, and are verified while still in the cache."""
STEP_BLOCKS: Final = 1024
"""Descriptors of one posted transfer."""

# UCX ends the *owner's* process ("Fatal: unexpected error: Endpoint timeout") when the kernel gives up one of
# its connections: 4 s after a cable was pulled with keepalives of a second. Pulls have their own deadlines,
# so the kernel is told to be patient. CONN_NB: else the first word to a host that cannot be reached blocks
# for 72 s, whatever the deadline. The sizes double tcp bandwidth.
_UCX_DEFAULTS: Final = {
    "UCX_TCP_TX_SEG_SIZE": "64K",
    "UCX_TCP_RX_SEG_SIZE": "256K",
    "UCX_TCP_KEEPIDLE": "32000s",
    "UCX_TCP_USER_TIMEOUT": "86400s",
    "UCX_TCP_CONN_NB": "y",
}
_MODULES: Final = ("nixl_cu12", "nixl_cu13", "nixl")
_SPINS: Final = 64  # polls without sleep: a small read is over by then
_NAP_MIN_S: Final = 20e-6
_NAP_MAX_S: Final = 100e-6  # 1 ms costs two thirds of the tcp bandwidth

INSTALL_HINT: Final = "install it with `pip install nixl-cu12` (or nixl-cu13 for CUDA 13)"


@cache
def load_bindings() -> Any:
    """The NIXL C++ binding of whichever CUDA variant is installed.

    Raises:
        TransportError: none is, or it cannot be loaded.
    """
    _set_ucx_defaults()
    faults: list[str] = []
    raise_exceptions = logging.raiseExceptions
    for name in _MODULES:
        try:
            api = importlib.import_module(f"{name}._api")
        except (ImportError, OSError, RuntimeError) as fault:
            faults.append(f"{name}: {fault}")
            continue
        finally:
            _restore_logging(raise_exceptions)
        return api.nixlBind
    raise TransportError(f"nixl cannot be imported; {INSTALL_HINT}. Tried: {'; '.join(faults)}")


def probe() -> tuple[bool, str]:
    """Whether NIXL is installed and its UCX backend comes up, and why (not)."""
    try:
        bind = load_bindings()
        _make_agent(bind, f"relay-probe-{os.getpid()}-{time.time_ns()}", progress=False)
    except TransportError as fault:
        return False, str(fault)
    return True, f"{bind.__name__.split('.')[0]} with UCX"


def _set_ucx_defaults() -> None:
    for name, value in _UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # `import ucxx` sets this behind the user's back, and it makes NIXL's shared-memory path ~5x slower.
    if "ucxx" in sys.modules and os.environ.pop("UCX_RNDV_THRESH", None) is not None:
        logger.info("removed UCX_RNDV_THRESH, which ucxx has set, before creating a NIXL agent")


def _restore_logging(raise_exceptions: bool) -> None:
    # Importing nixl attaches a stdout handler and clears logging.raiseExceptions for the whole process.
    logging.raiseExceptions = raise_exceptions
    nixl_logger = logging.getLogger("nixl")
    nixl_logger.handlers.clear()
    nixl_logger.propagate = True


def _faults(bind: Any) -> tuple[type[BaseException], ...]:
    """Every exception type that the binding raises."""
    own = tuple(getattr(bind, n) for n in dir(bind) if n.startswith("nixl") and n.endswith("Error"))
    return (*own, RuntimeError, ValueError)


def _make_agent(bind: Any, name: str, *, progress: bool) -> Any:
    config = bind.nixlAgentConfig()
    config.useProgThread = progress
    config.useListenThread = False
    config.pthrDelay = OWNER_POLL_US if progress else 0
    # The puller is guarded by our lock; nothing calls the owner after its metadata has been read.
    config.syncMode = bind.NIXL_THREAD_SYNC_NONE
    try:
        agent = bind.nixlAgent(name, config)
        agent.createBackend("UCX", {})
    except _faults(bind) as fault:
        raise TransportError(
            f"nixl: the UCX backend does not come up ({fault}). Check UCX_TLS and UCX_NET_DEVICES, or set "
            "transport.backend: tcp."
        ) from fault
    return agent


def _segment_kind(bind: Any, kind: str) -> Any:
    return bind.VRAM_SEG if kind == "cuda" else bind.DRAM_SEG


def _register(bind: Any, agent: Any, arena: Arena) -> None:
    region = (arena.base_address(), arena.nbytes, arena.device.index or 0, b"")
    try:
        agent.registerMem(bind.nixlRegDList(_segment_kind(bind, arena.device.type), [region]), [])
    except _faults(bind) as fault:
        raise TransportError(
            f"nixl: the arena of {arena.nbytes} bytes on {arena.device} cannot be registered: {fault}."
        ) from fault


@dataclass(frozen=True, slots=True)
class Address:
    """A peer's arena: descriptors are computed from `base`, never unpickled.

    Attributes:
        agent: name of the owner agent; contains the incarnation.
        metadata: NIXL's own bytes.
        base: raw address of block 0 in the peer; stride: bytes of a block with header; blocks: their number.
        kind: torch device type; device: its index.
    """

    agent: str
    metadata: bytes
    base: int
    stride: int
    blocks: int
    kind: str
    device: int

    def pack(self) -> bytes:
        """As msgpack."""
        fields = (
            SCHEMA,
            self.agent,
            self.metadata,
            self.base,
            self.stride,
            self.blocks,
            self.kind,
            self.device,
        )
        return bytes(msgpack.packb(fields, use_bin_type=True) or b"")

    @classmethod
    def unpack(cls, data: bytes) -> Address:
        """Raises ReadFailed(NO_ROUTE) for bytes that are not such an address."""
        try:
            schema, *fields = msgpack.unpackb(
                data, raw=False, use_list=False, max_bin_len=1 << 20, max_ext_len=0, max_array_len=16
            )
            address = cls(*fields)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as fault:
            raise ReadFailed(Outcome.NO_ROUTE, f"unreadable nixl address: {fault}") from fault
        types = (str, bytes, int, int, int, str, int)
        if schema != SCHEMA or not all(isinstance(f, t) for f, t in zip(fields, types, strict=True)):
            raise ReadFailed(
                Outcome.NO_ROUTE,
                f"a nixl address of schema {schema} with {len(fields)} fields; ours is {SCHEMA}.",
            )
        return address


@dataclass(slots=True)
class _Peer:
    remote: str
    in_flight: int = 0
    poisoned: bool = False


class _Puller:
    """A puller agent and what it is connected to.

        current --a read timed out--> retired --last pull leaves--> destroyed, quarantine released

    `lock` guards the agent and every field: the agent itself does no locking.
    """

    def __init__(self, bind: Any, name: str, arena: Arena) -> None:
        self.bind = bind
        self.faults = _faults(bind)
        self.lock = threading.Lock()
        self.pulls = 0
        self.retired = False
        self.quarantined: list[BlockId] = []
        self._arena = arena
        self._peers: dict[str, _Peer] = {}
        self._agent: Any = _make_agent(bind, name, progress=False)
        _register(bind, self._agent, arena)

    def connect(self, address: Address) -> _Peer:
        """Load the peer's metadata, again if its last transfer failed. The caller holds the lock.

        Raises:
            ReadFailed: the peer cannot be reached.
        """
        peer = self._peers.get(address.agent)
        if peer is not None and peer.poisoned:
            if peer.in_flight:
                raise ReadFailed(Outcome.PEER_GONE, f"{address.agent} has failed a moment ago.")
            self._drop(address.agent)
            peer = None
        if peer is None:
            try:
                remote = self._agent.loadRemoteMD(address.metadata)
            except self.faults as fault:
                self._invalidate(address.agent)  # half-loaded metadata would poison the next try
                raise ReadFailed(Outcome.PEER_GONE, f"{address.agent} cannot be reached: {fault}.") from fault
            name = remote.decode() if isinstance(remote, bytes) else str(remote)
            if name != address.agent:
                self._invalidate(name)
                raise ReadFailed(Outcome.NO_ROUTE, f"the metadata is of {name!r}, not {address.agent!r}.")
            peer = self._peers[address.agent] = _Peer(name)
        peer.in_flight += 1
        return peer

    def forget_other_lives(self, worker_prefix: str, keep: str) -> None:
        """Drop idle connections to older incarnations of a worker. The caller holds the lock."""
        for name in [n for n in self._peers if n.startswith(worker_prefix) and n != keep]:
            if not self._peers[name].in_flight:
                self._drop(name)

    def post(
        self,
        remote: str,
        address: Address,
        refs: Sequence[BlockRef],
        into: Sequence[BlockId],
        span: tuple[int, int],
    ) -> Any:
        """Start one READ of bytes [span[0], span[1]) of every block; returns its handle. The caller holds the
        lock."""
        base, stride = self._arena.base_address(), self._arena.stride
        local = _descriptors(base, stride, into, span, self._arena.device.index or 0)
        far = _descriptors(address.base, stride, [r.block for r in refs], span, address.device)
        handle = self._agent.createXferReq(
            self.bind.NIXL_READ,
            self.bind.nixlXferDList(_segment_kind(self.bind, self._arena.device.type), local),
            self.bind.nixlXferDList(_segment_kind(self.bind, address.kind), far),
            remote,
            b"",
            [],
        )
        try:
            self._agent.postXferReq(handle, b"")
        except self.faults:
            self.release(handle)
            raise
        return handle

    def in_progress(self, handle: Any) -> bool:
        """Poll a transfer. The caller holds the lock. Raises the binding's errors."""
        status = self._agent.getXferStatus(handle)
        if status == self.bind.NIXL_IN_PROG:
            return True
        if status == self.bind.NIXL_SUCCESS:
            return False
        raise RuntimeError(f"transfer status {status}")

    def release(self, handle: Any) -> None:
        """Give a handle back; it may still be in flight. The caller holds the lock."""
        try:
            self._agent.releaseXferReq(handle)
        except self.faults as fault:
            logger.debug("nixl: a transfer handle was not released: %s", fault)

    def destroy(self) -> None:
        """End the agent: after this, nothing writes into the arena any more. The caller holds the lock.
        With a stopped peer and a pending read this took 5 ms."""
        for name in list(self._peers):
            self._drop(name)
        self._agent = None

    def _drop(self, name: str) -> None:
        del self._peers[name]
        self._invalidate(name)

    def _invalidate(self, name: str) -> None:
        try:
            self._agent.invalidateRemoteMD(name)
        except self.faults as fault:
            logger.debug("nixl: metadata of %s not removed: %s", name, fault)


class _Late(Exception):
    """A transfer did not end before the deadline."""


class _Posts:
    """Transfers of one pull that are in flight, oldest first.

    Args:
        deadline: time.monotonic() instant at which waiting ends.
    """

    def __init__(self, puller: _Puller, peer: _Peer, address: Address, deadline: float) -> None:
        self.puller, self.peer, self.address = puller, peer, address
        self._deadline = deadline
        self.waiting: deque[tuple[Landed, Any]] = deque()

    def start(
        self, step: Landed, refs: Sequence[BlockRef], into: Sequence[BlockId], span: tuple[int, int]
    ) -> None:
        """Post the read of a step."""
        with self.puller.lock:
            handle = self.puller.post(self.peer.remote, self.address, refs, into, span)
        self.waiting.append((step, handle))

    def first_is_done(self) -> bool:
        """Whether the oldest has ended: over shared memory, that is when `start` returns."""
        with self.puller.lock:
            return not self.puller.in_progress(self.waiting[0][1])

    def finish(self) -> Landed:
        """Wait for the oldest.

        Raises:
            _Late: not within the deadline; it stays in flight.
        """
        step, handle = self.waiting[0]
        if not _poll(self.puller, handle, self._deadline):
            raise _Late
        self._drop_first()
        return step

    def settle(self) -> bool:
        """Wait until all have ended, well or badly; False when one has not by the deadline."""
        while self.waiting:
            try:
                self.finish()
            except _Late:
                return False
            except self.puller.faults as fault:
                logger.debug("nixl: a transfer of an ended pull failed: %s", fault)
                self._drop_first()
        return True

    def abandon(self) -> None:
        """Give up all handles; what is in flight may still land."""
        while self.waiting:
            self._drop_first()

    def _drop_first(self) -> None:
        _, handle = self.waiting.popleft()
        with self.puller.lock:
            self.puller.release(handle)


class NixlTransport:
    """One-sided reads through NIXL.

    Args:
        worker: name of this worker; part of the agents' names, with the arena's incarnation.
    """

    name = "nixl"

    def __init__(self, worker: str = "worker") -> None:
        self._worker = worker
        self._bind = load_bindings()
        self._lock = threading.Lock()
        self._arena: Arena | None = None
        self._owner: Any = None
        self._address = b""
        self._puller: _Puller | None = None
        self._retiring: list[_Puller] = []
        self._renewals = 0
        self._closed = False

    def register(self, arena: Arena) -> None:
        """Create both agents and register the arena with them.

        Raises:
            TransportError: UCX does not come up, or an arena is registered already.
        """
        if self._arena is not None:
            raise TransportError("nixl: register() was called twice; use one transport per arena.")
        name = f"{self._worker}.{arena.incarnation}.owner"
        owner = _make_agent(self._bind, name, progress=True)
        _register(self._bind, owner, arena)
        self._address = Address(
            agent=name,
            metadata=owner.getLocalMD(),
            base=arena.base_address(),
            stride=arena.stride,
            blocks=arena.num_blocks,
            kind=arena.device.type,
            device=arena.device.index or 0,
        ).pack()
        self._owner, self._arena = owner, arena
        self._puller = self._new_puller(arena)

    def address(self) -> bytes:
        """See `Address`.

        Raises:
            TransportError: no arena is registered.
        """
        if self._arena is None:
            raise TransportError("nixl: address() before register(). Register the worker's arena first.")
        return self._address

    def pull(
        self,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        timeout_s: float,
        lease_deadline: float | None = None,
        on_part: OnPart | None = None,
    ) -> Transfer:
        """See `transport.base.Transport.pull`."""
        if self._arena is None or self._closed:
            raise TransportError("nixl: pull() before register() or after close().")
        return run_pull(
            self.name,
            self._arena,
            lease,
            into,
            self.read,
            timeout_s=timeout_s,
            lease_deadline=lease_deadline,
            on_part=on_part,
        )

    def stats(self) -> dict[str, int]:
        """renewals: puller agents replaced after a timeout; retiring: those not yet destroyed."""
        with self._lock:
            return {"renewals": self._renewals, "retiring": len(self._retiring)}

    def close(self) -> None:
        """End both agents; pulls in flight end theirs when they leave."""
        with self._lock:
            self._closed = True
            if self._puller is not None:
                self._retire(self._puller)
        self._reap()
        self._owner = None

    # -- reading ---------------------------------------------------------------------------------------

    def read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> Reading:
        """Read without verifying: see `transport.pulling.Read`."""
        owner, arena = lease.located.owner, self._arena
        raw = owner.addresses.get(self.name)
        if raw is None or arena is None:
            raise ReadFailed(Outcome.NO_ROUTE, f"{owner.worker} has no nixl address.")
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
                yield from self._read_steps(_Posts(puller, peer, address, deadline), arena, lease, into)
            finally:
                with puller.lock:
                    peer.in_flight -= 1
        finally:
            self._leave(puller)

    def _read_steps(self, posts: _Posts, arena: Arena, lease: Lease, into: Sequence[BlockId]) -> Reading:
        """Two transfers at a time: while one is verified, the next one travels."""
        refs = lease.located.segment.blocks
        steps = plan_steps(arena, len(into), STEP_BYTES, STEP_BLOCKS)
        try:
            for step in steps:
                part = slice(step.first, step.stop)
                posts.start(step, refs[part], into[part], arena.part_range(step.part))
                while posts.waiting and (len(posts.waiting) == 2 or posts.first_is_done()):
                    if step is steps[-1] and len(posts.waiting) == 1:
                        break  # the very last one
                    yield posts.finish()
            while len(posts.waiting) > 1:
                yield posts.finish()
            if posts.waiting:
                last = posts.finish()
                if last.part:  # the header came with part 0: is the block still the leased one?
                    posts.start(last, refs, into, (0, HEADER_NBYTES))
                    posts.finish()
                    check_headers(arena, lease, into)
                yield last
        except posts.puller.faults as fault:
            posts.peer.poisoned = True
            raise ReadFailed(Outcome.PEER_GONE, f"{posts.address.agent}: {fault}.") from fault
        except _Late:
            raise self._timed_out(posts, into) from None
        finally:
            # Ended early: what is still in flight would land in blocks that their caller gets back.
            if not posts.settle():
                raise self._timed_out(posts, into)

    def _timed_out(self, posts: _Posts, into: Sequence[BlockId]) -> ReadFailed:
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

    def _new_puller(self, arena: Arena) -> _Puller:
        return _Puller(self._bind, f"{self._worker}.{arena.incarnation}.pull{self._renewals}", arena)

    def _enter(self, arena: Arena) -> _Puller:
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

    def _leave(self, puller: _Puller) -> None:
        with self._lock:
            puller.pulls -= 1
        self._reap()

    def _retire(self, puller: _Puller) -> None:
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
            with puller.lock:
                puller.destroy()
            if self._arena is not None and puller.quarantined:
                freed = self._arena.release_quarantine(puller.quarantined)
                logger.info("nixl: puller agent ended, %d quarantined blocks are free again", freed)


def _descriptors(
    base: int, stride: int, blocks: Sequence[int], span: tuple[int, int], device: int
) -> np.ndarray:
    """[n, 3] uint64: address, bytes, device id."""
    out = np.empty((len(blocks), 3), dtype=np.uint64)
    out[:, 0] = np.asarray(blocks, dtype=np.uint64) * np.uint64(stride) + np.uint64(base + span[0])
    out[:, 1] = span[1] - span[0]
    out[:, 2] = device
    return out


def _poll(puller: _Puller, handle: Any, deadline: float) -> bool:
    """Poll until done (True) or until the deadline (False). Raises the binding's errors."""
    nap, polls = _NAP_MIN_S, 0
    while True:
        with puller.lock:
            if not puller.in_progress(handle):
                return True
        if time.monotonic() >= deadline:
            return False
        polls += 1
        if polls > _SPINS:
            # Polling moves the bytes as well (there is no progress thread): naps stay short while data flows.
            time.sleep(nap)
            nap = min(nap * 1.02, _NAP_MAX_S)
