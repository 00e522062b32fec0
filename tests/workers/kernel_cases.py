"""Inputs for kernel tests: shapes, layouts and data types that the engine can meet, and the tolerances."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch

# out of attend_rows and relocate against the float32 oracle, per data type: (rtol, atol).
# float32: summation order. float16: half an ulp of the result, and of each softmax weight before the product
# with V, which tensor cores take in the inputs' type. bfloat16: likewise, but whole ulps, because Triton's
# interpreter cuts digits off where a device rounds to nearest.
TOLERANCES = {
    torch.float32: (1e-5, 2e-6),
    torch.float16: (2e-3, 1e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
# lse, context mass, value deviation: float32 sums of exact products, whatever the inputs' type.
FLOAT32_SUMS = (1e-5, 5e-6)

# scattered: any order, repeats, some before the first key and some behind the last; tail: the last rows of a
# sequence, ascending; blind: every row stands before the first key.
Order = Literal["scattered", "tail", "blind"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Shapes of one attention call. first: position of key 0."""

    groups: int = 3
    kv_heads: int = 2
    rows: int = 7
    tokens: int = 45
    dim: int = 16
    first: int = 0
    window: int | None = None
    softcap: float | None = None
    order: Order = "scattered"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        default = dataclasses.asdict(Case())
        changed = {k: v for k, v in fields.items() if v != default[k]}
        return "-".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in changed.items()) or "default"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments that attend_rows and context_mass share."""
        return {
            "first": self.first,
            "scaling": self.dim**-0.5,
            "window": self.window,
            "softcap": self.softcap,
        }


@dataclass(slots=True)
class Inputs:
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


def inputs(case: Case, device: str = "cpu", *, spread: float = 1.0) -> Inputs:
    """Random inputs laid out as in the engine: keys and values are a slice of a pool [layers, 2, kv_heads,
    tokens, head_dim], the query a transposed projection [rows, heads, head_dim].

    Args:
        spread: standard deviation of the queries; a large one makes attention peaked.
    """
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.groups * case.kv_heads
    pool = torch.randn((2, 2, case.kv_heads, case.tokens + 9, case.dim), generator=generator)
    query = torch.randn((case.rows, heads, case.dim), generator=generator) * spread
    if case.order == "tail":
        end = case.first + case.tokens
        positions = torch.arange(end - case.rows, end)
    elif case.order == "blind":
        positions = torch.full((case.rows,), case.first - 1)
    else:
        span = (case.first - 2, case.first + case.tokens + 5)
        positions = torch.randint(*span, (case.rows,), generator=generator)
    pool, query = pool.to(case.dtype).to(device), query.to(case.dtype).to(device)
    kv = pool[1, :, :, 4 : 4 + case.tokens]
    return Inputs(query.transpose(0, 1), kv[0], kv[1], positions.to(device))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: tuple[float, float]) -> None:
    """Equal shape, and equal values within (rtol, atol); infinities must match exactly."""
    assert actual.shape == expected.shape
    rtol, atol = tolerance
    torch.testing.assert_close(actual.float(), expected.float(), rtol=rtol, atol=atol)
