"""`relay up`, `relay status`, `relay down`: a cluster that outlives the command. Parses, shows and exits;
`lifecycle.py` does the work.

Exit status of `status`: 0 healthy, 3 down, 4 degraded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import psutil
import typer
from rich import box
from rich.table import Table
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples, write_json
from relay_cluster.config import ClusterConfig
from relay_cluster.console import StepProgress
from relay_cluster.unchanged import WORKER_FACTS, unchanged
from transport.errors import ConfigError

if TYPE_CHECKING:
    from relay_cluster.heads import Record
    from relay_cluster.lifecycle import Status, Up

DOWN: Final = 3
DEGRADED: Final = 4

_File = Annotated[
    Path | None,
    typer.Argument(metavar="[CLUSTER.yaml]", help="Cluster; default: this machine.", show_default=False),
]
_Named = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="A cluster that is up, by its name, instead of its file."),
]
_Drain = Annotated[
    float | None,
    typer.Option(
        "--drain-timeout-s",
        min=0.0,
        metavar="N",
        help="Seconds for what runs to finish; default: the longest that a request may take.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    few = examples(
        "relay up configs/clusters/local_cpu.yaml",
        "relay up cluster.yaml --restart",
        "relay run configs/pipelines/maths.yaml --example --cluster configs/clusters/local_cpu.yaml",
    )
    app.command("up", epilog=few)(command(up))
    few = examples("relay status", "relay status configs/clusters/local_cpu.yaml --json -")
    app.command("status", epilog=few)(command(status))
    few = examples("relay down configs/clusters/local_cpu.yaml", "relay down --name local_cpu")
    app.command("down", epilog=few)(command(down))


def up(
    cluster: _File = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Replace the workers too, one by one, drained: no request is lost."),
    ] = False,
    drain_timeout_s: _Drain = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Bring a cluster up that stays: Ray (where the file names none), directory and workers. Again: repair
    what is missing, and say in what it differs from the file."""
    config = ClusterConfig.load(cluster) if cluster else ClusterConfig()
    if not restart and (same := unchanged(config)) is not None:
        assert same.made is not None  # else it would not be known to be unchanged
        facts = {**_facts(same, same.made.workers), "differences": []}
        _show_up(facts, json_file)
        return
    _fetch_model(config)
    with StepProgress(f'cluster "{config.name}"') as progress:
        from relay_cluster import lifecycle

        with _half_done():
            done = lifecycle.up(
                config,
                file=cluster,
                restart=restart,
                drain_timeout_s=_patience(config, drain_timeout_s),
                tell=progress,
            )
    _report(done, cluster, json_file)


@contextmanager
def _half_done() -> Iterator[None]:
    """Ctrl-C stops this command, not the cluster."""
    try:
        yield
    except KeyboardInterrupt:
        console.show_error(
            "interrupted: what was up before may be half done. `relay status` shows it, `relay up` completes "
            "it, `relay down` ends it."
        )
        raise typer.Exit(130) from None


def _patience(config: ClusterConfig, drain_timeout_s: float | None) -> float:
    return config.worker.request_timeout_s if drain_timeout_s is None else drain_timeout_s


def _fetch_model(config: ClusterConfig) -> None:
    """Say in a second that a model cannot be used. A cluster of other machines has its own disks, and one
    that is up has it."""
    from relay_cluster.heads import settled

    if settled(config).address is not None:
        return
    from workers.model import describe, resolve

    with console.fraction_bar(f"model {config.model}") as progress:
        found = resolve(config.model, progress=progress)
    if isinstance(found, Path) and (refusal := describe(config.model)["refusal"]):
        raise ConfigError(str(refusal))


