"""The report: complete, as JSON and back, as tables, as a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from relay_cluster.console import MAX_ERROR_LINES, RunProgress, fallback_lines, show_error, show_report
from relay_cluster.plot import plot_report
from relay_cluster.report import (
    AgentReport,
    ClusterReport,
    CompareReport,
    FallbackReport,
    MachineReport,
    PublishedReport,
    RowReport,
    RunReport,
    Stages,
    TransferReport,
)


def agent(name: str, relayed: int, *, compare: bool = True) -> AgentReport:
    transfer = TransferReport(
        segment="ab/cd",
        slot="report",
        source="w0",
        destination="w1",
        source_node="n",
        backend="nixl",
        blocks=17,
        bytes=50_000_000,
        seconds=0.04,
        gb_s=1.25,
        outcome="pulled",
    )
    return AgentReport(
        agent=name,
        worker="w1",
        node="n",
        model="m",
        method="context_mass",
        prompt_tokens=1200,
        fresh_tokens=1200 - relayed,
        relayed_tokens=relayed,
        reuse=0.87 if relayed else None,
        recomputed_entries=130,
        total_entries=1000,
        ttft_s=0.91,
        stages=Stages(dispatch_s=0.01, pull_s=0.05, rectify_s=0.5, prefill_s=0.35),
        transfers=(transfer,) if relayed else (),
        published=(PublishedReport(segment="ab/cd", tokens=127, blocks=2, bytes=9),),
        decode_tokens=128,
        decode_tokens_per_s=12.5,
        finish_reason="length",
        text="[bold]not markup[/]",
        tokens=(1, 2, 3),
        compare=CompareReport(
            method="full_prefill",
            ttft_s=0.9,
            base_ttft_s=3.6,
            speedup=4.0,
            samples=((0.9, 3.6), (0.95, 3.5)),
            top1=0.97,
            kl_first=0.001,
            kl_mean=0.0042,
            kl_p90=float("inf"),
            compared_tokens=32,
        )
        if compare
        else None,
    )


def report(*agents: AgentReport) -> RunReport:
    return RunReport(
        pipeline="demo",
        method="auto",
        seed=0,
        max_new_tokens=128,
        machine=MachineReport(
            cpu="cpu",
            cores=2,
            memory_gib=8.0,
            gpus=(),
            platform="Linux",
            python="3.11",
            torch="2",
            ray="2",
            transformers="5",
            nixl="",
        ),
        cluster=ClusterReport(
            name="local", workers=2, backend="nixl", notes=("nixl is not installed: tcp is used",)
        ),
        rows=(RowReport(agents=agents, wall_s=12.5, inputs_digest="00ff"),),
    )


def text_of(result: RunReport, width: int) -> str:
    console = Console(width=width, record=True, highlight=False, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        show_report(result, console)
    return capture.get()


def test_json_has_every_field_of_the_schema() -> None:
    data = report(agent("a", 0), agent("b", 1100)).to_json()
    assert set(data) == {
        *("schema", "created", "pipeline", "method", "seed", "max_new_tokens", "machine", "cluster", "rows")
    }
    assert data["schema"] == "relay.run/1"
    entry = data["rows"][0]["agents"][1]
    assert set(entry) == {
        *(
            "notes",
            "agent",
            "worker",
            "node",
            "model",
            "method",
            "prompt_tokens",
            "fresh_tokens",
            "relayed_tokens",
        ),
        *(
            "prefix_tokens",
            "prepared_tokens",
            "pulled_ahead_blocks",
            "pulled_ahead_bytes",
            "ahead",
            "reuse",
            "recomputed_entries",
            "total_entries",
            "ttft_s",
            "stages",
            "transfers",
        ),
        *(
            "fallbacks",
            "published",
            "decode_tokens",
            "decode_tokens_per_s",
            "finish_reason",
            "text",
            "tokens",
        ),
        *("retries", "compare", "resolved_method", "healed_entries", "healed_at_token", "gate"),
        *("flop_ratio_predicted", "flop_ratio", "span_costs", "pull_hidden_s"),
    }
    assert set(entry["stages"]) == {
        f"{stage}_s"
        for stage in "dispatch queue lookup lease pull rotate rectify prefill first_token".split()  # noqa: SIM905
    }
    assert set(entry["transfers"][0]) == {
        *("segment", "slot", "source", "destination", "source_node", "backend", "blocks", "bytes", "seconds"),
        *("gb_s", "outcome", "detail"),
    }
    assert set(entry["compare"]) == {
        *("method", "ttft_s", "base_ttft_s", "speedup", "samples", "top1", "kl_first", "kl_mean", "kl_p90"),
        *("compared_tokens", "text", "same_text_prefix_tokens"),
    }
    assert entry["compare"]["kl_p90"] is None
    json.dumps(data, allow_nan=False)


def test_json_round_trip(tmp_path: Path) -> None:
    first = report(agent("a", 0), agent("b", 1100, compare=False))
    first.write(tmp_path / "runs" / "x.json")
    data = json.loads((tmp_path / "runs" / "x.json").read_text("utf-8"))
    assert RunReport.from_json(data).to_json() == first.to_json()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x.json"]


def test_other_schemas_are_refused() -> None:
    data = report(agent("a", 0)).to_json()
    with pytest.raises(ValueError, match=r"relay\.run/2"):
        RunReport.from_json({**data, "schema": "relay.run/2"})
    with pytest.raises(ValueError, match="no field extra"):
        RunReport.from_json({**data, "extra": 1})
    del data["pipeline"]
    with pytest.raises(ValueError, match="pipeline"):
        RunReport.from_json(data)


def test_merge_keeps_every_row() -> None:
    merged = RunReport.merge([report(agent("a", 0)), report(agent("b", 10))])
    assert [row.agents[0].agent for row in merged.rows] == ["a", "b"]
    assert merged.reused_tokens == 10
    assert merged.ttft_s == 0.91


@pytest.mark.parametrize("width", [100, 120])
def test_tables_fit_the_screen(width: int) -> None:
    shown = text_of(report(agent("analyst", 0), agent("critic", 1100)), width)
    assert all(len(line) <= width for line in shown.splitlines() if "torch" not in line)
    for word in (
        "analyst",
        "0.87",
        "900 ms",
        "3.60 s",
        "4.0x",
        "0.97",
        "0.0042",
        "1.2 GB/s",
        "nixl",
        "no fallbacks",
    ):
        assert word in shown
    assert "[bold]not markup[/]" in shown
    assert "nixl is not installed: tcp is used" in shown


def test_table_without_comparison_has_no_empty_columns() -> None:
    shown = text_of(report(agent("a", 1100, compare=False)), 120)
    assert "speed-up" not in shown
    assert "910 ms" in shown


def test_fallbacks_in_plain_words() -> None:
    lost = FallbackReport(slot="solver", reason="peer_gone", detail="w0 closed the connection", tokens=212)
    row = RowReport(
        agents=(AgentReport(**{**_fields(agent("critic", 5)), "fallbacks": (lost,), "retries": 1}),), wall_s=1
    )
    assert fallback_lines(row) == [
        '"critic" computed 212 tokens of {solver} itself: peer_gone (w0 closed the connection)',
        '"critic" was started again once because its worker died',
    ]


def _fields(value: AgentReport) -> dict[str, object]:
    return {name: getattr(value, name) for name in AgentReport.__slots__}


def test_picture(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.png"
    plot_report(report(agent("a", 0), agent("b", 1100)), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    plot_report(report(agent("a", 0, compare=False)), path)


def test_progress_prints_lines_and_ignores_unknown_events(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with RunProgress() as progress:
        progress("cluster", "starting")
        progress("agent_started", "a", "w0")
        progress("token", "a", 1)
        progress("compare", "a", "full_prefill 1 of 2")
        progress("agent_done", "a")
        progress("something_new", 1, 2, 3)
        progress.start_row(1, 2)
    shown = capsys.readouterr().err
    assert shown.splitlines() == [
        "starting",
        "a started on w0",
        "a: full_prefill 1 of 2",
        "a done",
        "row 2 of 2",
    ]


def test_progress_in_a_terminal() -> None:
    console = Console(force_terminal=True, width=100, record=True)
    with console.capture(), RunProgress(console) as progress:
        progress("agent_started", "a", "w0")
        progress("token", "a", 12)
        progress("agent_done", "a")
        progress("compare", "a", "again")


def test_error_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    show_error("\n".join(f"fault {index} [x]" for index in range(100)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == MAX_ERROR_LINES + 1
    assert lines[0] == "error: fault 0 [x]"
    assert lines[-1] == f"... and {100 - MAX_ERROR_LINES} more lines"


def test_what_was_prepared_has_a_column_only_where_something_was_to_be() -> None:
    plain = text_of(report(agent("a", 0), agent("b", 1100)), 160)
    assert "prepared" not in plain
    ahead = dataclasses.replace(agent("b", 0), prepared_tokens=987, ahead="exact: because")
    shown = text_of(report(agent("a", 0), ahead), 160)
    assert "prepared" in shown
    assert "987" in shown
