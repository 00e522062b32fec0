"""Cores of a machine, shared among the workers on it that compute at the same moment.

torch's threads wait for each other inside an operator, in part by spinning. Two workers that both take all
cores of a machine therefore do not run at half their speed: of two processes with 2 threads each on 2 cores,
both multiplying [64, 576] by [576, 1536], each had 0.25 of what it has alone, and with one thread each 0.77.
So a worker looks, before every layer, who else computes, and takes its part of the cores.

Every worker has a file of 8 bytes: until when (CLOCK_MONOTONIC, the same in all processes of a machine) it
counts as computing. Its lock says that the worker lives; who finds a file without one removes it. Workers of
other users, and in containers with a /dev/shm of their own, are not seen.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from transport.helping import usable_cores

_SUFFIX = ".cores"
_UNTIL = struct.Struct("=d")
_LAYER_S = 2.0
"""A worker that has been stopped in the middle of a layer counts as computing for no longer."""
_LINGER_S = 0.005
"""Between two decode steps a worker does not give its cores away."""
_REFRESH_S = 1.0
_TRIES = 10


def _default_folder() -> Path:
    shared = Path("/dev/shm")
    return (shared if shared.is_dir() else Path(tempfile.gettempdir())) / f"relay-cores-{os.getuid()}"


class CoreShare:
    """How many threads the steps of one worker take: `computing` and `tune` are its engine's.

    Attributes:
        cores: to be shared.
    """

    def __init__(self, cores: int | None = None, folder: Path | None = None) -> None:
        """Raises: OSError: the folder cannot be used."""
        self.cores = cores or usable_cores()
        self._folder = folder or _default_folder()
        self._folder.mkdir(mode=0o700, exist_ok=True)
        _check_own(self._folder)
        self._fd, self._path = _make_file(self._folder)
        self._own = mmap.mmap(self._fd, _UNTIL.size)
        self._others: dict[str, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._refreshed_at = float("-inf")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The worker computes meanwhile; `tune` is called between layers."""
        try:
            yield
        finally:
            self._mark(time.monotonic() + _LINGER_S)

    def tune(self) -> int:
        """Take this worker's part of the cores from now on. Returns: threads."""
        now = time.monotonic()
        self._mark(now + _LAYER_S)
        threads = max(1, self.cores // (1 + self._computing(now)))
        torch.set_num_threads(threads)
        return threads

    def beside_others(self) -> int | None:
        """Cores that each would get if this worker computed beside those that do now, or beside one that is
        about to; None where there is no other worker. May be called from any thread."""
        computing = self._computing(time.monotonic())
        return max(1, self.cores // (1 + max(1, computing))) if self._others else None

    def close(self) -> None:
        """Leave. Idempotent."""
        self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _mark(self, until: float) -> None:
        _UNTIL.pack_into(self._own, 0, until)

    def _computing(self, now: float) -> int:
        """How many others compute."""
        with self._lock:
            if now - self._refreshed_at > _REFRESH_S:
                self._refresh()
                self._refreshed_at = now
            return sum(_UNTIL.unpack_from(other)[0] > now for other in self._others.values())

    def _refresh(self) -> None:
        """Find who has come, and forget who has gone."""
        found: dict[str, mmap.mmap] = {}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path == self._path:
                continue
            known = self._others.get(path.name)
            # Another worker may remove it first, or may just have made it and have written nothing yet. Who
            # cannot be read is not counted: that costs speed, and must not cost a step.
            with suppress(OSError, ValueError), path.open("rb") as file:
                if _left_behind(file.fileno()):
                    path.unlink()
                    continue
                found[path.name] = known or mmap.mmap(file.fileno(), _UNTIL.size, prot=mmap.PROT_READ)
        self._others = found


def _check_own(folder: Path) -> None:
    """Files are removed from it, so it must not be somebody's link to another place."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is not a folder.")
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to another user, or others may write to it.")


def _make_file(folder: Path) -> tuple[int, Path]:
    """A locked file of one slot."""
    for _ in range(_TRIES):
        fd, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=_SUFFIX, dir=folder)
        # Another worker may have found it without its lock, and may hold one on it to remove it.
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                os.ftruncate(fd, _UNTIL.size)
                return fd, Path(name)
        os.close(fd)
        Path(name).unlink(missing_ok=True)
    raise OSError(f"{folder}: {_TRIES} files were removed by other workers as soon as they were there.")


def _left_behind(fd: int) -> bool:
    """Whether the worker whose file this is has ended."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
