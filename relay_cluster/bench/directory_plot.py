"""The picture of `relay bench directory`, drawn from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1d4ed8", "#f59e0b", "#0d9488", "#a78bfa", "#e11d48", "#38bdf8", "#84cc16", "#9a3412")


def draw_directory(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Left: keys per second of all clients together; right: median and 99th percentile of a call."""
    shown = [row for row in rows if row["op"] != "list"]  # one call of everything: no size to compare
    ops = list(dict.fromkeys(row["op"] for row in shown))
    left, right = figure.subplots(1, 2)
    for axes, key, title in ((left, "keys_per_s", "keys per second"), (right, "p50_ms", "ms per call")):
        for n, op in enumerate(ops):
            found = sorted((r for r in shown if r["op"] == op), key=lambda r: r["batch"])
            x, y = [r["batch"] for r in found], [r[key] for r in found]
            axes.plot(x, y, color=_COLORS[n % len(_COLORS)], marker="o", markersize=4, label=op)
            if key == "p50_ms":
                tail = [r["p99_ms"] for r in found]
                axes.plot(x, tail, color=_COLORS[n % len(_COLORS)], marker="_", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(
            "keys per call" + (" (dotted: 99th percentile)" if key == "p50_ms" else ""), fontsize=9
        )
        axes.set_ylabel(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        sizes = sorted({r["batch"] for r in shown})
        axes.set_xticks(sizes, [str(s) for s in sizes])
    left.legend(fontsize=8, frameon=False)
