"""The nouns of the transport room: keys, blocks, segments, leases and the outcome of a pull.

Every type here is frozen, slotted and made of plain Python values, so it may cross a Ray call or a
msgpack frame. This module does not know what the bytes of a block mean, nor what a prompt is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NewType

from transport.tokens import PullKey

WorkerId = NewType("WorkerId", str)
"""Name of a worker, unique in the cluster and stable over restarts ("w0")."""
NodeId = NewType("NodeId", str)
"""Host name or Ray node id: two workers of one node may share memory."""
BlockId = NewType("BlockId", int)
"""Index of a block in one arena."""
Incarnation = NewType("Incarnation", int)
"""Start time in ns of a worker process: a later start of the same name has a larger number."""
LeaseId = NewType("LeaseId", str)


@dataclass(frozen=True, slots=True)
class SegmentKey:
    """Names reusable KV.

    Attributes:
        space: fingerprint of all that alters KV (weights, architecture, dtype, RoPE, layout, tenant).
        digest: BLAKE2b over the canonical bytes of the token ids.
    """

    space: str
    digest: bytes

    def __str__(self) -> str:
        return f"{self.space[:8]}/{self.digest.hex()[:12]}"


@dataclass(frozen=True, slots=True)
class BlockRef:
    """A block in its owner's arena, as the owner published it.

    Attributes:
        block: index in the owner's arena.
        generation: the arena's count for this block; it changes when the block is freed.
        nbytes: payload bytes (every block of an arena has the same size).
        checksums: of every part of the payload, in order, as `transport.checksums` makes them (every block of
            an arena has the same parts; most have one).
    """

    block: BlockId
    generation: int
    nbytes: int
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """A live worker process that holds segments, and how to reach it.

    Attributes:
        worker: its name.
        incarnation: which life of that name.
        node: where it runs.
        addresses: backend name -> opaque address bytes, made and read by that backend only. The directory
            tells them with leases, and leaves them out of what a mere lookup finds.
        pull_key: with which the directory makes tokens for this life. Only the owner itself has it here; it
            is told to shards, and never by them.
    """

    worker: WorkerId
    incarnation: Incarnation
    node: NodeId
    addresses: dict[str, bytes] = field(default_factory=dict)
    pull_key: PullKey | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Segment:
    """KV of a run of tokens, held in whole blocks by one owner.

    Attributes:
        key: what it is.
        num_tokens: tokens whose KV is stored; the last block may be partly filled.
        start: position that the first token had when the keys were rotated.
        blocks: in token order.
        variant: digest of the context under which it was made ("" when unknown); the same tokens
            may be stored under several contexts. Where that context's own KV was not exact, "~" and
            the method that repaired it follow; where the format of the blocks loses bits, "~" and that.
        layout: fingerprint of the block layout; a reader with another layout must not use it.
        producer: who made it, for reports ("solver@w0").
        complete: False while the producer still appends blocks (streaming relay).
        consumers: readers that are expected (0: unknown); once so many have read it, it is evicted first.
        reads: readers so far; counted by the directory, which tells it with what it evicts.
        spilled: its bytes are outside the owner's arena, and `blocks` only say how many they were. Nobody can
            lease it until its owner has brought it back.
    """

    key: SegmentKey
    num_tokens: int
    start: int
    blocks: tuple[BlockRef, ...]
    variant: str = ""
    layout: str = ""
    producer: str = ""
    complete: bool = True
    consumers: int = 0
    reads: int = 0
    spilled: bool = False

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.blocks)

    @property
    def rectified(self) -> bool:
        """Whether it is not exact: made over KV that was itself only rectified, or in a lossy format."""
        return "~" in self.variant

    @property
    def consumed(self) -> bool:
        """Whether every expected reader has read it."""
        return 0 < self.consumers <= self.reads


@dataclass(frozen=True, slots=True)
class Located:
    """A segment together with the owner that holds it."""

    segment: Segment
    owner: Owner


@dataclass(frozen=True, slots=True)
class Lease:
    """A timed pin of one owner's copy of a segment. A pull takes a lease, never a bare block.

    Attributes:
        id: unique in the directory.
        located: what is pinned, and where.
        holder: who may read.
        ttl_s: seconds, counted by the directory from the grant and by the holder from *before* the
            request, so that clocks of different nodes are never compared.
        token: proof for the owner, see `transport.tokens`; empty where the directory does not know its key.
        others: leases of the same holder on other owners' copies of the same variant, which may give parts
            of it (`transport/sharing.py`). Each is released by its own id.
        whole: every block that was leased, where `located` shows only some of them: see `part`. The token is
            for all of them.
        first: index in `whole` of the first block that is shown.
    """

    id: LeaseId
    located: Located
    holder: WorkerId
    ttl_s: float
    token: bytes = field(default=b"", repr=False)
    others: tuple[Lease, ...] = ()
    whole: Sequence[BlockRef] | None = field(default=None, repr=False)
    first: int = 0

    @property
    def leased(self) -> Sequence[BlockRef]:
        """Every block that was leased, in order."""
        return self.located.segment.blocks if self.whole is None else self.whole

    def part(self, first: int, stop: int) -> Lease:
        """The same lease, to pull blocks [first, stop) of those that it shows, from this owner alone."""
        segment = self.located.segment
        shown = Located(replace(segment, blocks=segment.blocks[first:stop]), self.located.owner)
        return replace(self, located=shown, others=(), whole=self.leased, first=self.first + first)


class Outcome(StrEnum):
    """How a pull ended. Everything except PULLED means: compute the span yourself. REFUSED: the owner lives
    and did not accept the lease's token."""

    PULLED = "pulled"
    STALE = "stale"
    CORRUPT = "corrupt"
    LEASE_EXPIRED = "lease_expired"
    PEER_GONE = "peer_gone"
    TIMED_OUT = "timed_out"
    LAYOUT_MISMATCH = "layout_mismatch"
    NO_ROUTE = "no_route"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Transfer:
    """The facts of one pull.

    Attributes:
        source: owner's name; destination: reader's name.
        backend: the backend that moved the bytes ("nixl", "tcp", "inprocess", or "local" when the reader
            owns the segment).
        nbytes: payload bytes that arrived (0 unless PULLED).
        blocks: number of blocks asked for.
        seconds: wall time of read plus verification.
        outcome: see Outcome.
        detail: one line for people; empty when PULLED.
        shares: where several owners had a part in it, what each of them gave, or how it failed to.
    """

    source: WorkerId
    destination: WorkerId
    backend: str
    nbytes: int
    blocks: int
    seconds: float
    outcome: Outcome
    detail: str = ""
    shares: tuple[Transfer, ...] = ()

    @property
    def gb_s(self) -> float:
        """Bandwidth in 1e9 bytes per second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds > 0 else 0.0
