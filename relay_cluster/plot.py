"""A picture of a run: time to first token beside the compared method's, and what the reuse cost in fidelity.

With several rows, bars are medians over the rows. matplotlib draws to a file only; no window, no global
state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from relay_cluster.report import AgentReport, GateReport, RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dispatch, queue": ("#cbd5e1", ("dispatch_s", "queue_s")),
    "lookup, lease": ("#a78bfa", ("lookup_s", "lease_s")),
    "pull": ("#38bdf8", ("pull_s",)),
    "rotate": ("#34d399", ("rotate_s",)),
    "rectify": ("#f59e0b", ("rectify_s",)),
    "fresh prefill": ("#1d4ed8", ("prefill_s",)),
    "first token": ("#0f172a", ("first_token_s",)),
}
_BASE = "#9ca3af"
_INK = "#0f172a"
_FAINT = "#64748b"


@dataclass(frozen=True, slots=True)
class _Bar:
    """What is drawn for one agent."""

    agent: str
    ttft_s: float
    base_s: float | None
    speedup: float | None
    parts_s: dict[str, float]
    reuse: float | None
    top1: float | None
    kl: float | None
    gate: str


def plot_report(report: RunReport, path: Path) -> None:
    """Draw a report into a PNG file."""
    bars = _bars(report)
    figure = Figure(figsize=(11.5, 2.4 + 0.95 * len(bars)), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(2.3, 1.0))
    base = next((a.compare.method for row in report.rows for a in row.agents if a.compare), None)
    _draw_times(left, bars, base)
    _draw_fidelity(right, bars)
    rows = f", median of {len(report.rows)} rows" if len(report.rows) > 1 else ""
    title = f"{report.pipeline}: time to first token, {report.method}"
    figure.suptitle(
        f"{title} against {base}{rows}" if base else title + rows, x=0.01, ha="left", fontsize=13, color=_INK
    )
    machine = report.machine
    models = sorted({a.model.rstrip("/").rsplit("/", 1)[-1] for row in report.rows for a in row.agents})
    gpus = ", ".join(machine.gpus) or "no GPU"
    note = (
        f"{', '.join(models)} on {report.cluster.workers} workers over {report.cluster.backend}; "
        f"{machine.cpu}, {machine.cores} cores, {gpus}; {report.created}"
    )
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _bars(report: RunReport) -> list[_Bar]:
    names = list(dict.fromkeys(agent.agent for row in report.rows for agent in row.agents))
    return [
        _bar(name, [agent for row in report.rows for agent in row.agents if agent.agent == name])
        for name in names
    ]


def _bar(name: str, agents: Sequence[AgentReport]) -> _Bar:
    """Medians over rows; stages are scaled so that together they are the median time to first token."""

    def middle(pick: Callable[[AgentReport], float | None]) -> float | None:
        values = [value for agent in agents if (value := pick(agent)) is not None]
        return median(values) if values else None

    ttft = middle(lambda a: a.compare.ttft_s if a.compare else a.ttft_s) or 0.0
    raw = {
        group: median(sum(getattr(agent.stages, stage) for stage in stages) for agent in agents)
        for group, (_, stages) in _GROUPS.items()
    }
    total = sum(raw.values())
    return _Bar(
        agent=name,
        ttft_s=ttft,
        base_s=middle(lambda a: a.compare.base_ttft_s if a.compare else None),
        speedup=middle(lambda a: a.compare.speedup if a.compare else None),
        parts_s={group: value * ttft / total for group, value in raw.items()}
        if total
        else {"fresh prefill": ttft},
        reuse=middle(lambda a: a.reuse),
        top1=middle(lambda a: a.compare.top1 if a.compare else None),
        kl=middle(lambda a: a.compare.kl_mean if a.compare else None),
        gate=_gate_words(agents[-1].gate),
    )


def _gate_words(gate: GateReport | None) -> str:
    """The state of an agent's edge after its last request, if a gate watches it."""
    if gate is None or len(gate.ladder) == 1:
        return ""
    where = f"gate: {gate.ladder[gate.next_rung]} ({gate.next_rung + 1} of {len(gate.ladder)})"
    return where + (f", demoted {gate.falls}x" if gate.falls else "")


