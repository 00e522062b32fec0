"""The memory under an arena: sealed, all zero, gone with its last user, and not inherited."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from transport import memory
from transport.arena import Arena
from transport.memory import HUGE, SharedMemory, is_sealed, map_readonly

USABLE, WHY = memory.probe()
pytestmark = pytest.mark.skipif(not USABLE, reason=WHY)


def mappings() -> int:
    """Arenas that are mapped into this process."""
    return sum("memfd:relay-arena" in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE, HUGE - 1, HUGE + 1, 3 * HUGE + 12_345])
def test_it_is_zero_aligned_sealed_and_of_its_size(nbytes: int) -> None:
    shared = SharedMemory(nbytes)
    array = np.frombuffer(shared.buffer, dtype=np.uint8)
    assert (len(array), array.ctypes.data % HUGE) == (nbytes, 0)
    assert not array.any()
    assert is_sealed(shared.fd)
    assert os.fstat(shared.fd).st_size == nbytes
    array[-1] = 7
    there = map_readonly(shared.fd, nbytes)
    assert (int(there[-1]), int(there.sum())) == (7, 7)
    with pytest.raises(ValueError, match="read-only"):
        there[0] = 1


def test_mappings_and_descriptors_go_with_their_last_user() -> None:
    gc.collect()
    before, files = mappings(), set(os.listdir("/proc/self/fd"))
    arena = Arena(3 * HUGE, 1000)
    fd = arena.shared_fd()
    assert fd is not None
    there = map_readonly(fd, arena.nbytes)
    tail, payload = there[-10:], arena.payload(arena.allocate(1)[0])
    del there, arena
    gc.collect()
    assert mappings() > before, "a view of it is left on either side"
    payload.fill_(1)
    del tail, payload
    gc.collect()
    assert mappings() == before
    assert set(os.listdir("/proc/self/fd")) == files


def test_what_is_not_sealed_is_not_mapped() -> None:
    fd = os.memfd_create("relay-test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, HUGE)
        assert not is_sealed(fd)
        with pytest.raises(OSError, match="no sealed memory"):
            map_readonly(fd, HUGE)
    finally:
        os.close(fd)
    shared = SharedMemory(HUGE)
    with pytest.raises(OSError, match="no sealed memory"):
        map_readonly(shared.fd, 2 * HUGE)


def test_a_forked_child_does_not_have_it() -> None:
    """It could write into the parent's arena, and would keep the memory of a dead one."""
    shared = SharedMemory(HUGE)
    assert mappings() >= 1
    child = os.fork()
    if child == 0:  # no more than reading a file in here
        os._exit(1 if b"memfd:relay-arena" in Path("/proc/self/maps").read_bytes() else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del shared


def test_without_large_pages_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_MADV_COLLAPSE", 0x7FFF)  # what an older kernel says to it
    shared = SharedMemory(2 * HUGE + 5)
    assert not shared.huge
    assert not np.frombuffer(shared.buffer, dtype=np.uint8).any()
