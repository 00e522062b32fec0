"""The arena: allocation, headers, generations, quarantine."""

from __future__ import annotations

import ctypes
import struct
import threading

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from transport.arena import HEADER_NBYTES, Arena
from transport.errors import ArenaFull, ConfigError
from transport.types import BlockId, Outcome


def test_budget_is_hard_and_payload_aligned() -> None:
    arena = Arena(1 << 20, 1000)
    assert arena.stride == 1088
    assert arena.num_blocks == (1 << 20) // 1088
    assert arena.nbytes <= 1 << 20
    for block in arena.allocate(5):
        assert arena.payload(block).data_ptr() % 64 == 0
        assert arena.payload(block).numel() == 1000
        address, nbytes = arena.block_span(block)
        assert (address + HEADER_NBYTES, nbytes) == (arena.payload(block).data_ptr(), 1088)


def test_too_small_a_budget_says_what_to_raise() -> None:
    with pytest.raises(ConfigError, match=r"transport\.arena_bytes"):
        Arena(1000, 1000)
    with pytest.raises(ConfigError, match="at least one byte"):
        Arena(1000, 0)


def test_allocate_is_all_or_nothing() -> None:
    arena = Arena(10 * 128, 64)
    arena.allocate(7)
    with pytest.raises(ArenaFull, match=r"3 free blocks, 4 are needed \(7 used, 0 quarantined of 10"):
        arena.allocate(4)
    assert len(arena.allocate(3)) == 3


def test_free_writes_the_new_generation_at_once() -> None:
    arena = Arena(4 * 128, 64, incarnation=5)
    (block,) = arena.allocate(1)
    ref = arena.seal(block)
    address, _ = arena.block_span(block)
    read = lambda: struct.unpack_from("<8sQQQQ", ctypes.string_at(address, 64))  # noqa: E731
    assert read()[2:] == (ref.generation, 5, 64)
    arena.free([block])
    assert read()[2] == ref.generation + 1
    assert arena.verify(block, ref, 5) is Outcome.STALE


def test_double_free_and_foreign_ids_are_errors() -> None:
    arena = Arena(4 * 128, 64)
    one, two = arena.allocate(2)
    arena.free([one])
    with pytest.raises(ValueError, match="is free, not used"):
        arena.free([two, one])
    assert arena.stats().used == 1, "a refused free frees nothing"
    with pytest.raises(ValueError, match="named twice"):
        arena.free([two, two])
    with pytest.raises(ValueError, match="outside this arena"):
        arena.free([BlockId(99)])
    with pytest.raises(ValueError, match="is free, not used"):
        arena.seal(one)
    with pytest.raises(ValueError, match="outside this arena"):
        arena.payload(BlockId(-1))


def test_quarantined_blocks_are_not_reused_until_released() -> None:
    arena = Arena(4 * 128, 64)
    blocks = arena.allocate(4)
    before = [arena.generation(b) for b in blocks]
    arena.quarantine(blocks[:2])
    with pytest.raises(ArenaFull):
        arena.allocate(1)
    with pytest.raises(ValueError, match="is quarantined"):
        arena.free(blocks[:1])
    assert arena.release_quarantine(blocks[:1]) == 1
    assert arena.release_quarantine() == 1
    assert arena.release_quarantine() == 0
    assert [arena.generation(b) for b in blocks[:2]] == [g + 1 for g in before[:2]]
    assert arena.stats().free == 2


def test_verify_judges_and_restores_the_own_header() -> None:
    owner, reader = Arena(4 * 192, 128, incarnation=1), Arena(4 * 192, 128, incarnation=2)
    (src,), (dst,) = owner.allocate(1), reader.allocate(1)
    owner.payload(src).copy_(torch.arange(128, dtype=torch.uint8))
    ref = owner.seal(src)

    def land() -> None:
        reader.landing(dst)[:] = owner.outgoing(src)

    land()
    assert reader.verify(dst, ref, 1) is Outcome.PULLED
    assert reader.verify(dst, ref, 1) is Outcome.STALE, "the owner's header is gone"
    land()
    assert reader.verify(dst, ref, 3) is Outcome.STALE
    land()
    reader.payload(dst)[0] ^= 1
    assert reader.verify(dst, ref, 1) is Outcome.CORRUPT
    land()
    reader.landing(dst)[0] = 0
    assert reader.verify(dst, ref, 1) is Outcome.CORRUPT, "no header at all"
    mine = reader.seal(dst)
    assert reader.verify(dst, mine, 2) is Outcome.PULLED


