"""`relay model`: the models of this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from relay_cluster import cli_random, console
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples, write_json

model_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Models on this machine.")
model_app.command("random", epilog=cli_random.EPILOG)(cli_random.model_random)


@model_app.command("list", epilog=examples("relay model list"))
@command
def model_list(json_file: JsonOption = None, debug: DebugOption = False) -> None:
    """List the models in the cache folder."""
    from workers.model import list_models

    models = list_models()
    if json_file:
        write_json(models, json_file)
    if json_file and str(json_file) == "-":
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "state", "size", "folder"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for entry in models:
        state = "[green]ready[/]" if entry["ready"] else "not imported yet (`relay model import`)"
        size = f"{entry['bytes'] / 1e6:.0f} MB" if entry["bytes"] else "-"
        table.add_row(Text(entry["name"], style="bold"), state, size, Text(entry["path"]))
    console.output().print(table)


@model_app.command("import", epilog=examples("relay model import"))
@command
def model_import(json_file: JsonOption = None, debug: DebugOption = False) -> None:
    """Convert the embedded model once into the cache folder; later calls find it there."""
    from workers.embedded import import_embedded
    from workers.settings import DEFAULT_MODEL

    with console.fraction_bar(f"importing {DEFAULT_MODEL}") as progress:
        folder = import_embedded(progress)
    if json_file:
        write_json({"model": DEFAULT_MODEL, "path": str(folder)}, json_file)
    if not json_file or str(json_file) != "-":
        console.output().print(Text(f"{DEFAULT_MODEL} is in {folder}"), soft_wrap=True)


@model_app.command(
    "info", epilog=examples("relay model info smollm2-135m-instruct", "relay model info ~/models/my-llama")
)
@command
def model_info(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Name, folder or hub id.", show_default=False)],
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Show what a model is, and whether its KV can be relayed."""
    from workers.model import describe

    facts = describe(name)
    if json_file:
        write_json(facts, json_file)
    if json_file and str(json_file) == "-":
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if key == "refusal":
            table.add_row("can be relayed", Text("yes" if value is None else f"no: {value}"))
        elif value is not None:
            table.add_row(key.replace("_", " "), Text(f"{value:,}" if type(value) is int else str(value)))
    console.output().print(table)
