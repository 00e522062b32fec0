"""`relay model random`: a checkpoint that loads like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from transport.errors import ModelError
from workers import random_model
from workers.model import load_model
from workers.random_model import write_random_model


@pytest.mark.slow
def test_random_weights_are_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "inner": 128}
    monkeypatch.setitem(random_model.SHAPES, "tiny", tiny)
    said: list[float] = []
    write_random_model("tiny", tmp_path / "m", progress=lambda fraction, _: said.append(fraction))
    assert said[-1] == 1.0
    loaded = load_model(tmp_path / "m", device="cpu")
    assert (loaded.num_layers, loaded.layout.num_kv_heads, loaded.layout.head_dim) == (2, 2, 16)
    assert loaded.model.dtype is torch.float32  # on a CPU, whatever was stored
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("Hello there")) == "Hello there"
    with pytest.raises(ModelError, match="not empty"):
        write_random_model("tiny", tmp_path / "m")


def test_no_such_shape(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="llama-8b"):
        write_random_model("llama-1t", tmp_path / "m")
