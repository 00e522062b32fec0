"""`docs/configuration.md`, made from the settings themselves: keys, types, bounds, defaults, and what their
docstrings say.

    python -m relay_cluster.reference            write it
    python -m relay_cluster.reference --check    status 1 where it is out of date
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from relay_cluster.config import ClusterConfig, PipelineConfig
from relay_cluster.pipeline import Agent
from workers.methods.base import ModelProfile

FILE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
_BOUNDS = {Ge: ("ge", "&ge;"), Gt: ("gt", ">"), Le: ("le", "&le;"), Lt: ("lt", "<")}
_TITLES = (
    ("Cluster files", "for `relay up`, `serve`, and `run --cluster`", ClusterConfig),
    ("Pipeline files", "for `relay run` and `submit`", PipelineConfig),
    ("Model profiles", "written by `relay profile`; see [the profiler](profiler.md)", ModelProfile),
)
_INTRO = """# Configuration

<!-- Made by `python -m relay_cluster.reference`; a test compares it with the settings. -->

Files are YAML. `relay check FILE...` names every fault of a file with its line. Sizes are numbers of bytes,
or have a unit (`512MiB`, `2GB`); durations are seconds.
"""


@dataclass(frozen=True, slots=True)
class _Field:
    name: str
    annotation: Any
    default: str
    text: str


def document() -> str:
    """The whole page."""
    parts = [_INTRO]
    for title, what, kind in _TITLES:
        parts.append(f"## {title}\n\n{what[0].upper()}{what[1:]}.\n")
        parts.extend(_sections(kind, ""))
    return "\n".join(parts)


def _sections(kind: type, path: str) -> Iterator[str]:
    """The table of a class, then those of its parts."""
    fields = list(_fields(kind))
    yield (f"### `{path}`\n" if path else "") + "\n".join(
        ["", "| key | type | default | |", "|---|---|---|---|", *(_row(f) for f in fields), ""]
    ).removeprefix("" if path else "\n")
    for field in fields:
        inner = _inner(field.annotation)
        if inner is not None:
            where = f"{path}.{field.name}" if path else field.name
            named = "" if inner is field.annotation or not _is_mapping(field.annotation) else ".NAME"
            yield from _sections(inner, where + named)


def _row(field: _Field) -> str:
    kind = "see below" if _inner(field.annotation) else f"`{_type(field.annotation)}`"
    cells = (f"`{field.name}`", kind + _bounds(field.annotation), field.default, field.text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _fields(kind: type) -> Iterator[_Field]:
    told = _attributes(kind)
    if issubclass(kind, BaseModel):
        for name, info in kind.model_fields.items():
            annotation: Any = info.annotation
            if info.metadata:
                annotation = Annotated[(info.annotation, *info.metadata)]
            default = info.default_factory() if info.default_factory else info.default  # type: ignore[call-arg]
            yield _Field(name, annotation, _value(default), told.get(name, ""))
        return
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield _Field(field.name, hints[field.name], _value(default), told.get(field.name, ""))


def _attributes(kind: type) -> dict[str, str]:
    """What the `Attributes:` (or `Args:`) part of a docstring says of each name."""
    found: dict[str, str] = {}
    sources = [kind, *([Agent] if kind.__name__ == "AgentConfig" else [])]
    for source in sources:
        doc = inspect.getdoc(source) or ""
        _, _, rest = doc.partition("Attributes:\n")
        names: list[str] = []
        for line in rest.splitlines():
            if line and not line.startswith("    "):
                break
            entry = re.match(r"    (\w+(?:, \w+)*): (.*)", line)
            if entry is not None and not line.startswith("     "):
                names = entry[1].split(", ")
                for name in names:
                    found[name] = entry[2]
            else:
                for name in names:
                    found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _value(value: object) -> str:
    if value in (dataclasses.MISSING, PydanticUndefined):
        return "required"
    if dataclasses.is_dataclass(value) or isinstance(value, BaseModel):
        return ""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, int) and value >= 1 << 20 and value % (1 << 20) == 0:
        return f"`{value >> 20}MiB`"
    if isinstance(value, str):
        return f'`"{value}"`'
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _bare(annotation: Any) -> Any:
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(_bare(annotation)) is dict


def _inner(annotation: Any) -> type | None:
    """The class whose keys are written below this one, if any; of a mapping, that of its values."""
    bare = _bare(annotation)
    candidates = [bare, *(typing.get_args(bare) if typing.get_origin(bare) is not None else ())]
    for one in candidates:
        if inspect.isclass(one) and (dataclasses.is_dataclass(one) or issubclass(one, BaseModel)):
            return one
    return None


def _type(annotation: Any) -> str:
    bare = _bare(annotation)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if origin is typing.Literal:
        return " | ".join("null" if a is None else str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(_type(a) for a in arguments))
    if origin is not None:
        inner = ", ".join(_type(a) for a in arguments if a is not Ellipsis)
        return f"{getattr(origin, '__name__', origin)}[{inner}]"
    return "null" if bare is types.NoneType else getattr(bare, "__name__", str(bare))


def _bounds(annotation: Any) -> str:
    if typing.get_origin(annotation) is not Annotated:
        return ""
    told = [
        f"{sign} {getattr(one, field):,}"
        for one in annotation.__metadata__
        for kind, (field, sign) in _BOUNDS.items()
        if isinstance(one, kind)
    ]
    return " " + ", ".join(told) if told else ""


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with --check only compare it."""
    if "--check" in arguments:
        return int(not FILE.is_file() or FILE.read_text("utf-8") != document())
    FILE.write_text(document(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
