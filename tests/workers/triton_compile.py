"""Compile the Triton kernels for CUDA targets on a machine without one, with the arguments that the wrappers
really pass: `python -m tests.workers.triton_compile ARCH` prints one JSON object per kernel.

The interpreter neither types nor lays out what it runs; the compiler does. Not runnable under
TRITON_INTERPRET=1. Uses the ptxas and cuobjdump of triton's own wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.workers.kernel_cases import Case, inputs
from workers.kernels import triton as kernels

CASES = (
    Case(dim=64, rows=1, groups=8, dtype=torch.bfloat16),
    Case(dim=64, rows=160, dtype=torch.bfloat16),
    Case(dim=80, rows=160, dtype=torch.float16, window=100),
    Case(dim=128, rows=160, dtype=torch.bfloat16),
    Case(dim=256, rows=160, dtype=torch.bfloat16, window=100, softcap=30.0),
    Case(dim=64, rows=160, dtype=torch.float32),
    Case(dim=256, rows=160, dtype=torch.float32),
)


class Described:
    """What the compiler asks of a driver, for a device that is not here."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def _stack_bytes(cubin: bytes) -> int:
    """Bytes per thread that did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", listing)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resource usage: {listing!r}")
    return int(found.group(1))


class CompileOnly:
    """Stands where a kernel does in the wrappers' own launch: `kernel[grid](...)` compiles and reports."""

    def __init__(self, kernel: Any, case: Case, arch: int) -> None:
        self._kernel, self._case, self._arch = kernel, case, arch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def compile_(*args: Any, **options: Any) -> None:
            done = self._kernel.warmup(*args, grid=grid, **options)
            facts = {
                "kernel": self._kernel.__name__,
                "case": str(self._case),
                "arch": self._arch,
                "tile": [options.get(k) for k in ("BLOCK_M", "BLOCK_N", "num_warps")],
                "shared_bytes": done.metadata.shared,
                "stack_bytes": _stack_bytes(done.asm["cubin"]),
            }
            print(json.dumps(facts), flush=True)  # noqa: T201

        return compile_


def compile_all(arch: int) -> None:
    """Compile every kernel of every case for compute capability `arch` (80, 90...)."""
    driver.set_active(Described(arch))
    launch = kernels._launch

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        # Through the real launch, so that every option that it adds is compiled with.
        launch(CompileOnly(kernel, case, arch), grid, *args, **options)

    kernels._launch = compile_only
    kernels._check = lambda *_: None  # the tensors are on the CPU: they only lend their layout
    for case in CASES:
        given = inputs(case)
        arguments = (given.query, given.keys, given.values, given.positions)
        for splits in (1, 8):
            _, lse = kernels._attend_rows(
                *arguments, case.first, case.dim**-0.5, case.window, case.softcap, splits
            )
        kernels.context_mass(given.query, given.keys, lse, given.positions, start=0, stop=40, **case.options)
        kernels.value_deviation(given.keys, given.values)
        block = torch.zeros((2, 2, 2, 16, case.dim), dtype=case.dtype)
        kernels.relocate(block, None, None, block.clone())
        angles = torch.ones(1, case.dim // 2)
        kernels.relocate(block, angles, angles, block.clone())


if __name__ == "__main__":
    if kernels.interpreted():
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled.")
    compile_all(int(sys.argv[1]))
