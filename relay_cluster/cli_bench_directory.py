"""`relay bench directory`: options in, a document, a table and a picture out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relay_cluster.cli_bench import deliver
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples

EPILOG = examples(
    "relay bench directory --quick",
    "relay bench directory --segments 100000 --clients 4 --json runs/directory.json",
    "relay bench directory --shards 2 --replicas 2 --plot runs/directory.png",
)


@command
def directory(
    segments: Annotated[
        int | None, typer.Option("--segments", min=100, metavar="N", help="Copies in the directory [100000].")
    ] = None,
    blocks: Annotated[int, typer.Option("--blocks", min=1, metavar="N", help="Blocks of a segment.")] = 8,
    clients: Annotated[
        int | None, typer.Option("--clients", min=1, metavar="N", help="Processes that call at once [4].")
    ] = None,
    shards: Annotated[int, typer.Option("--shards", min=1, metavar="N", help="Shard actors.")] = 1,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, max=2, metavar="N", help="Shards that know each key.")
    ] = 1,
    batches: Annotated[
        str | None, typer.Option("--batches", metavar="N,...", help="Keys per call [1,16,64].")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.1, metavar="N", help="Of every reading phase [3].")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Choice of keys.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer segments, clients and seconds.")] = False,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")] = None,
    debug: DebugOption = False,
) -> None:
    """Calls per second of real shard actors with many segments in them, from several processes."""
    from relay_cluster.bench.common import int_list

    sizes = int_list(batches or ("1,16" if quick else "1,16,64"), "--batches")
    for target in filter(None, (json_file, plot)):
        check_writable(target)
    from relay_cluster.bench.directory import DirectorySettingsOfBench, run_directory

    settings = DirectorySettingsOfBench(
        segments=segments or (4000 if quick else 100_000),
        blocks=blocks,
        clients=clients or (2 if quick else 4),
        shards=shards,
        replicas=replicas,
        batches=sizes,
        seconds=seconds or (0.5 if quick else 3.0),
        seed=seed,
    )
    deliver(run_directory(settings), json_file, plot)
