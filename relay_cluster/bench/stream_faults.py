"""`relay bench stream-faults`: upstream agents that die, stop, change their minds, and drafts that go astray,
while their readers are prepared.

Real cluster, workers and model; the harm is done between the executor and the cluster. In `exact` mode every
answer must be full prefill's, token by token, which the same cluster gives for each text beforehand; when a
trial has ended no preparation may be left and every cache block must be free again.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ray.exceptions import RayError

from relay_cluster.bench.common import BASE, Document, progress
from relay_cluster.bench.fault_cluster import WatchedCluster
from relay_cluster.bench.stream_fault_rows import StreamFaultRow
from relay_cluster.bench.texts import Tasks
from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig
from relay_cluster.executor import Executor, RunOptions
from relay_cluster.pipeline import Agent, Pipeline, Stream
from relay_cluster.turns import Turn
from transport.errors import ConfigError, RelayError
from transport.types import WorkerId
from workers.messages import Draft
from workers.settings import DEFAULT_MODEL

log = logging.getLogger(__name__)

KINDS = ("lost", "late", "duplicated", "reordered", "branch", "cancelled", "writer_killed", "reader_killed")
"""Drafts that are lost, late, sent twice, overtaken by newer ones, or of a branch that is not taken; a run
that is cancelled; the worker of a writer, or of a reader that is prepared, killed."""
_TEXTS = 4
_REST_TIMEOUT_S = 60.0
_BACK_TIMEOUT_S = 120.0
_LATEST_S = 0.4

_PIPELINE = Pipeline(
    [
        Agent("solver", system="You solve problems.", prompt="Problem:\n{text}\nSolve it."),
        Agent("critic", system="You check.", prompt="Problem:\n{text}\nSolution:\n{solver}\nIs it right?"),
        Agent("judge", system="You decide.", prompt="One says:\n{critic}\nAnother:\n{solver}\nDecide."),
    ],
    name="stream-faults",
)


class _Enough(RelayError):
    """The caller of a trial's pipeline has had enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFaultsSettings:
    """kinds: of `KINDS`, in turn. deadline_s: of one pipeline."""

    trials: int = 200
    kinds: tuple[str, ...] = KINDS
    model: str = DEFAULT_MODEL
    seed: int = 0
    max_new_tokens: int = 12
    deadline_s: float = 180.0

    def cluster(self) -> ClusterConfig:
        """Two workers with a core each."""
        return ClusterConfig.model_validate(
            {
                "name": "stream-faults",
                "workers": 2,
                "model": self.model,
                "worker": {
                    "device": "cpu",
                    "threads": 1,
                    "cache_tokens": 4096,
                    "request_timeout_s": self.deadline_s / 2,
                },
                "transport": {"arena_bytes": 64 << 20},
                "ray": {"num_cpus": 2},
                "runtime": {"max_restarts": -1},
            }
        )


@dataclass(frozen=True, slots=True)
class Trial:
    """One pipeline under one kind of harm. text: which; at: token of `agent` at which a process is killed or
    the run is cancelled."""

    number: int
    kind: str
    text: int
    agent: str
    at: int
    seed: int


@dataclass(slots=True)
class _Seen:
    """What a trial showed."""

    hit: bool = False
    wrong: int = 0
    hang: bool = False
    blocks: int = 0
    preparations: int = 0
    error: str = ""
    retries: int = 0
    prepared: int = 0
    wasted: int = 0

    @property
    def failed(self) -> bool:
        return bool(self.wrong or self.hang or self.blocks or self.preparations or self.error)


def parse_stream_kinds(text: str | None) -> tuple[str, ...]:
    """Kinds of a comma-separated list; all of them where there is none.

    Raises:
        ConfigError: one is unknown.
    """
    named = tuple(filter(None, (item.strip() for item in (text or "").split(","))))
    for name in named:
        if name not in KINDS:
            raise ConfigError(f'--kinds "{name}" is no fault. Known: {", ".join(KINDS)}.')
    return named or KINDS


def draw_trials(settings: StreamFaultsSettings) -> tuple[Trial, ...]:
    """All trials, the kinds in turn; the rest by the seed."""
    chance = random.Random(f"stream-faults-{settings.seed}")
    return tuple(
        Trial(
            number=number,
            kind=settings.kinds[number % len(settings.kinds)],
            text=chance.randrange(_TEXTS),
            agent=chance.choice(("solver", "critic")),
            at=chance.randint(1, settings.max_new_tokens - 1),
            seed=chance.randrange(1 << 30),
        )
        for number in range(settings.trials)
    )


