"""What `relay submit` sends, and what it refuses, before anything is sent. (With a dashboard:
tests/e2e/test_submit.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay_cluster import cli
from relay_cluster.submitting import (
    DEFAULT_ADDRESS,
    Ended,
    Jobs,
    command_line,
    default_address,
    read_runtime_env,
)
from transport.errors import ConfigError


def test_the_job_runs_the_pipeline_in_the_folder_that_is_sent(tmp_path: Path) -> None:
    inside = tmp_path / "p" / "a.yaml"
    line = command_line(tmp_path, inside, tmp_path / "c.yaml", ["--example"])
    assert line == ("python", "-m", "relay_cluster", "run", "p/a.yaml", "--cluster", "c.yaml", "--example")
    with pytest.raises(ConfigError, match=r"lies outside .*--working-dir"):
        command_line(tmp_path / "q", inside, None, [])


def test_runtime_env(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("pip: [einops]\nenv_vars: {A: '1', B: '2'}\n", "utf-8")
    assert read_runtime_env(None, []) == {}
    assert read_runtime_env(file, ["B=3", "C=x=y"]) == {
        "pip": ["einops"],
        "env_vars": {"A": "1", "B": "3", "C": "x=y"},
    }
    for text, said in (("[1]", "must be a mapping"), ("working_dir: .", "--working-dir"), ("a: [", "read")):
        file.write_text(text, "utf-8")
        with pytest.raises(ConfigError, match=said):
            read_runtime_env(file, [])
    with pytest.raises(ConfigError, match="no such file"):
        read_runtime_env(tmp_path / "none.yaml", [])
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        read_runtime_env(None, ["A"])


def test_where_the_job_goes() -> None:
    assert default_address({}) == DEFAULT_ADDRESS
    assert default_address({"RAY_ADDRESS": "10.0.0.1:6379"}) == DEFAULT_ADDRESS, "a GCS is no dashboard"
    assert default_address({"RAY_ADDRESS": "http://a:1"}) == "http://a:1"
    both = {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}
    assert default_address(both) == "http://b:2"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
        ("RUNNING", None, 0),
    ],
)
def test_the_commands_exit_status_is_the_jobs(status: str, code: int | None, expected: int) -> None:
    assert Ended("x", status, "", code).exit_status == expected


def test_addresses_that_are_none_or_answer_nothing() -> None:
    with pytest.raises(ConfigError, match="is not a URL"):
        Jobs("127.0.0.1:8265")
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers .*ray\.dashboard: true"):
        Jobs("http://127.0.0.1:9")


def test_a_wrong_pipeline_is_said_here_and_not_by_a_job(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("agents: 3\n", "utf-8")
    done = CliRunner().invoke(cli.app, ["submit", str(file)])
    assert done.exit_code == 2
    assert "agents: must be a mapping" in done.output
