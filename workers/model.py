"""Finds, checks and loads a model, and names the space in which its KV may be shared.

A model is the embedded default, a local Hugging Face folder, or a hub id `owner/name[@revision]`. Loading
fails closed: a model is refused unless its keys can be moved by one rotation per shift and its cache is one K
and one V per layer, of one shape. This module does not know how layers are driven (`workers/engine.py`), nor
anything about prompts or segments.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from transport.errors import ModelError
from workers import embedded
from workers.fingerprint import canonical, digest, files_digest
from workers.layout import KVLayout
from workers.settings import DEFAULT_MODEL, Device, DType
from workers.wire import WireFormat

log = logging.getLogger(__name__)

SPACE_SCHEMA = 1
TRIED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""Model types whose ragged step is tested for exactness. Others that pass every check load with a warning."""

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_ATTENTION_TYPES = ("full_attention", "sliding_attention")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_HUB_SKIPPED = ("*/*", "consolidated*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


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
        _check_folder(path)
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
    folder, revision = _fetch(resolve(name_or_path, cache_dir, progress))
    _check_folder(folder)
    config = _load_config(folder, str(name_or_path))
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
    with _errors_of(str(name_or_path)), _quiet():
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
    config = _load_config(_fetch(found, ("config.json",))[0], name)
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
        weights = _weight_files(found)
        facts |= {
            "bytes": sum(f.stat().st_size for f in weights),
            "parameters": sum(map(_parameters, weights)),
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
        ready = embedded.is_imported(cache_dir) if name == DEFAULT_MODEL else not _missing(folder)
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


# -- what may be relayed --


def layer_types(config: Any) -> tuple[str, ...]:
    """Attention type of each layer, as transformers names them."""
    types = getattr(config, "layer_types", None)
    if types is None:
        return ("full_attention",) * int(getattr(config, "num_hidden_layers", 0) or 0)
    return tuple(types)


def check_supported(config: Any) -> None:
    """Refuse a config whose KV cannot be moved and mended.

    Raises:
        ModelError: says which property of the model is in the way.
    """
    reason = _cache_refusal(config) or _rope_refusal(config)
    if reason:
        raise ModelError(
            f"model type {config.model_type!r} cannot be relayed: {reason}. Take a model of one of these "
            f"types: {', '.join(TRIED_FAMILIES)}."
        )
    if config.model_type not in TRIED_FAMILIES:
        log.warning("model type %s passes every check but has not been tried", config.model_type)


def _cache_refusal(config: Any) -> str | None:
    """Why the cache is not one K and one V of one shape per layer; None when it is."""

    def has(name: str) -> Any:
        return getattr(config, name, None)

    odd = sorted(set(layer_types(config)) - set(_ATTENTION_TYPES))
    dims = has("head_dim")
    rules = (
        (
            has("is_encoder_decoder") or has("add_cross_attention"),
            "it has cross attention, whose KV depends on another text",
        ),
        (
            has("text_config") is not None,
            "it is a multimodal checkpoint; only text-only checkpoints are driven",
        ),
        (has("kv_lora_rank"), "its cache is a compressed latent (MLA) rather than keys and values"),
        (odd, f"it has layers of type {', '.join(odd)}, whose state is not a key and a value per token"),
        (
            any(
                has(n)
                for n in ("layers_block_type", "hybrid_override_pattern", "attn_layer_indices", "state_size")
            ),
            "it mixes in recurrent (state-space) layers, whose state is not a key and a value per token",
        ),
        (has("num_kv_shared_layers"), "some of its layers share the KV of other layers"),
        (
            has("use_bidirectional_attention"),
            "its attention is not causal, so a token's KV depends on later text",
        ),
        (
            has("global_head_dim") not in (None, dims) or isinstance(dims, (list, tuple)),
            "the size of its heads differs from layer to layer",
        ),
        (
            isinstance(has("num_key_value_heads"), (list, tuple)),
            "the number of KV heads differs from layer to layer",
        ),
        (not has("num_hidden_layers") or not has("hidden_size"), "its config has no decoder layers"),
    )
    return next((text for hit, text in rules if hit), None)


def _rope_refusal(config: Any) -> str | None:
    """Why keys cannot be moved by one rotation per shift; None when they can."""
    rope = getattr(config, "rope_parameters", None)
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "rope") not in (
        "rope",
        "rotary",
    ):
        return "its positions are not rotary (ALiBi or learned), so stored keys cannot be moved"
    if not isinstance(rope, dict) or not rope:
        return "it has no rotary positions, so stored keys cannot be moved"
    switches = getattr(config, "no_rope_layers", None)
    if switches and not all(switches):
        return "some of its layers have no rotary positions"
    per_type = all(isinstance(v, dict) or v is None for v in rope.values())
    groups = [v for v in rope.values() if v] if per_type else [rope]
    for group in groups:
        kind = group.get("rope_type", "default")
        if group.get("mrope_section") or kind == "mrope":
            return "its rotary positions have several sections (mrope), which a single shift cannot move"
        if kind == "dynamic":
            return "its RoPE is dynamic NTK: the frequencies change with the length of the prompt"
        if kind in ("longrope", "su"):
            return "its RoPE is longrope: the frequencies switch at the original context length"
        if kind not in _STATIC_ROPE:
            return f"its RoPE type {kind!r} is not known to be a pure rotation by position"
    return None


def check_structure(model: Any, layout: KVLayout) -> None:
    """Check what only the built model shows: layers at `model.model.layers[i].self_attn`, one head size, no
    extra attention inputs, and rotary embeddings that really are one rotation per shift (tried on random
    keys).

    Raises:
        ModelError: the model is built otherwise.
    """
    kind = type(model).__name__
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None or len(layers) != layout.num_layers:
        raise ModelError(
            f"{kind}: its {layout.num_layers} decoder layers are not at model.model.layers. Take another "
            "model."
        )
    for index, layer in enumerate(layers):
        attention = getattr(layer, "self_attn", None)
        if attention is None or getattr(attention, "layer_idx", None) != index:
            raise ModelError(
                f"{kind}: layer {index} has no self_attn that knows its layer index. Take another model."
            )
        if getattr(attention, "head_dim", layout.head_dim) != layout.head_dim:
            raise ModelError(f"{kind}: heads of layer {index} have another size than the config says.")
        if getattr(attention, "sinks", None) is not None:
            raise ModelError(
                f"{kind}: layer {index} has attention sinks, which our attention does not compute."
            )
    for layer_type in sorted(set(layer_types(model.config))):
        _check_rotation(model, layer_type, layout.head_dim)


def _check_rotation(model: Any, layer_type: str, head_dim: int) -> None:
    """Keys rotated at q and then by p - q must equal keys rotated at p, in halves (not interleaved pairs)."""
    kind = type(model).__name__
    index = layer_types(model.config).index(layer_type)
    attention = model.model.layers[index].self_attn
    module = __import__(type(attention).__module__, fromlist=["apply_rotary_pos_emb"])
    rotate = getattr(module, "apply_rotary_pos_emb", None)
    rotary = getattr(model.model, "rotary_emb", None)
    if rotate is None or rotary is None:
        raise ModelError(f"{kind}: its rotary embedding cannot be found. Take another model.")
    device = model.device
    old = torch.tensor([[0, 3, 40, 900]], device=device)
    new = torch.tensor([[7, 1, 300, 1000]], device=device)
    keys = torch.randn(1, 1, 4, head_dim, generator=torch.Generator().manual_seed(0)).to(device)
    extra = () if hasattr(rotary, "inv_freq") else (layer_type,)
    try:
        at_old = rotate(keys, keys, *rotary(keys, old, *extra))[1]
        at_new = rotate(keys, keys, *rotary(keys, new, *extra))[1]
    except (TypeError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"{kind}: its rotary embedding cannot be tried ({error}). Take another model."
        ) from error
    frequencies = inverse_frequencies(model, layer_type).to(device)
    angles = (new - old)[0, :, None].float() * frequencies  # [4, rotary_dim / 2]
    half = frequencies.numel()
    first, second, rest = at_old.split([half, half, head_dim - 2 * half], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    moved = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    if not torch.allclose(moved, at_new, atol=2e-3):
        raise ModelError(
            f"{kind}: its rotary embedding is not one rotation of two halves per shift (largest error "
            f"{(moved - at_new).abs().max():.2g}), so stored keys cannot be moved. Take another model."
        )


def inverse_frequencies(model: Any, layer: int | str) -> torch.Tensor:
    """Inverse frequencies of RoPE for a layer index or a layer type, without attention scaling.

    Returns: [rotary_dim / 2] float32, a copy.
    """
    rotary = model.model.rotary_emb
    layer_type = layer_types(model.config)[layer] if isinstance(layer, int) else layer
    buffer = getattr(rotary, "inv_freq", None)
    if buffer is None:
        buffer = getattr(rotary, f"{layer_type}_inv_freq", None)
    if buffer is None:
        raise ModelError(f"{type(model).__name__} has no RoPE frequencies for {layer!r}.")
    return buffer.detach().to(torch.float32).clone()


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
    return files_digest(_weight_files(folder))


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


# -- finding files --


def _weight_files(folder: Path) -> list[Path]:
    """All weights that loading may read, adapters too, but not Mistral's second copy, `consolidated*`."""
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith((".", "consolidated")))


def _missing(folder: Path) -> list[str]:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not _weight_files(folder):
        missing.append("*.safetensors")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        missing.append("tokenizer.json")
    return missing


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(
            f"model {path} is a file. Give the Hugging Face folder (config.json, *.safetensors) instead."
        )
    if missing := _missing(path):
        raise ModelError(
            f"folder {path} is not a Hugging Face model: missing {', '.join(missing)}. Give the folder that "
            "save_pretrained wrote (weights as safetensors)."
        )


def _fetch(found: Path | str, files: tuple[str, ...] = _HUB_FILES) -> tuple[Path, str | None]:
    """Local folder and revision; downloads `files` of a hub id into the hub's own cache."""
    if isinstance(found, Path):
        return found, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = found.partition("@")
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(files),
                ignore_patterns=list(_HUB_SKIPPED),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {found!r} cannot be fetched from the hub: {_first_line(error)}. Check the name and the "
            "network, or give a local folder."
        ) from error
    return folder, folder.name


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _load_config(folder: Path, name: str) -> Any:
    with _errors_of(name):
        return AutoConfig.from_pretrained(str(folder))


@contextmanager
def _errors_of(name: str) -> Iterator[None]:
    """Map what transformers and safetensors raise to ModelError; this is the only place where they are
    called."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, so no narrower class covers them
        raise ModelError(f"model {name} cannot be loaded: {_first_line(error)}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars from transformers: entry points draw their own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


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


def _parameters(path: Path) -> int:
    """Number of weights in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for size in entry["shape"]:
                count *= size
            total += count
    return total
