"""`relay bench transfer`: real backends between real processes, small sizes; counts and keys, no seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay_cluster.bench.common import check_document
from relay_cluster.bench.transfer import PATHS, TransferSettings, choose_backends, parse_sizes
from relay_cluster.cli import app
from transport.auto import available_backends
from transport.errors import ConfigError


def test_sizes_are_read() -> None:
    assert parse_sizes("4KiB, 64kib,1MiB,100") == (4096, 65536, 1 << 20, 100)


@pytest.mark.parametrize("text", ["", "4KB", "x", "1.5MiB", "2GiB", "1B"])
def test_sizes_that_are_none_say_so(text: str) -> None:
    with pytest.raises(ConfigError, match="--sizes"):
        parse_sizes(text)


def test_backends_default_to_what_is_installed() -> None:
    found = available_backends()
    assert choose_backends(None) == tuple(name for name in PATHS if name in found and found[name][0])
    assert choose_backends("tcp,tcp") == ("tcp",)
    with pytest.raises(ConfigError, match='"rdma" is not one of shm, nixl, ucx, tcp'):
        choose_backends("rdma")


def test_a_hidden_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_DISABLE_BACKENDS", "nixl")
    with pytest.raises(ConfigError, match="nixl cannot be used here: hidden by"):
        choose_backends("nixl")


def test_rounds_are_bounded_both_ways() -> None:
    settings = TransferSettings(backends=("tcp",), sizes=(64,), bytes_per_size=1 << 30)
    assert [settings.rounds(n) for n in (64, 64 << 20, 1 << 30)] == [300, 16, 5]


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    """The tcp backend in two processes of its own, in parts."""
    out, picture = tmp_path / "t.json", tmp_path / "t.png"
    options = ["--backends", "tcp", "--sizes", "4KiB,2MiB", "--parts", "3", "--quick"]
    result = CliRunner().invoke(
        app, ["bench", "transfer", *options, "--json", str(out), "--plot", str(picture)]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    check_document(document)
    assert document["schema"] == "relay.bench.transfer/1"
    rows = document["rows"]
    assert [(r["backend"], r["path"], r["size_bytes"], r["verified"]) for r in rows] == [
        ("tcp", "tcp", 4096, True),
        ("tcp", "tcp", 4096, False),
        ("tcp", "tcp", 2 << 20, True),
        ("tcp", "tcp", 2 << 20, False),
    ]
    for row in rows:
        assert (row["baseline"], row["parts"]) == ("socket", 3)
        assert row["blocks"] == max(1, row["size_bytes"] >> 20)
        assert row["samples"] == document["settings"]["rounds"][str(row["size_bytes"])]
        assert row["gb_s"] == pytest.approx(row["size_bytes"] / row["seconds_p50"] / 1e9, rel=1e-3)
        assert row["ratio"] == pytest.approx(row["gb_s"] / row["baseline_gb_s"], rel=1e-3)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.skipif(not available_backends()["shm"][0], reason=available_backends()["shm"][1])
def test_shared_memory_is_measured_beside_memcpy(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    options = ["--backends", "shm", "--sizes", "64KiB,2MiB", "--quick", "--json", str(out)]
    result = CliRunner().invoke(app, ["bench", "transfer", *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert {(r["backend"], r["path"], r["baseline"]) for r in rows} == {("shm", "shm", "memcpy")}
    assert [(r["size_bytes"], r["blocks"], r["verified"]) for r in rows] == [
        (64 << 10, 1, True),
        (64 << 10, 1, False),
        (2 << 20, 2, True),
        (2 << 20, 2, False),
    ]
