"""`relay bench decode`: see `bench/decode.py`. torch is imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relay_cluster.cli_bench import deliver, prepare_tasks
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples
from workers.settings import DEFAULT_MODEL

EPILOG = examples("relay bench decode --quick", "relay bench decode --batches 1,8 --json runs/decode.json")


@command
def decode(
    batches: Annotated[
        str | None, typer.Option("--batches", metavar="N,...", help="Requests that decode together [1,8].")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=8, metavar="N", help="Of every prompt, without template.")
    ] = 128,
    new_tokens: Annotated[
        int | None, typer.Option("--new-tokens", min=2, metavar="N", help="Decoded by every request [64].")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--repeats", min=1, metavar="N", help="Timed rounds after a cold one [5].")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE.jsonl", help="Text for the prompts. Default: tasks of our own."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Name, folder or hub id.")
    ] = DEFAULT_MODEL,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Choice of prompts.")] = 0,
    threads: Annotated[
        int, typer.Option("--threads", min=0, metavar="N", help="CPU threads of the worker; 0: all.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds and tokens; the same code.")] = False,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Decoding speed beside `transformers.generate` on the same weights, capture on."""
    from relay_cluster.bench.common import int_list

    sizes = int_list(batches or ("1,4" if quick else "1,8"), "--batches", at_least=1)
    tasks = prepare_tasks(data, json_file, None, model)
    from relay_cluster.bench.decode import DecodeSettings, run_decode

    settings = DecodeSettings(
        model=model,
        batches=sizes,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens or (16 if quick else 64),
        repeats=repeats or (1 if quick else 5),
        seed=seed,
        threads=threads,
    )
    deliver(run_decode(settings, tasks), json_file, None)
