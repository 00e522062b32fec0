"""No bytes of a peer are ever turned into code: an import and call scan of the three rooms.

Where Ray pickles (arguments and results of its own actor calls) is said in docs/security.md: its members are
trusted. What we read from sockets, shards and disks ourselves is msgpack with a schema, safetensors or plain
bytes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("relay_cluster", "workers", "transport")

MODULES = frozenset(
    {
        "pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle",
        "multiprocessing.connection", "multiprocessing.managers", "xmlrpc", "torch.multiprocessing",
        "torch.distributed",
    }
)  # fmt: skip
"""Modules that make objects of bytes, or sockets that do."""
CALLS = frozenset(
    {
        "torch.load", "numpy.load", "np.load", "pandas.read_pickle", "yaml.load", "yaml.load_all",
        "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "compile", "torch.jit.load", "torch.hub.load",
        "ray.cloudpickle.loads",
    }
)  # fmt: skip
FLAGS = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "shell": True}
"""Arguments that must not have this value, nor one that is only known at run time."""
ALLOWED: dict[tuple[str, str], str] = {}
"""(file, what) -> why. Nothing needs it today."""


def dotted(node: ast.expr) -> str:
    """a.b.c of an expression; empty for others."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def is_forbidden(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in MODULES)


def findings(source: str) -> Iterator[str]:
    """What of the lists above a module's source has in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if is_forbidden(a.name))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            full = (f"{module}.{a.name}" for a in node.names)
            yield from (name for name in full if is_forbidden(name) or is_forbidden(module) or name in CALLS)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in CALLS:
                yield name
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if name in ("importlib.import_module", "import_module", "__import__") and is_forbidden(
                str(first)
            ):
                yield str(first)
            for keyword in node.keywords:
                if keyword.arg in FLAGS:
                    value = keyword.value
                    safe = isinstance(value, ast.Constant) and value.value is not FLAGS[keyword.arg]
                    if not safe:
                        yield f"{keyword.arg}="


def sources() -> list[Path]:
    return sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))


def test_no_room_turns_bytes_into_code() -> None:
    found = {(str(p.relative_to(ROOT)), what) for p in sources() for what in findings(p.read_text("utf-8"))}
    assert found == set(ALLOWED), "what is read from a peer or a disk must be plain data"


def test_all_rooms_are_scanned() -> None:
    names = {str(p.relative_to(ROOT)) for p in sources()}
    assert {"transport/tcp_server.py", "transport/directory/wire.py", "workers/model.py"} <= names
    assert len(names) > 100


def test_weights_are_safetensors() -> None:
    """The other format of weights is pickle; `from_pretrained` must not fall back to it."""
    loads = [
        node
        for node in ast.walk(ast.parse((ROOT / "workers/model.py").read_text("utf-8")))
        if isinstance(node, ast.Call) and dotted(node.func) == "AutoModelForCausalLM.from_pretrained"
    ]
    assert loads
    for call in loads:
        said = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
        assert said.get("use_safetensors") is True


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("import torch.distributed as d", "torch.distributed"),
        ("from cloudpickle import loads", "cloudpickle.loads"),
        ("from multiprocessing import connection", "multiprocessing.connection"),
        ("from torch import load", "torch.load"),
        ("def f(x):\n    return torch.load(x)", "torch.load"),
        ("yaml.load(text)", "yaml.load"),
        ("importlib.import_module('marshal')", "marshal"),
        ("eval(text)", "eval"),
        ("model.from_pretrained(p, trust_remote_code=flag)", "trust_remote_code="),
        ("f(x, allow_pickle=True)", "allow_pickle="),
    ],
)
def test_the_scan_finds_what_is_planted(source: str, what: str) -> None:
    assert list(findings(source)) == [what]


@pytest.mark.parametrize(
    "source", ["yaml.safe_load(t)", "model.eval()", "f(weights_only=True)", "import json"]
)
def test_the_scan_lets_the_rest_pass(source: str) -> None:
    assert list(findings(source)) == []
