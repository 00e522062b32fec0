"""The row of `relay bench transfer`. Imports nothing, so that `bench.common` may know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRow:
    """One backend over one path at one size.

    Attributes:
        backend: "shm", "nixl", "ucx" or "tcp".
        path: "shm" (processes of one machine that share memory), "tcp" (loopback) or "cuda" (both arenas
            on one CUDA device).
        size_bytes: payload bytes of one pull.
        blocks: in how many blocks; parts: in how many parts each.
        samples: timed pulls.
        seconds_p50, seconds_p90: of one pull.
        gb_s: size / seconds_p50, in 1e9 bytes per second.
        baseline: what the same bytes were moved with in the same rounds: "memcpy" (one thread, numpy) on shm,
            "socket" (one raw TCP connection between the same two processes) on tcp, "device copy" on cuda.
        baseline_gb_s: its median rate.
        ratio: gb_s / baseline_gb_s.
        verified: True: a whole pull, as the product does it, with lease check, generations and checksums;
            False: only the bytes were read.
    """

    backend: str
    path: str
    size_bytes: int
    blocks: int
    parts: int
    samples: int
    seconds_p50: float
    seconds_p90: float
    gb_s: float
    baseline: str
    baseline_gb_s: float
    ratio: float
    verified: bool
