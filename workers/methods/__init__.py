"""The registry of reuse methods: one file and one line each. Torch-free, so `relay check` can use it.

A method is written as one of

    name                         a method with its defaults                context_mass
    name:key=value+key=value     with parameters                           context_mass:ratio=0.2+first=16
    auto, auto:<preset>          what the profile names; `auto` is auto:balanced, auto:strict also heals
    ...+heal=off|idle|always     of any of them: make the cache exact after the first token
    ...+heal_rows=N              rows that one healing chunk recomputes
    ...+heal_steps=N             larger chunks where the prompt would not be healed within N decode steps
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any, cast

from transport.errors import ConfigError
from workers.methods.base import SAFE_PRESETS, HealMode, ModelProfile, Reuse, ReuseMethod

METHODS: dict[str, str] = {
    "full_prefill": "workers.methods.full_prefill:FullPrefill",
    "exact_prefix": "workers.methods.exact_prefix:ExactPrefix",
    "naive": "workers.methods.naive:Naive",
    "kvcomm": "workers.methods.kvcomm:KVComm",
    "epic": "workers.methods.epic:Epic",
    "cacheblend": "workers.methods.cacheblend:CacheBlend",
    "relay_caching": "workers.methods.relay_caching:RelayCaching",
    "context_mass": "workers.methods.context_mass:ContextMass",
}

AUTO = "auto"
PRESETS = ("fast", "balanced", "strict")
HEAL_ROWS = 64
"""Rows of a healing chunk unless `heal_rows=` says otherwise."""
STRICT_ITEMS = ("heal=always", "heal_steps=24")
"""What auto:strict adds to its method, unless that says otherwise."""
_HEAL_KEYS = {"heal": "str", "heal_rows": "int", "heal_steps": "int"}
"""Keys of every method, and their types."""


def method_names() -> list[str]:
    """Every name that `parse_reuse` knows, `auto` first."""
    return [AUTO, *(f"{AUTO}:{preset}" for preset in PRESETS), *METHODS]


def parse_method(text: str) -> ReuseMethod:
    """The method alone; see `parse_reuse`."""
    return parse_reuse(text).method


def parse_reuse(text: str, profile: ModelProfile | None = None) -> Reuse:
    """Make what `text` names.

    Args:
        text: see the module's docstring; values are numbers.
        profile: resolves `auto*` and fills the parameters that the text leaves out. None: only check the
            text; presets then stand for the safe method and parameters may stay open until `plan`.

    Raises:
        ConfigError: unknown name, preset or parameter, or a value that is not a number or out of bounds; the
            message lists what would be right.
    """
    name, _, rest = text.strip().partition(":")
    items = [item for item in rest.split("+") if item]
    if name == AUTO:
        preset = items.pop(0) if items and "=" not in items[0] else "balanced"
        name, preset_items = _preset(preset, profile)
        items = preset_items + items
    cls = _load(name)
    params = _parse_items(name, cls, items)
    mode = _heal_mode(params.pop("heal", HealMode.OFF))
    rows = _at_least(1, "heal_rows", params.pop("heal_rows", HEAL_ROWS))
    steps = _at_least(0, "heal_steps", params.pop("heal_steps", 0))
    if mode is HealMode.OFF:
        rows, steps = HEAL_ROWS, 0
    if profile is not None:
        params = _fill(cls, params, profile)
    method = cast("ReuseMethod", cls(**params))
    return Reuse(method, mode, rows, steps, _describe(method, mode, rows, steps))


def check_presets(presets: Mapping[str, str]) -> None:
    """Whether a profile's presets can be used.

    Raises:
        ConfigError: an unknown preset, one that is missing, or a method text that does not parse.
    """
    for preset, text in presets.items():
        if preset not in PRESETS:
            raise ConfigError(f'preset "{preset}" is not known. Presets: {", ".join(PRESETS)}.')
        if text.strip().partition(":")[0] == AUTO:
            raise ConfigError(f'preset "{preset}" is "{text}": name a method, a preset cannot mean another.')
        parse_reuse(text)
    if missing := [p for p in SAFE_PRESETS if p not in presets]:
        raise ConfigError(f"presets lack {', '.join(missing)}. Name a method for each.")


def _preset(preset: str, profile: ModelProfile | None) -> tuple[str, list[str]]:
    """(method name, its parameter items) that the preset stands for."""
    if preset not in PRESETS:
        close = difflib.get_close_matches(preset, PRESETS, n=1)
        hint = f' Did you mean "{AUTO}:{close[0]}"?' if close else ""
        known = ", ".join(f"{AUTO}:{p}" for p in PRESETS)
        raise ConfigError(f'"{AUTO}" has no preset "{preset}".{hint} Presets: {known}.')
    presets = SAFE_PRESETS if profile is None else profile.presets
    name, _, rest = presets.get(preset, presets["balanced"]).strip().partition(":")
    healing = STRICT_ITEMS if preset == "strict" else ()
    return name, [*healing, *(item for item in rest.split("+") if item)]


def _load(name: str) -> Any:
    target = METHODS.get(name)
    if target is None:
        close = difflib.get_close_matches(name, method_names(), n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ConfigError(f'method "{name}" is not known.{hint} Known methods: {", ".join(method_names())}.')
    module_name, _, class_name = target.partition(":")
    return getattr(importlib.import_module(module_name), class_name)


def _parse_items(name: str, cls: Any, items: list[str]) -> dict[str, Any]:
    """Values by parameter; later ones win, so that a request may correct a preset."""
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)} | _HEAL_KEYS
    params: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if key not in types or not equals:
            known = ", ".join(types)
            raise ConfigError(
                f'method "{name}" has no parameter "{key}" (it has: {known}). Write name:key=value+key=value.'
            )
        try:
            params[key] = _value(types[key], value)
        except ValueError:
            raise ConfigError(f'method "{name}": {key}={value!r} is not a number.') from None
    return params


def _value(annotation: str, text: str) -> float | int | str:
    """Fields are annotated "int", "float" or "str", possibly "| None" (= from the model's profile)."""
    if annotation.startswith("int"):
        return int(text)
    return text if annotation.startswith("str") else float(text)


def _heal_mode(text: str) -> HealMode:
    if text not in list(HealMode):
        raise ConfigError(f'heal="{text}" is not one of {", ".join(HealMode)}.')
    return HealMode(text)


def _at_least(least: int, key: str, value: int) -> int:
    if value < least:
        raise ConfigError(f"{key}={value} must be at least {least}.")
    return value


def _fill(cls: Any, params: dict[str, Any], profile: ModelProfile) -> dict[str, Any]:
    """`params`, and the profile's values for those that the class takes from a profile."""
    from_profile: Mapping[str, str] = cls.from_profile
    return {key: getattr(profile, attribute) for key, attribute in from_profile.items()} | params


def _describe(method: ReuseMethod, heal: HealMode, heal_rows: int, heal_steps: int) -> str:
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(cast("Any", method))}
    items = [f"{key}={value}" for key, value in values.items() if value is not None]
    if heal is not HealMode.OFF:
        items += [f"heal={heal}", f"heal_rows={heal_rows}", f"heal_steps={heal_steps}"]
    return f"{method.name}:{'+'.join(items)}" if items else method.name
