"""What people see in the terminal: progress of a run, tables when it is done, errors on one screen.

This module does not know how a run works; it is fed with events and with a `RunReport`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from relay_cluster.report import AgentReport, GateReport, RowReport, RunReport, Stages

MAX_ERROR_LINES = 20
"""Longer errors are cut, so that the first fault stays on the screen."""

_STAGES = {
    "dispatch_s": "dispatch",
    "queue_s": "queue",
    "lookup_s": "lookup",
    "lease_s": "lease",
    "pull_s": "pull",
    "rotate_s": "rotate",
    "rectify_s": "rectify",
    "prefill_s": "prefill",
    "first_token_s": "1st token",
}


def output() -> Console:
    """Standard output. Where that is not a terminal, lines are long enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 120))


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


def show_error(text: str) -> None:
    """An error on one screen."""
    lines = text.strip().splitlines() or ["unknown error"]
    console = errors()
    console.print(Text("error: ", style="bold red") + Text(lines[0]), soft_wrap=True)
    for line in lines[1:MAX_ERROR_LINES]:
        console.print(Text(line), soft_wrap=True)
    if len(lines) > MAX_ERROR_LINES:
        console.print(Text(f"... and {len(lines) - MAX_ERROR_LINES} more lines"), style="dim")


# --- progress -----------------------------------------------------------------------------------------------


class StepProgress:
    """Shows how parts of a whole come along: in a terminal one live line per part, elsewhere one printed line
    per step. Called with (part, or "" for the whole, what happens)."""

    def __init__(self, whole: str, console: Console | None = None) -> None:
        self._whole = whole
        self._console = console or errors()
        self._live = self._console.is_terminal
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]\N{CHECK MARK}"),
            TextColumn("[bold]{task.description}"),
            TextColumn("[dim]{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StepProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, part: str, text: str) -> None:
        """A part of the whole has come to its next step."""
        if not self._live:
            self._console.print(Text(f"{part} {text}".strip()), soft_wrap=True)
            return
        name = part or self._whole
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(escape(name), total=None, status="")
        self._progress.update(self._tasks[name], status=escape(text))


class RunProgress:
    """Shows the events of a run: in a terminal one live line per agent, elsewhere one printed line per step.

    Events are calls: ("cluster", text), ("agent_started", agent, worker), ("token", agent, n),
    ("agent_done", agent), ("shadow", agent, method), ("compare", agent, text). They may come from any
    thread; unknown ones are ignored.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or errors()
        self._live = self._console.is_terminal
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]\N{CHECK MARK}"),
            TextColumn("{task.description}"),
            TextColumn("[dim]{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._lock = threading.Lock()
        self._steps: dict[str, Callable[..., None]] = {
            "cluster": self._on_cluster,
            "agent_started": self._on_agent_started,
            "token": self._on_token,
            "agent_done": self._on_agent_done,
            "shadow": self._on_shadow,
            "compare": self._on_compare,
        }

    def __enter__(self) -> RunProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, *event: Any) -> None:
        """Take one event: its name and its details."""
        name, *details = event
        step = self._steps.get(name)
        if step is not None:
            with self._lock:
                step(*details)

    def start_row(self, index: int, total: int) -> None:
        """Begin with the next set of inputs."""
        with self._lock:
            for task in self._tasks.values():
                self._progress.remove_task(task)
            self._tasks.clear()
            if total > 1:
                self._say(f"row {index + 1} of {total}")

    def _say(self, text: str) -> None:
        if self._live:
            self._progress.console.print(Text(text, style="dim"))
        else:
            self._console.print(Text(text), soft_wrap=True)

    def _task(self, key: str, description: str) -> TaskID:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(description, total=None, status="")
        return self._tasks[key]

    def _on_cluster(self, text: str) -> None:
        self._say(text)

    def _on_agent_started(self, agent: str, worker: str) -> None:
        self._task(agent, f"[bold]{escape(agent)}[/] on {escape(worker)}")
        if not self._live:
            self._say(f"{agent} started on {worker}")

    def _on_token(self, agent: str, count: int) -> None:
        self._progress.update(self._task(agent, agent), status=f"{count} tokens")

    def _on_agent_done(self, agent: str) -> None:
        self._progress.update(self._task(agent, agent), total=1, completed=1)
        if not self._live:
            self._say(f"{agent} done")

    def _on_shadow(self, agent: str, method: str) -> None:
        if self._live:
            self._progress.update(self._task(agent, agent), status=f"shadow check of {method}")
        else:
            self._say(f"{agent}: shadow check of {method}")

    def _on_compare(self, agent: str, text: str) -> None:
        self._progress.update(self._task(agent, agent), total=None, status=text)
        if not self._live:
            self._say(f"{agent}: {text}")


@contextmanager
def fraction_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """A progress bar fed with a fraction (0 to 1) and a line of text."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=errors(),
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task(title, total=1.0)

        def update(fraction: float, text: str = "") -> None:
            progress.update(task, completed=fraction, description=text or title)

        yield update


# --- report -------------------------------------------------------------------------------------------------


def show_report(report: RunReport, console: Console | None = None) -> None:
    """Tables of a whole run, its fallbacks in words, and the last answer."""
    console = console or output()
    for index, row in enumerate(report.rows):
        part = f", row {index + 1} of {len(report.rows)}" if len(report.rows) > 1 else ""
        console.print()
        console.print(
            f"[bold]{escape(report.pipeline)}[/], method {escape(report.method)}{part}, {row.wall_s:.1f} s"
        )
        console.print(row_table(row, wide=console.width >= 112))
        for line in [*method_lines(row), *skipped_lines(row)]:
            console.print(Text(line, style="dim"), soft_wrap=True)
        console.print(stage_table(row))
        if (gates := gate_table(row)) is not None:
            console.print(gates)
        for line in fallback_lines(row):
            console.print(Text(line, style="yellow" if line != _NO_FALLBACKS else "dim"), soft_wrap=True)
        last = row.agents[-1]
        title = f"{escape(last.agent)} ({last.decode_tokens} tokens, {escape(last.finish_reason)})"
        text = Text(last.text.strip() or "(empty)")
        console.print(Panel(text, title=title, title_align="left", box=box.ROUNDED, border_style="dim"))
    console.print(Text(_setting(report), style="dim"), soft_wrap=True)
    for note in report.cluster.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)