def _draw_times(axes: Axes, bars: Sequence[_Bar], base: str | None) -> None:
    offset, height = (0.2, 0.34) if base else (0.0, 0.5)
    longest = max((max(bar.ttft_s, bar.base_s or 0.0) for bar in bars), default=0.0) or 1.0
    for y, bar in enumerate(bars):
        start = 0.0
        for group, seconds in bar.parts_s.items():
            axes.barh(y - offset, seconds, height, left=start, color=_GROUPS[group][0], linewidth=0)
            start += seconds
        label = f" {_time(bar.ttft_s)}"
        axes.text(start, y - offset, label, va="center", fontsize=9, color=_INK)
        if bar.base_s is not None:
            axes.barh(y + offset, bar.base_s, height, color=_BASE, linewidth=0)
            axes.text(bar.base_s, y + offset, f" {_time(bar.base_s)}", va="center", fontsize=9, color=_FAINT)
        if bar.speedup is not None:
            x = start + 0.13 * longest
            text = f"{bar.speedup:.1f}x"
            color = "#047857" if bar.speedup >= 1.2 else _FAINT
            axes.text(x, y - offset, text, va="center", fontsize=12, fontweight="bold", color=color)
    shown = [group for group in _GROUPS if any(bar.parts_s.get(group, 0.0) > 0.002 * longest for bar in bars)]
    handles = [Patch(color=_GROUPS[group][0], label=group) for group in shown]
    if base:
        handles.append(Patch(color=_BASE, label=base))
    axes.legend(
        handles=handles,
        ncols=min(len(handles), 5),
        fontsize=8,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
    )
    axes.set_yticks(range(len(bars)), [bar.agent for bar in bars], fontsize=10)
    axes.set_xlim(0, longest * 1.14)
    axes.set_xlabel("seconds to first token", fontsize=9, color=_FAINT)
    _tidy(axes, len(bars))


def _draw_fidelity(axes: Axes, bars: Sequence[_Bar]) -> None:
    for y, bar in enumerate(bars):
        if bar.reuse is not None:
            axes.barh(y - 0.2, bar.reuse, 0.34, color="#0d9488", linewidth=0)
            _inside(axes, bar.reuse, y - 0.2, f"reuse {bar.reuse:.2f}")
        else:
            axes.text(0.02, y - 0.2, "nothing to reuse", va="center", fontsize=9, color=_FAINT)
        if bar.top1 is not None:
            axes.barh(y + 0.2, bar.top1, 0.34, color="#6366f1", linewidth=0)
            kl = "" if bar.kl is None else f", KL {bar.kl:.4f}"
            _inside(axes, bar.top1, y + 0.2, f"top-1 {bar.top1:.2f}{kl}")
        if bar.gate:
            axes.text(0.02, y + 0.45, bar.gate, va="center", fontsize=8, color=_FAINT)
    axes.set_xlim(0, 1)
    axes.set_yticks([])
    axes.set_xlabel("share reused; agreement with the exact answer", fontsize=9, color=_FAINT)
    _tidy(axes, len(bars))


def _inside(axes: Axes, length: float, y: float, text: str) -> None:
    """A label in its bar, or behind it where the bar is too short."""
    fits = length > 0.6
    x = 0.02 if fits else length + 0.02
    axes.text(x, y, text, va="center", fontsize=9, color="white" if fits else _INK)


def _tidy(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.5, -0.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#cbd5e1")
    axes.tick_params(axis="both", length=0, colors=_INK)
    axes.tick_params(axis="x", labelsize=8, colors=_FAINT)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
