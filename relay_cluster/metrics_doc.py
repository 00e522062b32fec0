"""The table of metrics as a document: `python -m relay_cluster.metrics_doc docs/observability.md` rewrites
the part of a file between its two markers; with --check it only says whether that is up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from relay_cluster.metrics import TABLE, Group, Metric

BEGIN: Final = "<!-- metrics: written by `python -m relay_cluster.metrics_doc docs/observability.md` -->"
END: Final = "<!-- end of metrics -->"


def markdown() -> str:
    """Every metric, by group."""
    parts: list[str] = []
    for group in Group:
        parts += [f"### {group.value}", "", "| metric | type, unit | labels | |", "|---|---|---|---|"]
        parts += [_row(metric) for metric in TABLE if metric.group is group]
        parts.append("")
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    help_text = metric.help.replace("|", "\\|")
    return f"| `{metric.name}` | {metric.kind}, {metric.unit} | {labels} | {help_text} |"


def filled(text: str) -> str:
    """A document with the table between its markers.

    Raises:
        ValueError: it has not got them.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the document needs a line {BEGIN} and after it a line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown()}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    """Write the documents, or with --check only compare them; 1 where one is out of date."""
    stale = 0
    for path in (Path(name) for name in arguments if name != "--check"):
        text = path.read_text("utf-8")
        if "--check" in arguments:
            stale |= filled(text) != text
        else:
            path.write_text(filled(text), "utf-8")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
