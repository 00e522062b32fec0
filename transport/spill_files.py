"""Segments in plain files: one folder per life of a worker, one file per segment.

    header   magic, schema, sizes, the owner's incarnation, the key, (block, generation, xxh3) of every block
    xxh3     of all of the above
    payload  of every block, in token order

A file is written under another name and then renamed, so a file that can be found is whole; it is verified
all the same whenever it is read. Files are as private as prompts: nobody but the user may read them.

A folder belongs to whoever holds the lock on the file beside it, and locks end with their process: folders
whose lock is free are leftovers, and the next worker that starts removes them. This module does not know when
segments are spilled or which of them are worth keeping.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
import xxhash

from transport.types import Incarnation, Segment, WorkerId

logger = logging.getLogger(__name__)

Payload = npt.NDArray[np.uint8]
"""The bytes of one block, outside any arena."""

SCHEMA: Final = 1
_MAGIC: Final = b"RELAYSPL"
# magic, schema, blocks, block bytes, incarnation, bytes of the key's space and digest
_FIXED: Final = struct.Struct("<8sIIQQII")
_BLOCK: Final = struct.Struct("<QQQ")  # block, generation, xxh3 of the payload
_SUM: Final = struct.Struct("<Q")
_FOLDER: Final = re.compile(r"relay-spill-.+-\d+")


class SpillDamaged(Exception):
    """A file is not what was written: cut off, changed, or another segment's. Never leaves the spill."""


class SpillFolder:
    """The files of one life of a worker. Each method may be called from any thread; a file is written once.

    Args:
        parent: folder of all workers' folders, made where it is missing. "": the system's folder for
            temporary files.

    Raises:
        OSError: the folder cannot be made or locked.
    """

    def __init__(self, parent: str, worker: WorkerId, incarnation: Incarnation) -> None:
        base = Path(parent or tempfile.gettempdir())
        base.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(base)
        self._incarnation = incarnation
        self._count = 0
        safe = re.sub(r"[^A-Za-z0-9_.-]", "_", worker)
        self.path = base / f"relay-spill-{safe}-{incarnation}"
        # Locked before the folder is there: who finds a folder with a free lock has found a leftover.
        self._lock_path = _lock_of(self.path)
        self._lock: int | None = _take_lock(self._lock_path)
        try:
            self.path.mkdir(mode=0o700)
        except OSError:
            os.close(self._lock)
            raise

    def nbytes(self, segment: Segment) -> int:
        """Size of the segment's file."""
        return len(self._head(segment, [0] * len(segment.blocks))) + segment.nbytes

    def write(self, segment: Segment, payloads: Sequence[Payload]) -> Path:
        """Write a segment's file and return its path.

        Raises:
            OSError: no space, a limit of the process, a broken disk; nothing is left behind.
        """
        self._count += 1
        final = self.path / f"{self._count:08d}.kv"
        partial = final.with_suffix(".part")
        head = self._head(segment, [xxhash.xxh3_64_intdigest(_view(p)) for p in payloads])
        try:
            descriptor = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb", buffering=0) as file:
                for part in (memoryview(head), *(_view(p) for p in payloads)):
                    _write_all(file.fileno(), part)
            os.replace(partial, final)
        except OSError:
            self.remove(partial)
            raise
        return final

    def read(self, path: Path, segment: Segment) -> list[Payload]:
        """The payloads of a segment, verified against the file's header and `segment`.

        Raises:
            SpillDamaged: the file is not what was written.
            OSError: it cannot be read.
        """
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size != self.nbytes(segment):
                raise SpillDamaged(f"{size} bytes instead of {self.nbytes(segment)}")
            head = _read_exactly(file.fileno(), size - segment.nbytes)
            sums = self._checksums(head, segment)
            payloads: list[Payload] = []
            for at, (ref, checksum) in enumerate(zip(segment.blocks, sums, strict=True)):
                payload = np.frombuffer(_read_exactly(file.fileno(), ref.nbytes), np.uint8)
                if xxhash.xxh3_64_intdigest(_view(payload)) != checksum:
                    raise SpillDamaged(f"block {at} of {len(sums)} has another checksum")
                payloads.append(payload)
        return payloads

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there. Never raises: what stays is a leftover."""
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s stays until this worker ends: %s", path.name, error)

    def close(self) -> None:
        """Remove the folder with all its files. Idempotent."""
        if self._lock is None:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    # -- inside ----------------------------------------------------------------------------------------

    def _head(self, segment: Segment, checksums: Sequence[int]) -> bytes:
        space, digest = segment.key.space.encode(), segment.key.digest
        block_nbytes = segment.blocks[0].nbytes if segment.blocks else 0
        fixed = _FIXED.pack(
            _MAGIC, SCHEMA, len(segment.blocks), block_nbytes, self._incarnation, len(space), len(digest)
        )
        blocks = b"".join(
            _BLOCK.pack(ref.block, ref.generation, checksum)
            for ref, checksum in zip(segment.blocks, checksums, strict=True)
        )
        body = fixed + space + digest + blocks
        return body + _SUM.pack(xxhash.xxh3_64_intdigest(body))

    def _checksums(self, head: bytearray, segment: Segment) -> list[int]:
        """The payloads' checksums out of a header that is `segment`'s own."""
        body, (total,) = head[: -_SUM.size], _SUM.unpack(head[-_SUM.size :])
        if xxhash.xxh3_64_intdigest(body) != total:
            raise SpillDamaged("the header has another checksum")
        start = len(body) - len(segment.blocks) * _BLOCK.size
        sums = [checksum for _, _, checksum in _BLOCK.iter_unpack(body[start:])]
        if bytes(head) != self._head(segment, sums):
            raise SpillDamaged("the header is another segment's, or of another version")
        return sums


def _view(payload: Payload) -> memoryview:
    return memoryview(cast("Any", payload))


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_exactly(descriptor: int, count: int) -> bytearray:
    out = bytearray(count)
    view, at = memoryview(out), 0
    while at < count:
        got = os.readv(descriptor, [view[at:]])
        if got == 0:
            raise SpillDamaged(f"it ends {count - at} bytes early")
        at += got
    return out


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _take_lock(path: Path) -> int:
    """A descriptor that holds the lock.

    Raises:
        OSError: another process holds it, or it cannot be made.
    """
    for _ in range(5):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # a worker that starts as well took it for a leftover, before it was locked
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise BlockingIOError(f"{path.name} cannot be locked")


def _remove_leftovers(base: Path) -> None:
    """Remove folders and locks of workers that are no more. Never raises: a leftover costs room only."""
    for lock_path in base.glob("relay-spill-*.lock"):
        folder = lock_path.with_name(lock_path.name.removesuffix(".lock"))
        if not _FOLDER.fullmatch(folder.name):
            continue
        try:
            descriptor = os.open(lock_path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            continue  # it has just been removed, or is somebody else's
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            lock_path.unlink(missing_ok=True)
            logger.info("removed %s, which a worker that is no more has left", folder.name)
        except OSError:
            pass  # locked: its worker lives
        finally:
            os.close(descriptor)
