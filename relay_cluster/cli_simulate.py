"""`relay simulate`: a cluster that is computed instead of run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples, write_json
from transport.errors import ConfigError

if TYPE_CHECKING:
    from relay_cluster.simulation.settings import SimulatedCluster, Workload

EPILOG = examples(
    "relay simulate configs/simulations/this_machine.yaml configs/simulations/debate.yaml",
    "relay simulate configs/simulations/h100_nodes.yaml configs/simulations/swarm.yaml --workers 8,64,1000 "
    "--json runs/sim.json --plot runs/sim.png",
    "relay simulate configs/simulations/this_machine.yaml configs/simulations/demo.yaml "
    "--calibrate runs/full.json --validate runs/auto.json",
)
_MODES = "full_prefill,auto,auto+stream"


@command
def simulate(
    cluster: Annotated[
        Path, typer.Argument(metavar="CLUSTER.yaml", help="simulation: cluster", show_default=False)
    ],
    workload: Annotated[
        Path, typer.Argument(metavar="WORKLOAD.yaml", help="simulation: workload", show_default=False)
    ],
    workers: Annotated[
        str | None,
        typer.Option("--workers", metavar="N,N,...", help="Numbers of workers; default: the cluster file's."),
    ] = None,
    modes: Annotated[
        str,
        typer.Option(
            "--modes",
            metavar="MODE,...",
            help="Reuse methods side by side; METHOD+stream prepares prompts ahead (auto, exact).",
        ),
    ] = _MODES,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Arrivals and answer lengths.")] = 0,
    validate: Annotated[
        Path | None,
        typer.Option(
            "--validate",
            metavar="REPORT.json",
            help="Compare with a report of `relay run --json` of this workload.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="REPORT.json",
            help="With --validate: take the device's rates from this report of the same machine.",
        ),
    ] = None,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")] = None,
    debug: DebugOption = False,
) -> None:
    """Compute what a cluster would do: throughput, times to first token, links, directory, arenas."""
    from relay_cluster.simulation.settings import SimulatedCluster, Workload

    cluster_file, workload_file = SimulatedCluster.load(cluster), Workload.load(workload)
    for target in filter(None, (json_file, plot)):
        check_writable(target)
    _check_simpy()
    if calibrate is not None and validate is None:
        raise ConfigError("--calibrate takes rates for --validate, which was not given")
    if validate is not None:
        if plot is not None or workers is not None:
            raise ConfigError("--validate simulates the report's own run: leave out --plot and --workers")
        _validate(cluster_file, workload_file, validate, calibrate, json_file)
        return
    from relay_cluster.simulation import results
    from relay_cluster.simulation.sweep import parse_modes, parse_workers, sweep

    counts = parse_workers(workers, cluster_file)
    wanted = parse_modes(modes)
    with console.fraction_bar("simulating") as progress:
        rows = sweep(cluster_file, workload_file, wanted, counts, seed=seed, progress=progress)
    found = results.document(cluster_file, workload_file, rows, seed)
    if json_file and str(json_file) == "-":
        write_json(found, json_file)
    else:
        out = console.output()
        out.print(results.latency_table(rows))
        out.print(results.load_table(rows))
        out.print(Text(f"device: {cluster_file.device.source}", style="dim"), soft_wrap=True)
        if json_file:
            results.write_document(found, json_file)
    if plot:
        from relay_cluster.simulation.plot import plot_document

        plot_document(found, plot)
    saved = [str(path) for path in (json_file, plot) if path and str(path) != "-"]
    if saved:
        console.errors().print(Text(f"saved {' and '.join(saved)}", style="dim"), soft_wrap=True)


def _check_simpy() -> None:
    """Raises ConfigError where the simulation library is not installed."""
    from importlib.util import find_spec

    if find_spec("simpy") is None:
        raise ConfigError(
            "`relay simulate` needs simpy, which is not installed: pip install 'relay-cluster[simulate]'"
        )


def _validate(
    cluster: SimulatedCluster,
    workload: Workload,
    report: Path,
    calibrate: Path | None,
    json_file: Path | None,
) -> None:
    """Print what was measured beside what is simulated, and how far they are apart."""
    from dataclasses import asdict

    from relay_cluster.simulation import validate

    measured = validate.read_report(report)
    if calibrate is not None:
        cluster = validate.calibrated(cluster, validate.read_report(calibrate))
    mode, found = validate.mode_of(measured), validate.compare(cluster, workload, measured)
    if json_file:
        write_json(validate.document(mode, found, asdict(cluster.device)), json_file)
    if json_file and str(json_file) == "-":
        return
    out = console.output()
    out.print(validate.table(mode, found))
    worst = max(found, key=lambda c: abs(c.error))
    of = worst.agent or "the whole run"
    line = f"largest error: {worst.error:+.0%} ({worst.what} of {of}); rates: {cluster.device.source}"
    out.print(Text(line, style="dim"), soft_wrap=True)
