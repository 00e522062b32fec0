"""Tables of a benchmark's document in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from relay_cluster import console
from relay_cluster.bench.chain_stream_rows import CHAIN_STREAM_COLUMNS, ChainStreamRow
from relay_cluster.bench.common import BASE, DecayRow, Document, FidelityRow, LinkRow, Row, TimingRow
from relay_cluster.bench.decode_rows import DECODE_COLUMNS, DecodeRow
from relay_cluster.bench.directory_rows import DIRECTORY_COLUMNS, DirectoryRow
from relay_cluster.bench.fault_rows import FaultRow
from relay_cluster.bench.kernel_rows import KERNEL_COLUMNS, KernelRow
from relay_cluster.bench.pull_rows import PULL_COLUMNS, PullRow
from relay_cluster.bench.serve_rows import SERVE_COLUMNS, ServeRow
from relay_cluster.bench.stream_fault_rows import STREAM_FAULT_COLUMNS, StreamFaultRow
from relay_cluster.bench.stream_rows import STREAM_COLUMNS, StreamRow
from relay_cluster.bench.transfer_rows import TransferRow

Column = tuple[str, Callable[[Any], str]]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _names(rows: Sequence[Row]) -> list[str]:
    """Methods by name; with their parameters where one name stands for several settings."""
    settings: dict[str, set[str]] = {}
    named = [_method(row) for row in rows]
    for method, params in named:
        settings.setdefault(method, set()).add(params)
    return [f"{m}:{p}" if len(settings[m]) > 1 else m for m, p in named]


def _method(row: Row) -> tuple[str, str]:
    """(what the row is about, its parameters)"""
    if isinstance(row, TransferRow):
        return row.backend, row.path
    if isinstance(row, DecodeRow):
        return f"batch {row.batch}", ""
    if isinstance(row, KernelRow):
        return row.kernel, ""
    if isinstance(row, PullRow):
        return row.backend, ""
    if isinstance(row, StreamRow | ChainStreamRow):
        return row.mode, row.method
    if isinstance(row, ServeRow):
        return f"{row.part} {row.what}", ""
    return (row.kind, "") if isinstance(row, FaultRow | StreamFaultRow) else (row.method, row.params)


_FIDELITY: tuple[Column, ...] = (
    ("spans", lambda r: r.spans),
    ("n", lambda r: str(r.samples)),
    ("heal", lambda r: r.heal),
    ("KL first", lambda r: _number(r.kl_first_mean, ".4f")),
    ("p90", lambda r: _number(r.kl_first_p90, ".4f")),
    ("KL 32", lambda r: _number(r.kl32_mean, ".4f")),
    ("p90", lambda r: _number(r.kl32_p90, ".4f")),
    ("KL 32-64", lambda r: _number(r.kl64_tail_mean, ".5f")),
    ("top-1 32", lambda r: _number(r.top1_32, ".3f")),
    ("1st differs", lambda r: _number(r.first_token_mismatch, ".3f")),
    ("greedy", lambda r: _number(r.greedy_prefix_median, ".0f")),
    ("agree", lambda r: _number(r.answer_agreement, ".2f")),
    ("right", lambda r: _number(r.accuracy, ".2f")),
    ("reuse", lambda r: _number(r.reuse, ".3f")),
)
_TIMING: tuple[Column, ...] = (
    ("agent", lambda r: _number(r.agent, "d")),
    ("in spans", lambda r: f"{r.span_tokens}/{r.spans}"),
    ("prompt", lambda r: str(r.prompt_tokens)),
    ("cold", lambda r: _seconds(r.ttft_s_cold)),
    ("TTFT", lambda r: _seconds(r.ttft_s_median)),
    ("p90", lambda r: _seconds(r.ttft_s_p90)),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
    ("quoted", lambda r: "-" if r.quoted_against == BASE else f"{r.speedup_quoted:.2f}x"),
    ("of bound", lambda r: _number(r.over_bound, ".2f")),
    ("reuse", lambda r: _number(r.reuse, ".3f")),
    ("KL first", lambda r: _number(r.kl_first, ".4f")),
    ("KL 32", lambda r: _number(r.kl32_mean, ".4f")),
    ("top-1", lambda r: _number(r.top1_32, ".3f")),
)
_DECAY: tuple[Column, ...] = (
    ("queries", lambda r: str(r.queries)),
    ("TTFT", lambda r: _seconds(r.ttft_s_median)),
    ("full prefill", lambda r: _seconds(r.base_ttft_s_median)),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
    ("warm peak", lambda r: f"{r.warm_peak:.2f}x"),
    ("of peak", lambda r: f"{r.of_peak:.2f}"),
    ("relayed", lambda r: f"{r.relayed_share:.2f}"),
    ("evicted", lambda r: str(r.evicted)),
    ("held", lambda r: str(r.segments)),
)
_LINK: tuple[Column, ...] = (
    ("groups", lambda r: str(r.layer_groups)),
    ("over", lambda r: r.backend),
    ("MB", lambda r: f"{r.bytes / 1e6:.1f}"),
    ("GB/s", lambda r: f"{r.link_gb_s:.3f}"),
    ("TTFT", lambda r: _seconds(r.ttft_s_median)),
    ("near", lambda r: _seconds(r.near_ttft_s_median)),
    ("wire", lambda r: _seconds(r.wire_s)),
    ("of bound", lambda r: f"{r.over_bound:.2f}"),
    ("waited", lambda r: _seconds(r.exposed_s)),
    ("full prefill", lambda r: _seconds(r.base_ttft_s_median)),
    ("speed-up", lambda r: f"{r.speedup:.2f}x"),
)
_COLUMNS: Mapping[type, tuple[Column, ...]] = {
    TimingRow: _TIMING,
    FidelityRow: _FIDELITY,
    DecayRow: _DECAY,
    DirectoryRow: DIRECTORY_COLUMNS,
    LinkRow: _LINK,
    DecodeRow: DECODE_COLUMNS,
    KernelRow: KERNEL_COLUMNS,
    PullRow: PULL_COLUMNS,
    StreamRow: STREAM_COLUMNS,
    StreamFaultRow: STREAM_FAULT_COLUMNS,
    ChainStreamRow: CHAIN_STREAM_COLUMNS,
    ServeRow: SERVE_COLUMNS,
}


def document_table(document: Document) -> Table:
    """One line per row, without columns that say nothing in any of them."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", style="bold", overflow="fold", min_width=14, max_width=34)
    shown: list[Callable[[Any], str]] = []
    for name, cell in _COLUMNS[type(document.rows[0])] if document.rows else ():
        if any(cell(row) != "-" for row in document.rows):
            table.add_column(name, justify="right", no_wrap=True)
            shown.append(cell)
    shape: object = None
    for name, row in zip(_names(document.rows), document.rows, strict=True):
        now = _shape(row)
        if shape not in (None, now):
            table.add_section()
        shape = now
        table.add_row(Text(name), *(cell(row) for cell in shown))
    return table


def _shape(row: Row) -> object:
    """Rows of one shape stand together."""
    if isinstance(row, TimingRow):
        return row.agent, row.span_tokens, row.spans
    if isinstance(row, ServeRow):
        return row.part, row.concurrency, row.relay
    return row.spans if isinstance(row, FidelityRow) else _method(row)[0]


def show_document(document: Document, out: Console | None = None) -> None:
    """Print the table and what it was measured on."""
    out = out or console.output()
    out.print(document_table(document))
    settings = document.settings
    facts = (
        settings.get("model") or settings.get("gpu"),
        f"data {', '.join(settings['data'])}" if settings.get("data") else "",
        f"seed {settings['seed']}" if "seed" in settings else "",
    )
    out.print(Text(", ".join(filter(None, facts)), style="dim"), soft_wrap=True)
