"""Pictures of a simulation's document, drawn from its JSON alone: modes side by side over the number of
workers. matplotlib draws to a file only; no window, no global state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#0f172a"
_FAINT = "#64748b"
_COLORS = ("#64748b", "#1d4ed8", "#f59e0b", "#0d9488", "#e11d48", "#a78bfa")

Row = Mapping[str, Any]
_PANELS: tuple[tuple[str, Callable[[Row], float], bool], ...] = (
    ("time to first token, p50, s", lambda r: r["ttft_s_p50"], True),
    ("time to first token, p99, s", lambda r: r["ttft_s_p99"], True),
    ("runs per second and worker", lambda r: r["runs_per_s"] / r["workers"], False),
    ("busiest directory shard, % of its time", lambda r: 100 * r["directory_use"][1], False),
    ("busiest port between nodes, % of its time", lambda r: 100 * r["link_use"]["remote"][1], False),
    (
        "fullest arena, % of its limit",
        lambda r: 100 * r["arena_bytes_highest"] / r["arena_bytes_limit"],
        False,
    ),
)


def plot_document(found: Mapping[str, Any], path: Path) -> None:
    """Draw a document of `relay simulate` into a picture; the file's ending says of which kind."""
    figure = Figure(figsize=(12.5, 6.6), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rows: Sequence[Row] = found["rows"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for axes, (title, value, logarithmic) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for color, mode in zip(_COLORS * len(modes), modes, strict=False):
            points = [(row["workers"], value(row)) for row in rows if row["mode"] == mode]
            axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=mode)
        _dress(axes, title, sorted({row["workers"] for row in rows}), logarithmic=logarithmic)
        if axes.get_subplotspec().is_first_col() and axes.get_subplotspec().is_first_row():
            axes.legend(fontsize=8, frameon=False)
    workload, cluster = found["workload"], found["cluster"]
    figure.suptitle(f"{workload['name']} on {cluster['name']}, simulated", x=0.01, ha="left", color=_INK)
    note = (
        f"{cluster['model']['name']}; {cluster['directory']['shards']} directory shards; seed {found['seed']}"
    )
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _dress(axes: Axes, title: str, counts: Sequence[int], *, logarithmic: bool) -> None:
    axes.set_title(title, fontsize=9, loc="left", color=_INK)
    axes.set_xlabel("workers", fontsize=8, color=_FAINT)
    if len(counts) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(counts), [f"{n:,}" for n in counts])
    axes.minorticks_off()
    if logarithmic:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8, colors=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)
