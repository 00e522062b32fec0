"""The registered block pool of one worker: one buffer, allocated once and never unmapped.

A block is a 64-byte header followed by the payload; its stride is rounded up to 64 bytes, so that every
payload is 64-byte aligned. The header carries the block's generation and its owner's incarnation. A reader
copies header and payload together, so one look at the landed bytes tells whether they are the leased ones.

A payload is divided into *parts*, contiguous byte ranges that are read, verified and handed over one after
the other; each has a checksum of its own. The header travels with part 0.

Life of a block:

    free --allocate--> used --free--> free            (free bumps the generation)
                        |
                        '--quarantine--> quarantined --release_quarantine--> free

This module does not know what the payload means, who reads it, or how it travels.
"""

from __future__ import annotations

import itertools
import logging
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
import xxhash

from transport import checksums
from transport.errors import ArenaFull, ConfigError
from transport.memory import SharedMemory
from transport.tokens import PullKey
from transport.types import BlockId, BlockRef, Incarnation, Outcome

if TYPE_CHECKING:
    from transport.faults import Faults

logger = logging.getLogger(__name__)

HEADER_NBYTES: Final = 64
ALIGN: Final = 64
_MAGIC: Final = b"RELAYKV2"
# magic, block index, generation, incarnation, payload bytes, digest of the parts' sizes; the rest is zero.
_HEADER: Final = struct.Struct("<8sQQQQQ16x")

_WORDS: Final = struct.Struct("<8q")  # a header as the device sees it

_FREE, _USED, _QUARANTINED = 0, 1, 2
_STATE_NAMES: Final = ("free", "used", "quarantined")


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """Counts of blocks by state.

    Attributes:
        total: all blocks; free + used + quarantined.
        block_nbytes: payload bytes of a block; stride: bytes of a block with its header.
        nbytes: bytes of the whole buffer.
    """

    total: int
    free: int
    used: int
    quarantined: int
    block_nbytes: int
    stride: int
    nbytes: int


