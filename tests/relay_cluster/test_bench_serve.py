"""`relay bench serve` on the service with a played worker: what is asked, counted and refused. (With a real
model it is one of `make test-bench`.)"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from relay_cluster import cli
from relay_cluster.bench import serve
from relay_cluster.bench.common import Document, check_document
from relay_cluster.bench.plots import plot_document
from relay_cluster.bench.serve import AGENTS, Documents, ServeBenchSettings, run_serve
from relay_cluster.bench.serve_client import ServiceClient, served_model
from relay_cluster.bench.serve_matching import measure_matching
from relay_cluster.bench.serve_rows import ServeRow
from relay_cluster.bench.show import show_document
from relay_cluster.bench.texts import load_tasks
from tests.relay_cluster.scripted_service import DEADLINE_S, Running, running
from transport.errors import RelayError
from workers.messages import Request

SMALL = ServeBenchSettings(
    concurrency=(1, 2),
    pipelines=3,
    document_chars=300,
    answer_tokens=2,
    overhead_requests=3,
    next_pairs=2,
    remembered=50,
    matching_rounds=4,
    timeout_s=DEADLINE_S,
)


def bench(live: Running, *, model: str | None = None, settings: ServeBenchSettings = SMALL) -> list[ServeRow]:
    name = model or served_model(live.url, "none")
    client = ServiceClient(live.url, name, api_key="none", seed=0, timeout_s=DEADLINE_S)
    found = run_serve(settings, load_tasks([]), client, {"model": name})
    check_document(found.to_json())
    return [row for row in found.rows if isinstance(row, ServeRow)]


def test_every_pipeline_is_counted_with_relay_and_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # for the table
    with running(max_waiting=64) as live:
        live.worker.goes_on.set()
        rows = bench(live)
        # Two pipelines to warm up, the overhead, two pairs with a hint and without, and three of three agents
        # for each load, relay on and off.
        assert len(live.worker.asked) == 2 * 3 + 3 + 2 * 2 * 2 + 2 * 2 * 3 * 3
    load = [row for row in rows if row.part == "pipelines"]
    assert [(r.concurrency, r.relay, r.what) for r in load] == [
        (at, relay, what) for at in (1, 2) for relay in (True, False) for what in ("all", *AGENTS)
    ]
    for row in load:
        assert (row.requests, row.errors) == (9 if row.what == "all" else 3, 0)
        assert (row.throughput_rps is not None) == (row.what == "all")
        assert 0 < row.ttft_s_p50 <= row.ttft_s_p95 <= row.ttft_s_p99
        if not row.relay:
            assert row.speedup == 1
    assert [(r.part, r.what, r.requests) for r in rows if r.part != "pipelines"] == [
        ("overhead", "http", 3),
        ("overhead", "service", 3),
        ("next", "hint", 2),
        ("next", "no hint", 2),
        ("matching", "find", 4),
        ("matching", "rewrite", 4),
    ]
    found = Document("serve", {**dataclasses.asdict(SMALL), "model": "m", "data": []}, rows)
    show_document(found)
    shown = capsys.readouterr().out
    assert all(what in shown for what in ("overhead", "matching", "planner", "judge"))
    document = found.to_json()
    plot_document(json.loads(json.dumps(document)), tmp_path / "serve.png")
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_documents_are_asked_on_and_off_and_never_again() -> None:
    with running(max_waiting=64) as live:
        live.worker.goes_on.set()
        bench(live, settings=dataclasses.replace(SMALL, concurrency=(2,), overhead_requests=1, next_pairs=0))
    asked = [(request.publish, said(request)) for request in live.worker.asked]
    plans = [(relay, text) for relay, text in asked if text.endswith("Make a plan in a few steps.")]
    on, off = ([text for relayed, text in plans if relayed is relay] for relay in (True, False))
    assert len(set(on[1:])) == len(on) - 1 == SMALL.pipelines, "the first one warms up"
    assert set(on[1:]) == set(off[1:])
    assert not set(on[1:]) & {on[0], off[0]}


def said(request: Request) -> str:
    """The user's message, its slots filled."""
    return request.messages[-1].content.format(**{name: v.text for name, v in request.values.items()})


def test_parts_can_be_chosen_by_their_names() -> None:
    with running(max_waiting=64) as live:
        live.worker.goes_on.set()
        rows = bench(live, settings=dataclasses.replace(SMALL, parts=("next", "matching")))
    assert [row.part for row in rows] == ["next", "next", "matching", "matching"]
    refused = CliRunner().invoke(cli.app, ["bench", "serve", "--parts", "next,load"])
    assert refused.exit_code != 0
    assert "there is no load" in refused.output


def test_what_was_measured_before_ctrl_c_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(*_: object) -> list[ServeRow]:
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "_load", interrupted)  # Ctrl-C at a moment that a test can know
    with running(max_waiting=64) as live:
        live.worker.goes_on.set()
        rows = bench(live)
    assert [row.part for row in rows] == ["overhead", "overhead", "next", "next"]


def test_answers_that_do_not_come_are_errors() -> None:
    with running(max_waiting=64) as live:
        live.worker.goes_on.set()
        rows = bench(live, model="gpt-4")
    assert all(row.requests == 0 for row in rows if row.part != "matching")
    planners = [row for row in rows if row.what == "planner"]
    assert [row.errors for row in planners] == [3, 3, 3, 3], "a pipeline ends at its first error"
    assert all(row.ttft_s_p50 is None and row.speedup is None for row in planners)


def test_documents_have_little_in_common() -> None:
    documents = Documents(load_tasks([]), seed=0)
    taken = [documents.take(2000) for _ in range(20)]
    assert all(len(text) >= 2000 for text in taken)
    runs = [text[at : at + 128] for text in taken for at in range(0, len(text) - 128, 16)]
    shared = sum(1 for run in runs if sum(run in text for text in taken) > 1)
    assert shared < 0.25 * len(runs)
    assert taken == [again.take(2000) for again in [Documents(load_tasks([]), seed=0)] for _ in range(20)]


def test_matching_finds_every_text_that_it_times() -> None:
    rows = measure_matching(remembered=30, chars=8 << 10, rounds=3, seed=1)
    assert [(row.what, row.requests) for row in rows] == [("find", 3), ("rewrite", 3)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.bench
@pytest.mark.timeout(600)
def test_a_service_of_its_own_is_measured_and_ended(tmp_path: Path) -> None:
    target = tmp_path / "serve.json"
    shown = CliRunner().invoke(cli.app, ["bench", "serve", "--quick", "--json", str(target)])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(target.read_text("utf-8"))["rows"]
    load = [row for row in rows if row["part"] == "pipelines"]
    assert load
    assert all(row["errors"] == 0 and row["requests"] > 0 for row in load)
    for row in load:
        if row["relay"] and row["what"] in ("solver", "judge"):
            assert row["cached_tokens"] > 0.5 * row["prompt_tokens"]
        if not row["relay"]:
            assert row["cached_tokens"] == 0


def test_a_url_that_nobody_answers_is_told() -> None:
    with pytest.raises(RelayError, match="relay serve"):
        served_model("http://127.0.0.1:9", "none")
    shown = CliRunner().invoke(
        cli.app, ["bench", "serve", "--url", "http://127.0.0.1:9"], env={"TERM": "dumb"}
    )
    assert shown.exit_code == 2
    assert "relay serve" in shown.output
