"""All modes on all numbers of workers, one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from relay_cluster.simulation.results import SimulatedRow, row_of
from relay_cluster.simulation.run import Mode, Simulation
from relay_cluster.simulation.settings import SimulatedCluster, Workload
from transport.errors import ConfigError
from workers.methods import parse_method

MODES = "full_prefill,auto,auto+stream"


def parse_modes(text: str) -> tuple[Mode, ...]:
    """Modes of a comma-separated list.

    Raises:
        ConfigError: none, or one that no run could have.
    """
    modes = tuple(Mode(part) for part in dict.fromkeys(filter(None, (p.strip() for p in text.split(",")))))
    if not modes:
        raise ConfigError("--modes is empty; write for example --modes full_prefill,auto,auto+stream")
    for mode in modes:
        parse_method(mode.method)
        if mode.method.partition(":")[0] == "kvcomm":
            raise ConfigError("kvcomm cannot be simulated: what it reuses depends on what it has learnt.")
    return modes


def parse_workers(text: str | None, cluster: SimulatedCluster) -> tuple[int, ...]:
    """Numbers of workers of a comma-separated list; None: those of the cluster's file.

    Raises:
        ConfigError: not numbers of workers.
    """
    if text is None:
        return tuple(cluster.sweep or [cluster.workers])
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f'--workers "{text}" is not a list of numbers, for example 1,8,64') from None
    if any(not 1 <= n <= 4096 for n in counts):
        raise ConfigError(f"--workers {text}: between 1 and 4096 workers can be simulated")
    return counts


def sweep(
    cluster: SimulatedCluster,
    workload: Workload,
    modes: Sequence[Mode],
    counts: Sequence[int],
    *,
    seed: int,
    progress: Callable[[float, str], None] = lambda *_: None,
) -> list[SimulatedRow]:
    """A row for each mode and number of workers.

    Args:
        progress: called with the share that is done, and what is under way.

    Raises:
        ConfigError: a prompt does not fit a worker's cache.
    """
    total = sum(workload.runs(n) for n in counts) * len(modes)
    done = 0
    rows: list[SimulatedRow] = []

    for count in counts:
        for mode in modes:
            what = f"{count} workers, {mode.text}"

            def tick(what: str = what) -> None:
                nonlocal done
                done += 1
                progress(done / total, what)

            simulation = Simulation(cluster, workload, mode, workers=count, seed=seed, tick=tick)
            simulation.run()
            rows.append(row_of(simulation))
    return rows
