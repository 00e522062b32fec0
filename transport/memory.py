"""The memory under a CPU arena: a file without a name, which readers on the same host may be let into.

On Linux it is a memfd: the owner maps it once, then seals it, so that it can neither shrink nor grow (a
reader never falls off its end) and so that nobody can ever write into it but through the owner's own mapping
(a reader cannot, whatever it does with the descriptor it was handed). Elsewhere, or where the system refuses,
the arena lies in ordinary memory and is not shared.

Pages of 2 MiB are asked for where the system has them: it takes half the time to touch them all.
This module does not know what lies in the memory, nor who reads it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import sys
import weakref
from functools import cache
from typing import Any, Final

import numpy as np

logger = logging.getLogger(__name__)

HUGE: Final = 2 << 20
"""Bytes of a large page on x86-64 and on arm64 with pages of 4 KiB."""
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_SIZE_SEALS: Final = 0x2 | 0x4  # F_SEAL_SHRINK | F_SEAL_GROW
_F_SEAL_FUTURE_WRITE: Final = 0x10  # since Linux 5.1; not in Python's fcntl
_MADV_DONTFORK: Final = 10
_MADV_COLLAPSE: Final = 25  # since Linux 6.1
_PROT_NONE: Final = 0
_MAP_NORESERVE: Final = 0x4000
_MAP_FIXED: Final = 0x10


class SharedMemory:
    """A sealed memfd and the one writable mapping of it, which lives as long as `buffer` does.

    Args:
        nbytes: size; the kernel rounds it up to a page.

    Raises:
        OSError: the system has no memfd, or no room for it.

    Attributes:
        buffer: the mapping, writable, page-aligned, all zero.
        fd: read-only descriptor for readers of this host.
        huge: whether all of it but the last 2 MiB lies in pages of 2 MiB.
    """

    def __init__(self, nbytes: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, f"{sys.platform} has no memfd")
        fd = os.memfd_create("relay-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            start = _map_aligned(fd, nbytes, mmap.PROT_READ | mmap.PROT_WRITE)
            try:
                _seal(fd)
                self.huge = _fill(start, nbytes)
                self.fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                _libc().munmap(start, nbytes)
                raise
        finally:
            os.close(fd)  # the mapping keeps the file
        self.buffer: Any = (ctypes.c_ubyte * nbytes).from_address(start)
        # Not at exit: other threads may still be using it then.
        weakref.finalize(self.buffer, _release, start, nbytes, self.fd).atexit = False


def probe() -> tuple[bool, str]:
    """Whether memory can be shared here, and why (not)."""
    try:
        SharedMemory(mmap.PAGESIZE)
    except OSError as fault:
        return False, f"no sealed memfd: {fault}"
    return True, "sealed memfd"


def is_sealed(fd: int) -> bool:
    """Whether a descriptor is of a memfd that can neither shrink nor grow."""
    import fcntl  # not on every system that this module is imported on

    try:
        return fcntl.fcntl(fd, _F_GET_SEALS) & _SIZE_SEALS == _SIZE_SEALS
    except OSError:  # no memfd at all
        return False


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc


def map_readonly(fd: int, nbytes: int) -> np.ndarray:
    """The first `nbytes` of an owner's memory as an array that cannot be written; the mapping lives as long
    as any view of it does. `fd` may be closed.

    Raises:
        OSError: it is no memory of ours (`SharedMemory`), or cannot be mapped.
    """
    if not is_sealed(fd) or os.fstat(fd).st_size < nbytes:
        raise OSError(errno.EINVAL, "this is no sealed memory of that size")
    start = _map_aligned(fd, nbytes, mmap.PROT_READ)
    buffer: Any = (ctypes.c_ubyte * nbytes).from_address(start)
    weakref.finalize(buffer, _unmap, start, nbytes).atexit = False
    array = np.frombuffer(buffer, dtype=np.uint8)
    array.flags.writeable = False
    return array


def _map_aligned(fd: int, nbytes: int, protection: int) -> int:
    """Address of a mapping whose large pages coincide with those of the file: only then can they be mapped as
    such, and `mmap` alone does not see to it."""
    libc = _libc()
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    around = _mapped(libc.mmap(None, nbytes + HUGE, _PROT_NONE, private, -1, 0))
    start = -(-around // HUGE) * HUGE
    try:
        _mapped(libc.mmap(start, nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, 0))
    except OSError:
        libc.munmap(around, nbytes + HUGE)
        raise
    if start > around:
        libc.munmap(around, start - around)
    behind = -(-(start + nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    end = -(-(around + nbytes + HUGE) // mmap.PAGESIZE) * mmap.PAGESIZE
    if end > behind:
        libc.munmap(behind, end - behind)
    # A forked child would write into the parent's arena, and keep it when the parent is gone.
    libc.madvise(start, nbytes, _MADV_DONTFORK)
    return start


def _mapped(address: int | None) -> int:
    failed = ctypes.c_void_p(-1).value
    if address is None or address == failed:
        code = ctypes.get_errno()
        raise OSError(code, f"mmap: {os.strerror(code)}")
    return address


def _seal(fd: int) -> None:
    import fcntl  # not on every system that this module is imported on

    fcntl.fcntl(fd, _F_ADD_SEALS, _SIZE_SEALS)
    try:
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
    except OSError as fault:  # an older kernel: the descriptor of readers is read-only all the same
        logger.info("the arena's memory cannot be sealed against writing (%s)", fault)


def _fill(start: int, nbytes: int) -> bool:
    """Touch every page, so that the first transfers do not pay for it; whether every 2 MiB are a large page.

    Collapsing one touched page of each 2 MiB takes half the time of touching all the small ones, and does not
    ask the machine's settings for transparent huge pages, which leave them out for memfds by default.
    """
    libc = _libc()
    whole = nbytes // HUGE * HUGE
    huge = True
    for at in range(start, start + whole, HUGE):
        ctypes.memset(at, 0, 1)
        if huge and libc.madvise(at, HUGE, _MADV_COLLAPSE) != 0:
            huge = False
            logger.info("no 2 MiB pages for the arena: %s", os.strerror(ctypes.get_errno()))
        if not huge:
            ctypes.memset(at, 0, HUGE)
    ctypes.memset(start + whole, 0, nbytes - whole)
    return huge


def _release(start: int, nbytes: int, fd: int) -> None:
    _unmap(start, nbytes)
    os.close(fd)


def _unmap(start: int, nbytes: int) -> None:
    _libc().munmap(start, nbytes)
