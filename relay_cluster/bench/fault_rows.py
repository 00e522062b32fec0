"""What `relay bench faults` finds, as rows of its document and as a table. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRow:
    """All trials of one kind of fault; the last row, of kind "all", sums them up.

    Attributes:
        kind: see `fault_kinds.KINDS`.
        trials: pipelines run.
        hits: of them, those in which the fault took effect.
        wrong_outputs: answers that differ from the fault-free replay of their own report.
        hangs: pipelines that neither ended nor failed within their deadline.
        leaked_leases: leases in the directory longer than their ttl after everything had ended.
        leaked_blocks: blocks of arenas, quarantined ones included, that no segment accounts for then.
        crashes: workers that died although nobody killed them.
        uncounted: trials in which a pull failed, or was to fail, and neither a fallback, an error nor a retry
            says so.
        fallbacks: slots that were computed although their KV should have been there, by reason.
        errors: pipelines that ended in a typed error, by its type.
        retries: requests that were started again because their worker had died.
        detect_s_p50, detect_s_max: seconds from the fault to its being noticed (the end of the pull, or the
            loss of the worker); None where nothing had to be noticed.
    """

    kind: str
    trials: int
    hits: int
    wrong_outputs: int
    hangs: int
    leaked_leases: int
    leaked_blocks: int
    crashes: int
    uncounted: int
    fallbacks: dict[str, int]
    errors: dict[str, int]
    retries: int
    detect_s_p50: float | None
    detect_s_max: float | None


def fault_table(rows: Sequence[FaultRow]) -> Table:
    """One line per kind."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("fault", style="bold", no_wrap=True)
    names = ("trials", "hits", "wrong", "hangs", "leases", "blocks", "crashes", "uncounted", "retries")
    for name in (*names, "noticed", "max"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fallbacks", overflow="fold")
    table.add_column("errors", overflow="fold")
    for row in rows:
        if row.kind == "all":
            table.add_section()
        counts = (row.trials, row.hits, row.wrong_outputs, row.hangs, row.leaked_leases, row.leaked_blocks)
        table.add_row(
            row.kind,
            *(str(n) for n in (*counts, row.crashes, row.uncounted, row.retries)),
            _seconds(row.detect_s_p50),
            _seconds(row.detect_s_max),
            _counts(row.fallbacks),
            _counts(row.errors),
        )
    return table


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items())) or "-"
