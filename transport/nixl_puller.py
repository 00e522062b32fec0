"""The reader's end of the nixl backend: a puller agent, the peers it is connected to, transfers in flight.

This module does not know what a lease is worth, nor what the payload means.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack
import numpy as np

from transport.arena import Arena
from transport.nixl_binding import binding_faults, make_agent, register_arena, segment_kind
from transport.pulling import Landed, ReadFailed
from transport.types import BlockId, BlockRef, Outcome

logger = logging.getLogger(__name__)

SCHEMA: Final = 2
DEPTH: Final = 8
"""Most transfers in flight: over tcp 2 MiB in all reach half the rate of a raw socket, 32 MiB nearly all."""
FIRST_DEPTH: Final = 2
"""Transfers in flight at first, and for good on a slow link. UCX serves all of them side by side: with eight
over 1 Gbit/s the first sixth of 50 MB came after 0.25-0.30 s of 0.45-0.65, with two after 0.11 of 0.43."""
QUICK_S: Final = 0.01
"""While transfers take less than this each, more of them are put in flight."""
_SPINS: Final = 64  # polls without sleep: a small read is over by then
_NAP_MIN_S: Final = 20e-6
_DRAIN_NAP_S: Final = 2e-3
_NAP_MAX_S: Final = 100e-6  # 1 ms costs two thirds of the tcp bandwidth


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
class Peer:
    remote: str
    in_flight: int = 0
    poisoned: bool = False


class Puller:
    """A puller agent and what it is connected to.

        current --a read timed out--> retired --last pull leaves--> drained --> destroyed, quarantine released

    `lock` guards the agent and every field: the agent itself does no locking.

    Attributes:
        pulls: that use it; retired: no further one will; quarantined: blocks that may be written late; late:
            transfers that were given up, and may still be in flight.
    """

    def __init__(self, bind: Any, name: str, arena: Arena) -> None:
        self.bind = bind
        self.faults = binding_faults(bind)
        self.lock = threading.Lock()
        self.pulls = 0
        self.retired = False
        self.quarantined: list[BlockId] = []
        self.late: list[Any] = []
        self._arena = arena
        self._peers: dict[str, Peer] = {}
        self._agent: Any = make_agent(bind, name, progress=False)
        register_arena(bind, self._agent, arena)

    def connect(self, address: Address) -> Peer:
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
            peer = self._peers[address.agent] = Peer(name)
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
            self.bind.nixlXferDList(segment_kind(self.bind, self._arena.device.type), local),
            self.bind.nixlXferDList(segment_kind(self.bind, address.kind), far),
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

    def drain(self, deadline: float, closed: threading.Event) -> bool:
        """Let late transfers end, well or badly, until `deadline` (time.monotonic()) or `closed`; whether all
        have. Without it the connection would go from under an owner that has yet to answer."""
        while self.late and time.monotonic() < deadline and not closed.is_set():
            with self.lock:
                self.late = [handle for handle in self.late if self._unfinished(handle)]
            closed.wait(_DRAIN_NAP_S)
        return not self.late

    def _unfinished(self, handle: Any) -> bool:
        try:
            if self.in_progress(handle):
                return True
        except self.faults as fault:
            logger.debug("nixl: a late transfer failed: %s", fault)
        self.release(handle)
        return False

    def destroy(self) -> None:
        """End the agent: after this, nothing writes into the arena any more. The caller holds the lock.
        With a stopped peer and a pending read this took 5 ms."""
        while self.late:
            self.release(self.late.pop())
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


class Late(Exception):
    """A transfer did not end before the deadline."""


class Posts:
    """Transfers of one pull that are in flight, oldest first.

    Args:
        deadline: time.monotonic() instant at which waiting ends.
    """

    def __init__(self, puller: Puller, peer: Peer, address: Address, deadline: float) -> None:
        self.puller, self.peer, self.address = puller, peer, address
        self._deadline = deadline
        self._depth = FIRST_DEPTH
        self._quick = 0  # so many in a row
        self._idle_until = time.monotonic()  # since then the oldest one was waited for
        self.waiting: deque[tuple[Landed, Any]] = deque()

    @property
    def full(self) -> bool:
        """Whether one has to end before the next one begins."""
        return len(self.waiting) >= self._depth

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
            Late: not within the deadline; it stays in flight.
        """
        step, handle = self.waiting[0]
        if not _poll(self.puller, handle, self._deadline):
            raise Late
        self._drop_first()
        self._adapt()
        return step

    def _adapt(self) -> None:
        now = time.monotonic()
        self._quick = self._quick + 1 if now - self._idle_until < QUICK_S else 0
        if self._quick > 1:  # those that travel side by side end together
            self._depth = min(DEPTH, self._depth + 1)
        elif not self._quick:
            self._depth = max(FIRST_DEPTH, self._depth - 1)
        self._idle_until = now

    def settle(self) -> bool:
        """Wait until all have ended, well or badly; False when one has not by the deadline."""
        while self.waiting:
            try:
                self.finish()
            except Late:
                return False
            except self.puller.faults as fault:
                logger.debug("nixl: a transfer of an ended pull failed: %s", fault)
                self._drop_first()
        return True

    def abandon(self) -> None:
        """Leave all handles to the puller; what is in flight may still land."""
        with self.puller.lock:
            self.puller.late.extend(handle for _, handle in self.waiting)
        self.waiting.clear()

    def _drop_first(self) -> None:
        _, handle = self.waiting.popleft()
        with self.puller.lock:
            self.puller.release(handle)


def _descriptors(
    base: int, stride: int, blocks: Sequence[int], span: tuple[int, int], device: int
) -> np.ndarray:
    """[n, 3] uint64: address, bytes, device id."""
    out = np.empty((len(blocks), 3), dtype=np.uint64)
    out[:, 0] = np.asarray(blocks, dtype=np.uint64) * np.uint64(stride) + np.uint64(base + span[0])
    out[:, 1] = span[1] - span[0]
    out[:, 2] = device
    return out


def _poll(puller: Puller, handle: Any, deadline: float) -> bool:
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
