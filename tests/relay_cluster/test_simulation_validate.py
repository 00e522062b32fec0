"""A simulation beside a report: of a run that was itself simulated, and of real ones that are kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from relay_cluster.cli import app
from relay_cluster.report import (
    AgentReport,
    ClusterReport,
    MachineReport,
    RowReport,
    RunReport,
    Stages,
)
from relay_cluster.simulation.facts import Answered, Mode
from relay_cluster.simulation.run import Simulation
from relay_cluster.simulation.settings import SimulatedCluster, Workload
from relay_cluster.simulation.validate import calibrated, compare, figures, mode_of, read_report
from transport.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "simulations"
RESULTS = ROOT / "docs" / "results"
HERE = SimulatedCluster.load(CONFIGS / "this_machine.yaml")
DEMO = Workload.load(CONFIGS / "demo.yaml")
ONCE = DEMO.model_copy(update={"least_runs": 1, "runs_per_worker": 0.1})
MACHINE = MachineReport(
    cpu="", cores=2, memory_gib=1, gpus=(), platform="", python="", torch="", ray="", transformers="", nixl=""
)


def agent_of(answer: Answered, method: str) -> AgentReport:
    """What a worker would have said of a simulated request."""
    dispatch_s = HERE.device.dispatch_s
    return AgentReport(
        agent=answer.agent,
        worker=answer.worker,
        node="n",
        model="m",
        method=method,
        prompt_tokens=answer.prompt_tokens,
        fresh_tokens=answer.prompt_tokens - answer.relayed_tokens,
        relayed_tokens=answer.relayed_tokens,
        prefix_tokens=answer.prefix_tokens,
        prepared_tokens=answer.prepared_tokens,
        ttft_s=answer.ttft_s,
        stages=Stages(dispatch_s=dispatch_s, queue_s=answer.queue_s, prefill_s=answer.prefill_s),
        decode_tokens=answer.answer_tokens,
        decode_tokens_per_s=(answer.answer_tokens - 1) / answer.decode_s,
        text="what nobody else may read",
        tokens=(1, 2),
    )


def report_of(cluster: SimulatedCluster, mode: Mode) -> RunReport:
    """A report of a run that was simulated."""
    simulation = Simulation(cluster, ONCE, mode, workers=2, seed=0)
    simulation.run()
    done = simulation.finished[0]
    agents = tuple(agent_of(answer, mode.method) for answer in simulation.answers)
    return RunReport(
        pipeline="demo",
        method=mode.method,
        seed=0,
        max_new_tokens=64,
        machine=MACHINE,
        cluster=ClusterReport(name="c", workers=2, backend="shm"),
        rows=(RowReport(agents=agents, wall_s=done.ended - done.began),),
    )


@pytest.mark.parametrize("mode", ["full_prefill", "auto", "auto+stream", "exact+stream"])
def test_a_simulated_run_is_simulated_again_exactly(mode: str) -> None:
    report = report_of(HERE, Mode(mode))
    assert mode_of(report).text.endswith("+stream") == mode.endswith("+stream")
    found = compare(HERE, DEMO, report)
    assert [(c.agent, c.what) for c in found] == [
        *((name, "ttft") for name in DEMO.agents),
        ("", "wall"),
    ]
    assert max(abs(c.error) for c in found) < 1e-9


def test_rates_are_found_again_from_a_report() -> None:
    """A machine of half the speed, known only by its report of full prefill, and what it then relays."""
    slow = dataclasses.replace(
        HERE.device,
        flops_per_s=HERE.device.flops_per_s / 2,
        step_fixed_s=0.09,
        dispatch_s=0.02,
        publish_s=0.1,
    )
    machine = HERE.model_copy(update={"device": slow})
    rated = calibrated(HERE, report_of(machine, Mode("full_prefill")))
    assert rated.device.flops_per_s == pytest.approx(slow.flops_per_s, rel=0.05)
    assert rated.device.step_fixed_s == pytest.approx(slow.step_fixed_s, rel=0.05)
    relayed = report_of(machine, Mode("auto"))
    assert max(abs(c.error) for c in compare(HERE, DEMO, relayed)) > 0.3, "the file's rates are not its rates"
    assert max(abs(c.error) for c in compare(rated, DEMO, relayed)) < 0.15


def test_rates_come_only_from_runs_that_reused_nothing() -> None:
    with pytest.raises(ConfigError, match="full_prefill"):
        calibrated(HERE, report_of(HERE, Mode("auto")))


def test_a_report_of_another_pipeline_or_with_longer_texts_is_an_error_with_advice() -> None:
    report = report_of(HERE, Mode("auto"))
    with pytest.raises(ConfigError, match="Name the workload"):
        compare(HERE, Workload.load(CONFIGS / "debate.yaml"), report)
    longer = DEMO.model_copy(update={"inputs": {"report": 5000}})
    with pytest.raises(ConfigError, match="Correct the lengths"):
        compare(HERE, longer, report)


def test_figures_tell_nothing_of_what_was_written() -> None:
    kept = figures(report_of(HERE, Mode("auto")))
    assert "nobody else" not in json.dumps(kept.to_json())
    assert compare(HERE, DEMO, kept)


def test_the_command_prints_both_and_the_error(tmp_path: Path) -> None:
    full, auto = tmp_path / "full.json", tmp_path / "auto.json"
    report_of(HERE, Mode("full_prefill")).write(full)
    report_of(HERE, Mode("auto")).write(auto)
    files = [str(CONFIGS / "this_machine.yaml"), str(CONFIGS / "demo.yaml")]
    given: list[Any] = ["--validate", str(auto), "--calibrate", str(full)]
    done = CliRunner().invoke(app, ["simulate", *files, *given, "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert "largest error" in done.output
    rows = json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]
    assert {row["what"] for row in rows} == {"ttft", "wall"}
    for wrong, said in (
        (["--calibrate", str(full)], "--validate"),
        (["--validate", str(tmp_path / "none.json")], "cannot be read"),
        (["--validate", files[0]], "not a report"),
    ):
        failed = CliRunner().invoke(app, ["simulate", *files, *wrong])
        assert failed.exit_code == 2
        assert said in failed.output


@pytest.mark.parametrize("name", ["simulate-demo-relay", "simulate-demo-stream"])
def test_runs_of_a_real_machine_come_out_within_a_fifth(name: str) -> None:
    """Reports of `relay run --compare full_prefill`, kept as figures; see docs/scale.md for what they are."""
    report = read_report(RESULTS / f"{name}.json")
    assert not any(agent.text or agent.tokens for row in report.rows for agent in row.agents)
    found = compare(calibrated(HERE, report), DEMO, report)
    assert max(abs(c.error) for c in found) < 0.2
