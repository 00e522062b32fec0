"""A picture of a profiler run: deviation by layer, rank correlation between layers, error against FLOPs.

Same look as `plot.py`. matplotlib draws to a file only; no window, no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from workers.profiler import ProfileResult
    from workers.profiling.choose import Errors, Row, Rule

_INK = "#0f172a"
_FAINT = "#64748b"
_LINE = "#cbd5e1"
_CURVES = {"values": "#1d4ed8", "keys": "#f59e0b", "layer inputs": "#34d399"}
_FAMILIES = {
    "context_mass": "#1d4ed8",
    "relay_caching": "#f59e0b",
    "epic": "#0d9488",
    "cacheblend": "#a78bfa",
    "naive": "#9ca3af",
}
_OTHER = "#db2777"
_PRESETS: dict[Literal["fast", "balanced"], str] = {"fast": "#db2777", "balanced": "#047857"}
_FLOOR = 1e-5


def plot_profile(result: ProfileResult, rule: Rule, path: Path) -> None:
    """Draw a profile into a PNG file."""
    figure = Figure(figsize=(13, 9.6), dpi=140, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    (curves, correlation), (single, composite) = figure.subplots(2, 2)
    _draw_curves(curves, result)
    _draw_correlation(correlation, result)
    _draw_errors(single, result, rule, "single")
    _draw_errors(composite, result, rule, "composite")
    c, name = result.curves, result.profile.model.rstrip("/").rsplit("/", 1)[-1]
    figure.suptitle(f"{name}: how its KV tolerates reuse", x=0.01, ha="left", fontsize=14, color=_INK)
    top, first = c.top_share, c.first_ratio
    note = (
        f"{c.spans} relayed spans, {c.tokens} tokens. The {min(top):.0%} most deviating tokens hold "
        f"{top[min(top)]:.0%} of the value deviation; a span's first 16 tokens deviate {first[16]:.1f}x its "
        f"mean, its last 32 {c.last_ratio:.1f}x.\nRank correlation of a token's deviation with its context "
        f"mass: {c.mass_correlation_mean:.2f}; with its closeness to the span's start: "
        f"{c.position_correlation_mean:.2f}."
    )
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_curves(axes: Axes, result: ProfileResult) -> None:
    c, profile = result.curves, result.profile
    axes.axvspan(profile.checkpoint_layer, profile.end_layer, color="#eff6ff", linewidth=0)
    for (name, color), values in zip(_CURVES.items(), (c.value, c.key, c.hidden), strict=True):
        axes.plot(range(len(values)), values, color=color, linewidth=2, marker="o", markersize=3, label=name)
    if c.value_composite:
        axes.plot(
            range(len(c.value_composite)),
            c.value_composite,
            color=_CURVES["values"],
            linewidth=1,
            linestyle=(0, (2, 2)),
            label="values, several spans",
        )
    marks = (
        (profile.checkpoint_layer, "checkpoint"),
        (profile.detection_layer, "detection"),
        (profile.end_layer, "end"),
    )
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * 1.12)
    for step, (layer, name) in enumerate(marks):
        axes.axvline(layer, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        height = top * (1.06 - 0.055 * step)
        axes.text(layer + 0.25, height, f"{name} {layer}", fontsize=8, color=_FAINT, va="center")
    axes.set_xlabel("layer", fontsize=9, color=_FAINT)
    axes.set_ylabel("mean 1 - cos", fontsize=9, color=_FAINT)
    _title(axes, "Deviation of decode KV from full prefill's")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.33, 1.0), frameon=False)
    _tidy(axes)


def _draw_correlation(axes: Axes, result: ProfileResult) -> None:
    matrix = result.curves.correlation
    image = axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    profile = result.profile
    axes.axhline(profile.detection_layer, color=_PRESETS["fast"], linewidth=1)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0, colors=_FAINT)
    axes.set_xlabel("layer", fontsize=9, color=_FAINT)
    axes.set_ylabel("layer", fontsize=9, color=_FAINT)
    mean = f"{result.picks.correlation:.2f} at layer {profile.detection_layer}"
    _title(axes, f"Rank correlation between layers ({mean})")
    _tidy(axes)


def _draw_errors(axes: Axes, result: ProfileResult, rule: Rule, kind: Literal["single", "composite"]) -> None:
    target = rule.target_single if kind == "single" else rule.target_composite
    title = "one relayed span" if kind == "single" else "several relayed spans"
    _title(axes, f"Error against cost, {title}")
    _tidy(axes)
    points = [(row, errors) for row in result.rows if (errors := _errors(row, kind)) is not None]
    if not points:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", fontsize=11, color=_FAINT)
        axes.set(xticks=[], yticks=[])
        return
    for family in dict.fromkeys(_family(row) for row, _ in points):
        xs = [e.flops for row, e in points if _family(row) == family]
        ys = [max(e.kl_mean, _FLOOR) for row, e in points if _family(row) == family]
        axes.scatter(
            xs, ys, s=36, color=_FAMILIES.get(family, _OTHER), label=family, linewidths=0, alpha=0.85
        )
    axes.set_yscale("log")
    for axis_set in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_set(FuncFormatter(_short))
    axes.margins(x=0.09, y=0.08)
    axes.axhline(target, color=_PRESETS["balanced"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"target {target:g}",
        (1, target),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        fontsize=8,
        color=_PRESETS["balanced"],
        ha="right",
    )
    chosen = result.picks.chosen
    _draw_preset(axes, "fast", _errors(chosen.fast.row, kind), (9, 9))
    _draw_preset(axes, "balanced", _errors(chosen.balanced.row, kind), (9, -14))
    axes.set_xlabel("FLOPs, share of full prefill", fontsize=9, color=_FAINT)
    axes.set_ylabel("mean KL from full prefill, nats per token", fontsize=9, color=_FAINT)
    axes.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
    axes.grid(axis="y", color="#f1f5f9", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_preset(
    axes: Axes, name: Literal["fast", "balanced"], errors: Errors | None, offset: tuple[int, int]
) -> None:
    if errors is None:
        return
    at = (errors.flops, max(errors.kl_mean, _FLOOR))
    color = _PRESETS[name]
    axes.scatter(*at, s=130, facecolors="none", edgecolors=color, linewidths=2)
    axes.annotate(
        name, at, xytext=offset, textcoords="offset points", fontsize=10, fontweight="bold", color=color
    )


def _errors(row: Row, kind: Literal["single", "composite"]) -> Errors | None:
    return row.single if kind == "single" else row.composite


def _family(row: Row) -> str:
    return row.text.partition(":")[0]


def _short(value: float, _place: object = None) -> str:
    """Tick labels of a logarithmic axis: 1, 2 and 5 of every decade."""
    first = f"{value:e}"[0]
    return f"{value:g}" if first in "125" else ""


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=_INK, pad=8)


def _tidy(axes: Axes, hidden: Sequence[str] = ("top", "right")) -> None:
    axes.spines[list(hidden)].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(axis="both", which="both", length=0, labelsize=8, colors=_FAINT)
