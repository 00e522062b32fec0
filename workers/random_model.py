"""Models of known shapes with random weights: for timing where there is no such checkpoint. Answers mean
nothing; how long they take is what the real ones take.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import torch

from transport.errors import ModelError
from workers.embedded import Progress, import_embedded

SHAPES: Final[dict[str, dict[str, int]]] = {
    "llama-1b": {"layers": 16, "hidden": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "inner": 8192},
    "llama-3b": {"layers": 28, "hidden": 3072, "heads": 24, "kv_heads": 8, "head_dim": 128, "inner": 8192},
    "llama-8b": {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "inner": 14336},
}
"""Layers of Llama 3.2 1B and 3B and of Llama 3.1 8B, as their config.json give them. The vocabulary is the
embedded model's."""
_CONTEXT: Final = 131_072
_SHARD: Final = "4GB"


def write_random_model(shape: str, folder: Path, *, seed: int = 0, progress: Progress | None = None) -> None:
    """Write a bfloat16 checkpoint of `shape` with random weights, drawn on the GPU where there is one.

    Raises:
        ModelError: no such shape, a folder that is not empty, or the disk refuses.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape not in SHAPES:
        raise ModelError(f"no shape {shape!r}; there are {', '.join(SHAPES)}.")
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{folder} is not empty. Name a new folder.")
    report = progress or (lambda fraction, text: None)
    source = import_embedded()
    base: dict[str, Any] = LlamaConfig.from_pretrained(str(source)).to_dict()
    of = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=of["layers"],
        hidden_size=of["hidden"],
        num_attention_heads=of["heads"],
        num_key_value_heads=of["kv_heads"],
        head_dim=of["head_dim"],
        intermediate_size=of["inner"],
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        **{name: base[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
    )
    report(0.1, f"drawing the weights of {shape}")
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)  # noqa: SLF001
    report(0.5, f"writing {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder), max_shard_size=_SHARD)
        for file in source.iterdir():
            if "token" in file.name or file.suffix == ".jinja":
                shutil.copy(file, folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error}.") from error
    report(1.0, f"{folder} is ready")
