"""`relay bench`: help, and what can go wrong before anything is measured."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from relay_cluster import cli


def relay(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    yield
    for name in ("relay_cluster", "workers", "transport"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", ["ttft", "chain", "fidelity", "decay"])
def test_help_explains_every_option_and_shows_examples(name: str) -> None:
    shown = relay("bench", name, "--help")
    assert shown.exit_code == 0
    assert f"$ relay bench {name} --quick" in shown.output
    for option in ("--json", "--plot", "--seed", "--quick", "--data"):
        assert option in shown.output


def test_the_examples_of_the_help_are_options_that_exist() -> None:
    for name in ("ttft", "chain", "fidelity", "decay"):
        text = relay("bench", name, "--help").output
        options, _, examples = text.partition("Examples")
        used = set(re.findall(r"--[a-z-]+", examples))
        assert used
        assert used <= set(re.findall(r"--[a-z-]+", options))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ttft", "--methods", "naive,epik"), "epic"),
        (("ttft", "--span-tokens", "5x"), "--span-tokens"),
        (("ttft", "--span-tokens", "4"), "at least 16"),
        (("ttft", "--data", "nowhere.jsonl"), "no such file"),
        (("fidelity", "--answers", "--no-greedy"), "--no-greedy"),
        (("fidelity", "--methods", "auto:fats"), "auto:fast"),
        (("decay", "--method", "naiv"), "naive"),
        (("chain", "--cluster", "nowhere.yaml"), "nowhere.yaml"),
        (("chain", "--stream", "exat"), "off, exact, auto, relay"),
        (("chain", "--stream", "off", "--methods", "naive,auto"), "one method"),
    ],
)
def test_faults_are_told_in_a_line(arguments: tuple[str, ...], said: str) -> None:
    result = relay("bench", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) <= 6


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    result = relay("bench", "ttft", "--json", str(tmp_path))
    assert result.exit_code == 2
    assert "is a folder" in result.stderr


def test_a_cluster_file_has_its_own_model() -> None:
    file = Path(__file__).resolve().parents[2] / "configs" / "clusters" / "local_cpu.yaml"
    result = relay("bench", "chain", "--cluster", str(file), "--threads", "1")
    assert result.exit_code == 2
    assert "--threads" in result.stderr
