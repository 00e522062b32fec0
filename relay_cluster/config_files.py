"""Files of settings: read with their line numbers, checked against a class, every fault told in one line.

    FILE:LINE key: what is wrong. Did you mean "x"?

This module knows no setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from relay_cluster.pipeline import did_you_mean
from transport.errors import ConfigError

STRICT = ConfigDict(extra="forbid", frozen=True)
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)")

Path_: TypeAlias = tuple[str | int, ...]
"""Keys from the top of a file down to a value."""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A parsed file: its data, and the line of each key and item."""

    path: Path
    data: dict[str, Any]
    lines: dict[Path_, int]
    text: str

    def line(self, at: Path_) -> int:
        """Line of a value, or of the nearest parent that is written down."""
        while at and at not in self.lines:
            at = at[:-1]
        return self.lines.get(at, 1)

    def fault(self, at: Path_, what: str, *, near: str = "") -> str:
        """One line of an error. `near`: text within a value of many lines, whose line is meant."""
        line = self.line(at)
        if near:
            rest = self.text.splitlines()[line - 1 :]
            line += next((offset for offset, written in enumerate(rest) if near in written), 0)
        key = ".".join(str(part) for part in at)
        return f"{self.path}:{line} {key}: {what}" if key else f"{self.path}:{line} {what}"

    def together(self, faults: Iterable[str]) -> str:
        """Several faults as one message, from the top of the file to its end."""
        start = len(str(self.path)) + 1
        return "\n".join(sorted(dict.fromkeys(faults), key=lambda fault: int(fault[start:].split(" ", 1)[0])))


