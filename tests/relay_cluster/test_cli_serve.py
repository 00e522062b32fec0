"""`relay serve`: what is refused before anything is started. (Serving is in tests/e2e.)"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay_cluster import cli


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """The command attaches handlers to the process's loggers; take them off again."""
    yield
    for name in ("relay_cluster", "workers", "transport"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, ["serve", *arguments], env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_help_has_examples() -> None:
    result = CliRunner().invoke(cli.app, ["serve", "--help"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert "$ relay serve configs/clusters/local_cpu.yaml" in result.stdout


def test_others_than_this_machine_are_not_served_without_keys() -> None:
    assert "serve.api_keys_file" in refused("--host", "0.0.0.0")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("serve: {max_waitng: 3}", "max_waiting"),
        ("serve: {default_max_tokens: 0}", "default_max_tokens"),
        ("serve: {api_keys_file: /nowhere/keys.yaml}", "/nowhere/keys.yaml"),
        ("telemetry: {otlp_endpoint: 'somewhere:4318'}", "telemetry.otlp_endpoint"),
        ("telemetry: {sample_ratio: 2}", "sample_ratio"),
    ],
)
def test_faults_of_the_file_are_told(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    assert told in refused(str(file))
