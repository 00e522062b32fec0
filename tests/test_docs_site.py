"""The documentation as a site: every link leads somewhere, and what is made from code is up to date."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from relay_cluster import reference

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert (tmp_path / "index.html").stat().st_size > 1000
    fetched = [line for line in (tmp_path / "index.html").read_text("utf-8").split('"') if "//" in line]
    assert not [url for url in fetched if "googleapis" in url or "cdn" in url], "nothing comes from elsewhere"


def test_the_configuration_page_is_that_of_the_settings() -> None:
    assert reference.main(["--check"]) == 0, "run: python -m relay_cluster.reference"


def test_every_key_is_explained() -> None:
    """But for those whose name says it all."""
    bare = [line.split("`")[1] for line in reference.document().splitlines() if line.endswith("|  |")]
    told = [key for key in bare if "see below" not in key]
    assert set(told) <= {"description", "prompt", "system", "model", "method", *NAMED_PARTS}, told


NAMED_PARTS = {"worker", "transport", "directory", "ray", "runtime", "serve", "telemetry", "sampling"}
