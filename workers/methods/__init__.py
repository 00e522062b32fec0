"""The registry of reuse methods: one file and one line each. Torch-free, so `relay check` can use it.

A method is written `name` or `name:key=value+key=value` (`context_mass:ratio=0.2`); `auto` is our best.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import Any, cast

from transport.errors import ConfigError
from workers.methods.base import ReuseMethod

METHODS: dict[str, str] = {
    "full_prefill": "workers.methods.full_prefill:FullPrefill",
    "exact_prefix": "workers.methods.exact_prefix:ExactPrefix",
    "naive": "workers.methods.naive:Naive",
    "relay_caching": "workers.methods.relay_caching:RelayCaching",
    "context_mass": "workers.methods.context_mass:ContextMass",
}

# What `auto` means today. Measured reasons belong in docs, the choice belongs here.
ALIASES: dict[str, str] = {"auto": "context_mass"}


def method_names() -> list[str]:
    """Every name that `parse_method` knows, `auto` first."""
    return [*ALIASES, *METHODS]


def parse_method(text: str) -> ReuseMethod:
    """Make the method that `text` names.

    Args:
        text: "name" or "name:key=value+key=value"; values are numbers.

    Raises:
        ConfigError: unknown name or parameter, or a value that is not a number or out of bounds; the
            message lists what would be right.
    """
    name, _, params_text = text.strip().partition(":")
    target = METHODS.get(ALIASES.get(name, name))
    if target is None:
        close = difflib.get_close_matches(name, method_names(), n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise ConfigError(f'method "{name}" is not known.{hint} Known methods: {", ".join(method_names())}.')
    module_name, _, class_name = target.partition(":")
    cls = getattr(importlib.import_module(module_name), class_name)
    return cast("ReuseMethod", cls(**_parse_params(name, cls, params_text)))


def _parse_params(name: str, cls: Any, text: str) -> dict[str, float | int]:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    params: dict[str, float | int] = {}
    for item in filter(None, text.split("+")):
        key, equals, value = item.partition("=")
        if key not in fields or not equals:
            known = ", ".join(fields) or "none"
            raise ConfigError(
                f'method "{name}" has no parameter "{key}" (it has: {known}). Write name:key=value+key=value.'
            )
        try:
            # Fields are annotated "int" or "float", possibly "| None" (= from the model's profile).
            params[key] = int(value) if str(fields[key].type).startswith("int") else float(value)
        except ValueError:
            raise ConfigError(f'method "{name}": {key}={value!r} is not a number.') from None
    return params
