"""Model profiles: which layers and how many tokens to rectify. Cheap imports (no torch)."""

from __future__ import annotations

import dataclasses
import logging
import re
from importlib import resources
from pathlib import Path
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


def load_profile(model: str, num_layers: int, path: str | None = None) -> ModelProfile:
    """The profile of `model`: the file `path`, else the shipped one, else the generic one with a warning.
    Keys that are not of `ModelProfile` (how it was found) are left alone.

    Raises:
        ConfigError: the file is missing where it was named, or does not fit the model.
    """
    name = profile_name(model)
    where = path or f"configs/profiles/{name}.yaml"
    if path is None:
        file = resources.files("configs").joinpath("profiles", f"{name}.yaml")
        if not file.is_file():
            log.warning("model %s has no profile (%s): using the generic one, slower but safe", model, where)
            return generic_profile(model, num_layers)
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"{where}: no such file (worker.profile). It must be there on every node.")
    profile = _read_profile(file.read_text("utf-8"), where)
    if profile.num_layers != num_layers:
        raise ConfigError(f"{where} is for {profile.num_layers} layers, the model has {num_layers}.")
    return profile


def _read_profile(text: str, where: str) -> ModelProfile:
    known = {f.name for f in dataclasses.fields(ModelProfile)}
    try:
        data: Any = yaml.safe_load(text)
        profile = ModelProfile(**{k: v for k, v in data.items() if k in known})
    except (TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: {error}. Run `relay check` on it.") from None
    try:
        check_presets(profile.presets)
    except ConfigError as error:
        raise ConfigError(f"{where} presets: {error}") from None
    return profile
