"""The picture of `relay bench serve`, drawn from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {True: "#1d4ed8", False: "#f59e0b"}
_NAMES = {True: "relay on", False: "relay off"}


def draw_serve(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Left: time to first token by agent and concurrency; right: throughput."""
    load = [row for row in rows if row["part"] == "pipelines"]
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1.0))
    _ttft(left, [row for row in load if row["what"] != "all" and row["ttft_s_p50"] is not None])
    whole = [row for row in load if row["what"] == "all" and row["throughput_rps"] is not None]
    for relay in (True, False):
        found = sorted((r for r in whole if r["relay"] is relay), key=lambda r: r["concurrency"])
        x, y = [str(r["concurrency"]) for r in found], [r["throughput_rps"] for r in found]
        right.plot(x, y, color=_COLORS[relay], marker="o", label=_NAMES[relay])
    right.set_ylim(bottom=0)
    right.set_xlabel("pipelines at once", fontsize=9)
    right.set_ylabel("answers per second", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, frameon=False)


def _ttft(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    groups = list(dict.fromkeys((row["concurrency"], row["what"]) for row in rows))
    for number, relay in enumerate((True, False)):
        found = {(r["concurrency"], r["what"]): r for r in rows if r["relay"] is relay}
        shown = [(at, found[group]) for at, group in enumerate(groups) if group in found]
        x = [at + 0.4 * number - 0.2 for at, _ in shown]
        axes.bar(x, [r["ttft_s_p50"] for _, r in shown], 0.38, color=_COLORS[relay], label=_NAMES[relay])
        axes.plot(x, [r["ttft_s_p95"] for _, r in shown], "_", color="#0f172a", markersize=10)
    axes.set_xticks(range(len(groups)), [f"{what}\n{at} at once" for at, what in groups])
    axes.set_ylabel("seconds to first token: median (bar), 95th percentile (line)", fontsize=9)
