"""`relay bench transfer`: options in; a document, a table and a picture out.

Measuring is in `bench/transfer.py`. The transport is imported inside the command.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples, write_json
from transport.errors import ConfigError

if TYPE_CHECKING:
    from relay_cluster.bench.common import Document
    from relay_cluster.bench.transfer_rows import TransferRow

EPILOG = examples(
    "relay bench transfer --quick",
    "relay bench transfer --backends shm,nixl --sizes 1MiB,64MiB --json runs/t.json --plot runs/t.png",
)
QUICK_BYTES = 256 << 20


@command
def transfer(
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends", metavar="A,B,...", help="shm, nixl, ucx, tcp; default: all that can be had."
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option("--sizes", metavar="N,...", help="Bytes of one pull [4KiB,64KiB,1MiB,64MiB]."),
    ] = None,
    parts: Annotated[
        int, typer.Option("--parts", min=1, max=64, metavar="N", help="Parts of every block.")
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds; the same code.")] = False,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")] = None,
    debug: DebugOption = False,
) -> None:
    """Rates and latencies of the backends between two processes, beside memcpy and a raw socket."""
    from relay_cluster.bench.transfer import (
        DEFAULT_SIZES,
        TransferSettings,
        choose_backends,
        parse_sizes,
        run_transfer,
    )

    for target in filter(None, (json_file, plot)):
        check_writable(target)
    chosen = parse_sizes(sizes or DEFAULT_SIZES)
    if min(chosen) // parts < 64:
        raise ConfigError(f"--parts {parts}: parts of {min(chosen)} bytes would be smaller than 64 B")
    settings = TransferSettings(backends=choose_backends(backends), sizes=chosen, parts=parts)
    if quick:
        settings = TransferSettings(
            backends=settings.backends, sizes=chosen, parts=parts, bytes_per_size=QUICK_BYTES
        )
    deliver(run_transfer(settings), json_file, plot)


def deliver(document: Document, json_file: Path | None, plot: Path | None) -> None:
    from relay_cluster.bench.common import write_document
    from relay_cluster.bench.transfer_plot import plot_transfer

    value = document.to_json()
    if json_file and str(json_file) == "-":
        write_json(value, json_file)
    else:
        console.output().print(_table(cast("Any", document.rows)))
        if json_file:
            write_document(value, json_file)
    if plot:
        plot_transfer(value, plot)
    saved = [str(path) for path in (json_file, plot) if path and str(path) != "-"]
    if saved:
        console.errors().print(Text(f"saved {' and '.join(saved)}", style="dim"), soft_wrap=True)


def _table(rows: Sequence[TransferRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("backend", style="bold")
    for name in ("path", "bytes", "verified", "p50", "p90", "GB/s", "baseline", "its GB/s", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    last: object = None
    for row in rows:
        if last not in (None, (row.backend, row.path)):
            table.add_section()
        last = (row.backend, row.path)
        table.add_row(
            row.backend,
            row.path,
            f"{row.size_bytes:,}",
            "yes" if row.verified else "no",
            f"{row.seconds_p50 * 1e6:,.0f} us",
            f"{row.seconds_p90 * 1e6:,.0f} us",
            f"{row.gb_s:.2f}",
            row.baseline,
            f"{row.baseline_gb_s:.2f}",
            f"{row.ratio:.2f}",
        )
    return table
