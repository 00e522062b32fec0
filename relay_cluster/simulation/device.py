"""What a step of the engine takes on a modelled device.

    seconds = step_fixed_s + sequences * sequence_s + max(FLOPs / flops_per_s, bytes / memory_bytes_per_s)

FLOPs are those of `workers.costs`; bytes are the weights, once per step, and the KV that decoding rows read.
Where `memory_bytes_per_s` is not given, reading is inside `step_fixed_s` (measured on a CPU, where a step of
one row takes as long as reading the weights).
"""

from __future__ import annotations

from dataclasses import dataclass

from relay_cluster.simulation.settings import DeviceSettings, ModelSettings
from workers.costs import ModelCosts, full_prefill_flops
from workers.layout import KVLayout
from workers.methods.base import ModelProfile
from workers.profile import generic_profile, load_profile

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def costs_of(model: ModelSettings) -> ModelCosts:
    """The model's sizes as the planners have them."""
    return ModelCosts(
        hidden=model.hidden,
        intermediate=model.intermediate,
        vocab=model.vocab,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        windows=(None,) * model.layers,
    )


def profile_of(model: ModelSettings, path: str | None) -> ModelProfile:
    """The profile by which methods plan. Raises ConfigError."""
    if path is None and "/" in model.name:
        return generic_profile(model.name, model.layers)
    return load_profile(model.name, model.layers, path)


def layout_of(
    model: ModelSettings, profile: ModelProfile, *, block_tokens: int, groups: int, wire: str
) -> KVLayout:
    """How a segment of the model lies in blocks. wire "auto" is raw: links are not measured here."""
    return KVLayout(
        num_layers=model.layers,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        hidden_size=model.hidden,
        dtype=model.dtype,
        block_tokens=block_tokens,
        checkpoint_layer=profile.checkpoint_layer,
        layer_groups=groups,
        wire="bf16" if wire == "bf16" else "int8" if wire == "int8" else "raw",
    )


@dataclass(frozen=True)
class Device:
    """Seconds of a device.

    Attributes:
        weight_bytes: read once in every step. kv_token_bytes: of one token's keys and values in all layers.
    """

    settings: DeviceSettings
    costs: ModelCosts
    weight_bytes: int
    kv_token_bytes: int

    @staticmethod
    def of(settings: DeviceSettings, model: ModelSettings) -> Device:
        """A device that runs a model."""
        costs, size = costs_of(model), _DTYPE_BYTES[model.dtype]
        # An entry's FLOPs are two per weight of its layer.
        weights = model.layers * costs.entry_flops // 2 + model.hidden * model.vocab
        kv_token_bytes = 2 * model.layers * model.kv_heads * model.head_dim * size
        return Device(settings, costs, weights * size, kv_token_bytes)

    def step_s(self, flops: float, sequences: int, context_tokens: int) -> float:
        """Of a step. context_tokens: KV entries that its decoding rows read, over all of them."""
        settings = self.settings
        compute_s = flops / settings.flops_per_s
        if settings.memory_bytes_per_s is not None:
            nbytes = self.weight_bytes + context_tokens * self.kv_token_bytes
            compute_s = max(compute_s, nbytes / settings.memory_bytes_per_s)
        return settings.step_fixed_s + sequences * settings.sequence_s + compute_s

    def decode_flops(self, context_tokens: int) -> float:
        """Of one decoded token behind `context_tokens`."""
        costs = self.costs
        row = costs.entry_flops + costs.key_flops * (context_tokens + 1)
        return costs.num_layers * row + costs.head_flops

    def prefill_flops(self, start: int, stop: int) -> float:
        """Of prompt tokens [start, stop) in all layers, without logits."""
        return full_prefill_flops(self.costs, stop) - full_prefill_flops(self.costs, start)
