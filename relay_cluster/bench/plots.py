"""Pictures of a benchmark's document, drawn from its JSON alone, so that an old result can be drawn again.

    ttft, chain   speed-up of every method by shape or agent, and its price: mean KL over 32 tokens
    chain_stream  the last agent's time to first token and the whole pipeline's, by mode
    fidelity      KL of the first token and over 32 tokens, singles and composites apart
    decay         speed-up over the queries, with the warm peak
    directory     keys per second and the time of a call, by kind and size of call
    serve         time to first token by agent and load, and throughput

matplotlib draws to a file only; no window, no global state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from relay_cluster.bench.chain_stream_plot import draw_chain_stream
from relay_cluster.bench.directory_plot import draw_directory
from relay_cluster.bench.serve_plot import draw_serve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#0f172a"
_FAINT = "#64748b"
_COLORS = (
    *("#1d4ed8", "#f59e0b", "#0d9488", "#a78bfa", "#e11d48", "#38bdf8", "#84cc16", "#9a3412", "#334155"),
    *("#db2777", "#facc15", "#22c55e"),
)
_BASES = ("full_prefill", "transformers")
_LEAST_KL = 1e-6
"""Smaller distances are rounding: such a method is exact, and a logarithmic axis has no place for it."""

Rows = Sequence[Mapping[str, Any]]


def plot_document(document: Mapping[str, Any], path: Path) -> None:
    """Draw a document into a PNG file."""
    name = str(document["schema"]).split(".")[2].partition("/")[0]
    figure = Figure(figsize=(12.5, 5.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    _DRAW[name](figure, document["rows"])
    settings, machine = document["settings"], document["machine"]
    figure.suptitle(_TITLES[name], x=0.01, ha="left", fontsize=13, color=_INK)
    gpus = ", ".join(machine.get("gpus", [])) or "no GPU"
    note = (
        f"{settings.get('model')}, data {', '.join(settings.get('data', []))}, seed {settings.get('seed')}; "
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {gpus}; {settings.get('created')}"
    )
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=_FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _label(row: Mapping[str, Any]) -> str:
    """Presets by name; other methods with their parameters where two rows would be called alike."""
    return str(row["method"])


def _labels(rows: Rows) -> list[str]:
    """A name for every row, unique among rows of different methods."""
    params: dict[str, set[str]] = {}
    for row in rows:
        params.setdefault(_label(row), set()).add(row["params"])
    return [f"{_label(r)}:{r['params']}" if len(params[_label(r)]) > 1 else _label(r) for r in rows]


def _series(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for label, row in zip(_labels(rows), rows, strict=True):
        out.setdefault(label, []).append(row)
    return out


def _draw_timing(figure: Figure, rows: Rows) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1.0))
    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    series = {k: v for k, v in _series(rows).items() if k != "full_prefill"}
    width = 0.84 / max(1, len(series))
    for n, (label, found) in enumerate(series.items()):
        color = _COLORS[n % len(_COLORS)]
        at = [shapes.index(_shape(r)) - 0.42 + (n + 0.5) * width for r in found]
        left.bar(at, [r["speedup"] for r in found], width * 0.92, color=color, label=label, linewidth=0)
        bounds = [(x, 1 / r["flop_ratio"]) for x, r in zip(at, found, strict=True) if r["flop_ratio"]]
        if label not in _BASES and bounds:
            left.scatter(*zip(*bounds, strict=True), marker="_", s=90, color=_INK, linewidths=1.2, zorder=3)
        points = [(r["speedup"], r["kl32_mean"]) for r in found if (r["kl32_mean"] or 0) > _LEAST_KL]
        if label not in _BASES and points:
            right.scatter(*zip(*points, strict=True), color=color, s=34, label=label, alpha=0.85)
    left.axhline(1, color=_FAINT, linewidth=0.8)
    left.set_xticks(range(len(shapes)), [_shape_name(s) for s in shapes], fontsize=9)
    left.set_ylabel("speed-up against full_prefill (dash: FLOP bound)", fontsize=9, color=_FAINT)
    left.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    right.set_yscale("log")
    right.set_xlabel("speed-up", fontsize=9, color=_FAINT)
    right.set_ylabel("mean KL over 32 tokens (nats)", fontsize=9, color=_FAINT)
    _tidy(left)
    _tidy(right)


def _shape(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["agent"],) if row["agent"] is not None else (row["span_tokens"], row["spans"])


def _shape_name(shape: tuple[Any, ...]) -> str:
    if len(shape) == 1:
        return f"agent {shape[0]}"
    tokens, spans = shape
    return f"{tokens:,} tokens\n{spans} span{'s' if spans > 1 else ''}"


def _draw_fidelity(figure: Figure, rows: Rows) -> None:
    """Points, not bars: a logarithmic axis has no zero for a bar to start from."""
    panels = figure.subplots(1, 2, sharey=True)
    wanted = (
        ("kl_first_mean", "KL of the first token (nats)"),
        ("kl32_mean", "mean KL over 32 tokens (nats)"),
    )
    kinds = [k for k in ("single", "composite") if any(r["spans"] == k for r in rows)]
    series = {k: v for k, v in _series(rows).items() if k not in _BASES}
    for axes, (key, title) in zip(panels, wanted, strict=True):
        values = [r[key] for found in series.values() for r in found if r[key] > _LEAST_KL]
        low, high = min(values, default=_LEAST_KL) / 1.6, max(values, default=1.0) * 2.6
        for y, found in enumerate(series.values()):
            axes.axhline(y, color="#e2e8f0", linewidth=0.8, zorder=0)
            for row in found:
                if row["spans"] in kinds:
                    _point(
                        axes, row[key], y + 0.22 * (kinds.index(row["spans"]) - 0.5), low, row["spans"], kinds
                    )
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xlabel(title, fontsize=9, color=_FAINT)
        _tidy(axes)
    panels[0].set_yticks(range(len(series)), list(series), fontsize=9)
    panels[0].set_ylim(len(series) - 0.4, -0.6)
    handles = [
        Line2D([], [], color=_COLORS[n], marker="o", linestyle="", label=kind) for n, kind in enumerate(kinds)
    ]
    panels[1].legend(handles=handles, fontsize=8, frameon=False, loc="lower right")


def _point(axes: Axes, value: float, y: float, low: float, kind: str, kinds: Sequence[str]) -> None:
    color = _COLORS[kinds.index(kind)]
    if value <= _LEAST_KL:
        axes.text(low * 1.05, y, "exact", va="center", fontsize=7, color=color)
        return
    axes.scatter([value], [y], s=38, color=color, zorder=3)
    axes.annotate(
        f"{value:.4f}",
        (value, y),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=_FAINT,
    )


def _draw_decay(figure: Figure, rows: Rows) -> None:
    axes = figure.subplots()
    for n, (label, found) in enumerate(_series(rows).items()):
        x = [r["queries"] for r in found]
        axes.plot(x, [r["speedup"] for r in found], color=_COLORS[n], marker="o", markersize=4, label=label)
        axes.axhline(found[-1]["warm_peak"], color=_COLORS[n], linestyle=":", linewidth=1)
        axes.annotate(
            f"{found[-1]['of_peak']:.0%} of the warm peak",
            (x[-1], found[-1]["speedup"]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=_INK,
        )
    axes.set_ylim(bottom=0)
    axes.set_xlabel("novel queries", fontsize=9, color=_FAINT)
    axes.set_ylabel("speed-up against full_prefill (dotted: warm peak)", fontsize=9, color=_FAINT)
    axes.legend(fontsize=8, frameon=False, loc="lower left")
    _tidy(axes)


def _draw_link(figure: Figure, rows: Rows) -> None:
    axes = figure.subplots()
    names = [f"{row['method']}\n{row['layer_groups']} groups" for row in rows]
    parts = (
        ("ttft_s_median", "over the link"),
        ("near_ttft_s_median", "segment held by the reader"),
        ("wire_s", "bytes at the rate of a plain socket"),
        ("base_ttft_s_median", "full_prefill"),
    )
    for n, (key, label) in enumerate(parts):
        x = [at + 0.2 * n - 0.3 for at in range(len(rows))]
        axes.bar(x, [row[key] for row in rows], width=0.18, color=_COLORS[n], label=label)
    axes.set_xticks(range(len(rows)), names)
    axes.set_ylabel("seconds to the first token", fontsize=9, color=_FAINT)
    axes.legend(fontsize=8, frameon=False)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#cbd5e1")
    axes.tick_params(axis="both", which="both", labelsize=8, colors=_FAINT, length=0)


_DRAW: Mapping[str, Callable[[Figure, Rows], None]] = {
    "ttft": _draw_timing,
    "chain": _draw_timing,
    "chain_stream": draw_chain_stream,
    "fidelity": _draw_fidelity,
    "decay": _draw_decay,
    "directory": draw_directory,
    "link": _draw_link,
    "serve": draw_serve,
}
_TITLES = {
    "ttft": "Time to first token at one worker",
    "chain": "Time to first token along a chain of agents over Ray, transfer included",
    "chain_stream": "A chain whose agents get ready while others write, against full prefill",
    "fidelity": "Distance from full prefill's answers",
    "decay": "Speed-up while novel queries keep arriving",
    "directory": "Keys per second of the directory's shards, and the time of a call",
    "link": "Time to first token where the segment comes over a network",
    "serve": "Three agents over HTTP, relay on and off on one service",
}