def test_parts_make_up_a_block() -> None:
    arena = Arena(4 * 192, 128, parts=(100, 20, 8))
    assert [arena.part_range(i) for i in range(3)] == [(0, 164), (164, 184), (184, 192)]
    assert Arena(4 * 192, 128).parts == (128,)
    for wrong in ((100, 20), (128, 0), (130, -2)):
        with pytest.raises(ConfigError, match="do not make up a block of 128"):
            Arena(4 * 192, 128, parts=wrong)


def test_each_part_has_its_own_checksum() -> None:
    arena = Arena(4 * 192, 128, incarnation=1, parts=(100, 20, 8))
    (block,) = arena.allocate(1)
    arena.payload(block).copy_(torch.arange(128, dtype=torch.uint8))
    ref = arena.seal(block)
    assert len(set(ref.checksums)) == 3
    for part, at in enumerate((99, 119, 127)):
        arena.payload(block)[at] ^= 1
        verdicts = [arena.verify_part(block, ref, i) for i in range(3)]
        assert verdicts == [Outcome.CORRUPT if i == part else Outcome.PULLED for i in range(3)]
        arena.payload(block)[at] ^= 1
    assert arena.verify(block, ref, 1) is Outcome.PULLED


def test_the_header_tells_other_parts_of_the_same_size() -> None:
    owner, reader = (Arena(4 * 192, 128, incarnation=i, parts=p) for i, p in ((1, (64, 64)), (2, (32, 96))))
    (src,), (dst,) = owner.allocate(1), reader.allocate(1)
    ref = owner.seal(src)
    reader.landing(dst)[:] = owner.outgoing(src)
    assert reader.fits(ref), "as many parts"
    assert reader.verify_header(dst, ref, 1) is Outcome.LAYOUT_MISMATCH


def test_threads_never_share_a_block() -> None:
    arena = Arena(64 * 128, 64)
    clashes: list[int] = []

    def churn(mark: int) -> None:
        for _ in range(200):
            blocks = arena.allocate(4)
            for b in blocks:
                arena.payload(b).fill_(mark)
            if any(int(arena.payload(b)[0]) != mark for b in blocks):
                clashes.append(mark)
            arena.free(blocks)

    threads = [threading.Thread(target=churn, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert clashes == []
    assert arena.stats().free == 64


class ArenaMachine(RuleBasedStateMachine):
    """Blocks are conserved, and a generation never repeats for a block."""

    used = Bundle("used")
    set_aside = Bundle("set_aside")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(8 * 128, 64)
        self.n_used = self.n_quarantined = 0
        self.seen: set[tuple[int, int]] = set()

    @rule(target=used)
    def allocate(self) -> BlockId | None:
        if self.n_used + self.n_quarantined == 8:
            with pytest.raises(ArenaFull):
                self.arena.allocate(1)
            return None
        (block,) = self.arena.allocate(1)
        life = (block, self.arena.seal(block).generation)
        assert life not in self.seen
        self.seen.add(life)
        self.n_used += 1
        return block

    @rule(block=consumes(used))
    def free(self, block: BlockId | None) -> None:
        if block is not None:
            self.arena.free([block])
            self.n_used -= 1

    @rule(block=consumes(used), target=set_aside)
    def quarantine(self, block: BlockId | None) -> BlockId | None:
        if block is not None:
            self.arena.quarantine([block])
            self.n_used -= 1
            self.n_quarantined += 1
        return block

    @rule(blocks=st.lists(consumes(set_aside), max_size=3))
    def release(self, blocks: list[BlockId | None]) -> None:
        self.n_quarantined -= self.arena.release_quarantine([b for b in blocks if b is not None])

    @invariant()
    def counts_agree(self) -> None:
        s = self.arena.stats()
        assert (s.used, s.quarantined) == (self.n_used, self.n_quarantined)
        assert s.free + s.used + s.quarantined == s.total == 8


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
