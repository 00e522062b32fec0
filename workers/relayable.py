"""What may be relayed: models whose keys can be moved by one rotation per shift and whose cache is one K and
one V per layer, of one shape. Everything else is refused, with the property that is in the way.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from transport.errors import ModelError
from workers.layout import KVLayout

log = logging.getLogger(__name__)

TRIED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
"""Model types whose ragged step is tested for exactness. Others that pass every check load with a warning."""
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
_ATTENTION_TYPES = ("full_attention", "sliding_attention")


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
