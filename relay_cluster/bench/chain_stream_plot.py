"""The picture of `relay bench chain --stream`: by mode, the last agent's time to first token and the whole
pipeline's time, each beside full prefill's. Drawn from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FAINT = "#64748b"
_COLORS = {
    "full_prefill": "#334155",
    "off": "#f59e0b",
    "exact": "#1d4ed8",
    "auto": "#0d9488",
    "relay": "#be185d",
}
_PANELS = (
    (
        "ttft_after_last_token_s",
        "ttft_s",
        "speedup",
        "from the last token needed to the last agent's first (s)",
    ),
    ("wall_s", "wall_s", "wall_ratio", "whole pipeline (s)"),
)


def draw_chain_stream(figure: Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars with the range over the rounds."""
    for axes, (key, span, told, title) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for x, row in enumerate(rows):
            value = row[key]
            reach = [[value - row[f"{span}_min"]], [row[f"{span}_max"] - value]]
            axes.bar(x, value, 0.62, color=_COLORS[row["mode"]], linewidth=0)
            axes.errorbar(x, value, yerr=reach, color=_FAINT, capsize=3, linewidth=1)
            text = f"{row[told]:.1f}x" if told == "speedup" else f"{row[told]:.0%}"
            axes.annotate(
                f"{value:.2f} s\n{text}",
                (x, row[f"{span}_max"]),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_xticks(range(len(rows)), [_name(row["mode"]) for row in rows], fontsize=9)
        axes.set_ylim(0, 1.2 * max(row[f"{span}_max"] for row in rows))
        axes.set_title(title, fontsize=10, color=_FAINT, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=_FAINT, length=0)


def _name(mode: str) -> str:
    return mode if mode == "full_prefill" else f"stream {mode}"
