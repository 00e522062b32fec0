"""`relay bench directory`: its document, its picture and its options; a whole run is marked bench."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay_cluster import cli
from relay_cluster.bench.common import Document, check_document
from relay_cluster.bench.directory import bench_segment
from relay_cluster.bench.directory_rows import DirectoryRow
from relay_cluster.bench.plots import plot_document
from relay_cluster.bench.show import document_table

ROW = DirectoryRow(
    op="lookup",
    batch=16,
    clients=4,
    shards=1,
    replicas=1,
    segments=100,
    calls=10,
    keys=160,
    keys_per_s=5000.0,
    p50_ms=1.0,
    p99_ms=2.0,
    bytes_per_segment=900.0,
    message_bytes=4000,
)


def test_the_document_keeps_its_schema_and_can_be_drawn(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, batch=64), replace(ROW, op="list", batch=100, message_bytes=None)]
    document = Document("directory", {"seed": 0, "model": "none", "data": []}, rows)
    value = document.to_json()
    assert value["schema"] == "relay.bench.directory/1"
    check_document(json.loads(json.dumps(value)))
    assert document_table(document).row_count == 3
    plot_document(value, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    value["rows"][0]["keys_per_s"] = "many"
    with pytest.raises(ValueError, match="keys_per_s"):
        check_document(value)


def test_segments_of_the_benchmark_differ_as_real_ones_do() -> None:
    made = [bench_segment(c, i, 8) for c in range(2) for i in range(50)]
    assert len({s.key for s in made}) == 100
    assert len({s.variant for s in made}) == 100
    assert {len(s.blocks) for s in made} == {8}


def test_help_explains_every_option_and_shows_examples() -> None:
    runner = CliRunner()
    shown = runner.invoke(cli.app, ["bench", "directory", "--help"], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    for text in ("--segments", "--clients", "--replicas", "$ relay bench directory --quick"):
        assert text in shown.output
    wrong = runner.invoke(cli.app, ["bench", "directory", "--batches", "x"])
    assert wrong.exit_code == 2
    assert "--batches" in wrong.output


@pytest.mark.ray
@pytest.mark.bench
def test_a_small_run_finds_everything(tmp_path: Path) -> None:
    target = tmp_path / "d.json"
    arguments = [
        "--segments",
        "400",
        "--clients",
        "2",
        "--shards",
        "2",
        "--replicas",
        "2",
        "--batches",
        "1,16",
    ]
    done = CliRunner().invoke(
        cli.app, ["bench", "directory", *arguments, "--seconds", "0.2", "--json", str(target)]
    )
    assert done.exit_code == 0, done.output
    value = json.loads(target.read_text())
    check_document(value)
    rows = value["rows"]
    ops = ("publish", "lookup", "lookup_miss", "lease", "renew", "release", "list", "evict")
    assert {row["op"] for row in rows} == set(ops)
    assert rows[0]["segments"] == 800, "every copy twice"
    assert next(row for row in rows if row["op"] == "list")["keys"] == 400
    assert all(row["keys_per_s"] > 0 and row["calls"] > 0 for row in rows)
    assert rows[-1]["segments"] < 800
