"""`relay bench faults`: options in; a document and a table out. The campaign is in `bench/faults.py`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples, write_json
from transport.errors import ConfigError, RelayError

EPILOG = examples(
    "relay bench faults --quick",
    "relay bench faults --trials 300 --seed 7 --json runs/faults.json",
    "relay bench faults --kinds owner_kill,owner_stop --trials 20",
)
_QUICK_TRIALS = 34
_BACKENDS = ("auto", "shm", "nixl", "tcp")


@command
def faults(
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, metavar="N", help="Pipelines to run [300].")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Of kinds, stages, pipelines and texts.")
    ] = 0,
    kinds: Annotated[
        str | None,
        typer.Option("--kinds", metavar="A,B,...", help="Faults, separated by commas; default: all."),
    ] = None,
    backends: Annotated[
        str,
        typer.Option(
            "--backends", metavar="A,B,...", help="Each takes its share of the trials: auto, shm, nixl, tcp."
        ),
    ] = "auto,nixl,tcp",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer trials.")] = False,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Kill, stop, corrupt and delay; no answer may be wrong, nothing may hang or leak.

    Runs on a cluster of its own, which it takes apart and puts together again. Exits with 2 when it finds a
    wrong answer, a hang or a leak.
    """
    from relay_cluster.bench.texts import load_tasks

    if json_file:
        check_writable(json_file)
    from relay_cluster.bench.common import write_document
    from relay_cluster.bench.fault_rows import FaultRow, fault_table
    from relay_cluster.bench.faults import FaultsSettings, parse_kinds, run_faults

    chosen = tuple(filter(None, (item.strip() for item in backends.split(","))))
    if not chosen or set(chosen) - set(_BACKENDS):
        raise ConfigError(f'--backends "{backends}" is not a list of {", ".join(_BACKENDS)}.')
    settings = FaultsSettings(
        trials=trials or (_QUICK_TRIALS if quick else FaultsSettings().trials),
        seed=seed,
        kinds=parse_kinds(kinds),
        backends=chosen,
    )
    document = run_faults(settings, load_tasks([]))
    value = document.to_json()
    if json_file and str(json_file) == "-":
        write_json(value, json_file)
    else:
        out = console.output()
        out.print(fault_table([row for row in document.rows if isinstance(row, FaultRow)]))
        out.print(Text(f"seed {seed}, {value['settings']['seconds']:.0f} s", style="dim"))
        if json_file:
            write_document(value, json_file)
    if failures := value["settings"]["failures"]:
        raise RelayError(f"{len(failures)} trials were not as they should be: {failures[:3]}")
