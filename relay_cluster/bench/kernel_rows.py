"""The row of `relay bench kernels`. Plain; the benchmark is in `kernels.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One kernel at one shape on a CUDA device.

    Attributes:
        kernel: its name in `workers.kernels`.
        shape: what the engine calls it for.
        rows: rows, or tokens where the kernel has no rows; keys: keys that they see, 0 without attention.
        dtype: of keys and values.
        seconds_p50: of one call, device time, caches of the device emptied before it; launch_s: that the
            caller is busy with it, which is hidden where the device has other work.
        floor_s: the larger of bytes / measured copy bandwidth and operations / measured matrix rate, each
            input read once and each output written once: no version is much faster.
        of_floor: seconds_p50 / floor_s.
        baseline: what torch offers for the same; baseline_s: its median seconds.
        speedup: baseline_s / seconds_p50.
        error: largest |difference| from the float32 oracle, over the largest |oracle|.
    """

    kernel: str
    shape: str
    rows: int
    keys: int
    dtype: str
    seconds_p50: float
    launch_s: float
    floor_s: float
    of_floor: float
    baseline: str
    baseline_s: float
    speedup: float
    error: float


KERNEL_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("shape", lambda r: r.shape),
    ("rows", lambda r: str(r.rows)),
    ("keys", lambda r: str(r.keys) if r.keys else "-"),
    ("time", lambda r: f"{r.seconds_p50 * 1e6:.1f} us"),
    ("launch", lambda r: f"{r.launch_s * 1e6:.0f} us"),
    ("floor", lambda r: f"{r.floor_s * 1e6:.1f} us"),
    ("of floor", lambda r: f"{r.of_floor:.1f}x"),
    ("torch", lambda r: f"{r.baseline_s * 1e6:.1f} us"),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
    ("error", lambda r: f"{r.error:.1e}"),
)
