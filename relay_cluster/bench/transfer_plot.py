"""The picture of `relay bench transfer`, drawn from its JSON alone: rates by size, a panel for each path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLORS: Final = {"shm": "#7c3aed", "nixl": "#1d4ed8", "ucx": "#0d9488", "tcp": "#f59e0b"}
_INK: Final = "#0f172a"
_FAINT: Final = "#64748b"
_PATHS: Final = {"shm": "shared memory of one machine", "tcp": "TCP over loopback"}


def plot_transfer(document: Mapping[str, Any], path: Path) -> None:
    """Draw a document into a PNG file."""
    rows = document["rows"]
    paths = [name for name in _PATHS if any(row["path"] == name for row in rows)]
    figure = Figure(figsize=(5.8 * max(1, len(paths)), 5.0), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, max(1, len(paths)), squeeze=False)[0]
    for axes, name in zip(panels, paths, strict=False):
        _panel(axes, [row for row in rows if row["path"] == name], _PATHS[name])
    settings, machine = document["settings"], document["machine"]
    figure.suptitle("Moving blocks between two processes", x=0.01, ha="left", fontsize=13, color=_INK)
    note = f"{machine.get('cpu')}, {machine.get('cores')} cores; {settings.get('created')}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _panel(axes: Axes, rows: list[Mapping[str, Any]], title: str) -> None:
    """Solid: whole pulls, verified; dashed: the read alone; grey: the machine itself."""
    for backend, color in _COLORS.items():
        for verified, style in ((True, "-"), (False, "--")):
            found = [r for r in rows if r["backend"] == backend and r["verified"] is verified]
            if found:
                axes.plot(
                    [r["size_bytes"] for r in found],
                    [r["gb_s"] for r in found],
                    color=color,
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    label=backend if verified else f"{backend}, read only",
                )
    sizes = sorted({r["size_bytes"] for r in rows})
    best = [max(r["baseline_gb_s"] for r in rows if r["size_bytes"] == size) for size in sizes]
    axes.plot(sizes, best, color=_FAINT, linestyle=":", marker="s", markersize=4, label=rows[0]["baseline"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [_size(n) for n in sizes])
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.set_ylabel("GB/s", fontsize=9, color=_FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=_FAINT, length=0)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def _size(nbytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if nbytes >= unit:
            return f"{nbytes / unit:g} {name}"
    return f"{nbytes} B"
