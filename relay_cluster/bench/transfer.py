"""`relay bench transfer`: how fast do blocks move between two processes of this machine?

Every backend over every path it has is measured in processes of its own (`transfer_case`), each beside what
the machine itself can do with the same bytes at the same time: a copy by one thread (shm), one raw TCP
connection (tcp), a copy within the device (cuda). Absolute rates of a shared machine drift; ratios less.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, cast

import torch

from relay_cluster.bench.common import Document, progress
from relay_cluster.bench.transfer_rows import TransferRow
from transport.auto import available_backends
from transport.errors import ConfigError, TransportError
from transport.helping import usable_cores

PATHS: Final = {
    "shm": ("shm",),
    "nixl": ("shm", "tcp", "cuda"),
    "ucx": ("shm", "tcp"),
    "tcp": ("tcp", "cuda"),
}
"""Backend -> the paths that it is measured over; "cuda" where there is a device."""
DEFAULT_SIZES: Final = "4KiB,64KiB,1MiB,64MiB"
_UNITS: Final = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_SIZE: Final = re.compile(r"(\d+)\s*([A-Za-z]*)")
_CASE_TIMEOUT_S: Final = 600.0
_LARGEST: Final = 1 << 30
_MOST_ROUNDS: Final = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSettings:
    """What is measured.

    Attributes:
        backends: names from `PATHS`.
        sizes: payload bytes of one pull.
        parts: parts of every block; more than one shows what pulling by layer groups costs.
        bytes_per_size: how much is moved for one row, in bytes; small sizes are bounded by rounds instead.
    """

    backends: tuple[str, ...]
    sizes: tuple[int, ...]
    parts: int = 1
    bytes_per_size: int = 2 << 30

    def rounds(self, size: int) -> int:
        """Timed rounds of a size: enough for a median, bounded in time."""
        return max(5, min(_MOST_ROUNDS, self.bytes_per_size // size))


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes of "4KiB,64KiB,1MiB".

    Raises:
        ConfigError: not sizes, none, or one beyond 1 GiB.
    """
    sizes: list[int] = []
    for item in filter(None, (piece.strip() for piece in text.split(","))):
        found = _SIZE.fullmatch(item)
        unit = _UNITS.get(found.group(2).upper()) if found else None
        if found is None or unit is None:
            raise ConfigError(f'--sizes: "{item}" is not a size like 4KiB, 64KiB or 1MiB')
        sizes.append(int(found.group(1)) * unit)
    if not sizes or min(sizes) < 64 or max(sizes) > _LARGEST:
        raise ConfigError(f'--sizes "{text}": sizes are between 64 B and 1 GiB')
    return tuple(sizes)


def choose_backends(text: str | None) -> tuple[str, ...]:
    """Backends of a comma-separated list, or all that can be used here.

    Raises:
        ConfigError: one is unknown, or cannot be had here.
    """
    found = available_backends()
    if text is None:
        return tuple(name for name in PATHS if name in found and found[name][0])
    names = tuple(dict.fromkeys(filter(None, (piece.strip() for piece in text.split(",")))))
    for name in names:
        if name not in PATHS:
            raise ConfigError(f'--backends: "{name}" is not one of {", ".join(PATHS)}')
        usable, why = found.get(name, (False, "not a backend of this build"))
        if not usable:
            raise ConfigError(f"--backends: {name} cannot be used here: {why}")
    if not names:
        raise ConfigError(f"--backends names none of {', '.join(PATHS)}")
    return names


def run_transfer(settings: TransferSettings) -> Document:
    """Measure all backends, one after the other.

    Raises:
        TransportError: a backend failed.
    """
    device = torch.cuda.is_available()
    cases = [(name, path) for name in settings.backends for path in PATHS[name] if device or path != "cuda"]
    rows: list[TransferRow] = []
    with progress("transfer", len(cases)) as advance:
        for backend, path in cases:
            rows.extend(_run_case(backend, path, settings))
            advance(f"{backend} over {path}")
    facts = {
        **asdict(settings),
        "rounds": {str(size): settings.rounds(size) for size in settings.sizes},
        "baseline": "memcpy: numpy.copyto by one thread; socket: one TCP connection, recv_into one buffer; "
        "device copy: one copy within the GPU's memory",
        "ratio": "median seconds of the baseline / median seconds of the backend, same rounds",
        "cores_usable": usable_cores(),
    }
    return Document("transfer", facts, cast("Any", rows))  # its other rows are those of reuse methods


def _run_case(backend: str, path: str, settings: TransferSettings) -> list[TransferRow]:
    case: dict[str, Any] = {
        "backend": backend,
        "path": path,
        "sizes": settings.sizes,
        "rounds": [settings.rounds(size) for size in settings.sizes],
        "parts": settings.parts,
    }
    command = [sys.executable, "-m", "relay_cluster.bench.transfer_case", json.dumps(case)]
    try:
        done = subprocess.run(
            command,
            env=_environment(path),
            capture_output=True,
            text=True,
            timeout=_CASE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as fault:
        raise TransportError(f"{backend} over {path} took more than {_CASE_TIMEOUT_S:g} s.") from fault
    if done.returncode:
        raise TransportError(f"{backend} over {path} failed: {_last_line(done.stderr.splitlines())}")
    return [TransferRow(**row) for row in json.loads(done.stdout)]


def _environment(path: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # UCX takes the fastest way that both processes share, unless it is told to stay away from it.
    if path == "tcp":
        # With a GPU in sight, NIXL insists on being able to reach its memory.
        env["UCX_TLS"] = "tcp,cuda_copy" if torch.cuda.is_available() else "tcp"
    else:
        env.pop("UCX_TLS", None)
    return env


def _last_line(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
