"""Model profiles: which layers and how many tokens to rectify. Cheap imports (no torch)."""

from __future__ import annotations

import dataclasses
import logging
import re
from importlib import resources
from typing import Any

import yaml

from transport.errors import ConfigError
from workers.methods import check_presets
from workers.methods.base import ModelProfile

log = logging.getLogger(__name__)


def generic_profile(model: str, num_layers: int) -> ModelProfile:
    """A safe profile for a model that nobody has measured: a wide band and a large ratio."""
    start = max(1, num_layers // 8) if num_layers > 2 else 0
    return ModelProfile(
        model=model,
        num_layers=num_layers,
        checkpoint_layer=start,
        detection_layer=min(num_layers - 1, start + 2),
        end_layer=num_layers,
        ratio=0.25,
        first_tokens=16,
        measured=False,
    )


def profile_name(model: str) -> str:
    """File name of a model's profile: "Qwen/Qwen3-0.6B" -> "qwen-qwen3-0.6b"."""
    return re.sub(r"[^a-z0-9._-]+", "-", model.lower()).strip("-")


def load_profile(model: str, num_layers: int) -> ModelProfile:
    """The shipped profile of `model`, or the generic one with a warning.

    Raises:
        ConfigError: the file exists but does not fit the model.
    """
    name = profile_name(model)
    file = resources.files("configs").joinpath("profiles", f"{name}.yaml")
    if not file.is_file():
        log.warning(
            "model %s has no profile (configs/profiles/%s.yaml): using the generic one, slower but safe",
            model,
            name,
        )
        return generic_profile(model, num_layers)
    data: Any = yaml.safe_load(file.read_text("utf-8"))
    known = {f.name for f in dataclasses.fields(ModelProfile)}
    try:
        profile = ModelProfile(**{k: v for k, v in data.items() if k in known})
    except TypeError as error:
        raise ConfigError(f"configs/profiles/{name}.yaml: {error}. Run `relay check` on it.") from None
    try:
        check_presets(profile.presets)
    except ConfigError as error:
        raise ConfigError(f"configs/profiles/{name}.yaml presets: {error}") from None
    if profile.num_layers != num_layers:
        raise ConfigError(
            f"configs/profiles/{name}.yaml is for {profile.num_layers} layers, the model has {num_layers}."
        )
    return profile
