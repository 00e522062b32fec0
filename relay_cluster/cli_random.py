"""`relay model random`: see `workers/random_model.py`. torch is imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, command, examples

EPILOG = examples(
    "relay model random llama-8b /dev/shm/llama-8b",
    "relay bench ttft --model /dev/shm/llama-8b --span-tokens 4096",
)


@command
def model_random(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="llama-1b, llama-3b or llama-8b.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new one; 2 to 15 GB.")],
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the weights.")] = 0,
    debug: DebugOption = False,
) -> None:
    """Write a model of a known shape with random weights, for timing: its answers mean nothing."""
    from workers.random_model import write_random_model

    with console.fraction_bar(f"random {shape}") as progress:
        write_random_model(shape, folder, seed=seed, progress=progress)
    console.output().print(Text(f"random weights of {shape} are in {folder}"), soft_wrap=True)