def method_lines(row: RowReport) -> list[str]:
    """What each method that was asked for came to on the workers, where the two texts differ."""
    found: dict[tuple[str, str], list[str]] = {}
    for agent in row.agents:
        if agent.resolved_method not in ("", agent.method):
            found.setdefault((agent.method, agent.resolved_method), []).append(agent.agent)
    return [f"{asked} = {text} ({', '.join(names)})" for (asked, text), names in found.items()]


def skipped_lines(row: RowReport) -> list[str]:
    """Spans that were computed because a pull was predicted to take longer; no fallbacks."""
    return [
        f"{agent.agent}: {cost.tokens} tokens of slot {cost.slot} computed in place of a pull "
        f"({_seconds(cost.predicted_prefill_s or 0)} predicted, not {_seconds(cost.predicted_relay_s or 0)})"
        for agent in row.agents
        for cost in agent.span_costs
        if not cost.relayed
    ]


def _setting(report: RunReport) -> str:
    """What it was measured on, in one line."""
    machine, cluster = report.machine, report.cluster
    parts = [
        f"{cluster.workers} workers on {cluster.nodes} node(s) over {cluster.backend}",
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_gib:.0f} GiB",
        ", ".join(machine.gpus) or "no GPU",
        f"torch {machine.torch}",
    ]
    return "; ".join(parts)


def row_table(row: RowReport, *, wide: bool = True) -> Table:
    """One line per agent: what was reused, how fast, and what it cost in fidelity."""
    base = next((agent.compare.method for agent in row.agents if agent.compare), None)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1 if wide else 0, 0, 0), pad_edge=False)
    table.add_column("agent", style="bold", no_wrap=True)
    table.add_column("worker", no_wrap=True)
    ahead = any(agent.ahead for agent in row.agents)
    for name in ("prompt", *(("prepared",) if ahead else ()), "relayed", "reuse", "TTFT"):
        table.add_column(name, justify="right", no_wrap=True)
    if base:
        for name in (base.replace("_", " "), "speed-up", "top-1", "KL"):
            table.add_column(name, justify="right", no_wrap=name != base.replace("_", " "))
    table.add_column("pulled", justify="right", no_wrap=True)
    table.add_column("tok/s", justify="right", no_wrap=True)
    for agent in row.agents:
        table.add_row(*_agent_cells(agent, compare=base is not None, ahead=ahead, wide=wide))
    return table


def _agent_cells(agent: AgentReport, *, compare: bool, ahead: bool, wide: bool) -> list[str | Text]:
    other = agent.compare
    ttft = other.ttft_s if other else agent.ttft_s
    cells: list[str | Text] = [
        escape(agent.agent),
        escape(agent.worker),
        str(agent.prompt_tokens),
        *((str(agent.prepared_tokens),) if ahead else ()),
        str(agent.relayed_tokens),
        "-" if agent.reuse is None else f"{agent.reuse:.2f}",
        _seconds(ttft),
    ]
    if compare and other:
        style = "green" if other.speedup >= 2 else ""
        cells += [
            _seconds(other.base_ttft_s),
            Text(f"{other.speedup:.1f}x", style=style),
            "-" if other.top1 is None else f"{other.top1:.2f}",
            "-" if other.kl_mean is None else f"{other.kl_mean:.4f}",
        ]
    elif compare:
        cells += ["-"] * 4
    rate = agent.decode_tokens_per_s
    return [*cells, _pulled(agent, " " if wide else "\n"), "-" if rate is None else f"{rate:.1f}"]