def _report(done: Up, cluster: Path | None, json_file: Path | None) -> None:
    raised = done.raised
    workers = [{key: getattr(i, key) for key in WORKER_FACTS} for i in raised.workers]
    facts = {
        **_facts(done.record, workers),
        "new_head": done.new_head,
        "started": list(raised.started),
        "replaced": list(raised.replaced),
        "differences": [{**asdict(d), "up": str(d.up), "wanted": str(d.wanted)} for d in raised.differences],
    }
    _show_up(facts, json_file)
    if not json_file or str(json_file) != "-":
        _advise(done, cluster)


def _facts(record: Record, workers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a cluster to which nothing was done."""
    return {
        "name": record.name,
        "address": record.address,
        "dashboard": record.head.dashboard if record.head else "",
        "new_head": False,
        "workers": list(workers),
        "started": [],
        "replaced": [],
    }


def _show_up(facts: Mapping[str, Any], json_file: Path | None) -> None:
    # Since the command was started: what its user has waited for.
    seconds = time.time() - psutil.Process().create_time()
    # Of this command alone, whatever else the machine does.
    times = {"seconds": round(seconds, 2), "cpu_seconds": round(time.process_time(), 2)}
    if json_file:
        write_json({**facts, **times}, json_file)
    if json_file and str(json_file) == "-":
        return
    nodes = len({one["node"] for one in facts["workers"]})
    what = f"{len(facts['started'])} started" if facts["started"] else "nothing to do"
    size = f"{len(facts['workers'])} workers on {nodes} node(s)"
    line = f'"{facts["name"]}" is up: {size}, {what}, {seconds:.1f} s'
    console.output().print(Text(line), soft_wrap=True)


def _advise(done: Up, cluster: Path | None) -> None:
    """What differs, and what to do about it."""
    different = done.raised.differences
    if not different:
        return
    tell = console.errors()
    tell.print(Text("what is up differs from the file:", style="yellow"))
    for one in different:
        tell.print(Text(f"  {one}"), soft_wrap=True)
    file = "" if cluster is None else f" {cluster}"
    if all(one.restart for one in different):
        how = f"`relay up{file} --restart` replaces the workers one by one"
    elif {one.key for one in different} == {"directory.shards"}:
        how = "`relay directory resize N` changes that while requests run"
    else:
        how = f"`relay down{file}` and then `relay up{file}`"
    tell.print(Text(f"to make it so: {how}"), soft_wrap=True)


def status(
    cluster: _File = None,
    name: _Named = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Show what is up: nodes, workers, directory. Without a file or a name, every cluster that this user has
    brought up. Exit status: 0 healthy, 3 down, 4 degraded."""
    with console.errors().status("looking"):
        from relay_cluster import lifecycle

        chosen = _chosen(cluster, name)
        found = [lifecycle.status(config, compare=cluster is not None) for config in chosen]
    if json_file:
        plain = [_plain(one) for one in found]
        write_json(plain[0] if cluster or name else plain, json_file)
    if not json_file or str(json_file) != "-":
        for one in found:
            _show(one)
        if not found:
            console.output().print("no cluster is up; `relay up CLUSTER.yaml` starts one")
    healths = {one.health for one in found} or {"down"}
    if healths != {"healthy"}:
        raise typer.Exit(DOWN if healths == {"down"} else DEGRADED)


def _chosen(cluster: Path | None, name: str | None) -> list[ClusterConfig]:
    from relay_cluster import heads

    if cluster is not None:
        if name is not None:
            raise ConfigError("CLUSTER.yaml and --name exclude each other.")
        return [ClusterConfig.load(cluster)]
    if name is not None:
        record = heads.load(name)
        if record is None:
            known = ", ".join(r.name for r in heads.records()) or "none"
            raise ConfigError(f'no cluster "{name}" was brought up by this user (known: {known}).')
        return [_of(record)]
    return [_of(record) for record in heads.records()]


def _of(record: Record) -> ClusterConfig:
    """A cluster as far as its record tells."""
    address = None if record.head else record.address
    ray = {"address": address, "namespace": record.namespace, "auth": record.auth}
    return ClusterConfig.model_validate({"name": record.name, "ray": ray})


def down(
    cluster: _File = None,
    name: _Named = None,
    drain_timeout_s: _Drain = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """End a cluster that is up: what runs is finished; Ray is ended where `up` has started it."""
    config = ClusterConfig() if cluster is None and name is None else _chosen(cluster, name)[0]
    with StepProgress(f'cluster "{config.name}"') as progress:
        from relay_cluster import lifecycle

        with _half_done():
            ended = lifecycle.down(config, drain_timeout_s=_patience(config, drain_timeout_s), tell=progress)
    if json_file:
        write_json({"name": config.name, "ended": ended}, json_file)
    if not json_file or str(json_file) != "-":
        console.output().print(Text(f'"{config.name}" is down' if ended else f'"{config.name}" was not up'))


# --- showing ------------------------------------------------------------------------------------------------


def _plain(one: Status) -> dict[str, Any]:
    return {
        "name": one.name,
        "health": one.health,
        "why": list(one.why),
        "address": one.address,
        "head": asdict(one.head) if one.head else None,
        "nodes": list(one.nodes),
        "workers": [_worker(seen) for seen in one.workers],
        "shards": one.shards,
        "differences": list(one.differences),
    }


def _worker(seen: Any) -> dict[str, Any]:
    info, stats = seen.info, seen.stats
    arena = stats.get("arena")
    return {
        "worker": seen.worker,
        "state": seen.state,
        "fault": seen.fault,
        "node": info.node if info else "",
        "pid": info.pid if info else None,
        "incarnation": info.incarnation if info else None,
        "device": info.device if info else "",
        "model": info.model if info else "",
        "backends": list(info.backends) if info else [],
        "calls": stats.get("calls"),
        "segments": stats.get("segments_held"),
        "arena_used_bytes": arena.used * arena.stride if arena else None,
        "arena_bytes": arena.nbytes if arena else None,
    }


_STYLES: Final = {"healthy": "green", "up": "green", "down": "red", "failed": "red", "missing": "red"}


def _show(one: Status) -> None:
    out = console.output()
    head = Text(f"{one.name}  ", style="bold")
    head.append(one.health, style=_STYLES.get(one.health, "yellow"))
    if one.address:
        alive = [n for n in one.nodes if n["alive"]]
        head.append(f"  Ray at {one.address}, {len(alive)} node(s)", style="dim")
    if one.head and one.head.dashboard:
        head.append(f", {one.head.dashboard}", style="dim")
    out.print(head, soft_wrap=True)
    if one.workers:
        out.print(_worker_table(one))
    if one.shards:
        out.print(_shard_table(one))
    for line in one.why:
        out.print(Text(f"! {line}", style="yellow"), soft_wrap=True)
    for line in one.differences:
        out.print(Text(f"differs: {line}", style="yellow"), soft_wrap=True)


def _worker_table(one: Status) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("worker", "state", "node", "device", "pid", "incarnation", "calls", "segments", "arena"):
        table.add_column(name, overflow="fold")
    for seen in one.workers:
        row = _worker(seen)
        used, size = row["arena_used_bytes"], row["arena_bytes"]
        arena = "-" if size is None else f"{used / 1e6:,.0f} of {size / 1e6:,.0f} MB"
        keys = ("node", "device", "pid", "incarnation", "calls", "segments")
        state = Text(seen.state, style=_STYLES.get(seen.state, "yellow"))
        table.add_row(seen.worker, state, *(_cell(row[key]) for key in keys), arena)
    return table


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def _shard_table(one: Status) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("shard", "segments", "leases", "owners"):
        table.add_column(name, justify="left" if name == "shard" else "right", overflow="fold")
    for name, stats in one.shards.items():
        table.add_row(
            name, *(f"{stats[k]:,.0f}" if k in stats else "-" for k in ("segments", "leases", "owners"))
        )
    return table
