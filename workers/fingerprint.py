"""Digests that name things across processes: files, folders of weights, and canonical JSON.

BLAKE2b throughout and never Python's `hash()`, which differs from process to process. This module does not
know what a model is; it sees bytes and plain values.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

DIGEST_BYTES = 16
_CHUNK = 4 << 20


def canonical(value: Any) -> bytes:
    """JSON bytes that depend on the value only: keys sorted, no blanks, ASCII. Raises TypeError for what
    JSON cannot say."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def digest(data: bytes, size: int = DIGEST_BYTES) -> str:
    """BLAKE2b of `data`, as hex of `size` bytes."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def _sidecar(path: Path) -> Path:
    return path.with_name(f".{path.name}.blake2b.json")


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def write_atomic(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old content or the new, never half. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def remember_digest(path: Path, hexdigest: str) -> None:
    """Keep the digest of `path` beside it, keyed by size and mtime. A read-only folder is no error: the
    digest is then computed each time."""
    try:
        write_atomic(_sidecar(path), json.dumps({**_stamp(path), "blake2b": hexdigest}))
    except OSError as error:
        log.debug("digest of %s not kept: %s", path.name, error)


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's content as hex; read from the note beside the file while size and mtime are
    unchanged.
    Raises OSError when the file cannot be read."""
    stamp = _stamp(path)
    with contextlib.suppress(OSError, ValueError, TypeError):
        note = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        if (
            isinstance(note, dict)
            and {k: note.get(k) for k in stamp} == stamp
            and isinstance(note.get("blake2b"), str)
        ):
            return note["blake2b"]
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    remember_digest(path, state.hexdigest())
    return state.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """One digest over named files, in the order of their names."""
    return digest(canonical([[path.name, file_digest(path)] for path in sorted(paths, key=lambda p: p.name)]))
