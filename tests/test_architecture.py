"""The rooms and the direction of imports: the contracts hold, and they would catch a violation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("relay_cluster", "workers", "transport")


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the rooms in `folder`, never over an installed copy of them."""
    code = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports_command as c; c()"
    command = [sys.executable, "-c", code, "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The rooms and their contracts in a folder of their own, to plant faults in."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("transport/settings.py", "import workers.settings", "Imports point down"),
        ("workers/settings.py", "import relay_cluster.pipeline", "Imports point down"),
        ("transport/types.py", "import torch", "stays cheap"),
        ("workers/methods/base.py", "import ray", "stays cheap"),
        ("relay_cluster/pipeline.py", "import transformers", "stays cheap"),
        ("transport/directory/table.py", "import torch", "state machine is pure"),
    ],
)
def test_planted_import_is_caught(copy: Path, module: str, line: str, contract: str) -> None:
    with (copy / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(copy)
    assert done.returncode != 0, done.stdout + done.stderr
    broken = [text for text in done.stdout.splitlines() if "BROKEN" in text]
    assert any(contract in text for text in broken), done.stdout
