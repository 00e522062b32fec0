"""`relay bench pull`: see `bench/pull.py`. torch and Ray are imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relay_cluster.cli_bench import deliver, prepare_tasks
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples

EPILOG = examples(
    "relay bench pull --quick", "relay bench pull --backends auto,tcp --blocks 1,4 --json runs/pull.json"
)


@command
def pull(
    backends: Annotated[
        str, typer.Option("--backends", metavar="A,B,...", help="Values of transport.backend.")
    ] = "auto,tcp",
    blocks: Annotated[
        str, typer.Option("--blocks", metavar="N,...", help="In how many blocks a segment lies.")
    ] = "1,4",
    samples: Annotated[
        int | None, typer.Option("--samples", min=3, metavar="N", help="Timed pulls of each [300].")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", metavar="FILE", help="Default: two workers on this machine.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="FILE.jsonl", help="Texts; default: our own.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Choice of texts.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pulls; the same code.")] = False,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """A worker's wait for a small segment of another worker, beside a Ray call that does nothing."""
    from relay_cluster.bench.common import int_list
    from relay_cluster.config import ClusterConfig

    config = ClusterConfig.load(cluster) if cluster else ClusterConfig(name="bench", workers=2)
    sizes = int_list(blocks, "--blocks", at_least=1)
    names = tuple(filter(None, (name.strip() for name in backends.split(","))))
    tasks = prepare_tasks(data, json_file, None, config.model)
    from relay_cluster.bench.pull import PullSettings, run_pull

    settings = PullSettings(
        backends=names, blocks=sizes, samples=samples or (30 if quick else 300), seed=seed
    )
    deliver(run_pull(settings, tasks, config), json_file, None)
