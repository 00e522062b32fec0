"""The faults of a campaign: what can go wrong, at which stages of a pipeline, and how it is done.

    upstream agent:  started --token*--> (publishing) --> done
    reader:                                               started: lookup, lease, pull --> token* --> done

A trial draws one stage of its kind. A `Stagehand` watches the pipeline's events and acts when the stage
comes. To add a kind, add a line to `KINDS` and, unless it is one of `transport.faults`, a deed to
`Stagehand`. It does not judge what comes of it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from ray.exceptions import RayError

from relay_cluster.bench.fault_cluster import WatchedCluster, send, signals
from relay_cluster.pipeline import Pipeline
from transport.errors import RelayError
from transport.faults import READ, FaultKind, FaultSpec
from transport.types import WorkerId

log = logging.getLogger(__name__)

BEFORE_LOOKUP: Final = "before_lookup"
IN_PULL: Final = "in_pull"  # leased, and about to read
IN_READ: Final = "in_read"  # the owner is stopped, so that the read is under way for sure
UPSTREAM_DECODE: Final = "upstream_decode"
PUBLISHING: Final = "publishing"
READER_DECODE: Final = "reader_decode"

HELD_MS: Final = 500.0
"""How long a pull, or a publication, is held up for a fault to come in between."""
_SEEN_TIMEOUT_S: Final = 30.0
_SETTLE_S: Final = 0.05
_RESTART_TIMEOUT_S: Final = 90.0
_EVERY_WRITE: Final = 1000


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    Attributes:
        stages: when it comes; one is drawn for every trial.
        pull_fails: a pull that it hits cannot succeed.
        spec: what is armed, for faults inside the reader (or, REUSE, the owner).
        loses: "owner" or "reader" where that worker's own request dies with it.
    """

    name: str
    stages: tuple[str, ...] = (BEFORE_LOOKUP,)
    pull_fails: bool = False
    spec: FaultSpec | None = None
    loses: str = ""


def _inside(kind: FaultKind, *, pull_fails: bool = True, **options: Any) -> Kind:
    return Kind(kind.value, pull_fails=pull_fails, spec=FaultSpec(kind=kind, **options))


