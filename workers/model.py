"""Finds, checks and loads a model, and names the space in which its KV may be shared.

A model is the embedded default, a local Hugging Face folder, or a hub id `owner/name[@revision]`. Loading
fails closed: see `workers/relayable.py`. This module does not know how layers are driven
(`workers/engine.py`), nor anything about prompts or segments.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from transport.errors import ModelError
from workers import embedded
from workers.fingerprint import canonical, digest, files_digest
from workers.layout import KVLayout
from workers.model_files import (
    check_folder,
    count_parameters,
    errors_of,
    fetch,
    load_config,
    missing_files,
    quiet,
    weight_files,
)
from workers.relayable import (
    TRIED_FAMILIES,
    check_structure,
    check_supported,
    inverse_frequencies,
    layer_types,
)
from workers.settings import DEFAULT_MODEL, Device, DType
from workers.wire import WireFormat

log = logging.getLogger(__name__)

SPACE_SCHEMA = 1

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be driven.

    Attributes:
        name: what the user asked for.
        model: Hugging Face causal LM in eval mode, without gradients, on `device`.
        tokenizer: its tokenizer.
        config: its text config.
        layout: shape of its KV blocks.
        space: fingerprint of all that alters KV; equal on two workers exactly when they may share segments.
        device, dtype: where it computes, and in what.
        max_context: most tokens of prompt plus answer.
        num_layers: decoder layers.
        rotary_dim: leading dimensions of a head that RoPE rotates (head_dim, or less for partial rotary).
    """

    name: str
    model: Any
    tokenizer: Any
    config: Any
    layout: KVLayout
    space: str
    device: torch.device
    dtype: torch.dtype
    max_context: int
    num_layers: int
    rotary_dim: int


def resolve(
    name_or_path: str | Path,
    cache_dir: str | Path | None = None,
    progress: embedded.Progress | None = None,
) -> Path | str:
    """Folder of the model, or its hub id. Imports the embedded model when it is not there yet (`progress` as
    in `import_embedded`); never asks the network.

    Raises:
        ModelError: a folder that is not a model, a path that does not exist, or a name that cannot be either.
    """
    text = str(name_or_path)
    if text == DEFAULT_MODEL:
        return embedded.import_embedded(progress, cache_dir)
    path = Path(text).expanduser()
    if text and path.exists():
        check_folder(path)
        return path.absolute()
    if isinstance(name_or_path, Path) or text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelError(
            f"model {text!r} is neither the embedded model ({DEFAULT_MODEL}), nor an existing folder, nor a "
            "hub id (owner/name). Check the spelling, or run `relay model list`."
        )
    return text


def load_model(
    name_or_path: str | Path,
    *,
    dtype: DType = "auto",
    device: Device = "auto",
    tenant: str = "default",
    checkpoint_layer: int = 0,
    block_tokens: int = 64,
    layer_groups: int = 1,
    wire: WireFormat = "raw",
    cache_dir: str | Path | None = None,
    progress: embedded.Progress | None = None,
) -> LoadedModel:
    """Load a model that can be relayed.

    Args:
        name_or_path: embedded name, folder, or hub id `owner/name[@revision]`.
        dtype, device: see WorkerSettings.
        tenant: whose data it serves; part of `space`, so that tenants never share KV.
        checkpoint_layer: layer whose input segments carry (from the model's profile).
        block_tokens: tokens per KV block.
        layer_groups: parts in which a block travels; wire: format of keys and values there.
        cache_dir, progress: see `resolve`.

    Raises:
        ModelError: not found, unreadable, not supported, or no such device.
    """
    folder, revision = fetch(resolve(name_or_path, cache_dir, progress))
    check_folder(folder)
    config = load_config(folder, str(name_or_path))
    check_supported(config)
    where = _choose_device(device)
    number = _choose_dtype(dtype, where, config)
    layout = kv_layout(
        config,
        dtype=number,
        block_tokens=block_tokens,
        checkpoint_layer=checkpoint_layer,
        layer_groups=layer_groups,
        wire=wire,
    )
    with errors_of(str(name_or_path)), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=number, use_safetensors=True)
    model = model.to(where).eval().requires_grad_(False)
    check_structure(model, layout)
    weights = weights_digest(folder)
    space = space_of(config, weights=weights, revision=revision, layout=layout, tenant=tenant)
    return LoadedModel(
        name=str(name_or_path),
        model=model,
        tokenizer=tokenizer,
        config=config,
        layout=layout,
        space=space,
        device=where,
        dtype=number,
        max_context=int(config.max_position_embeddings),
        num_layers=layout.num_layers,
        rotary_dim=2 * int(inverse_frequencies(model, 0).numel()),
    )