def read_file(path: Path) -> ConfigFile:
    """Raises ConfigError: not there, not readable, not YAML, not a mapping, or a key twice."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.{_similar_file(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name a file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line} not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if node is None or not isinstance(data, dict):
        given = "empty" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}:1 must be a mapping of settings (key: value), but the file is {given}")
    lines: dict[Path_, int] = {}
    twice: list[str] = []
    for at, line in _walk(node, ()):
        if at in lines:
            key = ".".join(str(part) for part in at)
            twice.append(f"{path}:{line} {key}: written twice (first on line {lines[at]}); keep one of them")
        lines.setdefault(at, line)
    if twice:
        raise ConfigError("\n".join(twice))
    return ConfigFile(path, data, lines, text)


def _walk(node: yaml.Node, at: Path_) -> Iterator[tuple[Path_, int]]:
    """Every key and item below a node, with its line."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            # YAML 1.1 reads `on` and `yes` as booleans, which is never meant in a key: keep the text.
            below = (*at, str(key.value))
            yield below, key.start_mark.line + 1
            yield from _walk(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            below = (*at, index)
            yield below, value.start_mark.line + 1
            yield from _walk(value, below)


def _similar_file(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f' Did you mean "{folder / near[0]}"?' if near else ""


# --- checking -----------------------------------------------------------------------------------------------

S = TypeVar("S")
Check: TypeAlias = Callable[[ConfigFile, Any], Iterable[str]]


def load_file(
    path: Path, cls: type[S], check: Check | None = None, *, ignored: frozenset[str] = frozenset()
) -> S:
    """Read, validate and check a file.

    Args:
        cls: pydantic model or dataclass. check: more faults of the whole, one line each.
        ignored: keys that are left alone.

    Raises:
        ConfigError: everything that is wrong with it.
    """
    file = read_file(path)
    # A plain dataclass takes `extra="forbid"` from the model around it, and has no other way to get it.
    box = create_model("File", __config__=STRICT, value=(cls, ...))
    data = {key: value for key, value in file.data.items() if key not in ignored}
    try:
        value: S = box.model_validate({"value": _with_sizes(data)}).__dict__["value"]
    except ValidationError as error:
        faults = [_sentence(file, cls, detail) for detail in error.errors()]
        raise ConfigError(file.together(faults)) from error
    faults = list(check(file, value)) if check else []
    if faults:
        raise ConfigError(file.together(faults))
    return value


def _with_sizes(data: Any, key: Hashable = "") -> Any:
    """The data with "512MiB" turned into bytes wherever the key ends in `_bytes`, and with text for keys."""
    if isinstance(data, dict):
        return {k if isinstance(k, str) else str(k): _with_sizes(v, k) for k, v in data.items()}
    if isinstance(data, list):
        return [_with_sizes(item) for item in data]
    if isinstance(data, str) and str(key).endswith("_bytes") and (match := _SIZE.fullmatch(data.strip())):
        unit = _UNITS.get(match[2].upper())
        return data if unit is None else int(float(match[1]) * unit)
    return data


def _sentence(file: ConfigFile, root: type, detail: ErrorDetails) -> str:
    """One pydantic error in our words."""
    at: Path_ = tuple(part for part in detail["loc"][1:] if part != "[key]")
    given = detail["input"]
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return file.fault(at, _unknown_key(root, at))
    if kind in ("missing", "missing_argument"):
        return file.fault(at, "is missing and has no default")
    if str(at[-1] if at else "").endswith("_bytes") and isinstance(given, str):
        return file.fault(at, f'"{given}" is not a size; write a number of bytes, or 512MiB, 2GiB, 100MB')
    if kind == "literal_error":
        expected = str(context["expected"])
        hint = did_you_mean(str(given), re.findall(r"'([^']*)'", expected)) if isinstance(given, str) else ""
        return file.fault(at, f"must be {expected}, got {_shown(given)}.{hint}")
    for prefix, noun in _NOUNS.items():
        if kind.startswith(prefix):
            return file.fault(at, f"must be {noun}, got {_shown(given)}")
    for name, words in _BOUNDS.items():
        if name in context:
            return file.fault(at, f"must be {words} {context[name]:g}, got {_shown(given)}")
    return file.fault(at, detail["msg"])


_NOUNS = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_": "text",
    "list_": "a list",
    "dict_": "a mapping (key: value)",
    "model_": "a mapping (key: value)",
    "dataclass_": "a mapping (key: value)",
}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _shown(value: object) -> str:
    if isinstance(value, str | int | float | bool) or value is None:
        text = json.dumps(value, ensure_ascii=False)
        return text if len(text) <= 60 else text[:57] + "..."
    return {"list": "a list", "dict": "a mapping"}.get(type(value).__name__, type(value).__name__)


def _unknown_key(root: type, at: Path_) -> str:
    """Say that a key is unknown, and which one may have been meant, here or one level down."""
    parent = _type_at(root, at[:-1])
    known = list(_fields(parent)) if parent else []
    key = str(at[-1])
    owner = f'"{at[-2]}"' if len(at) > 1 else "this file"
    what = f"is not a setting of {owner}."
    if hint := did_you_mean(key, known):
        return what + hint
    for section, hint_type in _fields(root).items():
        inner = _plain_type(hint_type)
        if inner and key in _fields(inner) and at[:-1] != (section,):
            return f'{what} Did you mean "{section}.{key}"?'
    return f"{what} Known: {', '.join(known)}."


def _fields(cls: type) -> dict[str, Any]:
    """Names and types of the settings of a class."""
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        return {name: info.annotation for name, info in cls.model_fields.items()}
    if dataclasses.is_dataclass(cls):
        return typing.get_type_hints(cls)
    return {}


def _plain_type(hint: Any) -> type | None:
    """The class of settings inside a type hint, if there is one."""
    if isinstance(hint, type) and _fields(hint):
        return hint
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union, Annotated, list, dict):
        return next((found for arg in args if (found := _plain_type(arg))), None)
    return None


def _type_at(root: type, at: Path_) -> type | None:
    """The class of settings at a path; keys of a dict and indices of a list are stepped over."""
    cls: type | None = root
    for part in at:
        if cls is None:
            return None
        hints = _fields(cls)
        if part in hints:
            cls = _plain_type(hints[str(part)])
    return cls