def run_stream_faults(settings: StreamFaultsSettings, tasks: Tasks) -> Document:
    """Run the campaign. Ctrl-C ends it early: the document then has the trials so far."""
    begin = time.monotonic()
    trials = draw_trials(settings)
    chance = random.Random(f"texts-{settings.seed}")
    texts = [" ".join(chance.choice(tasks.rows).text.split()[:60]) for _ in range(_TEXTS)]
    seen: dict[str, list[_Seen]] = {kind: [] for kind in settings.kinds}
    failures: list[dict[str, Any]] = []
    with (
        progress("stream-faults", len(trials)) as advance,
        WatchedCluster(settings.cluster(), agents_hint=_PIPELINE) as cluster,
    ):
        campaign = _Campaign(cluster, settings, texts)
        try:
            for trial in trials:
                found = campaign.run(trial)
                seen[trial.kind].append(found)
                advance(trial.kind)
                if found.failed:
                    failures.append({**asdict(trial), **asdict(found)})
                    log.error("a trial failed: %s", failures[-1])
                if found.hang:
                    break  # the cluster is not to be trusted any more
        except KeyboardInterrupt:
            log.warning("interrupted after %d of %d trials", sum(map(len, seen.values())), len(trials))
    facts = {
        **asdict(settings),
        "data": list(tasks.sources),
        "failures": failures,
        "seconds": round(time.monotonic() - begin, 1),
        "oracle": f"{BASE} of the same pipeline and text on the same cluster, before anything is harmed",
    }
    rows = [_row(kind, found) for kind, found in seen.items() if found]
    return Document(
        "stream_faults", facts, [*rows, _row("all", [s for found in seen.values() for s in found])]
    )


class _Campaign:
    """Runs trials on one cluster."""

    def __init__(self, cluster: WatchedCluster, settings: StreamFaultsSettings, texts: Sequence[str]) -> None:
        self._cluster = cluster
        self._settings = settings
        self._texts = texts
        self._whole: dict[int, dict[str, tuple[int, ...]]] = {}

    def run(self, trial: Trial) -> _Seen:
        """One trial, judged; the cluster is whole again afterwards."""
        if trial.text not in self._whole:
            turns = self._pipeline(self._cluster, trial.text, "off", None)
            self._whole[trial.text] = {name: turn.reply.token_ids for name, turn in turns.items()}
        seen = _Seen()
        harmed = Harmed(self._cluster, trial)
        before = self._wasted()
        ended: list[dict[str, Turn] | Exception] = []

        def run() -> None:
            try:
                ended.append(self._pipeline(harmed, trial.text, "exact", harmed.on_event))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what the trial is about
                ended.append(error)

        thread = threading.Thread(target=run, name=f"trial-{trial.number}", daemon=True)
        thread.start()
        thread.join(self._settings.deadline_s)
        if not ended or not harmed.settle(self._settings.deadline_s):
            seen.hang = True
            return seen
        self._judge(seen, trial, ended[0])
        seen.hit = harmed.hit
        try:
            self._cluster.await_alive(_BACK_TIMEOUT_S)
            seen.blocks, seen.preparations = self._rest()
            seen.wasted = max(0, self._wasted() - before)
        except (RelayError, RayError) as lost:
            log.error("trial %d: the cluster is not whole again: %s", trial.number, lost)  # noqa: TRY400
            seen.hang = True
        return seen

    def _judge(self, seen: _Seen, trial: Trial, ended: dict[str, Turn] | Exception) -> None:
        if isinstance(ended, Exception):
            if not (trial.kind == "cancelled" and isinstance(ended, _Enough)):
                seen.error = f"{type(ended).__name__}: {ended}"
            return
        for name, tokens in self._whole[trial.text].items():
            turn = ended[name]
            seen.wrong += turn.reply.token_ids != tokens
            seen.retries += turn.retries
            seen.prepared += turn.reply.prepared_tokens

    def _pipeline(
        self, workers: Any, text: int, stream: Stream, on_event: Callable[..., None] | None
    ) -> dict[str, Turn]:
        settings = self._settings
        options = RunOptions(
            method=BASE,
            compare=None,
            repeats=1,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            max_retries=2,
            stream=stream,
        )
        run_id = f"stream-{uuid.uuid4().hex[:8]}"
        executor = Executor(_PIPELINE, workers, options, run_id, on_event or (lambda *_: None))
        return executor.run({"text": self._texts[text]})[0]

    def _rest(self) -> tuple[int, int]:
        """(blocks, preparations) that are still held when nothing runs any more."""
        deadline = time.monotonic() + _REST_TIMEOUT_S
        while True:
            stats = self._cluster.stats().values()
            blocks = sum(s["cache_blocks"] - s["free_cache_blocks"] for s in stats)
            left = sum(s["preparations"] for s in stats)
            if not (blocks or left) or time.monotonic() > deadline:
                return blocks, left
            time.sleep(0.05)  # between two looks: a step that is given up takes a moment

    def _wasted(self) -> int:
        return sum(s["prepared_tokens_wasted"] for s in self._cluster.stats().values())