def describe(name_or_path: str | Path, cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Facts about a model for people, without loading weights (of a hub id only config.json is fetched). The
    entry `refusal` is None, or says why the model cannot be relayed.

    Raises:
        ModelError: it cannot be found, or the embedded model is not imported yet.
    """
    name = str(name_or_path)
    if name == DEFAULT_MODEL and not embedded.is_imported(cache_dir):
        raise ModelError(f"{name} is not imported yet. Run `relay model import` (once, about 15 seconds).")
    found = resolve(name_or_path, cache_dir)
    config = load_config(fetch(found, ("config.json",))[0], name)
    refusal = None
    try:
        check_supported(config)
    except ModelError as error:
        refusal = str(error)
    facts: dict[str, Any] = {
        "name": name,
        "path": str(found),
        "architecture": (getattr(config, "architectures", None) or [type(config).__name__])[0],
        "family": config.model_type,
        "family_tried": config.model_type in TRIED_FAMILIES,
        "refusal": refusal,
        "dtype": str(getattr(config, "dtype", None) or "unknown").removeprefix("torch."),
        "vocab_size": getattr(config, "vocab_size", None),
        "max_context": getattr(config, "max_position_embeddings", None),
        "rope": getattr(config, "rope_parameters", None),
        "layers": getattr(config, "num_hidden_layers", None),
        "sliding_layers": sum(t == "sliding_attention" for t in layer_types(config)),
    }
    if refusal is None:
        layout = kv_layout(config, dtype=torch.float32)
        facts |= {
            "kv_heads": layout.num_kv_heads,
            "head_dim": layout.head_dim,
            "hidden_size": layout.hidden_size,
            "kv_values_per_token": layout.num_layers * 2 * layout.num_kv_heads * layout.head_dim,
        }
    if isinstance(found, Path):
        weights = weight_files(found)
        facts |= {
            "bytes": sum(f.stat().st_size for f in weights),
            "parameters": sum(map(count_parameters, weights)),
        }
    return facts


def list_models(cache_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """The embedded model and every other folder under the cache's `models/`: name, path, ready, bytes,
    embedded."""
    root = embedded.embedded_path(cache_dir).parent
    names = {DEFAULT_MODEL}
    if root.is_dir():
        names |= {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    rows: list[dict[str, Any]] = []
    for name in sorted(names):
        folder = root / name
        ready = embedded.is_imported(cache_dir) if name == DEFAULT_MODEL else not missing_files(folder)
        nbytes = sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) if folder.is_dir() else 0
        rows.append(
            {
                "name": name,
                "path": str(folder),
                "ready": ready,
                "bytes": nbytes,
                "embedded": name == DEFAULT_MODEL,
            }
        )
    return rows


# -- identity --


def kv_layout(
    config: Any,
    *,
    dtype: torch.dtype,
    block_tokens: int = 64,
    checkpoint_layer: int = 0,
    layer_groups: int = 1,
    wire: WireFormat = "raw",
) -> KVLayout:
    """Layout of the model's KV blocks. Raises ModelError when the checkpoint layer is not one of its
    layers."""
    layers = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    if not 0 <= checkpoint_layer < layers:
        raise ModelError(
            f"checkpoint layer {checkpoint_layer} is not in 0..{layers - 1}. Correct the model's profile."
        )
    return KVLayout(
        num_layers=layers,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        hidden_size=int(config.hidden_size),
        dtype=str(dtype).removeprefix("torch."),
        block_tokens=block_tokens,
        checkpoint_layer=checkpoint_layer,
        layer_groups=layer_groups,
        wire=wire,
    )


def weights_digest(folder: Path) -> str:
    """BLAKE2b over the content of the safetensors files; kept beside them, so that only the first call reads
    them."""
    return files_digest(weight_files(folder))


def space_of(config: Any, *, weights: str, revision: str | None, layout: KVLayout, tenant: str) -> str:
    """Fingerprint of everything that alters KV (32 hex digits), the same in every process.

    Args:
        config: the model's config; all of it counts, except where it was loaded from and by which version.
        weights: content digest of the weights.
        revision: hub commit, None for folders.
        layout: KV layout, which includes dtype and checkpoint layer.
        tenant: whose data it is.
    """
    said = json.loads(config.to_json_string(use_diff=False))
    rope = said.get("rope_parameters")
    for noise in (
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "_attn_implementation",
    ):
        said.pop(noise, None)
    identity = {
        "schema": SPACE_SCHEMA,
        "weights": weights,
        "revision": revision,
        "architecture": type(config).__name__,
        "config": said,
        "rope": rope,
        "dtype": layout.dtype,
        "layout": layout.fingerprint,
        "tensor_parallel": 1,
        "tenant": tenant,
    }
    return digest(canonical(identity))


# -- choices --


def _choose_device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "device cuda was asked for, but torch sees no GPU. Use device: auto, or run `relay doctor`."
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _choose_dtype(dtype: DType, device: torch.device, config: Any) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = getattr(config, "dtype", None)
    if device.type == "cpu" or not isinstance(stored, torch.dtype):
        return torch.float32
    return stored
