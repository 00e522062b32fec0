"""Whether a worker of this machine takes requests, told over a Unix socket to who does not want to join Ray
for that. Importing Ray and joining a cluster takes seconds, a question here a millisecond.

    connect -> one line of JSON -> the end

The socket lies in a folder that only its user can enter. Nothing is read from it. Knows nothing of workers.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)

_SUFFIX: Final = ".pulse"
_LONGEST_PATH: Final = 100
"""Linux takes 107 characters, macOS 103."""
_SEND_S: Final = 2.0
_WAITING: Final = 8
_MOST_BYTES: Final = 1 << 16


def pulse_path(folder: str, worker: str) -> Path:
    """Where a worker's socket lies."""
    return Path(folder) / f"{worker}{_SUFFIX}"


class Pulse:
    """Answers everybody who connects, one at a time, until it is closed.

    Args:
        path: of the socket; one that a dead process has left is replaced.
        tell: what is answered; called on a thread of this object, and may take its time.
    """

    def __init__(self, path: Path, tell: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._tell = tell
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            self._socket.listen(_WAITING)
        except OSError:
            self._socket.close()
            raise
        threading.Thread(target=self._serve, name="pulse", daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread; close alone would not
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return  # closed
            with peer:
                try:
                    peer.settimeout(_SEND_S)
                    peer.sendall(json.dumps(self._tell()).encode() + b"\n")
                except Exception as error:  # noqa: BLE001 - who asks hears nothing, and asks Ray
                    log.debug("nothing was told: %s", error)


def start_pulse(folder: str, worker: str, tell: Callable[[], dict[str, Any]]) -> Pulse | None:
    """A pulse in that folder; None where there can be none, which costs those who ask their time."""
    path = pulse_path(folder, worker)
    if not folder or len(str(path)) > _LONGEST_PATH or not hasattr(socket, "AF_UNIX"):
        return None
    try:
        return Pulse(path, tell)
    except OSError as error:
        log.warning("%s: no socket there: %s", path, error)
        return None


def ask_pulse(path: Path, *, timeout_s: float) -> dict[str, Any] | None:
    """What a worker tells; None where it says nothing in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(timeout_s)
        try:
            peer.connect(str(path))
            with peer.makefile("rb") as stream:
                line = stream.readline(_MOST_BYTES)
            told = json.loads(line)
        except (OSError, ValueError):
            return None
    return told if isinstance(told, dict) else None
