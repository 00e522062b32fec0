"""The conformance suite for blocks in parts; everything of the other one runs in parts as well."""

from __future__ import annotations

import signal
import time
from typing import ClassVar

import numpy as np
import pytest

from tests.transport.conformance import BLOCK, Conformance, Reader
from tests.transport.rigs import OwnerSide, RemoteOwner, content, make_lease, wait_for
from transport.types import BlockId, BlockRef, Outcome


class PartsConformance(Conformance):
    """Pulls in parts: what is handed over, in which order, and what a failure between two parts leaves."""

    PARTS: ClassVar[tuple[int, ...]] = (9_000, 3, 20_997, 10_000)

    @pytest.mark.parametrize("n", [1, 150])
    def test_parts_are_verified_bytes_when_they_are_handed_over(
        self, side: OwnerSide, reader: Reader, n: int
    ) -> None:
        refs = side.publish(n, seed=n)
        assert all(len(r.checksums) == len(self.PARTS) for r in refs)
        handed: list[int] = []

        def check(part: int, into: list[BlockId]) -> None:
            handed.append(part)
            first = sum(self.PARTS[:part])
            for at in (0, n // 2, n - 1):
                wanted = content(BLOCK, n + at)[first : first + self.PARTS[part]]
                landed = reader.arena.payload(into[at]).cpu().numpy()[first : first + self.PARTS[part]]
                assert np.array_equal(landed, wanted), f"part {part} of block {at}"

        transfer, into = reader.pull(side, refs, on_part=check)
        assert transfer.outcome is Outcome.PULLED, transfer.detail
        assert handed == [0, 1, 2, 3]
        self.expect(reader.arena, into, seed=n)
        own = [reader.arena.seal(block) for block in into]
        assert [r.checksums for r in own] == [r.checksums for r in refs]
        side.free(refs)

    @pytest.mark.parametrize("part", [0, 1, 2, 3])
    def test_a_corrupt_part_is_never_handed_over(self, side: OwnerSide, reader: Reader, part: int) -> None:
        refs = side.publish(3, seed=part)
        side.corrupt(refs[2], sum(self.PARTS[: part + 1]) - 1)
        handed: list[int] = []
        outcome = reader.outcome(side, refs, on_part=lambda i, _: handed.append(i))
        assert (outcome, handed) == (Outcome.CORRUPT, list(range(part)))
        side.free(refs)

    @pytest.mark.parametrize("reused", [False, True])
    def test_blocks_freed_between_two_parts(self, side: OwnerSide, reader: Reader, reused: bool) -> None:
        refs = side.publish(2, seed=1)
        handed: list[int] = []
        new: list[BlockRef] = []

        def free_at_the_first(part: int, _: list[BlockId]) -> None:
            handed.append(part)
            if part == 0:
                side.free(refs)
                new.extend(side.publish(2, seed=77) if reused else [])

        outcome = reader.outcome(side, refs, on_part=free_at_the_first)
        if reused:
            assert {r.block for r in new} == {r.block for r in refs}
            # The bytes of the other segment may be noticed before the generation is.
            assert outcome in (Outcome.STALE, Outcome.CORRUPT)
        else:
            assert outcome is Outcome.STALE
        assert handed == list(range(len(handed)))
        assert len(handed) < len(self.PARTS)
        side.free(new)

    def test_lease_that_ends_between_two_parts(self, side: OwnerSide, reader: Reader) -> None:
        refs = side.publish(2, seed=3)
        ends = time.monotonic() + 1.0
        handed: list[int] = []

        def dawdle(part: int, _: list[BlockId]) -> None:
            handed.append(part)
            while time.monotonic() <= ends:
                time.sleep(0.01)

        outcome = reader.outcome(side, refs, lease_deadline=ends, on_part=dawdle)
        assert (outcome, handed) == (Outcome.LEASE_EXPIRED, [0])
        side.free(refs)

    def test_what_the_caller_raises_comes_out_and_ends_the_read(
        self, side: OwnerSide, reader: Reader
    ) -> None:
        refs = side.publish(50, seed=4)
        into = reader.arena.allocate(50)

        def fail(part: int) -> None:
            raise KeyError(part)

        with pytest.raises(KeyError, match="0"):
            reader.transport.pull(make_lease(side.owner, refs), into, timeout_s=5, on_part=fail)
        reader.arena.free(into)
        assert reader.outcome(side, refs) is Outcome.PULLED
        side.free(refs)

    @pytest.mark.parametrize("parts", [(), (20_000, 20_000), (9_001, 3, 20_996, 10_000)])
    def test_other_parts_are_another_layout(self, side: OwnerSide, parts: tuple[int, ...]) -> None:
        refs = side.publish(1, seed=5)
        other = Reader(self.backend, parts=parts, device=self.reader_device)
        try:
            assert other.outcome(side, refs) is Outcome.LAYOUT_MISMATCH
        finally:
            other.transport.close()
            side.free(refs)


class RemotePartsConformance(PartsConformance):
    """What a backend promises when its peer stops or dies between two parts."""

    QUARTERS: ClassVar[tuple[int, ...]] = (1 << 18,) * 4

    @pytest.mark.parametrize(
        ("number", "timeout_s", "expected"),
        [(signal.SIGKILL, 10.0, Outcome.PEER_GONE), (signal.SIGSTOP, 1.0, Outcome.TIMED_OUT)],
        ids=["killed", "stopped"],
    )
    def test_owner_after_the_first_part(
        self, number: signal.Signals, timeout_s: float, expected: Outcome
    ) -> None:
        # Parts of 16 MiB: more than the kernel's buffers hold, so that later ones cannot have been sent.
        side = self.make_owner(80 << 20, 1 << 20, self.QUARTERS)
        assert isinstance(side, RemoteOwner)
        reader = Reader(self.backend, 80 << 20, 1 << 20, self.QUARTERS, device=self.reader_device)
        try:
            refs = side.publish(64, seed=1)
            handed: list[int] = []

            def strike(part: int, _: list[BlockId]) -> None:
                handed.append(part)
                if part == 0 and number == signal.SIGKILL:
                    side.kill()
                elif part == 0:
                    side.signal(number)

            assert reader.outcome(side, refs, timeout_s=timeout_s, on_part=strike) is expected
            assert handed == list(range(len(handed)))
            assert 1 <= len(handed) < 4
            wait_for(lambda: reader.arena.stats().free == reader.arena.num_blocks, "all blocks are back")
        finally:
            reader.transport.close()
            side.close()
