"""`relay bench stream`: see `bench/stream.py`. torch is imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relay_cluster.cli_bench import deliver, prepare_tasks
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples

EPILOG = examples(
    "relay bench stream --quick",
    "relay bench stream --modes full_prefill,exact --fresh-tokens 16 --json runs/stream.json",
)


@command
def stream(
    modes: Annotated[
        str,
        typer.Option(
            "--modes",
            metavar="A,B,...",
            help="full_prefill and relay begin when the writer has ended; exact and auto are prepared; busy: "
            "as exact, while the reader's worker decodes another request.",
        ),
    ] = "full_prefill,relay,exact,auto,busy",
    known_tokens: Annotated[
        int | None,
        typer.Option("--known-tokens", min=16, metavar="N", help="Before the writer begins [1000]."),
    ] = None,
    streamed_tokens: Annotated[
        int | None,
        typer.Option("--streamed-tokens", min=17, metavar="N", help="Of the writer's answer [512]."),
    ] = None,
    fresh_tokens: Annotated[
        str, typer.Option("--fresh-tokens", metavar="N,...", help="Behind the writer's answer.")
    ] = "64,16",
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, metavar="N", help="Timed rounds after a cold one [3].")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", metavar="FILE", help="Default: two workers on this machine, a core each."),
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="FILE.jsonl", help="Texts; default: our own.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Choice of texts.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Shorter texts, fewer rounds; the same code.")
    ] = False,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """From a writer's last token to the first of a reader that was prepared meanwhile."""
    from relay_cluster.bench.common import int_list
    from relay_cluster.config import ClusterConfig

    base = {"name": "bench", "workers": 2, "worker": {"threads": 1, "break_even": False}}
    config = ClusterConfig.load(cluster) if cluster else ClusterConfig.model_validate(base)
    shapes = int_list(fresh_tokens, "--fresh-tokens", at_least=1)
    tasks = prepare_tasks(data, json_file, None, config.model)
    from relay_cluster.bench.stream import StreamSettings, run_stream

    settings = StreamSettings(
        modes=tuple(filter(None, (mode.strip() for mode in modes.split(",")))),
        known_tokens=known_tokens or (200 if quick else 1000),
        streamed_tokens=streamed_tokens or (48 if quick else 512),
        fresh_tokens=shapes,
        repeats=repeats or (1 if quick else 3),
        seed=seed,
    )
    deliver(run_stream(settings, tasks, config), json_file, None)
