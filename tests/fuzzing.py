"""schemathesis as a command, on a service that runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TIMEOUT_S = 240
_HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    # Requests that are right otherwise are to reach the model, and not to keep it busy.
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = {model!r}
        for name in ("max_tokens", "max_completion_tokens"):
            if type(body.get(name)) is int:
                body[name] = min(body[name], 2)
    return body
"""


def fuzz(url: str, folder: Path, *, model: str, key: str | None, phases: str, examples: int) -> None:
    """All checks of schemathesis on every operation; what it found is the failure's text."""
    pytest.importorskip("schemathesis", reason="needs the extra `dev`")
    (folder / "relay_fuzzing_hooks.py").write_text(_HOOKS.format(model=model))
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--phases", phases, "--max-examples", str(examples), "--seed", "1", "--no-color"]
    command += ["--request-timeout", "60"]
    if key:
        command += ["--header", f"Authorization: Bearer {key}"]
    python_path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": python_path, "SCHEMATHESIS_HOOKS": "relay_fuzzing_hooks"}
    found = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Tested: 6" in found.stdout, found.stdout
