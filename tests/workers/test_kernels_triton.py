"""The Triton kernels against the oracle: interpreted on the CPU, compiled where a GPU is (`-m gpu`).

Every case runs on both kinds of device; which one a process can serve is decided by TRITON_INTERPRET when
triton is first imported (see conftest.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from tests.workers.kernel_cases import FLOAT32_SUMS, TOLERANCES, Case, assert_same, inputs
from transport.errors import ConfigError
from workers.kernels import reference

pytest.importorskip("triton", reason="triton is made for Linux only")
import triton

from workers.kernels import triton as fast

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

HALF, BRAIN = torch.float16, torch.bfloat16
SHORT_GRID = (
    Case(),
    Case(groups=1, kv_heads=3, dim=64, tokens=70, dtype=HALF),
    Case(groups=2, dim=80, tokens=33, rows=17, first=40, dtype=BRAIN),
    Case(groups=8, kv_heads=1, rows=9, tokens=150, window=24),
    Case(rows=1, order="tail", tokens=129, dim=64, dtype=BRAIN),
    Case(rows=1, order="tail", tokens=129, window=64, softcap=2.0),
    Case(order="tail", rows=45, kv_heads=1, dtype=HALF, softcap=5.0),
    Case(order="tail", first=7, rows=15, tokens=15, window=1),
    Case(groups=3, kv_heads=1, rows=33, tokens=40, dim=80),
    Case(rows=0),
    Case(tokens=0, dtype=BRAIN),
    Case(order="blind", first=3),
)
LONG_GRID = tuple(
    Case(groups=g, dim=d, rows=r, tokens=t, first=f, window=w, softcap=c, order=o, dtype=y, seed=n)
    for n, (g, d, (r, t), (f, w), (c, o), y) in enumerate(
        itertools.product(
            (1, 2, 3, 8),
            (16, 64, 80),
            ((1, 1), (1, 200), (37, 131)),
            ((0, None), (9, 33)),
            ((None, "scattered"), (4.0, "tail")),
            TOLERANCES,
        )
    )
)


def check_rows(case: Case, device: str, *, splits: int | None = None, spread: float = 1.0) -> None:
    """attend_rows and context_mass of one case equal the oracle's.

    Args:
        splits: cut the keys into so many shares, instead of what the device suggests.
        spread: standard deviation of the queries. Scores of a few hundred carry errors of 1e-5 in float32.
    """
    require(device)
    have = inputs(case, device, spread=spread)
    slack = 1e-6 * (spread - 1)
    rows = (have.query, have.keys, have.values, have.positions)
    expected, expected_lse = reference.attend_rows(*rows, **case.options)
    if splits is None:
        out, lse = fast.attend_rows(*rows, **case.options)
    else:
        out, lse = fast._attend_rows(
            *rows, case.first, case.options["scaling"], case.window, case.softcap, splits
        )
    assert out.dtype == case.dtype
    rtol, atol = TOLERANCES[case.dtype]
    assert_same(out, expected, (rtol, atol + slack))
    assert_same(lse, expected_lse, FLOAT32_SUMS)
    span = {"start": case.first + 3, "stop": case.first + 30, **case.options}
    mass = fast.context_mass(have.query, have.keys, expected_lse, have.positions, **span)
    exact = reference.context_mass(have.query, have.keys, expected_lse, have.positions, **span)
    rtol, atol = FLOAT32_SUMS
    assert_same(mass, exact, (rtol, atol + slack))


@on_devices
@pytest.mark.parametrize(("start", "stop"), [(-4, 10**6), (0, 9), (9, 54), (20, 20), (50, 60), (70, 99)])
def test_context_mass_of_ranges_in_and_out_of_the_keys(start: int, stop: int, device: str) -> None:
    require(device)
    case = Case(first=9)
    have = inputs(case, device)
    lse = reference.attend_rows(have.query, have.keys, have.values, have.positions, **case.options)[1]
    arguments = (have.query, have.keys, lse, have.positions)
    span = {"start": start, "stop": stop, **case.options}
    assert_same(
        fast.context_mass(*arguments, **span), reference.context_mass(*arguments, **span), FLOAT32_SUMS
    )


def require(device: str) -> None:
    """A skip where this process cannot show anything about `device`; a failure where it should."""
    if device == "cuda":
        assert not fast.interpreted(), "TRITON_INTERPRET is set: nothing would be compiled. Unset it."
    elif os.environ.get("TRITON_INTERPRET") == "1":
        # triton.language has kernels of its own, decorated when triton was imported.
        compiled = isinstance(triton.language.sum, triton.JITFunction) or not fast.interpreted()
        assert not compiled, "something imported triton before tests/conftest.py set TRITON_INTERPRET"
    else:
        assert torch.cuda.is_available(), "TRITON_INTERPRET is not 1, and there is no CUDA device either"
        pytest.skip("kernels are compiled for the GPU in this process, not interpreted")


@on_devices
@pytest.mark.parametrize("case", SHORT_GRID, ids=str)
def test_rows_short_grid(case: Case, device: str) -> None:
    check_rows(case, device)


@on_devices
@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize(
    "case",
    [
        Case(kv_heads=1, tokens=150, rows=9, first=4, dtype=HALF),
        Case(kv_heads=1, tokens=200, rows=1, order="tail", window=70),
        Case(kv_heads=1, order="blind"),
    ],
    ids=str,
)
def test_splits_of_the_keys_merge_to_the_same(case: Case, splits: int, device: str) -> None:
    check_rows(case, device, splits=splits)


@on_devices
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_peaked_attention_keeps_its_digits(dtype: torch.dtype, device: str) -> None:
    """Scores of some hundreds overflow exp unless the running maximum is subtracted."""
    check_rows(Case(kv_heads=1, dim=64, tokens=90, rows=12, dtype=dtype), device, spread=100.0)


@on_devices
def test_keys_that_no_row_sees_are_never_read(device: str) -> None:
    """The cache behind the last position, and before the window, may hold anything: here NaN."""
    require(device)
    case = Case(rows=5, tokens=200, window=30)
    have = inputs(case, device)
    have.positions.copy_(torch.tensor([121, 118, 119, 125, 118]))
    for pool in (have.keys, have.values):
        pool[:, :89] = float("nan")
        pool[:, 126:] = float("nan")
    out, lse = fast.attend_rows(have.query, have.keys, have.values, have.positions, **case.options)
    seen = slice(89, 126)
    expected, expected_lse = reference.attend_rows(
        have.query,
        have.keys[:, seen],
        have.values[:, seen],
        have.positions,
        **{**case.options, "first": 89},
    )
    assert_same(out, expected, TOLERANCES[case.dtype])
    assert_same(lse, expected_lse, FLOAT32_SUMS)
    have.keys[:, 110:] = float("nan")
    mass = fast.context_mass(have.query, have.keys, lse, have.positions, start=0, stop=110, **case.options)
    assert mass.isfinite().all()


@on_devices
def test_order_of_rows_does_not_matter(device: str) -> None:
    require(device)
    case = Case(rows=14, tokens=50)
    have = inputs(case, device)
    order = torch.randperm(case.rows).to(device)
    out, lse = fast.attend_rows(have.query, have.keys, have.values, have.positions, **case.options)
    again, lse_again = fast.attend_rows(
        have.query[:, order], have.keys, have.values, have.positions[order], **case.options
    )
    assert_same(again, out[:, order], TOLERANCES[case.dtype])
    assert_same(lse_again, lse[:, order], FLOAT32_SUMS)


def check_relocate(
    dtype: torch.dtype, dim: int, rotary: int, angles: int, tokens: int, device: str, layers: int = 3
) -> None:
    """relocate from a strided block into a slice of a cache; rotary = 0: no shift."""
    require(device)
    block = torch.randn(layers, 2, 2, tokens + 3, dim).to(dtype).to(device)[..., 1 : 1 + tokens, :]
    cos, sin = reference.rotation(torch.rand(angles, rotary // 2, device=device), -731)
    shift = (cos, sin) if rotary else (None, None)
    cache = torch.full((layers, 2, 2, tokens + 20, dim), 7.0, dtype=dtype, device=device)
    expected = cache.clone()
    place = (Ellipsis, slice(9, 9 + tokens), slice(None))
    fast.relocate(block, *shift, cache[place])
    reference.relocate(block, *shift, expected[place])
    # Also shows that nothing outside the slice was written.
    assert_same(cache, expected, TOLERANCES[dtype])
    assert torch.equal(cache[:, 1], expected[:, 1])
    assert torch.equal(cache[:, 0, ..., rotary:], expected[:, 0, ..., rotary:])


@on_devices
@pytest.mark.parametrize(
    ("dim", "rotary", "angles", "tokens"),
    [(64, 64, 1, 16), (80, 32, 3, 13), (16, 8, 3, 1), (80, 80, 1, 70), (16, 0, 1, 5), (16, 16, 1, 0)],
)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_relocate(dtype: torch.dtype, dim: int, rotary: int, angles: int, tokens: int, device: str) -> None:
    check_relocate(dtype, dim, rotary, angles, tokens, device, layers=3 if angles > 1 else 1)


def check_deviation(
    dtype: torch.dtype, kv_heads: int, tokens: int, dim: int, device: str, *, noise: float = 0.1
) -> None:
    require(device)
    reused = torch.randn(2, kv_heads, tokens + 5, dim).to(dtype).to(device)[1, :, 2 : 2 + tokens]
    computed = (reused.float() + noise * torch.randn(reused.shape, device=device)).to(dtype)
    deviation = fast.value_deviation(reused, computed)
    assert deviation.dtype == torch.float32
    assert_same(deviation, reference.value_deviation(reused, computed), FLOAT32_SUMS)


@on_devices
@pytest.mark.parametrize(("kv_heads", "tokens", "dim"), [(3, 37, 64), (1, 1, 80), (2, 0, 16)])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_value_deviation(dtype: torch.dtype, kv_heads: int, tokens: int, dim: int, device: str) -> None:
    check_deviation(dtype, kv_heads, tokens, dim, device)


@on_devices
def test_value_deviation_of_known_vectors(device: str) -> None:
    require(device)
    a = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]], device=device)
    b = torch.tensor([[[3.0, 0.0], [1.0, -1.0], [0.0, -1.0], [1.0, 0.0]]], device=device)
    expected = torch.tensor([0.0, 1.0, 2.0, 1.0], device=device)
    assert_same(fast.value_deviation(a, b), expected, FLOAT32_SUMS)


# ---------------------------------------------------------------------------------------------- the long grid


@pytest.mark.grid
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80])
@on_devices
def test_rows_long_grid(dim: int, dtype: torch.dtype, device: str) -> None:
    cases = [c for c in LONG_GRID if c.dim == dim and c.dtype == dtype]
    assert len(cases) == 48
    for case in cases:
        try:
            check_rows(case, device)
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.grid
@pytest.mark.timeout(900)
@on_devices
@settings(max_examples=80)
@drawn(data=st.data())
def test_rows_of_any_shape(device: str, data: st.DataObject) -> None:
    require(device)
    tokens = data.draw(st.integers(0, 180), "tokens")
    order = data.draw(st.sampled_from(["scattered", "scattered", "tail", "blind"]), "order")
    most = min(tokens, 70) if order == "tail" else 70
    case = Case(
        groups=data.draw(st.sampled_from([1, 2, 3, 5, 8]), "groups"),
        kv_heads=data.draw(st.integers(1, 3), "kv_heads"),
        rows=data.draw(st.integers(0, most), "rows"),
        tokens=tokens,
        dim=data.draw(st.sampled_from([8, 16, 40, 64, 80, 96]), "dim"),
        first=data.draw(st.integers(0, 5000), "first"),
        window=data.draw(st.none() | st.integers(1, 250), "window"),
        softcap=data.draw(st.none() | st.floats(0.5, 50.0), "softcap"),
        order=order,
        dtype=data.draw(st.sampled_from(list(TOLERANCES)), "dtype"),
        seed=data.draw(st.integers(0, 2**31), "seed"),
    )
    check_rows(case, device, splits=data.draw(st.sampled_from([1, 1, 2, 3, 16]), "splits"))


@pytest.mark.grid
@pytest.mark.timeout(900)
@on_devices
@settings(max_examples=40)
@drawn(data=st.data())
def test_relocate_and_deviation_of_any_shape(device: str, data: st.DataObject) -> None:
    require(device)
    dim = data.draw(st.sampled_from([8, 16, 40, 64, 80, 96]), "dim")
    layers = data.draw(st.integers(1, 4), "layers")
    rotary = 2 * data.draw(st.integers(0, dim // 2), "rotary / 2")
    angles = data.draw(st.sampled_from([1, layers]), "angles")
    dtype = data.draw(st.sampled_from(list(TOLERANCES)), "dtype")
    tokens = data.draw(st.integers(0, 70), "tokens")
    check_relocate(dtype, dim, rotary, angles, tokens, device, layers)
    check_deviation(dtype, layers, tokens, dim, device, noise=data.draw(st.floats(0, 10), "noise"))


@pytest.mark.grid
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_within_the_limits_of_devices(arch: int, tmp_path: Path) -> None:
    """What the interpreter cannot show: they type-check, fit shared memory, and keep to their registers."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.workers.triton_compile", str(arch)],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({facts["kernel"] for facts in compiled}) == 5
    for facts in compiled:
        assert facts["shared_bytes"] <= 99 * 1024, facts
        assert facts["stack_bytes"] <= 256, facts