@dataclass(slots=True)
class Harmed:
    """The cluster as a trial's executor sees it; see executor.Workers.

    Attributes:
        hit: whether any harm was done.
    """

    cluster: Cluster
    trial: Trial
    hit: bool = False
    _chance: random.Random = field(init=False)
    _held: dict[str, Draft] = field(default_factory=dict[str, Draft])
    _strays: list[threading.Thread] = field(default_factory=list[threading.Thread])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._chance = random.Random(f"harm-{self.trial.seed}")

    def __getattr__(self, name: str) -> Any:
        """All that is not harmed is the cluster's own."""
        return getattr(self.cluster, name)

    def on_event(self, event: str, agent: str, *more: Any) -> None:
        """See executor.OnEvent."""
        trial = self.trial
        if self.hit or event != "token" or agent != trial.agent or more[0] < trial.at:
            return
        if trial.kind == "cancelled":
            self.hit = True
            raise _Enough("the caller has had enough")
        if trial.kind in ("writer_killed", "reader_killed"):
            self.hit = True
            reader = "critic" if agent == "solver" else "judge"
            self._kill(self.cluster.worker_for(agent if trial.kind == "writer_killed" else reader))

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        """A draft on its way to a reader's worker."""
        harm = _ASTRAY.get(self.trial.kind)
        with self._lock:
            harmed = harm is not None and self._chance.random() < 0.6
            wait_s = self._chance.uniform(0, _LATEST_S)
        if not harmed or harm is None:
            return self._release(worker, draft)
        self.hit = True
        return harm(self, worker, draft, wait_s)

    def settle(self, timeout_s: float) -> bool:
        """Wait for drafts that are still on their way; False where one does not end."""
        deadline = time.monotonic() + timeout_s
        for stray in self._strays:
            stray.join(max(0.0, deadline - time.monotonic()))
        return not any(stray.is_alive() for stray in self._strays)

    def _kill(self, worker: WorkerId) -> None:
        os.kill(self.cluster.workers[worker].pid, signal.SIGKILL)

    def _release(self, worker: WorkerId, draft: Draft) -> int:
        """Send a draft, and behind it one that was held back."""
        done = self.cluster.prepare_ahead(worker, draft)
        with self._lock:
            held = self._held.pop(draft.request.id, None)
        if held is not None:
            self.cluster.prepare_ahead(worker, held)
        return done

    def lose(self, worker: WorkerId, draft: Draft, wait_s: float) -> int:
        """It never gets there."""
        return 0

    def delay(self, worker: WorkerId, draft: Draft, wait_s: float) -> int:
        """Perhaps it comes only when its request has come, or has been answered."""
        return self._stray(worker, draft, wait_s * 5)

    def duplicate(self, worker: WorkerId, draft: Draft, wait_s: float) -> int:
        """It comes twice."""
        self._stray(worker, draft, wait_s)
        return self.cluster.prepare_ahead(worker, draft)

    def hold_back(self, worker: WorkerId, draft: Draft, wait_s: float) -> int:
        """Until a newer one has gone."""
        with self._lock:
            self._held[draft.request.id] = draft
        return 0

    def change(self, worker: WorkerId, draft: Draft, wait_s: float) -> int:
        """What the upstream agent is said to have written is not what it will have written."""
        values = {
            slot: replace(value, token_ids=tuple(self._other(i) for i in value.token_ids))
            if slot in draft.open_slots and value.token_ids
            else value
            for slot, value in draft.request.values.items()
        }
        return self.cluster.prepare_ahead(
            worker, replace(draft, request=replace(draft.request, values=values))
        )

    def _other(self, token: int) -> int:
        return token if self._chance.random() < 0.7 else self._chance.randrange(100, 10_000)

    def _stray(self, worker: WorkerId, draft: Draft, wait_s: float) -> int:
        def send() -> None:
            time.sleep(wait_s)  # that is the harm
            try:
                self.cluster.prepare_ahead(worker, draft)
            except RelayError as error:
                log.info("a stray draft: %s", error)

        thread = threading.Thread(target=send, name="stray-draft", daemon=True)
        self._strays.append(thread)
        thread.start()
        return 0


_ASTRAY: Mapping[str, Callable[[Harmed, WorkerId, Draft, float], int]] = {
    "lost": Harmed.lose,
    "late": Harmed.delay,
    "duplicated": Harmed.duplicate,
    "reordered": Harmed.hold_back,
    "branch": Harmed.change,
}
"""What may happen to a draft."""


def _row(kind: str, found: Sequence[_Seen]) -> StreamFaultRow:
    return StreamFaultRow(
        kind=kind,
        trials=len(found),
        hits=sum(s.hit for s in found),
        wrong_outputs=sum(s.wrong for s in found),
        hangs=sum(s.hang for s in found),
        leaked_blocks=sum(s.blocks for s in found),
        leaked_preparations=sum(s.preparations for s in found),
        errors=dict(Counter(s.error.partition(":")[0] for s in found if s.error)),
        retries=sum(s.retries for s in found),
        prepared_tokens=sum(s.prepared for s in found),
        wasted_tokens=sum(s.wasted for s in found),
    )
