"""`relay ls`, `relay evict`, `relay pin`, `relay unpin` and `relay directory ...`: what the directory of a
running cluster holds, and what operators do to it. Parses, shows and exits; `directory.py` does the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import HELP, DebugOption, JsonOption, command, examples, write_json
from relay_cluster.config import ClusterConfig
from transport.directory.catalogue import Filter, Listed
from transport.errors import ConfigError

if TYPE_CHECKING:
    from relay_cluster.directory import Attached

directory_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="rich", help="The shards of a running cluster's directory."
)

_Prefix = Annotated[
    str | None,
    typer.Argument(
        metavar="[KEY_PREFIX]",
        help="Start of the digest, or SPACE/DIGEST with the start of each, as ls shows.",
        show_default=False,
    ),
]
_Owner = Annotated[str, typer.Option("--owner", metavar="WORKER", help="Only what this worker holds.")]
_Idle = Annotated[
    float, typer.Option("--idle-s", min=0.0, metavar="N", help="Only what was not used for so many seconds.")
]
_Kind = Annotated[
    str, typer.Option("--variant", metavar="exact|rectified", help="Only exact, or only rectified KV.")
]
_All = Annotated[bool, typer.Option("--all", help="Everything that the filters leave; needed without any.")]
_Cluster = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="Cluster that runs; default: the one on this machine."),
]
_Directory = Annotated[
    str | None,
    typer.Option("--directory", metavar="NAME", help="Which one, where several relay clusters run."),
]
_Name = Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the pin.")]

_COLUMNS = ("segment", "tokens", "bytes", "variant", "owner", "node", "leases", "pinned", "idle")


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(directory_app, name="directory", context_settings=HELP)
    few = examples("relay ls", "relay ls --owner w0 --idle-s 60 --json -")
    app.command("ls", epilog=few)(command(ls))
    few = examples("relay evict 3fa9", "relay evict --owner w1 --idle-s 600")
    app.command("evict", epilog=few)(command(evict))
    few = examples("relay pin 3fa9 --ttl-s 3600", "relay pin --owner w0 --ttl-s 600 --name demo")
    app.command("pin", epilog=few)(command(pin))
    few = examples("relay unpin 3fa9", "relay unpin --name demo")
    app.command("unpin", epilog=few)(command(unpin))


@contextmanager
def _running(cluster: Path | None, directory: str | None) -> Iterator[Attached]:
    config = ClusterConfig.load(cluster) if cluster else ClusterConfig()
    with console.errors().status("joining the cluster"):
        from relay_cluster.directory import attached
        from relay_cluster.heads import settled

        entered = attached(settled(config), directory)
        found = entered.__enter__()
    try:
        yield found
    finally:
        entered.__exit__(None, None, None)


def _filter(prefix: str | None, **more: Any) -> Filter:
    kind = more.pop("kind", "")
    if kind not in ("", "exact", "rectified"):
        raise ConfigError(f'--variant "{kind}" is neither exact nor rectified.')
    return Filter(key_prefix=(prefix or "").lower(), kind=kind, **more)


def _chosen(prefix: str | None, everything: bool, **more: Any) -> Filter:
    """A filter for something that changes the directory: nothing is meant by saying nothing."""
    chosen = _filter(prefix, **more)
    if chosen == Filter() and not everything:
        raise ConfigError("name a KEY_PREFIX or a filter, or pass --all.")
    return chosen


def ls(
    prefix: _Prefix = None,
    owner: _Owner = "",
    idle_s: _Idle = 0.0,
    variant: _Kind = "",
    leased: Annotated[bool, typer.Option("--leased", help="Only what readers lease now.")] = False,
    pinned: Annotated[bool, typer.Option("--pinned", help="Only what is pinned.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="At most so many rows.")] = 200,
    cluster: _Cluster = None,
    directory: _Directory = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """List the segments that the workers of a running cluster hold."""
    chosen = _filter(prefix, owner=owner, idle_s=idle_s, kind=variant, leased=leased, pinned=pinned)
    with _running(cluster, directory) as found:
        rows = list(itertools.islice(found.operator.rows(chosen), limit + 1))
    _show([_plain(row) for row in rows[:limit]], json_file)
    if len(rows) > limit:
        console.errors().print(Text(f"there are more than {limit}: pass --limit", style="dim"))


def evict(
    prefix: _Prefix = None,
    owner: _Owner = "",
    idle_s: _Idle = 0.0,
    variant: _Kind = "",
    everything: _All = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", min=0.1, metavar="N", help="How long to wait for the owners.")
    ] = 15.0,
    cluster: _Cluster = None,
    directory: _Directory = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Have workers give up segments that nobody leases and no pin keeps; their blocks are free then."""
    chosen = _chosen(prefix, everything, owner=owner, idle_s=idle_s, kind=variant)
    with _running(cluster, directory) as found:
        done = found.operator.evict(chosen, timeout_s=timeout_s)
    facts = {"segments": done.segments, "bytes": done.nbytes, "busy": done.busy, "left": done.left}
    _tell(
        f"evicted {done.segments} segments, {done.nbytes:,} bytes; {done.busy} are in use and stay"
        + (f"; {done.left} were not given up within {timeout_s:g} s" if done.left else ""),
        facts,
        json_file,
    )