def _pulled(agent: AgentReport, gap: str) -> str:
    """ "54 MB @ 1.4 GB/s nixl"; `gap` is a line break where there is little room."""
    done = [transfer for transfer in agent.transfers if transfer.outcome == "pulled" and transfer.bytes]
    if not done:
        return "-"
    nbytes = sum(transfer.bytes for transfer in done)
    seconds = done[0].seconds
    if len(done) > 1:  # they travel side by side, so their times must not be added up
        seconds = max(agent.stages.pull_s + agent.pull_hidden_s, *(t.seconds for t in done))
    backends = "+".join(sorted({transfer.backend for transfer in done}))
    rate = f"{gap}@ {nbytes / seconds / 1e9:.1f} GB/s" if seconds > 0 else ""
    size = f"{nbytes / 1e6:.0f}" if nbytes >= 1e7 else f"{nbytes / 1e6:.1f}"
    return f"{size} MB{rate} {backends}"


def stage_table(row: RowReport) -> Table:
    """Where each agent's time to first token went, in milliseconds, without stages that took none."""
    spent = [key for key in _STAGES if any(_stage(agent.stages, key) >= 5e-5 for agent in row.agents)]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("ms to first token", style="bold", no_wrap=True)
    for key in spent:
        table.add_column(_STAGES[key], justify="right", no_wrap=True)
    table.add_column("TTFT", justify="right", no_wrap=True)
    hidden = any(agent.pull_hidden_s >= 5e-4 for agent in row.agents)
    if hidden:
        table.add_column("(pull behind it)", justify="right", no_wrap=True)
    for agent in row.agents:
        cells = [_milliseconds(_stage(agent.stages, key)) for key in spent]
        behind = [_milliseconds(agent.pull_hidden_s)] if hidden else []
        table.add_row(escape(agent.agent), *cells, _milliseconds(agent.ttft_s), *behind)
    return table


def gate_table(row: RowReport) -> Table | None:
    """What the quality gate saw and decided, one line per edge; None without a gate."""
    if all(agent.gate is None for agent in row.agents):
        return None
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("quality gate", style="bold", overflow="fold")
    table.add_column("method", overflow="fold")
    for name in ("KL", "top-1", "1 - cos V", "checks"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("next request", overflow="fold")
    for agent in row.agents:
        if agent.gate is not None:
            table.add_row(*_gate_cells(agent.gate))
    return table


def _gate_cells(gate: GateReport) -> list[str | Text]:
    used, following = gate.ladder[gate.rung], gate.ladder[gate.next_rung]
    if gate.judged and gate.judged != used:
        used = f"{used} (probe: {gate.judged})"
    moved = gate.next_rung - gate.rung
    style = "yellow" if moved > 0 else "green" if moved < 0 else "dim"
    why = f" ({gate.reason})" if gate.reason else ""
    skipped = f" + {gate.skipped} without a verdict" if gate.skipped else ""
    return [
        escape(gate.edge),
        escape(used),
        "-" if gate.kl_mean is None else f"{gate.kl_mean:.4f}",
        "-" if gate.top1 is None else f"{gate.top1:.2f}",
        "-" if gate.value_error is None else f"{gate.value_error:.4f}",
        f"{gate.checks}{skipped}",
        Text(f"{following}{why}", style=style),
    ]


_NO_FALLBACKS = "no fallbacks"


def fallback_lines(row: RowReport) -> Sequence[str]:
    """Plain sentences about what was computed although it should have been reused."""
    lines: list[str] = []
    for agent in row.agents:
        for fallback in agent.fallbacks:
            tokens = f"{fallback.tokens} tokens of " if fallback.tokens else ""
            detail = f" ({fallback.detail})" if fallback.detail else ""
            lines.append(
                f'"{agent.agent}" computed {tokens}{{{fallback.slot}}} itself: {fallback.reason}{detail}'
            )
        if agent.retries:
            times = "once" if agent.retries == 1 else f"{agent.retries} times"
            lines.append(f'"{agent.agent}" was started again {times} because its worker died')
        lines.extend(f'"{agent.agent}": {note}' for note in agent.notes)
    return lines or [_NO_FALLBACKS]


def _stage(stages: Stages, key: str) -> float:
    return float(getattr(stages, key))


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.1f}" if value < 0.1 else f"{value * 1e3:.0f}"
