"""The CPU's `relocate` against the reference: the same bits, whatever the shapes."""

from __future__ import annotations

import pytest
import torch

from workers.kernels import cpu, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 5])
@pytest.mark.parametrize("half", [4, 3])
@pytest.mark.parametrize("shift", [None, -7, 1000])
def test_cpu_relocate_is_the_reference(dtype: torch.dtype, layers: int, half: int, shift: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    block = torch.randn((5, 2, 2, 16, 8), generator=generator).to(dtype)[:, :, :, :13]
    cos, sin = (None, None) if shift is None else reference.rotation(torch.rand(layers, half), shift)
    expected, got = torch.zeros((2, 5, 2, 2, 40, 8), dtype=dtype)
    reference.relocate(block, cos, sin, expected[:, :, :, 7:20])
    cpu.relocate(block, cos, sin, got[:, :, :, 7:20])
    assert torch.equal(got, expected)
    assert got[:, :, :, 7:20].abs().sum() > 0