def pin(
    prefix: _Prefix = None,
    ttl_s: Annotated[
        float, typer.Option("--ttl-s", min=1.0, metavar="N", help="How long, in seconds.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    name: _Name = "operator",
    owner: _Owner = "",
    everything: _All = False,
    cluster: _Cluster = None,
    directory: _Directory = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Keep the segments that are there now from eviction, for a bounded time."""
    chosen = _chosen(prefix, everything, owner=owner)
    with _running(cluster, directory) as found:
        rows = found.operator.pin(chosen, name=name, ttl_s=ttl_s)
        limit_s = found.operator.settings.max_pin_s
    kept = [row for row in rows if name in row.pins]
    what = f'pinned {len(kept)} of {len(rows)} segments as "{name}" for {min(ttl_s, limit_s):g} s'
    _tell(what, {"pinned": len(kept), "matched": len(rows)}, json_file)


def unpin(
    prefix: _Prefix = None,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Only pins of this name.")] = "",
    owner: _Owner = "",
    everything: _All = False,
    cluster: _Cluster = None,
    directory: _Directory = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """End pins before their time."""
    chosen = _chosen(prefix, everything or bool(name), owner=owner)
    with _running(cluster, directory) as found:
        rows = found.operator.unpin(chosen, name=name)
    left = sum(bool(row.pins) for row in rows)
    what = f"{len(rows)} segments looked at; {left} of them are still pinned"
    _tell(what, {"matched": len(rows), "pinned": left}, json_file)


@directory_app.command("resize", epilog=examples("relay directory resize 4"))
@command
def directory_resize(
    shards: Annotated[int, typer.Argument(metavar="N", min=1, help="Number of shards.", show_default=False)],
    drain_s: Annotated[
        float | None,
        typer.Option(
            "--drain-s", min=0.0, metavar="N", help="End a shard that leaves after so many seconds."
        ),
    ] = None,
    cluster: _Cluster = None,
    directory: _Directory = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Add or remove shards while requests run: keys that move are misses for about a heartbeat."""
    with _running(cluster, directory) as found, console.errors().status("moving keys"):
        from relay_cluster.directory import resize

        view = resize(found.operator, found.prefix, shards, drain_s=drain_s)
    what = f"the directory has {len(view.shards)} shards now (epoch {view.epoch})"
    _tell(what, {"epoch": view.epoch, "shards": list(view.shards)}, json_file)


@directory_app.command("stats", epilog=examples("relay directory stats", "relay directory stats --json -"))
@command
def directory_stats(
    cluster: _Cluster = None,
    directory: _Directory = None,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Show every shard's counts: segments, leases by age, memory."""
    with _running(cluster, directory) as found:
        shards = found.operator.stats()
    if json_file:
        write_json(shards, json_file)
    if json_file and str(json_file) == "-":
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for name in shards:
        table.add_column(name, justify="right", overflow="fold")
    for fact in next(iter(shards.values()), {}):
        table.add_row(fact.replace("_", " "), *(f"{s.get(fact, 0):,.0f}" for s in shards.values()))
    console.output().print(table)


def _plain(row: Listed) -> dict[str, Any]:
    return {
        "space": row.key.space,
        "digest": row.key.digest.hex(),
        "tokens": row.num_tokens,
        "bytes": row.nbytes,
        "variant": "rectified" if row.rectified else "exact",
        "context": row.variant,
        "owner": row.owner,
        "node": row.node,
        "leases": row.leases,
        "pins": {name: round(left_s, 3) for name, left_s in row.pins.items()},
        "idle_s": round(row.idle_s, 3),
        "complete": row.complete,
    }


def _show(rows: list[dict[str, Any]], json_file: Path | None) -> None:
    if json_file:
        write_json(rows, json_file)
    if json_file and str(json_file) == "-":
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _COLUMNS:
        right = name in ("tokens", "bytes", "leases", "idle")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    console.output().print(table)
    total = sum(row["bytes"] for row in rows)
    console.errors().print(Text(f"{len(rows)} segments, {total:,} bytes", style="dim"))


def _cells(row: Mapping[str, Any]) -> list[Text]:
    pins = ", ".join(f"{name} {left_s:.0f} s" for name, left_s in row["pins"].items())
    cells = [
        f"{row['space'][:8]}/{row['digest'][:12]}",
        f"{row['tokens']:,}",
        f"{row['bytes']:,}",
        row["variant"] if row["complete"] else f"{row['variant']}, growing",
        row["owner"],
        row["node"],
        str(row["leases"]),
        pins or "-",
        f"{row['idle_s']:.0f} s",
    ]
    return [Text(cell) for cell in cells]


def _tell(text: str, facts: Mapping[str, Any], json_file: Path | None) -> None:
    if json_file:
        write_json(facts, json_file)
    if not json_file or str(json_file) != "-":
        console.output().print(Text(text), soft_wrap=True)
