"""Formats of keys and values in a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.workers import tiny
from workers.layout import KVLayout
from workers.methods import parse_method
from workers.wire import WIRE_FORMATS, WireFormat

BOUNDS = {"raw": 0.0, "bf16": 2.0**-8, "int8": 0.5 / 127 * 1.01}
"""Largest error as a share of the largest entry of its channel (keys) or token (values): half a step."""


def _layout(wire: WireFormat, **changes: Any) -> KVLayout:
    values: dict[str, Any] = {
        "num_layers": 5,
        "num_kv_heads": 3,
        "head_dim": 20,
        "hidden_size": 24,
        "dtype": "float32",
        "block_tokens": 16,
        "checkpoint_layer": 2,
        "wire": wire,
    }
    return KVLayout(**{**values, **changes})


@pytest.mark.parametrize("wire", WIRE_FORMATS)
@pytest.mark.parametrize("tokens", [1, 7, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_goes_in_comes_out_within_half_a_step(wire: WireFormat, tokens: int, dtype: str) -> None:
    layout = _layout(wire, dtype=dtype)
    payload = torch.full((layout.block_nbytes,), 0x7F, dtype=torch.uint8)
    views = layout.views(payload)
    scale = torch.logspace(-3, 3, 20)  # channels that differ by six orders of magnitude
    kv = (torch.randn(5, 2, 3, tokens, 20) * scale).to(layout.torch_dtype)
    views.kv.put(kv)
    got = views.kv.take(tokens)
    assert got.dtype == layout.torch_dtype
    error = (got.float() - kv.float()).abs()
    rounding = 0.0 if dtype == "float32" or wire != "int8" else 2.0**-8
    keys, values = kv[:, 0].float().abs(), kv[:, 1].float().abs()
    bound = BOUNDS[wire] if layout.lossy else 0.0
    assert (error[:, 0] <= (bound + rounding) * keys.amax(dim=2, keepdim=True)).all()
    assert (error[:, 1] <= (bound + rounding) * values.amax(dim=3, keepdim=True)).all()
    assert torch.equal(views.kv.take(tokens, 1, 3), got[1:3])
    # Nothing of what the block held before is left behind the tokens.
    assert (views.kv.take(16)[:, :, :, tokens:] == 0).all()


def test_bytes_of_a_block() -> None:
    raw = _layout("raw", num_kv_heads=3, head_dim=64, block_tokens=64)
    bf16 = _layout("bf16", num_kv_heads=3, head_dim=64, block_tokens=64)
    int8 = _layout("int8", num_kv_heads=3, head_dim=64, block_tokens=64)
    assert bf16.window_nbytes * 2 == raw.window_nbytes
    assert 0.25 < int8.window_nbytes / raw.window_nbytes < 0.27
    assert len({raw.fingerprint, bf16.fingerprint, int8.fingerprint}) == 3
    for layout in (raw, bf16, int8):
        assert sum(layout.parts) == layout.block_nbytes
    # Where keys and values are not exact, the checkpoint need not be either: readers wait for the first part.
    dtypes = [
        layout.views(torch.zeros(layout.block_nbytes, dtype=torch.uint8)).checkpoint.dtype
        for layout in (raw, bf16, int8)
    ]
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert raw.block_nbytes - raw.window_nbytes > 1.9 * (int8.block_nbytes - int8.window_nbytes)


def test_the_model_s_own_format_loses_nothing() -> None:
    assert not _layout("raw").lossy
    assert not _layout("bf16", dtype="bfloat16").lossy
    assert _layout("bf16").lossy
    assert _layout("int8", dtype="bfloat16").lossy


def test_zeros_stay_zeros() -> None:
    layout = _layout("int8")
    views = layout.views(torch.zeros(layout.block_nbytes, dtype=torch.uint8))
    views.kv.put(torch.zeros(5, 2, 3, 9, 20))
    assert (views.kv.take(16) == 0).all()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_a_prefill_over_a_lossy_format(wire: WireFormat) -> None:
    """Recomputing everything is exact whatever came over the wire; reuse is near what raw bytes give."""
    model = tiny.build("llama")
    raw, rig = tiny.Rig(model), tiny.Rig(model, wire=wire)
    exact, _ = raw.run(parse_method("naive"), raw.two_spans())
    logits, _ = rig.run(parse_method("naive"), rig.two_spans())
    far = (logits - exact).abs().max()
    assert 0 < far < 0.05 * exact.abs().max()
    method = parse_method("context_mass:ratio=1+start=0+end=6")
    pieces = rig.two_spans()
    logits, prefill = rig.run(method, pieces)
    whole = [i for ids, _ in pieces for i in ids]
    assert prefill.num_tokens == len(whole)
    assert (logits - tiny.reference_logits(rig.model, whole)[-1]).abs().max() < 1e-4
