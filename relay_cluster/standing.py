"""A standing cluster: detached actors under names that follow from the cluster's, so that any process finds
them. There is no other state: what is up is asked of the actors themselves.

    relay-up-NAME-w0, w1, ...        workers, one in each bundle of the placement group relay-up-NAME
    relay-directory-up-NAME-0, ...   directory shards

This module finds, compares and describes; `raising.py` makes and ends. Everything here belongs to the Ray
namespace that this process has joined.
"""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Final, Literal

import ray
import ray.util
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from relay_cluster.config import ClusterConfig
from relay_cluster.faulting import unwrapped
from relay_cluster.following import Follower
from relay_cluster.heads import slug
from transport.directory.shard import find_names
from transport.errors import RelayError, WorkerLost
from transport.settings import TransportSettings
from transport.types import WorkerId
from workers.actor import WorkerInfo, WorkerSpec

log = logging.getLogger(__name__)

_PREFIX: Final = "relay-up-"
_DIRECTORY: Final = "relay-directory-up-"

State = Literal["up", "draining", "starting", "restarting", "failed", "missing"]


# --- names --------------------------------------------------------------------------------------------------


def worker_name(name: str, worker: str) -> str:
    """Actor name of a worker."""
    return f"{_PREFIX}{slug(name)}-{worker}"


def group_name(name: str) -> str:
    """Name of the placement group."""
    return f"{_PREFIX}{slug(name)}"


def directory_prefix(name: str) -> str:
    """Of the names of the directory's shards."""
    return f"{_DIRECTORY}{slug(name)}"


@dataclass(frozen=True, slots=True)
class Found:
    """The actors of a standing cluster.

    Attributes:
        workers: in the order of their numbers.
        directory: prefix of the shards' names. shards: name -> handle.
    """

    name: str
    workers: tuple[WorkerId, ...]
    directory: str
    shards: dict[str, Any]


def find(name: str) -> Found | None:
    """The standing cluster of that name; None when nothing of it is there."""
    pattern = re.compile(re.escape(worker_name(name, "")) + r"(w(\d+))")
    matches = (pattern.fullmatch(str(actor)) for actor in ray.util.list_named_actors())
    workers = sorted((int(m[2]), WorkerId(m[1])) for m in matches if m)
    prefix = directory_prefix(name)
    if not workers:
        return None
    shards: dict[str, Any] = {}
    for shard in find_names().get(prefix, ()):
        with suppress(ValueError):  # it has ended since
            shards[shard] = ray.get_actor(shard)
    return Found(name, tuple(w for _, w in workers), prefix, shards)


def numbered(count: int) -> list[WorkerId]:
    """Names of so many workers."""
    return [WorkerId(f"w{i}") for i in range(count)]


def group_size(name: str) -> int:
    """How many workers there should be, by the placement group; 0 where there is none."""
    try:
        return ray.util.get_placement_group(group_name(name)).bundle_count
    except ValueError:
        return 0


def actor(name: str, worker: WorkerId) -> Any:
    """Handle of a worker. Raises ValueError when there is none."""
    return ray.get_actor(worker_name(name, worker))


# --- specs --------------------------------------------------------------------------------------------------


