"""One backend over one path, measured: the reader's process of `relay bench transfer`.

A process of its own, because UCX reads its environment once. The owner is a child of it. In every round each
size is moved by the baseline, by a whole pull and by a read without verification, one right after the other,
so that whatever else the machine does meets all of them alike.

    python -m relay_cluster.bench.transfer_case '<the fields of Case as JSON>'     prints rows as JSON
"""

from __future__ import annotations

import base64
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch

from relay_cluster.bench.common import median, quantile
from relay_cluster.bench.transfer_owner import HOST, KEY, LEASE_S, READER, WANT, private_stdout
from relay_cluster.bench.transfer_rows import TransferRow
from transport.arena import Arena
from transport.auto import make_backend
from transport.backend import Backend
from transport.pulling import landed_parts
from transport.settings import TransportSettings
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    Lease,
    LeaseId,
    Located,
    NodeId,
    Outcome,
    Owner,
    Segment,
    WorkerId,
)

LARGEST_BLOCK = 1 << 20
_ANSWER_TIMEOUT_S = 120.0
_PULL_TIMEOUT_S = 30.0
_TICK_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one process measures.

    Attributes:
        backend, path: see TransferRow; the environment of this process must fit the path.
        sizes: payload bytes.
        rounds: timed rounds of each size, by size.
        parts: parts of every block.
    """

    backend: str
    path: str
    sizes: tuple[int, ...]
    rounds: tuple[int, ...]
    parts: int = 1

    @property
    def device(self) -> str:
        """Where both arenas lie."""
        return "cuda" if self.path == "cuda" else "cpu"


class _OwnerProcess:
    """The other end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "relay_cluster.bench.transfer_owner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises RuntimeError: no answer within _ANSWER_TIMEOUT_S."""
        pipe, answers = self._process.stdin, self._process.stdout
        assert pipe is not None
        assert answers is not None
        pipe.write(json.dumps(request) + "\n")
        pipe.flush()
        ready, _, _ = select.select([answers], [], [], _ANSWER_TIMEOUT_S)
        line = answers.readline() if ready else ""
        if not line:
            raise RuntimeError(f"the owner's process did not answer (exit status {self._process.poll()})")
        return json.loads(line)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(_TICK_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _parts(block_nbytes: int, count: int) -> list[int]:
    """Equal parts, multiples of 64 bytes but for the last."""
    each = max(64, block_nbytes // count // 64 * 64)
    return [each] * (count - 1) + [block_nbytes - each * (count - 1)]


@contextmanager
def _target(case: Case, size: int, ask: Callable[..., dict[str, Any]]) -> Iterator[_Target]:
    block_nbytes = min(size, LARGEST_BLOCK)
    blocks = -(-size // block_nbytes)
    parts = _parts(block_nbytes, case.parts)
    answer = ask(
        backend=case.backend, device=case.device, block_nbytes=block_nbytes, parts=parts, blocks=blocks
    )
    arena = Arena(blocks * (block_nbytes + 128), block_nbytes, case.device, parts=parts)
    transport = make_backend(case.backend, TransportSettings(), worker=f"reader{size}", host=HOST)
    transport.register(arena)
    addresses = {name: base64.b64decode(text) for name, text in answer["addresses"].items()}
    owner = Owner(WorkerId("owner"), Incarnation(answer["incarnation"]), NodeId("node"), addresses)
    refs = tuple(BlockRef(BlockId(b), g, n, tuple(c)) for b, g, n, c in answer["refs"])
    located = Located(Segment(KEY, 1, 0, refs), owner)
    lease = Lease(LeaseId("bench"), located, READER, LEASE_S, token=base64.b64decode(answer["token"]))
    try:
        yield _Target(transport, arena, lease, arena.allocate(blocks))
    finally:
        transport.close()


@dataclass(frozen=True, slots=True)
class _Target:
    transport: Backend
    arena: Arena
    lease: Lease
    into: list[BlockId]

    def pull(self) -> None:
        """As the product does it. Raises RuntimeError: it did not arrive."""
        transfer = self.transport.pull(self.lease, self.into, timeout_s=_PULL_TIMEOUT_S)
        if transfer.outcome is not Outcome.PULLED:
            raise RuntimeError(f"{transfer.backend}: {transfer.outcome.value}: {transfer.detail}")

    def read(self) -> None:
        """Only the bytes."""
        reading = self.transport.read(self.lease, self.into, time.monotonic() + _PULL_TIMEOUT_S)
        for _ in landed_parts(self.arena, self.lease, self.into, reading, verify=False):
            pass


class _Baseline(Protocol):
    """What the machine can do with the same bytes."""

    @property
    def name(self) -> str: ...
    def move(self, size: int) -> None: ...


class _Memcpy:
    """One thread, from one buffer to another, both touched before."""

    name = "memcpy"

    def __init__(self, largest: int) -> None:
        self._source = np.random.default_rng(2).integers(0, 256, largest, dtype=np.uint8)
        self._target = np.zeros_like(self._source)

    def move(self, size: int) -> None:
        np.copyto(self._target[:size], self._source[:size])


class _DeviceCopy:
    """One copy within the device's memory."""

    name = "device copy"

    def __init__(self, largest: int) -> None:
        self._source = torch.randint(256, (largest,), dtype=torch.uint8, device="cuda")
        self._target = torch.zeros_like(self._source)

    def move(self, size: int) -> None:
        self._target[:size].copy_(self._source[:size])
        torch.cuda.synchronize()


class _Socket:
    """One TCP connection between the two processes, straight into a buffer."""

    name = "socket"

    def __init__(self, largest: int, port: int) -> None:
        self._buffer = memoryview(bytearray(largest))
        self._sock = socket.create_connection((HOST, port), timeout=_PULL_TIMEOUT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def move(self, size: int) -> None:
        self._sock.sendall(WANT.pack(size))
        got = 0
        while got < size:
            n = self._sock.recv_into(self._buffer[got:size])
            if n == 0:
                raise RuntimeError("the raw socket was closed")
            got += n

    def close(self) -> None:
        self._sock.close()


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(case: Case) -> list[TransferRow]:
    """All sizes."""
    rows: list[TransferRow] = []
    with ExitStack() as stack:
        owner = _OwnerProcess()
        stack.callback(owner.close)
        largest = max(case.sizes)
        if case.path == "shm":
            baseline: _Baseline = _Memcpy(largest)
        elif case.path == "cuda":
            baseline = _DeviceCopy(largest)
        else:
            baseline = _Socket(largest, int(owner.ask(socket=largest)["port"]))
            stack.callback(baseline.close)
        for size, rounds in zip(case.sizes, case.rounds, strict=True):
            with _target(case, size, owner.ask) as target:
                rows.extend(
                    _rows(case, size, target, _samples(target, baseline, size, rounds), baseline.name)
                )
    return rows


def _samples(target: _Target, baseline: _Baseline, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the first one (which connects) left out."""
    work: dict[str, Callable[[], None]] = {
        "baseline": lambda: baseline.move(size),
        "pull": target.pull,
        "read": target.read,
    }
    names = list(work)
    out: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            seconds = _seconds(work[name])
            if number:
                out[name].append(seconds)
    return out


def _rows(
    case: Case, size: int, target: _Target, samples: dict[str, list[float]], baseline: str
) -> Iterator[TransferRow]:
    base = median(samples["baseline"])
    for name in ("pull", "read"):
        seconds: Sequence[float] = samples[name]
        p50 = median(seconds)
        yield TransferRow(
            backend=case.backend,
            path=case.path,
            size_bytes=size,
            blocks=len(target.into),
            parts=case.parts,
            samples=len(seconds),
            seconds_p50=p50,
            seconds_p90=quantile(seconds, 0.9),
            gb_s=size / p50 / 1e9,
            baseline=baseline,
            baseline_gb_s=size / base / 1e9,
            ratio=base / p50,
            verified=name == "pull",
        )


def main() -> None:
    """Measure the case that the command line names."""
    out = private_stdout()
    fields = json.loads(sys.argv[1])
    fields.update(sizes=tuple(fields["sizes"]), rounds=tuple(fields["rounds"]))
    case = Case(**fields)
    out.write(json.dumps([asdict(row) for row in measure(case)]) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