# ----------------------------------------------------------------------------------- only where a device is


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(rows=160, tokens=4096, dim=64, first=0),
        Case(rows=1, tokens=8000, dim=128, groups=8, order="tail"),
        Case(rows=700, tokens=3000, dim=80, groups=1, window=512),
        Case(rows=90, tokens=2000, dim=256, groups=2, softcap=50.0),
    ],
    ids=str,
)
def test_real_sizes(case: Case, dtype: torch.dtype) -> None:
    check_rows(dataclasses.replace(case, dtype=dtype), "cuda")


@pytest.mark.gpu
def test_few_rows_over_many_keys_are_split() -> None:
    require("cuda")
    have = inputs(Case(rows=1, tokens=8000, dim=64, order="tail", dtype=HALF), "cuda")
    assert fast._splits(have.query, have.keys) > 1


# ----------------------------------------------------------------------------------------- choice and refusal


def test_keys_are_split_only_where_that_fills_the_device() -> None:
    assert fast._shares(programs=3, key_blocks=128, multiprocessors=132) == 32
    assert fast._shares(programs=12, key_blocks=64, multiprocessors=132) == 16
    assert fast._shares(programs=300, key_blocks=128, multiprocessors=132) == 1
    assert fast._shares(programs=3, key_blocks=5, multiprocessors=132) == 1