def _ranges(parts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """[start, stop) of every part from the start of its block; the header belongs to part 0."""
    stops = tuple(HEADER_NBYTES + end for end in itertools.accumulate(parts))
    return tuple(zip((0, *stops[:-1]), stops, strict=True))


def _share(nbytes: int) -> SharedMemory | None:
    try:
        return SharedMemory(nbytes)
    except OSError as fault:
        logger.info("the arena lies in ordinary memory: %s", fault)
        return None


def _tensor(memory: SharedMemory) -> torch.Tensor:
    """Keeps the mapping for as long as any view of it lives."""
    return torch.frombuffer(memory.buffer, dtype=torch.uint8)


def _private(nbytes: int, device: torch.device) -> torch.Tensor:
    """Filled, so that the first transfers do not pay for page faults on both ends."""
    raw = torch.empty(nbytes + ALIGN, dtype=torch.uint8, device=device).zero_()
    skip = -raw.data_ptr() % ALIGN
    return raw[skip : skip + nbytes]


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """CPU: a view of the tensor's own memory; otherwise of a copy."""
    return memoryview(cast("Any", flat.cpu().numpy()))


class Arena:
    """A thread-safe pool of equal blocks in one contiguous buffer.

    Args:
        budget_bytes: hard limit of the buffer, headers included.
        block_nbytes: payload bytes of one block.
        device: a torch device. Blocks on "cuda" are checked where they lie, many in one launch; backends that
            need CPU memory are given copies.
        incarnation: which life of the worker this is; written into every header. Default: now, in ns.
        parts: bytes of every part of the payload, in order; their sum is block_nbytes. Default: one part.
        shared: let readers of this host in (`transport.memory`), where the system has it; only on "cpu".

    Attributes:
        pull_key: secret of this life of the worker, with which tokens for its blocks are made.
        on_device: whether the blocks lie elsewhere than in CPU memory.

    Raises:
        ConfigError: not even one block fits into the budget, or the parts do not make up a block.
    """

    def __init__(
        self,
        budget_bytes: int,
        block_nbytes: int,
        device: str = "cpu",
        incarnation: int | None = None,
        parts: Sequence[int] = (),
        shared: bool = True,
    ) -> None:
        if block_nbytes < 1:
            raise ConfigError(f"block_nbytes is {block_nbytes}: a block must hold at least one byte.")
        self.block_nbytes = block_nbytes
        self.parts = tuple(parts) or (block_nbytes,)
        if sum(self.parts) != block_nbytes or min(self.parts) < 1:
            raise ConfigError(f"parts of {list(parts)} bytes do not make up a block of {block_nbytes}.")
        self._parts_digest = xxhash.xxh3_64_intdigest(struct.pack(f"<{len(self.parts)}Q", *self.parts))
        self._ranges = _ranges(self.parts)
        self.stride = (HEADER_NBYTES + block_nbytes + ALIGN - 1) // ALIGN * ALIGN
        self.num_blocks = budget_bytes // self.stride
        if self.num_blocks < 1:
            raise ConfigError(
                f"arena_bytes = {budget_bytes} holds no block of {self.stride} bytes (payload "
                f"{block_nbytes}). Raise transport.arena_bytes or lower transport.block_tokens."
            )
        self.incarnation = Incarnation(time.time_ns() if incarnation is None else incarnation)
        self.pull_key = PullKey.random()
        self.device = torch.device(device)
        self.nbytes = self.num_blocks * self.stride
        self.on_device = self.device.type != "cpu"
        self._shared = _share(self.nbytes) if shared and not self.on_device else None
        self._buffer = _private(self.nbytes, self.device) if self._shared is None else _tensor(self._shared)
        # A flat byte view of CPU memory: sockets read and write it without a copy.
        self._view = None if self.on_device else _bytes_of(self._buffer)
        self.faults: Faults | None = None  # only ever set in test mode
        self._lock = threading.Lock()
        self._state = bytearray(self.num_blocks)
        self._generation = [1] * self.num_blocks
        self._free = [BlockId(i) for i in reversed(range(self.num_blocks))]
        self._write_headers(range(self.num_blocks))

    # -- allocation ------------------------------------------------------------------------------------

    def allocate(self, n: int) -> list[BlockId]:
        """Take `n` blocks, all or none.

        Raises:
            ArenaFull: fewer than `n` blocks are free.
        """
        if n < 0:
            raise ValueError(f"allocate({n}): the number of blocks cannot be negative")
        if self.faults is not None:
            self.faults.before_allocate(n)
        with self._lock:
            if n > len(self._free):
                raise ArenaFull(self._full_message(n))
            ids = [self._free.pop() for _ in range(n)]
            for i in ids:
                self._state[i] = _USED
        return ids

    def free(self, ids: Iterable[BlockId]) -> None:
        """Return used blocks. Their generation changes at once, so that a late reader sees it.

        Raises:
            ValueError: a block is not in use (double free, quarantined, unknown); none is freed then.
        """
        with self._lock:
            self._retire(list(ids), _USED, "free")

    def quarantine(self, ids: Iterable[BlockId]) -> None:
        """Set used blocks aside: a timed-out transfer may still write into them.

        Raises:
            ValueError: a block is not in use; none is quarantined then.
        """
        with self._lock:
            wanted = list(ids)
            self._expect(wanted, _USED, "quarantine")
            for i in wanted:
                self._state[i] = _QUARANTINED

    def release_quarantine(self, ids: Iterable[BlockId] | None = None) -> int:
        """Free quarantined blocks once nothing can write into them any more.

        Args:
            ids: which; None means all.

        Returns:
            The number of blocks freed.
        """
        with self._lock:
            every = range(self.num_blocks) if ids is None else ids
            out = [BlockId(i) for i in every if ids is not None or self._state[i] == _QUARANTINED]
            self._retire(out, _QUARANTINED, "release_quarantine")
            return len(out)

    # -- content ---------------------------------------------------------------------------------------

    def payload(self, block: BlockId) -> torch.Tensor:
        """The block's payload as a uint8 view of the arena, [block_nbytes]."""
        start = self._offset(block) + HEADER_NBYTES
        return self._buffer[start : start + self.block_nbytes]

    def seal(self, block: BlockId) -> BlockRef:
        """Write the header and describe the block for publication. The payload must not change after.

        Raises:
            ValueError: the block is not in use.
        """
        return self.seal_all([block])[0]

    def seal_all(self, blocks: Sequence[BlockId]) -> tuple[BlockRef, ...]:
        """`seal` for many blocks: on a device as many launches as there are parts.

        Raises:
            ValueError: a block is not in use; none is sealed then.
        """
        columns = [self._checksums(blocks, part) for part in range(len(self.parts))]
        with self._lock:
            self._expect(blocks, _USED, "seal")
            self._write_headers(blocks)
            return tuple(
                BlockRef(block, self._generation[block], self.block_nbytes, sums)
                for block, sums in zip(blocks, zip(*columns, strict=True), strict=True)
            )

    def generation(self, block: BlockId) -> int:
        """The current generation of a block."""
        self._offset(block)
        return self._generation[block]

    def verify(self, block: BlockId, ref: BlockRef, owner_incarnation: int) -> Outcome:
        """Judge a block that landed as a whole: is it the one that `ref` names, as its owner sealed it?

        Returns:
            What `verify_header` or `verify_part` say.
        """
        verdict = self.verify_header(block, ref, owner_incarnation)
        for part in range(len(self.parts)):
            if verdict is not Outcome.PULLED:
                break
            verdict = self.verify_part(block, ref, part)
        return verdict

    def verify_header(self, block: BlockId, ref: BlockRef, owner_incarnation: int) -> Outcome:
        """Judge the header of a landed block.

        The owner's header travelled with part 0 and overwrote this block's own; whatever the verdict, the own
        header is put back, so that the block can be sealed or freed like any other.

        Returns:
            PULLED, STALE (freed, reused or made by another life of the owner), CORRUPT (no header) or
            LAYOUT_MISMATCH (blocks of another size or in other parts).
        """
        return next(iter(self.verify_headers([block], [ref], owner_incarnation)))

    def verify_headers(
        self, blocks: Sequence[BlockId], refs: Sequence[BlockRef], owner_incarnation: int
    ) -> Iterator[Outcome]:
        """`verify_header` for many blocks, in order; on a device all headers come over in one copy."""
        headers = self._read_headers(blocks)
        with self._lock:
            self._write_headers(blocks)
        for header, ref in zip(headers, refs, strict=True):
            yield self.judge_header(header, ref, owner_incarnation)

    def judge_header(self, header: bytes, ref: BlockRef, owner_incarnation: int) -> Outcome:
        """Judge the first HEADER_NBYTES of a block, wherever they are: see `verify_header`."""
        magic, index, generation, incarnation, nbytes, parts = _HEADER.unpack(header)
        if not self.fits(ref):
            return Outcome.LAYOUT_MISMATCH
        if magic != _MAGIC:
            return Outcome.CORRUPT
        if (index, generation, incarnation) != (ref.block, ref.generation, owner_incarnation):
            return Outcome.STALE
        if (nbytes, parts) != (self.block_nbytes, self._parts_digest):
            return Outcome.LAYOUT_MISMATCH
        return Outcome.PULLED

    def verify_part(self, block: BlockId, ref: BlockRef, part: int) -> Outcome:
        """Judge the bytes of one landed part: PULLED, or CORRUPT when they are not the sealed ones."""
        sealed = ref.checksums[part]
        found = checksums.again(self._part_bytes(block, part), sealed)
        return Outcome.PULLED if found == sealed else Outcome.CORRUPT

    def verify_landed(
        self, blocks: Sequence[BlockId], refs: Sequence[BlockRef], part: int, owner_incarnation: int
    ) -> Iterator[tuple[BlockRef, Outcome]]:
        """Judge one landed part of many blocks, and with part 0 their headers; on a device in one launch.
        There is a verdict on every header and on every part."""
        if self._checks_on_device(part) and all(r.checksums[part] & checksums.WORDS_BIT for r in refs):
            yield from self._verify_on_device(blocks, refs, part, owner_incarnation)
            return
        if part == 0:
            yield from zip(refs, self.verify_headers(blocks, refs, owner_incarnation), strict=True)
        for block, ref in zip(blocks, refs, strict=True):
            yield ref, self.verify_part(block, ref, part)

    def _verify_on_device(
        self, blocks: Sequence[BlockId], refs: Sequence[BlockRef], part: int, owner_incarnation: int
    ) -> Iterator[tuple[BlockRef, Outcome]]:
        rows: list[tuple[int, ...]] = [(block,) for block in blocks]
        if part == 0:
            with self._lock:
                rows = [(block, *_WORDS.unpack(self._header(block))) for block in blocks]
        for ref, (found, *header) in zip(refs, self._sums(rows, part), strict=True):
            if header:
                yield ref, self.judge_header(_WORDS.pack(*header), ref, owner_incarnation)
            yield ref, Outcome.PULLED if found == ref.checksums[part] else Outcome.CORRUPT

    def fits(self, ref: BlockRef) -> bool:
        """Whether a peer's block has as many bytes and as many parts as ours."""
        return ref.nbytes == self.block_nbytes and len(ref.checksums) == len(self.parts)

    # -- for backends ----------------------------------------------------------------------------------

    def base_address(self) -> int:
        """Raw address of block 0's header."""
        return self._buffer.data_ptr()

    def rows(self) -> np.ndarray:
        """[blocks, stride] of CPU memory, headers included."""
        assert self._view is not None, "an arena on a device has no rows"
        return np.frombuffer(self._view, dtype=np.uint8).reshape(-1, self.stride)

    def shared_fd(self) -> int | None:
        """Read-only descriptor of the whole buffer, open for as long as the arena is; None where it is not
        shared."""
        return None if self._shared is None else self._shared.fd

    def block_span(self, block: BlockId) -> tuple[int, int]:
        """Raw address and byte count of header + payload, padding included."""
        return self.base_address() + self._offset(block), self.stride

    def part_range(self, part: int) -> tuple[int, int]:
        """[start, stop) of a part, in bytes from the start of its block; part 0 begins with the header."""
        return self._ranges[part]

    def outgoing(self, block: BlockId, start: int = 0, stop: int | None = None) -> memoryview:
        """Bytes [start, stop) of a block for sending, counted from its header on; default: all of the stride.
        CPU: the arena's own memory; otherwise a copy."""
        at = self._offset(block)
        end = at + (self.stride if stop is None else stop)
        if self._view is not None:
            return self._view[at + start : end]
        return _bytes_of(self._buffer[at + start : end])

    def landing(self, block: BlockId, start: int = 0, stop: int | None = None) -> memoryview:
        """Where received bytes [start, stop) of a block go. CPU: the arena's own memory; otherwise a bounce
        buffer, which `landed` copies in."""
        if self._view is not None:
            return self.outgoing(block, start, stop)
        return memoryview(bytearray((self.stride if stop is None else stop) - start))

    def landed(self, block: BlockId, view: memoryview, start: int = 0) -> None:
        """Finish what `landing` began at the same `start`: a no-op on CPU."""
        if self._view is None:
            at = self._offset(block) + start
            host = torch.from_numpy(np.frombuffer(view, dtype=np.uint8))
            self._buffer[at : at + len(view)].copy_(host)

    def stats(self) -> ArenaStats:
        """Counts by state, taken at one instant."""
        with self._lock:
            quarantined = self._state.count(_QUARANTINED)
            return ArenaStats(
                total=self.num_blocks,
                free=len(self._free),
                used=self.num_blocks - len(self._free) - quarantined,
                quarantined=quarantined,
                block_nbytes=self.block_nbytes,
                stride=self.stride,
                nbytes=self.nbytes,
            )

    # -- inside ----------------------------------------------------------------------------------------

    def _offset(self, block: BlockId) -> int:
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block} is outside this arena of {self.num_blocks} blocks")
        return block * self.stride

    def _expect(self, ids: Sequence[BlockId], state: int, verb: str) -> None:
        if len(set(ids)) != len(ids):
            raise ValueError(f"{verb}: a block is named twice in {ids[:8]}")
        for i in ids:
            self._offset(i)
            if self._state[i] != state:
                raise ValueError(
                    f"{verb}: block {i} is {_STATE_NAMES[self._state[i]]}, not {_STATE_NAMES[state]}. "
                    "A block is returned once, by whoever allocated it."
                )

    def _retire(self, ids: Sequence[BlockId], state: int, verb: str) -> None:
        self._expect(ids, state, verb)
        for i in ids:
            self._generation[i] += 1
            self._state[i] = _FREE
        self._write_headers(ids)
        self._free.extend(reversed(ids))

    def _header(self, block: BlockId | int) -> bytes:
        generation = self._generation[block]
        return _HEADER.pack(
            _MAGIC, block, generation, self.incarnation, self.block_nbytes, self._parts_digest
        )

    def _write_headers(self, blocks: Sequence[BlockId] | range) -> None:
        if self._view is not None:
            for block in blocks:
                at = block * self.stride
                self._view[at : at + HEADER_NBYTES] = self._header(block)
        elif blocks:
            headers = bytearray(b"".join(map(self._header, blocks)))
            host = torch.frombuffer(headers, dtype=torch.uint8).view(-1, HEADER_NBYTES)
            self._device_rows()[self._index(blocks), :HEADER_NBYTES] = host.to(self.device)

    def _read_headers(self, blocks: Sequence[BlockId]) -> list[bytes]:
        if self._view is not None:
            return [bytes(self.outgoing(block, 0, HEADER_NBYTES)) for block in blocks]
        found = self._device_rows()[self._index(blocks), :HEADER_NBYTES].cpu().numpy()
        return [row.tobytes() for row in found]

    def _device_rows(self) -> torch.Tensor:
        return self._buffer.view(self.num_blocks, self.stride)

    def _index(self, blocks: Sequence[BlockId] | range) -> torch.Tensor:
        return torch.tensor(list(blocks), dtype=torch.int64, device=self.device)

    def _part_bytes(self, block: BlockId, part: int) -> memoryview:
        """A part's payload, without the header; see `outgoing`."""
        start, stop = self._ranges[part]
        return self.outgoing(block, max(start, HEADER_NBYTES), stop)

    def _checks_on_device(self, part: int) -> bool:
        start, stop = self._ranges[part]
        start = max(start, HEADER_NBYTES)
        return checksums.serves_device(self.device, start, stop - start)

    def _checksums(self, blocks: Sequence[BlockId], part: int) -> list[int]:
        """Of one part of every block, of the kind that suits the device."""
        if not self._checks_on_device(part):
            return [checksums.of_bytes(self._part_bytes(block, part)) for block in blocks]
        return [found for found, *_ in self._sums([(block,) for block in blocks], part)]

    def _sums(self, rows: Sequence[Sequence[int]], part: int) -> list[list[int]]:
        start, stop = self._ranges[part]
        start = max(start, HEADER_NBYTES)
        return checksums.on_device(self._buffer, rows, self.stride, start, stop - start)

    def _full_message(self, n: int) -> str:
        quarantined = self._state.count(_QUARANTINED)
        used = self.num_blocks - len(self._free) - quarantined
        return (
            f"the arena has {len(self._free)} free blocks, {n} are needed ({used} used, {quarantined} "
            f"quarantined of {self.num_blocks}; {self.stride} bytes each). Evict segments, or raise "
            "transport.arena_bytes."
        )
