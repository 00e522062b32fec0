"""`relay up`, `status`, `down` and the rolling restart, from a cluster file to a standing cluster and back.

    up       record? -> Ray (ours or theirs) -> actors (`raising.py`) -> record
    status   record or file -> join -> look
    down     record or file -> join -> end the actors -> end Ray, if it is ours -> forget the record

One of these at a time works on a cluster, for each user. Ray that somebody else has started is never ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import ray
from filelock import FileLock, Timeout

from relay_cluster import heads, standing
from relay_cluster.access import inside_job
from relay_cluster.config import ClusterConfig, RaySettings
from relay_cluster.heads import Record
from relay_cluster.joining import join, visiting
from relay_cluster.raising import Raised, Raising, Tell
from relay_cluster.standing import Seen
from relay_cluster.unchanged import made
from transport.directory.operate import DirectoryOperator
from transport.errors import ConfigError, DirectoryUnavailable, RelayError

_LOCK_S: Final = 5.0
_LOOK_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Up:
    """A standing cluster after `up`. new_head: whether Ray was started for it now."""

    record: Record
    raised: Raised
    new_head: bool


@dataclass(frozen=True, slots=True)
class Status:
    """What is up of a cluster.

    Attributes:
        health: "healthy"; "degraded" where something is missing or does not take requests; "down".
        why: what keeps it from being healthy, in plain words.
        nodes: as Ray tells them. shards: name -> statistics, empty for one that does not answer.
        differences: from the file, where one was given.
    """

    name: str
    address: str
    health: str
    why: tuple[str, ...] = ()
    head: heads.Head | None = None
    nodes: tuple[dict[str, Any], ...] = ()
    workers: tuple[Seen, ...] = ()
    shards: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    differences: tuple[str, ...] = ()


def worker_count(config: ClusterConfig) -> int:
    """Workers of a standing cluster: `auto` is what the service starts."""
    return config.serve.workers if config.workers == "auto" else config.workers


def up(
    config: ClusterConfig,
    *,
    file: Path | None,
    restart: bool = False,
    drain_timeout_s: float,
    tell: Tell,
) -> Up:
    """Bring a cluster up, or what is missing of it. A head that was started for one that then did not come up
    is ended again.

    Args:
        restart: also replace the workers, one after the other.

    Raises:
        ConfigError: what the file asks for is not there, or another command works on this cluster.
        RelayError: Ray or a worker did not come up.
    """
    with _alone(config.name):
        record, new_head = _ray(config, file, tell)
        try:
            with _joined(config, record, tell):
                here = config.ray.address is None and record.head is not None
                folder = record.head.folder if here and record.head else ""
                raising = Raising(config, worker_count(config), here=here, tell=tell, pulses=folder)
                raised = raising.up() if new_head or not restart else _restarted(raising, drain_timeout_s)
                record = replace(
                    record, address=_address(), made=made(config, raised.workers, raising.shards)
                )
        except BaseException:
            if new_head and record.head is not None:
                heads.end_head(record.head)
                heads.forget(record.name)
            raise
        heads.save(record)
    return Up(record, raised, new_head)


def _restarted(raising: Raising, drain_timeout_s: float) -> Raised:
    if raising.is_up():
        return raising.restart(drain_timeout_s=drain_timeout_s)
    return raising.up()


def _ray(config: ClusterConfig, file: Path | None, tell: Tell) -> tuple[Record, bool]:
    """Where Ray is, and whether it was started now."""
    old = heads.load(config.name)
    named = "" if file is None else str(file.absolute())
    if config.ray.address is not None or inside_job(os.environ):
        address = config.ray.address or "auto"
        return Record(config.name, address, config.ray.namespace, named, config.ray.auth), False
    if old is not None and old.head is not None:
        if heads.is_alive(old.head):
            return replace(old, file=named), False
        tell("", "Ray's head has ended by itself; a new one is started")
        heads.end_head(old.head)
    tell("", "starting Ray")
    head, address, auth = heads.start_head(
        config.ray, timeout_s=config.runtime.start_timeout_s, environment=os.environ
    )
    record = Record(config.name, address, config.ray.namespace, named, auth, head)
    heads.save(record)  # before anything else can fail: `down` must find it
    return record, True


def down(config: ClusterConfig, *, drain_timeout_s: float, tell: Tell) -> bool:
    """Drain and end a cluster, and Ray where `up` has started it. Idempotent.

    Returns:
        whether there was something to end.

    Raises:
        ConfigError: Ray is not ours and cannot be reached, or another command works on this cluster.
    """
    with _alone(config.name):
        record = heads.load(config.name)
        head = record.head if record else None
        found = False
        if head is None or heads.is_alive(head):
            if record is None and config.ray.address is None and not inside_job(os.environ):
                return False
            try:
                with _joined(config, record, tell):
                    raising = Raising(config, worker_count(config), here=True, tell=tell)
                    found = raising.down(drain_timeout_s=drain_timeout_s)
            except RelayError as error:
                if head is None:
                    raise
                tell("", f"{error}")  # Ray is broken: what is left of it goes anyway
        if head is not None:
            heads.end_head(head, lambda text: tell("", text))
            found = True
        heads.forget(config.name)
        return found


def status(config: ClusterConfig, *, compare: bool) -> Status:
    """Look at a cluster. compare: with the file.

    Raises:
        ConfigError: no token for it.
    """
    record = heads.load(config.name)
    nowhere = record is None and config.ray.address is None and not inside_job(os.environ)
    if nowhere:
        return Status(config.name, "", "down", ("it is not up: `relay up` starts it",))
    if record is not None and record.head is not None and not heads.is_alive(record.head):
        why = f"Ray's head (pid {record.head.pid}) has ended by itself: `relay up` starts it again"
        return Status(config.name, record.address, "down", (why,), record.head)
    settings = _settings(config, record)
    try:
        with visiting(settings):
            return _look(config, record, compare=compare)
    except ConfigError as error:
        return Status(config.name, settings.address or "", "down", (str(error),))


def _look(config: ClusterConfig, record: Record | None, *, compare: bool) -> Status:
    found = standing.find(config.name)
    nodes = tuple(_node(n) for n in ray.nodes())
    address, head = _address(), record.head if record else None
    if found is None:
        why = f'nothing of "{config.name}" runs in Ray namespace "{config.ray.namespace}"'
        return Status(config.name, address, "down", (why,), head, nodes)
    size = standing.group_size(config.name) or len(found.workers)
    seen = standing.look(config.name, standing.numbered(size), timeout_s=_LOOK_S)
    shards = _shards(tuple(found.shards))
    different = standing.differences(config, [s.spec for s in seen if s.spec]) if compare else ()
    why = [
        f"worker {s.worker} is {s.state}{': ' if s.fault else ''}{s.fault}" for s in seen if s.state != "up"
    ]
    why += [f"directory shard {name} does not answer" for name, stats in shards.items() if not stats]
    if not shards:
        why.append("the directory has no shard")
    health = "degraded" if why else "healthy"
    return Status(
        config.name,
        address,
        health,
        tuple(why),
        head,
        nodes,
        tuple(seen),
        shards,
        tuple(map(str, different)),
    )


def _shards(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Statistics of all shards that there should be."""
    if not names:
        return {}
    try:
        operator = DirectoryOperator.of(names)
    except DirectoryUnavailable:
        return {name: {} for name in names}
    told = operator.stats()
    return {name: told.get(name, {}) for name in operator.view.shards}


def _node(node: dict[str, Any]) -> dict[str, Any]:
    held = node["Resources"]
    return {
        "address": node["NodeManagerAddress"],
        "host": node["NodeManagerHostname"],
        "alive": node["Alive"],
        "cpus": held.get("CPU", 0.0),
        "gpus": held.get("GPU", 0.0),
    }


def _address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _settings(config: ClusterConfig, record: Record | None) -> RaySettings:
    """How to join the Ray cluster of a record, or else of the file."""
    if record is None or (config.ray.address is not None and config.ray.address != "auto"):
        return config.ray
    return replace(config.ray, address=record.address, namespace=record.namespace, auth=record.auth)


@contextmanager
def _joined(config: ClusterConfig, record: Record | None, tell: Tell) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    join(_settings(config, record), lambda text: tell("", text))
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """One command at a time for a cluster."""
    folder = heads.records_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{heads.slug(name)}.lock", timeout=_LOCK_S):
            yield
    except Timeout as error:
        raise ConfigError(
            f'another `relay up`, `down` or restart works on "{name}" at this moment; wait for it.'
        ) from error


__all__ = ["Status", "Up", "down", "status", "up", "worker_count"]