def test_cpu_tensors_are_refused_by_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "interpreted", lambda: False)
    with pytest.raises(ConfigError, match=r"cpu.*workers\.kernels\.reference"):
        fast.value_deviation(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"query": torch.zeros(6, 7, 8)}, "does not fit keys"),
        ({"query": torch.zeros(5, 7, 16)}, "does not fit keys"),
        ({"keys": torch.zeros(2, 45, 16, dtype=HALF)}, "does not fit keys"),
        ({"values": torch.zeros(2, 44, 16)}, "differ"),
        ({"positions": torch.zeros(6, dtype=torch.int64)}, "positions are"),
        ({"positions": torch.zeros(7, dtype=torch.int32)}, "positions are"),
        ({"query": torch.zeros(6, 7, 16, dtype=torch.float64)}, "float64 is not supported"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, torch.Tensor], what: str) -> None:
    require("cpu")
    have = inputs(Case())
    arguments = {"query": have.query, "keys": have.keys, "values": have.values, "positions": have.positions}
    with pytest.raises(ValueError, match=what):
        fast.attend_rows(**{**arguments, **change}, scaling=1.0)


def test_wrong_angles_and_caches_are_named() -> None:
    require("cpu")
    block = torch.zeros(3, 2, 1, 4, 16)
    with pytest.raises(ValueError, match="source"):
        fast.relocate(block, None, None, torch.zeros(3, 2, 1, 5, 16))
    for shape in ((2, 8), (1, 9)):
        with pytest.raises(ValueError, match="cos"):
            fast.relocate(block, torch.zeros(shape), torch.zeros(shape), block.clone())