KINDS: Final[Mapping[str, Kind]] = {
    kind.name: kind
    for kind in (
        _inside(FaultKind.DROP),
        _inside(FaultKind.HANG),
        _inside(FaultKind.DELAY, pull_fails=False, delay_ms=300.0),
        # Where nobody may pull a real cable; tests/multihost does that.
        _inside(FaultKind.LINK_DOWN),
        _inside(FaultKind.LINK_UP, pull_fails=False, delay_ms=600.0),
        _inside(FaultKind.CORRUPT),
        _inside(FaultKind.TRUNCATE),
        _inside(FaultKind.STALE),
        _inside(FaultKind.REUSE),
        _inside(FaultKind.LEASE_EXPIRY),
        # Of up to four segments at a time, each of which tries twice.
        _inside(FaultKind.ARENA_FULL, times=8),
        _inside(FaultKind.DIRECTORY_DROP, pull_fails=False),
        _inside(FaultKind.DIRECTORY_DELAY, pull_fails=False, delay_ms=300.0),
        Kind("disk_full", pull_fails=True),
        Kind("owner_kill", (BEFORE_LOOKUP, IN_PULL, IN_READ)),
        Kind("owner_stop", (BEFORE_LOOKUP, IN_PULL)),
        Kind("owner_restart"),
        Kind("upstream_kill", (UPSTREAM_DECODE, PUBLISHING), loses="owner"),
        Kind("reader_kill", (IN_PULL, READER_DECODE), loses="reader"),
        Kind("shard_kill", (BEFORE_LOOKUP, IN_PULL, UPSTREAM_DECODE, PUBLISHING)),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One pipeline under one fault.

    Attributes:
        upstream, reader: the agents at both ends of the relay that is disturbed.
        seed: of what the fault leaves to chance (bytes, the shard).
    """

    number: int
    kind: Kind
    stage: str
    pipeline: Pipeline
    inputs: Mapping[str, str]
    upstream: str
    reader: str
    seed: int


class Stagehand:
    """Does the harm of one trial, at its stage.

    Attributes:
        acted_at: time.monotonic() at which the fault was there; None until then.
        owner, target: workers of the upstream agent and of the reader, once they are known.
        killed: pids of workers that it ended.
        trouble: why the fault could not be done.
    """

    def __init__(self, cluster: WatchedCluster, trial: Trial) -> None:
        self._cluster = cluster
        self._trial = trial
        self._chance = random.Random(f"deed-{trial.seed}")
        self._stopped: list[int] = []
        self._once = threading.Lock()
        self._done = False
        self.acted_at: float | None = None
        self.owner: WorkerId | None = None
        self.target: WorkerId | None = None
        self.killed: set[int] = set()
        self.trouble = ""

    def on_event(self, event: str, agent: str, *more: Any) -> None:
        """Called by the executor, in the thread of the request; the pipeline waits meanwhile."""
        trial = self._trial
        try:
            if event == "agent_started" and agent == trial.upstream:
                self.owner = WorkerId(more[0])
                if trial.stage == PUBLISHING:
                    self._when_seen(self.owner, FaultKind.DIRECTORY_DELAY, calls=("publish",))
            elif event == "token" and agent == trial.upstream and trial.stage == UPSTREAM_DECODE:
                self._act()
            elif event == "agent_done" and agent == trial.upstream:
                self._before_reader()
            elif event == "token" and agent == trial.reader and trial.stage == READER_DECODE:
                self._act()
        except (RayError, RelayError) as error:
            self.trouble = f"{type(error).__name__}: {error}"
            log.warning("trial %d: the fault could not be done: %s", trial.number, error)

    def go_on(self) -> None:
        """Let stopped processes go on."""
        while self._stopped:
            send(self._stopped.pop(), signals()["continue"])

    # -- when ----------------------------------------------------------------------------------------------

    def _before_reader(self) -> None:
        stage = self._trial.stage
        self.target = self._cluster.worker_for(self._trial.reader)
        if stage == BEFORE_LOOKUP:
            self._act()
        elif stage == IN_PULL:
            self._when_seen(self.target, FaultKind.DELAY)
        elif stage == IN_READ:
            assert self.owner is not None  # it has answered
            self._stop(self._cluster.worker_pid(self.owner))
            self._watch(self.target, READ)

    def _when_seen(self, worker: WorkerId, held: FaultKind, calls: tuple[str, ...] = ()) -> None:
        """Hold the worker up at its next pull or call, and act then."""
        self._cluster.inject(worker, FaultSpec(kind=held, delay_ms=HELD_MS, calls=calls))
        self._watch(worker, held)

    def _watch(self, worker: WorkerId, what: str) -> None:
        thread = threading.Thread(
            target=self._act_when, args=(worker, what), name=f"trial-{self._trial.number}", daemon=True
        )
        thread.start()

    def _act_when(self, worker: WorkerId, what: str) -> None:
        deadline = time.monotonic() + _SEEN_TIMEOUT_S
        try:
            while time.monotonic() < deadline and not self._done:
                if any(event.what == what for event in self._cluster.facts(worker).events):
                    if self._trial.stage == IN_READ:
                        time.sleep(_SETTLE_S)  # let the read be posted
                    self._act()
                    return
                time.sleep(0.01)
        except (RayError, RelayError) as error:
            self.trouble = f"{type(error).__name__}: {error}"

    # -- what ----------------------------------------------------------------------------------------------

    def _act(self) -> None:
        with self._once:
            if self._done:
                return
            self._done = True
        spec = self._trial.kind.spec
        if spec is None:
            self.acted_at = getattr(self, f"_{self._trial.kind.name}")()
            return
        chance = self._chance
        drawn = replace(
            spec,
            seed=self._trial.seed,
            nbytes=chance.choice((1, 4096)),
            reply=chance.random() < 0.5,
            calls=("lease",),  # what every hit goes through; look-ups come behind it, for what was not leased
        )
        worker = self.owner if spec.kind is FaultKind.REUSE else self.target
        assert worker is not None  # the upstream agent has answered
        self._cluster.inject(worker, drawn)
        self.acted_at = time.monotonic()

    def _stop(self, pid: int) -> float:
        self._stopped.append(pid)
        return send(pid, signals()["stop"])

    def _kill(self, pid: int) -> float:
        self.killed.add(pid)
        return send(pid, signals()["kill"])

    def _owner_pid(self) -> int:
        """Of a process that may be stopped and then does not tell it itself."""
        assert self.owner is not None  # its agent has been started
        info = self._cluster.workers.get(self.owner)
        if self._stopped and info is not None:
            return self._stopped[-1]
        return self._cluster.worker_pid(self.owner)

    def _owner_kill(self) -> float:
        return self._kill(self._owner_pid())

    def _owner_stop(self) -> float:
        return self._stop(self._owner_pid())

    def _owner_restart(self) -> float:
        assert self.owner is not None  # its agent has answered
        pid = self._owner_pid()
        at = self._kill(pid)
        self._cluster.await_life(self.owner, pid, _RESTART_TIMEOUT_S)
        return at

    def _disk_full(self) -> float:
        """The owner runs out of memory and then of disk: all that it has published is lost."""
        assert self.owner is not None  # its agent has answered
        self._cluster.inject(self.owner, FaultSpec(kind=FaultKind.DISK_FULL, times=_EVERY_WRITE))
        return time.monotonic()

    def _upstream_kill(self) -> float:
        return self._kill(self._owner_pid())

    def _reader_kill(self) -> float:
        worker = self.target or self._cluster.worker_for(self._trial.reader)
        return self._kill(self._cluster.worker_pid(worker))

    def _shard_kill(self) -> float:
        pids = self._cluster.shard_pids()
        return send(pids[self._trial.seed % len(pids)], signals()["kill"])
