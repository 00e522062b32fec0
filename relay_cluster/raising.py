"""Makes, repairs, restarts and ends the detached actors of a standing cluster, in the Ray cluster that this
process has joined. Names and comparisons are in `standing.py`; Ray itself is `lifecycle.py`'s matter.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Final

import ray
import ray.util
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from relay_cluster import standing
from relay_cluster.config import ClusterConfig
from relay_cluster.faulting import unwrapped
from relay_cluster.links import choose_wire
from relay_cluster.nodes import bundles
from relay_cluster.standing import Difference, Seen
from transport.directory.client import DirectoryClient
from transport.directory.operate import DirectoryOperator
from transport.directory.shard import create_shard, find_names, kill_shards, shard_name
from transport.errors import DeadlineExceeded, RelayError
from transport.settings import TransportSettings
from transport.types import WorkerId
from workers.actor import WorkerInfo, WorkerSpec, remote_worker

log = logging.getLogger(__name__)
# It warns that such actors end with their placement group. They are to: `down` removes both.
logging.getLogger("ray.actor").setLevel(logging.ERROR)

Tell = Callable[[str, str], None]
"""Called with (worker, or "" for the whole, what happens)."""

_LOOK_S: Final = 10.0
_LINK_TIMEOUT_S: Final = 20.0
_NAME_FREE_S: Final = 20.0
_CALL_S: Final = 5.0
_POLL_S: Final = 0.2
_SETTLE_S: Final = 0.5
"""From the end of the last call to the end of its process: its answer is on its way meanwhile."""


@dataclass(frozen=True, slots=True)
class Raised:
    """What `raise_up` did.

    Attributes:
        workers: all of them.
        started: those that were made now. replaced: those that had been lost among them.
        differences: settings in which what is up is not what the file says.
    """

    workers: tuple[WorkerInfo, ...]
    started: tuple[WorkerId, ...]
    replaced: tuple[WorkerId, ...]
    differences: tuple[Difference, ...]


class Raising:
    """One standing cluster, to be made, repaired, restarted or ended.

    Args:
        config: its file.
        count: workers.
        here: all of it runs on this machine.
        tell: hears of progress.
        pulses: folder of the workers' sockets; "": none.
    """

    def __init__(
        self, config: ClusterConfig, count: int, *, here: bool, tell: Tell, pulses: str = ""
    ) -> None:
        self._config = config
        self._names = standing.numbered(count)
        self._here = here
        self._tell = tell
        self._transport = config.transport
        self._shards: tuple[str, ...] = ()
        self._pulses = pulses

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the directory's shards, once it is up."""
        return self._shards

    # -- up ------------------------------------------------------------------------------------------------

    def up(self) -> Raised:
        """Make what is missing, and wait until all workers take requests. Does nothing where all is there.

        Raises:
            ConfigError: nodes or GPUs that are not there. DeadlineExceeded: no room for the workers, or they
                were not ready, within runtime.start_timeout_s. RelayError: a worker could not start.
        """
        group, made = self._group()
        self._ensure_shards()
        seen = standing.look(self._config.name, self._names, timeout_s=0.0 if made else _LOOK_S)
        specs = [s.spec for s in seen if s.spec is not None]
        if any(s.state in ("missing", "failed") for s in seen):
            self._settle_wire(specs)
        started = [s.worker for s in seen if self._repair(s, group)]
        infos = self._await_ready(seen, started)
        different = [*self._regrouped(group), *standing.differences(self._config, specs)]
        replaced = () if made else tuple(started)
        return Raised(tuple(infos), tuple(started), replaced, tuple(different))

    def is_up(self) -> bool:
        """Whether anything of it is there to be restarted."""
        return standing.find(self._config.name) is not None

    def _repair(self, seen: Seen, group: PlacementGroup) -> bool:
        """Make a worker that is missing; whether it had to be made."""
        if seen.state == "draining":  # a restart was interrupted
            ray.get(seen.handle.drain.remote(False), timeout=_CALL_S)
            self._tell(seen.worker, "takes requests again")
        if seen.state not in ("missing", "failed"):
            return False
        if seen.state == "failed":
            self._tell(seen.worker, f"is replaced: {seen.fault}")
            _kill(seen.handle)
        seen.handle = self._spawn(seen.worker, group)
        self._tell(seen.worker, "loads the model")
        return True

    def _settle_wire(self, specs: Sequence[WorkerSpec]) -> None:
        """All workers use one wire format: the one of those that are up."""
        if specs and self._config.transport.wire == "auto":
            chosen = specs[0].transport.wire
        else:
            nodes = [str(node["NodeID"]) for node in ray.nodes() if node["Alive"]]
            chosen, _ = choose_wire(self._config.transport, nodes, timeout_s=_LINK_TIMEOUT_S)
        self._transport: TransportSettings = replace(self._config.transport, wire=chosen)

    def _ensure_shards(self) -> None:
        prefix, settings = standing.directory_prefix(self._config.name), self._config.directory
        present = find_names().get(prefix, ())
        wanted = tuple(shard_name(prefix, i) for i in range(settings.shards))
        first = wanted
        if present:
            view = DirectoryOperator.of(present).view
            wanted = view.shards  # a resize may have changed it
            first = wanted if view.epoch == 0 else ()
        for name in wanted:
            if name not in present:
                create_shard(name, settings, first=first, detached=True)
        self._shards = wanted

    def _group(self) -> tuple[PlacementGroup, bool]:
        """The placement group, and whether it was made now."""
        name = standing.group_name(self._config.name)
        try:
            return ray.util.get_placement_group(name), False
        except ValueError:
            pass  # there is none yet
        wanted = bundles(self._config, len(self._names))
        self._tell("", f"placing {len(wanted)} workers")
        # As near to each other as they fit: what they relay then stays within a machine.
        group = placement_group(wanted, strategy="PACK", name=name, lifetime="detached")
        timeout_s = self._config.runtime.start_timeout_s
        if not group.wait(timeout_s):
            remove_placement_group(group)
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise DeadlineExceeded(
                f"Ray found no room for {len(wanted)} workers of {wanted[0]} within {timeout_s:.0f} s "
                f"(runtime.start_timeout_s); free: {free}. Lower `workers`, or end what else runs there."
            )
        return group, True

    def _regrouped(self, group: PlacementGroup) -> list[Difference]:
        """Whether workers are as many, on the nodes and devices that the file says."""
        up, wanted = group.bundle_specs, bundles(self._config, len(self._names))
        if len(up) != len(wanted):
            return [Difference("workers", len(up), len(wanted), restart=False)]
        # The share of the CPUs depends on what else the cluster has.
        places = [[{k: v for k, v in b.items() if k != "CPU"} for b in side] for side in (up, wanted)]
        if places[0] == places[1]:
            return []
        return [Difference("nodes", *(_places(p) for p in places), restart=False)]

    def _spawn(self, worker: WorkerId, group: PlacementGroup) -> Any:
        index = self._names.index(worker)
        held = group.bundle_specs[index]
        spec = standing.worker_spec(
            self._config, worker, self._config.model, self._transport, self._shards, here=self._here
        )
        deadline = time.monotonic() + _NAME_FREE_S
        while True:
            try:
                return remote_worker(
                    replace(spec, pulses=self._pulses),
                    name=standing.worker_name(self._config.name, worker),
                    num_cpus=held.get("CPU", 0.0),
                    num_gpus=held.get("GPU", 0.0),
                    max_restarts=self._config.runtime.max_restarts,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=index
                    ),
                    detached=True,
                )
            except ValueError as error:  # the name is taken by one that is ending
                if time.monotonic() > deadline:
                    raise RelayError(f"worker {worker} cannot be made: {error}") from error
                time.sleep(_POLL_S)

    def _await_ready(self, seen: Sequence[Seen], new: Sequence[WorkerId] = ()) -> list[WorkerInfo]:
        """Wait until all take requests."""
        timeout_s = self._config.runtime.start_timeout_s
        deadline = time.monotonic() + timeout_s
        pending = {s.handle.info.remote(): s for s in seen}
        infos: dict[WorkerId, WorkerInfo] = {}
        while pending:
            done, _ = ray.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                names = ", ".join(s.worker for s in pending.values())
                raise DeadlineExceeded(
                    f"workers {names} were not ready within {timeout_s:.0f} s. Raise "
                    "runtime.start_timeout_s, or see `relay status` and the logs in Ray's session folder."
                )
            one = pending.pop(done[0])
            try:
                info: WorkerInfo = ray.get(done[0])
            except ActorUnavailableError:  # it has died, and Ray starts it again
                time.sleep(_POLL_S)
                pending[one.handle.info.remote()] = one
                continue
            except RayError as error:
                raise unwrapped(error, f"worker {one.worker} could not start") from None
            infos[one.worker] = info
            if one.worker in new:
                self._tell(one.worker, f"ready on {info.node} ({info.device}, pid {info.pid})")
        return [infos[s.worker] for s in seen]

    # -- restart -------------------------------------------------------------------------------------------

    def restart(self, *, drain_timeout_s: float) -> Raised:
        """Replace the workers one after the other by new ones of the file's settings. Each is drained first:
        requests that it runs are answered, and new ones go to others, or wait for its successor.

        Raises:
            RelayError: a new worker did not come up; those behind it are as they were, and `up` repairs.
        """
        group, _ = self._group()
        self._ensure_shards()
        seen = standing.look(self._config.name, self._names, timeout_s=_LOOK_S)
        specs = [s.spec for s in seen if s.spec is not None]
        self._settle_wire(specs)
        with closing(DirectoryClient(self._shards, self._config.directory)) as directory:
            infos = [self._replace(one, group, directory, drain_timeout_s) for one in seen]
        workers = tuple(one.worker for one in seen)
        different = [d for d in standing.differences(self._config, specs) if not d.restart]
        return Raised(tuple(infos), workers, workers, (*self._regrouped(group), *different))

    def _replace(
        self, one: Seen, group: PlacementGroup, directory: DirectoryClient, drain_timeout_s: float
    ) -> WorkerInfo:
        if one.handle is not None:
            self._drain([one], drain_timeout_s)
            if one.info is not None:
                # Nobody begins to read from it any more.
                directory.drop_owner(one.worker, one.info.incarnation)
            self._end([one])
        one.handle = self._spawn(one.worker, group)
        self._tell(one.worker, "loads the model")
        return self._await_ready([one], [one.worker])[0]

    def _drain(self, ones: Sequence[Seen], timeout_s: float) -> None:
        """Let workers finish what they run, and begin nothing new."""
        left = {s.worker: s for s in ones if s.state in ("up", "draining")}
        deadline = time.monotonic() + timeout_s
        told: dict[WorkerId, int] = {}
        while left:
            for worker, one in list(left.items()):
                running = _drained(one.handle)
                if not running:
                    del left[worker]
                elif told.get(worker) != running:
                    told[worker] = running
                    self._tell(worker, f"finishes {running} calls" if running > 0 else "does not answer")
            if left and time.monotonic() > deadline:
                names = ", ".join(left)
                self._tell("", f"{names} did not finish within {timeout_s:.0f} s: their callers start again")
                return
            time.sleep(_POLL_S if left else _SETTLE_S)

    def _end(self, ones: Sequence[Seen]) -> None:
        closing = [s.handle.close.remote() for s in ones if s.state in ("up", "draining")]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=self._config.runtime.stop_timeout_s)
        for one in ones:
            if one.handle is not None:
                _kill(one.handle)

    # -- down ----------------------------------------------------------------------------------------------

    def down(self, *, drain_timeout_s: float) -> bool:
        """Drain and end the workers, then the directory, and give their room back. Idempotent.

        Returns:
            whether there was something to end.
        """
        name = self._config.name
        found = standing.find(name)
        workers = found.workers if found else ()
        seen = standing.look(name, workers, timeout_s=_LOOK_S)
        if seen:
            self._tell("", f"ending {len(seen)} workers")
            self._drain(seen, drain_timeout_s)
            self._end(seen)
        prefix = standing.directory_prefix(name)
        shards = find_names().get(prefix, ())
        kill_shards(prefix)
        try:
            remove_placement_group(ray.util.get_placement_group(standing.group_name(name)))
        except ValueError:
            return bool(seen or shards)
        return True


def _places(held: Sequence[dict[str, float]]) -> str:
    return ", ".join("+".join(sorted(bundle)) or "anywhere" for bundle in held)


def _drained(handle: Any) -> int:
    """Calls that still run, or -1 where it does not say; 0 also where nobody is left to run them."""
    try:
        return ray.get(handle.drain.remote(), timeout=_CALL_S)
    except GetTimeoutError:
        return -1
    except RayError as error:
        log.warning("a worker cannot be drained: %s", error)
        return 0


def _kill(handle: Any) -> None:
    try:
        ray.kill(handle)
    except (RayError, ValueError) as error:
        log.warning("an actor could not be ended: %s", error)


__all__ = ["Raised", "Raising", "Tell"]