def worker_spec(
    config: ClusterConfig,
    worker: WorkerId,
    model: str,
    transport: TransportSettings,
    shards: tuple[str, ...],
    *,
    here: bool | None = None,
) -> WorkerSpec:
    """What a worker of this cluster is made of.

    Args:
        transport: the cluster's, with the wire format that was chosen.
        shards: names of the directory's.
        here: all of it on this machine, so that peers are reached over loopback; None: if Ray is our own.
    """
    alone = config.ray.address is None if here is None else here
    return WorkerSpec(
        worker=worker,
        model=model,
        settings=config.worker,
        transport=transport,
        directory=config.directory,
        directory_shards=shards,
        namespace=config.ray.namespace,
        host="127.0.0.1" if alone else None,
    )


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that is not what the file says.

    Attributes:
        key: as in the file. up, wanted: the two values.
        restart: whether a restart of the workers is enough to settle it.
    """

    key: str
    up: Any
    wanted: Any
    restart: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.up} is up, the file says {self.wanted}"


def differences(config: ClusterConfig, specs: Sequence[WorkerSpec]) -> list[Difference]:
    """What the file says, against what workers that are up were made of. Pure."""
    found: dict[str, Difference] = {}
    for spec in specs:
        transport = spec.transport
        if config.transport.wire == "auto":  # resolved when the cluster came up
            transport = replace(transport, wire="auto")
        pairs = {
            "worker": (spec.settings, config.worker, True),
            "transport": (transport, config.transport, True),
            "directory": (spec.directory, config.directory, False),
            "model": (spec.model, config.model, True),
        }
        for section, (up, wanted, restart) in pairs.items():
            for key, one, other in _unequal(section, up, wanted):
                found.setdefault(key, Difference(key, one, other, restart))
    return list(found.values())


def _unequal(key: str, up: Any, wanted: Any) -> list[tuple[str, Any, Any]]:
    if up == wanted:
        return []
    if is_dataclass(up) and is_dataclass(wanted) and type(up) is type(wanted):
        names = (f.name for f in fields(up))
        return [d for n in names for d in _unequal(f"{key}.{n}", getattr(up, n), getattr(wanted, n))]
    return [(key, up, wanted)]


def notes(config: ClusterConfig, specs: Sequence[WorkerSpec]) -> list[str]:
    """For who attaches with a file that says something else."""
    found = differences(config, specs)
    if not found:
        return []
    keys = ", ".join(d.key for d in found)
    return [f"it differs from the file in {keys}: what is up counts; `relay up` says more"]


# --- looking ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Seen:
    """A worker as it was found.

    Attributes:
        state: "starting" also stands for a process that does not answer.
        fault: why it failed.
        info, spec, stats: what it told; None or empty where it did not.
    """

    worker: WorkerId
    state: State
    handle: Any = None
    fault: str = ""
    info: WorkerInfo | None = None
    spec: WorkerSpec | None = None
    stats: Mapping[str, Any] = field(default_factory=dict[str, Any])


def look(name: str, workers: Sequence[WorkerId], *, timeout_s: float) -> list[Seen]:
    """The state of every worker, those that are missing included, after at most `timeout_s`."""
    seen: list[Seen] = []
    calls: dict[int, tuple[Any, Any, Any]] = {}
    for worker in workers:
        try:
            handle = actor(name, worker)
        except ValueError:
            seen.append(Seen(worker, "missing"))
            continue
        calls[len(seen)] = (handle.accepting.remote(), handle.spec.remote(), handle.info.remote())
        seen.append(Seen(worker, "starting", handle))
    deadline = time.monotonic() + timeout_s
    for index, asked in calls.items():
        ready, _ = ray.wait(list(asked), num_returns=3, timeout=max(0.0, deadline - time.monotonic()))
        if len(ready) == 3:
            _take(seen[index], asked)
    up = [s for s in seen if s.state in ("up", "draining")]
    stats = {s.worker: s.handle.stats.remote() for s in up}
    if stats:
        ray.wait(list(stats.values()), num_returns=len(stats), timeout=max(0.1, deadline - time.monotonic()))
    for s in up:
        s.stats = _now(stats[s.worker])
    return seen


def _take(seen: Seen, asked: tuple[Any, Any, Any]) -> None:
    accepting, spec, info = asked
    try:
        taking = ray.get(accepting)
        seen.spec, seen.info = ray.get(spec), ray.get(info)
        seen.state = "draining" if taking is None else "up"
    except ActorUnavailableError:
        seen.state = "restarting"
    except ActorDiedError as error:
        seen.state, seen.fault = "failed", str(unwrapped(error, f"worker {seen.worker}"))
    except RayError as error:  # what kept it from coming up
        seen.state, seen.fault = "failed", str(unwrapped(error, f"worker {seen.worker} could not start"))


def _now(call: Any) -> Mapping[str, Any]:
    try:
        return ray.get(call, timeout=0)
    except RayError as error:
        log.debug("no statistics: %s", error)
        return {}


def follow(found: Found, *, timeout_s: float) -> list[tuple[WorkerId, WorkerSpec, Follower]]:
    """Followers of all workers, for who sends requests to them. One that is being replaced now is awaited by
    its follower.

    Raises:
        WorkerLost: none of them answers within `timeout_s`.
    """
    followers = {w: Follower(functools.partial(actor, found.name, w)) for w in found.workers}
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        back = [f.back() for f in followers.values()]  # all of them are asked at once
        if all(back):
            break
        time.sleep(0.05)
    specs: dict[WorkerId, WorkerSpec] = {}
    for worker, follower in followers.items():
        if not follower.away:
            try:
                specs[worker] = ray.get(follower.handle.spec.remote(), timeout=timeout_s)
            except (RayError, RelayError) as error:
                log.warning("worker %s: %s", worker, error)
                follower.leave()
    if not specs:
        raise WorkerLost(
            f'"{found.name}" is up, but none of its workers answered within {timeout_s:.0f} s. '
            "`relay status` says more, and `relay up` replaces dead ones."
        )
    one = next(iter(specs.values()))
    return [(w, specs.get(w, replace(one, worker=w)), f) for w, f in followers.items()]
