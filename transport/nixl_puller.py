"""The reader's end of the nixl backend: a puller agent, the peers it is connected to, transfers in flight.

This module does not know what a lease is worth, nor what the payload means.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack
import numpy as np

from transport.arena import Arena
from transport.nixl_binding import binding_faults, make_agent, register_arena, segment_kind
from transport.pulling import Landed, ReadFailed
from transport.types import BlockId, BlockRef, Outcome

logger = logging.getLogger(__name__)

SCHEMA: Final = 2
_SPINS: Final = 64  # polls without sleep: a small read is over by then
_NAP_MIN_S: Final = 20e-6
_DRAIN_NAP_S: Final = 2e-3
_NAP_QUICK_S: Final = 100e-6  # the longest on a quick link: 1 ms costs two thirds of loopback's bandwidth
_NAP_LONGEST_S: Final = 1e-3
_NAP_BYTES: Final = 64 << 10

_MOST_STEP_BYTES: Final = 8 << 20
_LEAST_STEP_BYTES: Final = 256 << 10
_STEP_S: Final = 2e-3
_MOST_WINDOW_BYTES: Final = 32 << 20
_LEAST_WINDOW_STEPS: Final = 2
_FIRST_STEP_BYTES: Final = 1 << 20
_FIRST_WINDOW_BYTES: Final = 4 << 20
_WINDOW_S: Final = 8e-3
_TELLING_BYTES: Final = 1 << 20  # of a pull that says something about the rate


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

    @property
    def sound(self) -> bool:
        """Whether descriptors can be computed from it: every field of its type and within its bounds."""
        numbers = (self.base, self.stride, self.blocks, self.device)
        return (
            isinstance(self.agent, str)
            and isinstance(self.metadata, bytes)
            and self.kind in ("cpu", "cuda")
            and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
            and self.base + self.stride * self.blocks < 1 << 63
        )

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
        if schema != SCHEMA or not address.sound:
            raise ReadFailed(
                Outcome.NO_ROUTE,
                f"a nixl address that is not sound, or not of schema {SCHEMA}.",
            )
        return address


@dataclass(slots=True)
class Pace:
    """How much of a pull is in flight at a time, from what earlier pulls over the same link have shown.

    Transfers that are in flight together share the link and end together. With many of them, a slow link
    brings all parts of a segment at its end, and nothing can be computed meanwhile (1 Gbit/s, 15 MB in six
    parts: 6 ms of 132 hidden with 32 MiB in flight). A fast one needs them: over loopback 2 MiB in flight
    reach half the rate of a raw socket.

    Attributes:
        bytes_per_s: of the last pull that was large enough to tell; 0: none yet.
        round_trip_s: of a read of a few bytes.
    """

    bytes_per_s: float = 0.0
    round_trip_s: float = 0.0

    @property
    def step_bytes(self) -> int:
        """Of one posted transfer. A post over shared memory blocks for its whole copy, holding the agent's
        lock; steps let the deadline and other pulls have their turn."""
        if not self.bytes_per_s:
            return _FIRST_STEP_BYTES
        return int(min(max(self.bytes_per_s * _STEP_S, _LEAST_STEP_BYTES), _MOST_STEP_BYTES))

    @property
    def window_bytes(self) -> int:
        """In flight at a time. More than the rate times the round trip, so that it can always grow."""
        if not self.bytes_per_s:
            return _FIRST_WINDOW_BYTES
        wanted = self.bytes_per_s * (_WINDOW_S + 2 * self.round_trip_s)
        return int(min(max(wanted, _LEAST_WINDOW_STEPS * self.step_bytes), _MOST_WINDOW_BYTES))

    @property
    def nap_s(self) -> float:
        """Longest sleep between two polls: what arrives meanwhile waits in the socket's buffer, which takes
        more than `_NAP_BYTES`. On a slow link every poll less is one in which the thread that computes does
        not wait for the interpreter."""
        if not self.bytes_per_s:
            return _NAP_QUICK_S
        return min(max(_NAP_BYTES / self.bytes_per_s, _NAP_QUICK_S), _NAP_LONGEST_S)

    def learn(self, nbytes: int, seconds: float) -> None:
        """Take what a pull that came whole has shown."""
        if nbytes >= _TELLING_BYTES and seconds > 0:
            self.bytes_per_s = nbytes / seconds


@dataclass(slots=True)
class Peer:
    remote: str
    in_flight: int = 0
    poisoned: bool = False
    pace: Pace = field(default_factory=Pace)


class Puller:
    """A puller agent and what it is connected to.

        current --a read timed out--> retired --last pull leaves--> drained --> destroyed, quarantine released

    `lock` guards the agent and every field: the agent itself does no locking.

    Attributes:
        pulls: that use it; retired: no further one will; quarantined: blocks that may be written late; late:
            transfers that were given up, and may still be in flight.
    """

    def __init__(self, bind: Any, name: str, arena: Arena, *, loopback: bool = True) -> None:
        self.bind = bind
        self.faults = binding_faults(bind)
        self.lock = threading.Lock()
        self.pulls = 0
        self.retired = False
        self.quarantined: list[BlockId] = []
        self.late: list[Any] = []
        self._arena = arena
        self._peers: dict[str, Peer] = {}
        self._agent: Any = make_agent(bind, name, progress=False, loopback=loopback)
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

    Attributes:
        nbytes: in flight.
    """

    def __init__(self, puller: Puller, peer: Peer, address: Address, deadline: float) -> None:
        self.puller, self.peer, self.address = puller, peer, address
        self._deadline = deadline
        self.waiting: deque[tuple[Landed, int, Any]] = deque()
        self.nbytes = 0

    def start(
        self, step: Landed, refs: Sequence[BlockRef], into: Sequence[BlockId], span: tuple[int, int]
    ) -> None:
        """Post the read of a step."""
        with self.puller.lock:
            handle = self.puller.post(self.peer.remote, self.address, refs, into, span)
        nbytes = len(into) * (span[1] - span[0])
        self.waiting.append((step, nbytes, handle))
        self.nbytes += nbytes

    @property
    def full(self) -> bool:
        """Whether the oldest should have landed before more is asked for."""
        return len(self.waiting) >= _LEAST_WINDOW_STEPS and self.nbytes >= self.peer.pace.window_bytes

    def first_is_done(self) -> bool:
        """Whether the oldest has ended: over shared memory, that is when `start` returns."""
        with self.puller.lock:
            return not self.puller.in_progress(self.waiting[0][-1])

    def finish(self) -> Landed:
        """Wait for the oldest.

        Raises:
            Late: not within the deadline; it stays in flight.
        """
        step, _, handle = self.waiting[0]
        if not _poll(self.puller, handle, self._deadline, self.peer.pace.nap_s):
            raise Late
        self._drop_first()
        return step

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
            self.puller.late.extend(handle for _, _, handle in self.waiting)
        self.waiting.clear()
        self.nbytes = 0

    def _drop_first(self) -> None:
        _, nbytes, handle = self.waiting.popleft()
        self.nbytes -= nbytes
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


def _poll(puller: Puller, handle: Any, deadline: float, longest_nap_s: float) -> bool:
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
            nap = min(nap * 1.02, longest_nap_s)
