"""A report of `relay run --json` beside the same run, simulated.

What a report gives the simulation are lengths: prompts and answers in tokens, the number of workers, method
and streaming. Times come from the cluster's file, or from another report of the same machine and hour
(`calibrated`): how fast it decodes and prefills, what a call and the way from one agent to the next take. So
what is compared is what the simulator adds to these: waiting, sharing, pulls, plans and preparation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from relay_cluster.report import AgentReport, RowReport, RunReport
from relay_cluster.simulation.device import Device
from relay_cluster.simulation.run import Mode, Simulation
from relay_cluster.simulation.settings import ArrivalSettings, SimulatedCluster, Workload
from transport.errors import ConfigError

SCHEMA = "relay.simulate.validation/1"


@dataclass(frozen=True, slots=True)
class Compared:
    """One time, measured and simulated. what: "ttft" of an agent, or "wall" of the whole run (agent "")."""

    row: int
    agent: str
    what: str
    measured_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        """Share by which the simulation is too high (negative: too low)."""
        return self.simulated_s / self.measured_s - 1


def read_report(path: Path) -> RunReport:
    """A report of `relay run --json`.

    Raises:
        ConfigError: no such file, or something else.
    """
    try:
        return RunReport.from_json(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a report of `relay run --json` of this version ({error}).") from error


def figures(report: RunReport) -> RunReport:
    """The report without what agents wrote: what may be shown to anybody, and all that is needed here."""
    rows = tuple(
        replace(row, agents=tuple(replace(a, text="", tokens=()) for a in row.agents)) for row in report.rows
    )
    return replace(report, rows=rows)


def mode_of(report: RunReport) -> Mode:
    """How the report's run was made."""
    agents = [agent for row in report.rows for agent in row.agents]
    if not any(agent.prepared_tokens for agent in agents):
        return Mode(report.method)
    exact = all(agent.method == "exact_prefix" for agent in agents)
    return Mode("exact+stream" if exact else f"{report.method}+stream")


def calibrated(cluster: SimulatedCluster, report: RunReport) -> SimulatedCluster:
    """The cluster with the rates of a report in which nothing was relayed or prepared.

    Raises:
        ConfigError: there was, or it measured too little.
    """
    agents = [agent for row in report.rows for agent in row.agents]
    if any(agent.relayed_tokens or agent.prepared_tokens for agent in agents):
        raise ConfigError("--calibrate needs a report of full_prefill: in this one something was reused.")
    rates = [a.decode_tokens_per_s for a in agents if a.decode_tokens_per_s]
    if not rates:
        raise ConfigError("--calibrate needs a report whose agents have decoded something.")
    device = Device.of(cluster.device, cluster.model)
    settings = cluster.device
    flops = sum(_prefill_flops(device, agent) for agent in agents)
    prefill_s = sum(agent.stages.prefill_s for agent in agents)
    alone_s = settings.step_fixed_s + settings.sequence_s
    flops_per_s = flops / max(prefill_s - alone_s * len(agents), 0.1 * prefill_s)
    context = sum(a.prompt_tokens + a.decode_tokens // 2 for a in agents) // len(agents)
    token_s = _median([1 / rate for rate in rates])
    fixed_s = token_s - settings.sequence_s - device.decode_flops(context) / flops_per_s
    calls = [a.stages.dispatch_s + a.stages.queue_s + a.stages.first_token_s for a in agents]
    rated = replace(
        settings,
        source=f"a report of {report.pipeline}, {report.method}, {report.created}; else {settings.source}",
        flops_per_s=flops_per_s,
        step_fixed_s=max(0.0, fixed_s),
        dispatch_s=_median(calls),
        publish_s=max(0.0, _median([_gap_s(row) for row in report.rows])),
    )
    return cluster.model_copy(update={"device": rated})


def _prefill_flops(device: Device, agent: AgentReport) -> float:
    return device.prefill_flops(agent.prefix_tokens, agent.prompt_tokens) + device.costs.head_flops


def _gap_s(row: RowReport) -> float:
    """Seconds from an agent's last token to the next one's request, where agents wait for each other."""
    spent = sum(a.ttft_s + (a.decode_tokens - 1) / (a.decode_tokens_per_s or 1e9) for a in row.agents)
    return (row.wall_s - spent) / len(row.agents)


def compare(cluster: SimulatedCluster, workload: Workload, report: RunReport) -> list[Compared]:
    """Every agent's time to first token and every row's wall time, measured and simulated.

    Raises:
        ConfigError: the workload does not have the report's agents, or its texts are longer than the prompts.
    """
    mode = mode_of(report)
    out: list[Compared] = []
    for number, row in enumerate(report.rows):
        simulation = Simulation(
            cluster,
            _as_reported(workload, row),
            mode,
            workers=report.cluster.workers,
            seed=0,
            lengths=lambda _, agent, row=row: row[agent].decode_tokens,
        )
        simulation.run()
        found = {answer.agent: answer for answer in simulation.answers}
        for agent in row.agents:
            out.append(Compared(number, agent.agent, "ttft", agent.ttft_s, found[agent.agent].ttft_s))
        walls = simulation.finished[0]
        out.append(Compared(number, "", "wall", row.wall_s, walls.ended - walls.began))
    return out


def _as_reported(workload: Workload, row: RowReport) -> Workload:
    """The workload with a row's lengths: an agent's fresh text is what its prompt has beside all it reads."""
    reported = {agent.agent: agent for agent in row.agents}
    if reported.keys() != workload.agents.keys():
        raise ConfigError(
            f'workload "{workload.name}" has the agents {", ".join(workload.agents)}, but the report has '
            f"{', '.join(reported)}. Name the workload of the report's pipeline."
        )
    agents = {}
    for name, agent in workload.agents.items():
        read = sum(reported[r].decode_tokens if r in reported else workload.inputs[r] for r in agent.reads)
        fresh = reported[name].prompt_tokens - agent.prefix_tokens - read
        if fresh < 1:
            raise ConfigError(
                f'agent "{name}" of workload "{workload.name}" has {agent.prefix_tokens + read} tokens of '
                f"prefix and texts, but the report's prompt has {reported[name].prompt_tokens}. "
                "Correct the lengths in the workload's file."
            )
        answer = reported[name].decode_tokens
        agents[name] = replace(agent, fresh_tokens=fresh, answer_tokens=max(1, answer))
    # One run after another, each with an input of its own, as `relay run` makes them.
    once = {"agents": agents, "least_runs": 1, "runs_per_worker": 1e-6, "answer_spread": 0.0}
    return workload.model_copy(update={**once, "arrivals": ArrivalSettings(kind="closed", per_worker=1e-6)})


def document(mode: Mode, found: Sequence[Compared], device: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values."""
    rows = [{**asdict(c), "error": c.error} for c in found]
    return {"schema": SCHEMA, "mode": mode.text, "device": dict(device), "rows": rows}


def table(mode: Mode, found: Sequence[Compared]) -> Table:
    """Measured beside simulated."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"method {mode.text}", title_justify="left")
    for name in ("row", "agent", "", "measured", "simulated", "error"):
        out.add_column(name, justify="left" if name in ("agent", "") else "right", no_wrap=True)
    for c in found:
        out.add_row(
            str(c.row + 1),
            c.agent or "whole run",
            c.what,
            f"{c.measured_s:.3f} s",
            f"{c.simulated_s:.3f} s",
            f"{c.error:+.0%}",
        )
    return out


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
