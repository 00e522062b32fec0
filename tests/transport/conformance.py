"""One suite for every backend. A subclass gives `backend`, and where the owner lives.

To try a backend of your own, subclass `Conformance` and override the fixtures `side` and `reader`.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

from tests.transport.rigs import (
    LocalOwner,
    OwnerSide,
    RemoteOwner,
    content,
    make_lease,
    wait_for,
)
from transport import nixl
from transport.arena import Arena
from transport.auto import AutoTransport, make_transport
from transport.settings import TransportSettings
from transport.types import BlockId, BlockRef, Incarnation, Outcome, Transfer

BLOCK = 40_000  # not a multiple of 64: strides are rounded up
BUDGET = 12 << 20


class Reader:
    """A transport and its arena, on the pulling side."""

    def __init__(
        self,
        backend: str,
        budget: int = BUDGET,
        block_nbytes: int = BLOCK,
        parts: Sequence[int] = (),
        device: str = "cpu",
    ) -> None:
        self.arena = Arena(budget, block_nbytes, device, incarnation=99, parts=parts)
        self.transport: AutoTransport = make_transport(
            TransportSettings(backend=backend),  # type: ignore[arg-type]
            worker="reader",
        )
        self.transport.register(self.arena)

    def pull(
        self,
        side: OwnerSide,
        refs: list[BlockRef],
        *,
        timeout_s: float = 10.0,
        lease_deadline: float | None = None,
        on_part: Callable[[int, list[BlockId]], None] | None = None,
    ) -> tuple[Transfer, list[BlockId]]:
        into = self.arena.allocate(len(refs))
        transfer = self.transport.pull(
            make_lease(side.owner, refs),
            into,
            timeout_s=timeout_s,
            lease_deadline=lease_deadline,
            on_part=None if on_part is None else lambda part: on_part(part, into),
        )
        return transfer, into

    def outcome(self, side: OwnerSide, refs: list[BlockRef], **kwargs: Any) -> Outcome:
        """Pull, give the blocks back as the contract says, and tell the outcome."""
        transfer, into = self.pull(side, refs, **kwargs)
        assert (transfer.detail == "") == (transfer.outcome is Outcome.PULLED)
        if transfer.outcome is not Outcome.TIMED_OUT:
            self.arena.free(into)
        return transfer.outcome


class Conformance:
    """What every backend promises; the owner may be in this process."""

    backend: ClassVar[str]
    env: ClassVar[dict[str, str]] = {}
    remote: ClassVar[bool] = True
    owner_device: ClassVar[str] = "cpu"
    reader_device: ClassVar[str] = "cpu"
    PARTS: ClassVar[tuple[int, ...]] = ()

    @classmethod
    def make_owner(
        cls, budget: int = BUDGET, block_nbytes: int = BLOCK, parts: Sequence[int] | None = None
    ) -> OwnerSide:
        parts = cls.PARTS if parts is None else parts
        if cls.remote:
            return RemoteOwner(cls.backend, budget, block_nbytes, cls.env, parts, device=cls.owner_device)
        return LocalOwner(cls.backend, budget, block_nbytes, parts, device=cls.owner_device)

    @pytest.fixture(scope="class")
    @classmethod
    def side(cls) -> Iterator[OwnerSide]:
        owner = cls.make_owner()
        yield owner
        owner.close()

    @pytest.fixture(autouse=True)
    def _short_farewell(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nixl, "FAREWELL_S", 0.1)  # nobody here waits for an owner to come back

    @pytest.fixture
    def reader(self) -> Iterator[Reader]:
        reader = Reader(self.backend, parts=self.PARTS, device=self.reader_device)
        yield reader
        try:
            wait_for(lambda: reader.arena.stats().quarantined == 0, "quarantined blocks are released")
        finally:
            reader.transport.close()

    def expect(self, arena: Arena, into: list[BlockId], seed: int, valid: int | None = None) -> None:
        for at, landed in enumerate(into):
            wanted = content(arena.block_nbytes, seed + at, valid if at == len(into) - 1 else None)
            assert np.array_equal(arena.payload(landed).cpu().numpy(), wanted), f"block {at} differs"

    @pytest.mark.parametrize("n", [1, 3, 100])
    def test_content_arrives(self, side: OwnerSide, reader: Reader, n: int) -> None:
        refs = side.publish(n, seed=n)
        transfer, into = reader.pull(side, refs)
        assert transfer.outcome is Outcome.PULLED, transfer.detail
        assert (transfer.nbytes, transfer.blocks, transfer.backend) == (n * BLOCK, n, self.backend)
        assert (transfer.source, transfer.destination) == ("owner", "reader")
        self.expect(reader.arena, into, seed=n)
        side.free(refs)

    def test_scattered_blocks_in_any_order(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(6, seed=50)
        transfer, into = reader.pull(side, refs[::-1][::2])
        assert transfer.outcome is Outcome.PULLED
        self.expect(reader.arena, into[2:], seed=51)
        side.free(refs)

    def test_ragged_tail_is_zero(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(2, seed=5, valid=1234)
        transfer, into = reader.pull(side, refs)
        assert transfer.outcome is Outcome.PULLED
        self.expect(reader.arena, into, seed=5, valid=1234)
        assert not reader.arena.payload(into[1])[1234:].any()
        side.free(refs)

    def test_landed_blocks_can_be_sealed_and_are_our_own(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=8)
        transfer, into = reader.pull(side, refs)
        assert transfer.outcome is Outcome.PULLED
        own = reader.arena.seal(into[0])
        if self.owner_device == self.reader_device:  # else of another kind; `expect` looks at the bytes
            assert own.checksums == refs[0].checksums
        assert reader.arena.verify(into[0], own, reader.arena.incarnation) is Outcome.PULLED
        side.free(refs)

    def test_freed_block_is_stale(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(2, seed=9)
        side.free(refs)
        assert reader.outcome(side, refs) is Outcome.STALE

    def test_reused_block_is_stale(self, side: OwnerSide, reader: Reader) -> None:
        old = side.publish(2, seed=10)
        side.free(old)
        new = side.publish(2, seed=11)
        assert {r.block for r in old} & {r.block for r in new}, "the test needs a reused block"
        assert reader.outcome(side, old) is Outcome.STALE
        assert reader.outcome(side, new) is Outcome.PULLED
        side.free(new)

    def test_other_life_of_the_owner_is_stale(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=12)
        older = replace(side.owner, incarnation=Incarnation(side.owner.incarnation - 1))
        lease = make_lease(older, refs)
        into = reader.arena.allocate(1)
        assert reader.transport.pull(lease, into, timeout_s=5).outcome is Outcome.STALE
        side.free(refs)

    def test_block_outside_the_arena_is_refused(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=12)
        outside = [replace(refs[0], block=BlockId(1_000_000))]
        assert reader.outcome(side, outside) is Outcome.STALE
        side.free(refs)

    def test_flipped_byte_is_corrupt(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(3, seed=13)
        side.corrupt(refs[1])
        assert reader.outcome(side, refs) is Outcome.CORRUPT
        assert reader.outcome(side, refs[:1]) is Outcome.PULLED
        side.free(refs)

    def test_expired_lease(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=14)
        late = reader.outcome(side, refs, lease_deadline=time.monotonic() - 0.001)
        assert late is Outcome.LEASE_EXPIRED
        side.free(refs)

    def test_other_layout(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=15)
        assert reader.outcome(side, [replace(refs[0], nbytes=BLOCK // 2)]) is Outcome.LAYOUT_MISMATCH
        side.free(refs)

    def test_no_address_is_no_route(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=16)
        into = reader.arena.allocate(1)
        mute = replace(side.owner, addresses={})
        assert reader.transport.pull(make_lease(mute, refs), into, timeout_s=1).outcome is Outcome.NO_ROUTE
        side.free(refs)

    def test_garbage_address_is_no_route(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=16)
        into = reader.arena.allocate(1)
        for garbage in (b"", b"\x00", b"\x93\x01\x02\x03", b"x" * 500):
            owner = replace(side.owner, addresses={self.backend: garbage})
            transfer = reader.transport.pull(make_lease(owner, refs), into, timeout_s=1)
            assert transfer.outcome in (Outcome.NO_ROUTE, Outcome.PEER_GONE), transfer
        side.free(refs)

    def test_wrong_number_of_destinations_is_our_mistake(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(2, seed=17)
        with pytest.raises(ValueError, match="2 blocks, but 1"):
            reader.transport.pull(make_lease(side.owner, refs), reader.arena.allocate(1), timeout_s=1)
        side.free(refs)

    def test_concurrent_pulls(self, side: OwnerSide, reader: Reader) -> None:
        segments = [side.publish(10, seed=100 * i) for i in range(6)]
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(lambda refs: reader.pull(side, refs), segments))
        for i, (transfer, into) in enumerate(results):
            assert transfer.outcome is Outcome.PULLED, transfer.detail
            self.expect(reader.arena, into, seed=100 * i)
        for refs in segments:
            side.free(refs)

    def test_close_is_idempotent_and_leaves_no_thread(self) -> None:
        ours = lambda: {t.name for t in threading.enumerate() if t.name.startswith("relay-")}  # noqa: E731
        before = ours()  # an owner in this process has threads of its own
        reader = Reader(self.backend, device=self.reader_device)
        reader.transport.close()
        reader.transport.close()
        assert ours() == before

    # vllm#52234: a failed or stale receive was answered as if it had succeeded. Nothing is handed over here.

    def never_handed_over(self, side: OwnerSide, reader: Reader, refs: list[BlockRef]) -> Outcome:
        handed: list[int] = []
        outcome = reader.outcome(side, refs, timeout_s=5.0, on_part=lambda part, _: handed.append(part))
        assert handed == []
        return outcome

    def test_vllm_52234_failed_transfer(self, reader: Reader) -> None:
        side = self.make_owner()
        refs = side.publish(2, seed=20)
        side.close()
        assert self.never_handed_over(side, reader, refs) is Outcome.PEER_GONE

    def test_vllm_52234_block_reused_by_another_segment(self, side: OwnerSide, reader: Reader) -> None:
        """There it was the previous prompt's answer that came back."""
        old = side.publish(1, seed=21)
        side.free(old)
        new = side.publish(1, seed=22)
        assert old[0].block == new[0].block
        # Even a reference with the old bytes' checksum and the new generation names no such block.
        for stale in (old, [replace(old[0], generation=new[0].generation)]):
            assert self.never_handed_over(side, reader, stale) in (Outcome.STALE, Outcome.CORRUPT)
        side.free(new)

    def test_vllm_52234_wrong_incarnation(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(1, seed=23)
        into = reader.arena.allocate(1)
        for other in (-1, 1):
            owner = replace(side.owner, incarnation=Incarnation(side.owner.incarnation + other))
            handed: list[int] = []
            transfer = reader.transport.pull(
                make_lease(owner, refs), into, timeout_s=5, on_part=handed.append
            )
            assert (transfer.outcome, handed) == (Outcome.STALE, [])
        side.free(refs)

    def test_vllm_52234_corrupt_bytes(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(2, seed=24)
        side.corrupt(refs[0], at=0)
        assert self.never_handed_over(side, reader, refs) is Outcome.CORRUPT
        side.free(refs)

    def test_vllm_52234_missing_block(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(2, seed=25)
        side.free(refs[1:])
        assert self.never_handed_over(side, reader, refs) is Outcome.STALE
        missing = [refs[0], replace(refs[0], block=BlockId(10**6))]
        assert self.never_handed_over(side, reader, missing) is Outcome.STALE
        side.free(refs[:1])

    def test_mooncake_4239_reader_sleeps_past_its_lease(
        self, side: OwnerSide, reader: Reader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the read and the use: one of Mooncake's read paths does not look at the lease again."""
        refs = side.publish(1, seed=26)
        assert reader.outcome(side, refs) is Outcome.PULLED, "connected"
        ends = time.monotonic() + 0.5
        verify = reader.arena.verify_landed

        def late(*args: Any) -> Iterator[tuple[BlockRef, Outcome]]:
            while time.monotonic() <= ends:  # the reader sleeps, as the name says: by the lease's own clock
                time.sleep(0.01)
            return verify(*args)

        monkeypatch.setattr(reader.arena, "verify_landed", late)
        handed: list[int] = []
        outcome = reader.outcome(side, refs, lease_deadline=ends, on_part=lambda part, _: handed.append(part))
        assert (outcome, handed) == (Outcome.LEASE_EXPIRED, [])
        side.free(refs)


class RemoteConformance(Conformance):
    """What a backend between processes promises when its peer stops or dies."""

    BIG: ClassVar[int] = 1 << 20

    def test_owner_stops_then_dies(self) -> None:
        """A stopped owner costs the deadline, no more; a late write never lands in reused memory; a dead
        owner is noticed."""
        side = self.make_owner(36 << 20, self.BIG)
        assert isinstance(side, RemoteOwner)
        reader = Reader(self.backend, 40 << 20, self.BIG, device=self.reader_device)
        try:
            refs = side.publish(32, seed=1)
            side.signal(signal.SIGSTOP)
            start = time.monotonic()
            assert reader.outcome(side, refs, timeout_s=0.4) is Outcome.TIMED_OUT
            assert time.monotonic() - start < 3.0
            assert reader.arena.stats().used == 0
            wait_for(lambda: reader.arena.stats().quarantined == 0, "the quarantine is released")
            reuse = reader.arena.allocate(reader.arena.num_blocks)
            for block in reuse:
                reader.arena.payload(block).fill_(7)
            side.signal(signal.SIGCONT)
            time.sleep(0.2)  # give a late write its chance
            assert all((reader.arena.payload(b) == 7).all() for b in reuse)
            reader.arena.free(reuse)
            side.kill()
            assert reader.outcome(side, refs, timeout_s=10.0) is Outcome.PEER_GONE
        finally:
            reader.transport.close()
            side.close()

    def test_owner_killed_during_pulls_then_replaced(self) -> None:
        side = self.make_owner(36 << 20, self.BIG)
        assert isinstance(side, RemoteOwner)
        reader = Reader(self.backend, 40 << 20, self.BIG, device=self.reader_device)
        try:
            refs = side.publish(32, seed=1)
            assert reader.outcome(side, refs) is Outcome.PULLED
            seen: list[Outcome] = []

            def pull_until_it_fails() -> None:
                while not seen or seen[-1] is Outcome.PULLED:
                    seen.append(reader.outcome(side, refs, timeout_s=10.0))

            puller = threading.Thread(target=pull_until_it_fails)
            puller.start()
            wait_for(lambda: len(seen) >= 2, "two pulls are through")
            side.kill()
            puller.join(20)
            assert not puller.is_alive()
            assert seen[-1] is Outcome.PEER_GONE
            assert reader.outcome(side, refs) is Outcome.PEER_GONE
            other = self.make_owner(36 << 20, self.BIG)
            try:
                assert reader.outcome(other, other.publish(4, seed=3)) is Outcome.PULLED
            finally:
                other.close()
            assert reader.arena.stats().free == reader.arena.num_blocks
        finally:
            reader.transport.close()
            side.close()
