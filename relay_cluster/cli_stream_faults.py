"""`relay bench stream-faults`: options in; a document and a table out. The campaign is in
`bench/stream_faults.py`."""

from __future__ import annotations

from typing import Annotated

import typer

from relay_cluster.cli_bench import deliver, prepare_tasks
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples
from transport.errors import RelayError

EPILOG = examples(
    "relay bench stream-faults --quick",
    "relay bench stream-faults --trials 200 --seed 7 --json runs/stream_faults.json",
    "relay bench stream-faults --kinds writer_killed,reader_killed --trials 20",
)
_QUICK_TRIALS = 8


@command
def stream_faults(
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, metavar="N", help="Pipelines to run [200].")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, metavar="N", help="Of texts, moments and drafts.")
    ] = 0,
    kinds: Annotated[
        str | None,
        typer.Option("--kinds", metavar="A,B,...", help="Faults, separated by commas; default: all."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One trial of every kind.")] = False,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Kill, cancel and lead drafts astray while readers are prepared; every answer is full prefill's.

    Runs on a cluster of its own. Exits with 2 when it finds a wrong answer, a hang, a leak or an error.
    """
    from relay_cluster.bench.stream_faults import (
        StreamFaultsSettings,
        parse_stream_kinds,
        run_stream_faults,
    )

    chosen = parse_stream_kinds(kinds)
    tasks = prepare_tasks(None, json_file, None, StreamFaultsSettings().model)
    settings = StreamFaultsSettings(
        trials=trials or (_QUICK_TRIALS if quick else 200), seed=seed, kinds=chosen
    )
    document = run_stream_faults(settings, tasks)
    deliver(document, json_file, None)
    failures = document.settings["failures"]
    if failures:
        raise RelayError(f"{len(failures)} of {settings.trials} trials failed; the first: {failures[0]}")
