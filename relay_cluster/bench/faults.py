"""`relay bench faults`: pipelines under faults, and whether an answer was ever wrong.

Every trial runs a real pipeline on a real cluster (two workers, two directory shards), does one kind of harm
at one of its stages, and then asks: was every answer that of a fault-free run with the same spans relayed
(`fault_oracle.py`)? Did it end in time? Is everything given back? Does the report say what happened? All
choices come from one seed.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Final

from ray.exceptions import RayError

from relay_cluster.bench.common import Document, progress
from relay_cluster.bench.fault_cluster import WatchedCluster
from relay_cluster.bench.fault_judge import Seen, fault_row, judge
from relay_cluster.bench.fault_kinds import KINDS, Kind, Stagehand, Trial
from relay_cluster.bench.fault_oracle import CleanRoom
from relay_cluster.bench.fault_rows import FaultRow
from relay_cluster.bench.texts import Tasks
from relay_cluster.config import ClusterConfig
from relay_cluster.pipeline import Agent, Pipeline
from transport.errors import ConfigError, RelayError
from transport.faults import TEST_MODE_ENV
from transport.types import WorkerId
from workers.settings import DEFAULT_MODEL

log = logging.getLogger(__name__)

WORKERS: Final = (WorkerId("w0"), WorkerId("w1"))
_SPAN_TOKENS: Final = 64
_BACK_TIMEOUT_S: Final = 120.0
_REST_MARGIN_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultsSettings:
    """What is done.

    Attributes:
        trials: pipelines over all backends.
        kinds: faults that they meet in turn.
        backends: of the cluster, one after another; each takes its share of the trials.
        threads: of every worker; with more of them, killed and restarting workers and the clean room would
            wait for each other's.
        max_new_tokens: of every answer.
        deadline_s: a pipeline that is not over by then hangs.
        lease_ttl_s, pull_timeout_s, call_timeout_s: of the cluster.
    """

    trials: int = 300
    kinds: tuple[str, ...] = tuple(KINDS)
    backends: tuple[str, ...] = ("auto", "nixl", "tcp")
    model: str = DEFAULT_MODEL
    seed: int = 0
    threads: int = 1
    max_new_tokens: int = 10
    deadline_s: float = 120.0
    lease_ttl_s: float = 2.0
    pull_timeout_s: float = 2.0
    call_timeout_s: float = 1.0

    def cluster(self, backend: str) -> ClusterConfig:
        """The cluster of the trials over one backend."""
        return ClusterConfig.model_validate(
            {
                "name": "faults",
                "stream": "off",  # `relay bench stream-faults` has it on
                "workers": len(WORKERS),
                "model": self.model,
                "worker": {
                    "device": "cpu",
                    "cache_tokens": 4096,
                    "threads": self.threads,
                    # Every relay is to be tried, and short answers as well.
                    "break_even": False,
                    "min_segment_tokens": 4,
                    "request_timeout_s": self.deadline_s / 2,
                },
                "transport": {
                    "backend": backend,
                    "arena_bytes": 128 << 20,
                    "pull_timeout_s": self.pull_timeout_s,
                    "spill": {"disk_bytes": 64 << 20},
                    # The clean room has every segment where its producer was, and nowhere else.
                    "keep_pulled": False,
                },
                "directory": {"lease_ttl_s": self.lease_ttl_s, "call_timeout_s": self.call_timeout_s},
                "ray": {"num_cpus": 2},
                "runtime": {"max_restarts": -1},
            }
        )


def parse_kinds(text: str | None) -> tuple[str, ...]:
    """Kinds of a comma-separated list; all of them where there is none.

    Raises:
        ConfigError: one is unknown.
    """
    named = tuple(filter(None, (item.strip() for item in (text or "").split(","))))
    for name in named:
        if name not in KINDS:
            raise ConfigError(f'--kinds "{name}" is no fault. Known: {", ".join(KINDS)}.')
    return named or tuple(KINDS)


def run_faults(settings: FaultsSettings, tasks: Tasks) -> Document:
    """Run the campaign. Ctrl-C ends it early: the document then has the trials so far.

    Raises:
        RelayError: a cluster does not come up.
    """
    begin = time.monotonic()
    campaign = Campaign(settings)
    with (
        campaign_environment(),
        CleanRoom(settings.model, settings.cluster("auto").worker, WORKERS) as room,
        progress("faults", settings.trials) as advance,
    ):
        trials = draw_trials(settings, tasks, room.tokens_of)
        try:
            for backend, share in zip(settings.backends, shares(trials, settings.backends), strict=True):
                campaign.run(backend, share, room, advance)
        except KeyboardInterrupt:
            if not campaign.trials:
                raise
            log.warning("interrupted after %d of %d trials", campaign.trials, settings.trials)
    facts = {
        **asdict(settings),
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "pulls": dict(campaign.pulls),
        "relayed_spans": campaign.relayed,
        "failures": campaign.failures,
        "seconds": round(time.monotonic() - begin, 1),
        "oracle": "the same requests in a clean room, with exactly the spans that the report calls relayed",
    }
    return Document("faults", facts, campaign.rows())


def draw_trials(settings: FaultsSettings, tasks: Tasks, tokens_of: Callable[[str], int]) -> tuple[Trial, ...]:
    """All trials, the kinds in turn; order, stages, pipelines and texts by the seed."""
    chance = random.Random(f"faults-{settings.seed}")
    kinds = [KINDS[settings.kinds[i % len(settings.kinds)]] for i in range(settings.trials)]
    return tuple(_draw(number, kind, chance, tasks, tokens_of) for number, kind in enumerate(kinds))


def _draw(
    number: int, kind: Kind, chance: random.Random, tasks: Tasks, tokens_of: Callable[[str], int]
) -> Trial:
    spans, agents = chance.choice((1, 1, 2, 3)), chance.choice((2, 2, 3))
    # The third agent has the texts on its own worker already: it pulls an answer at most.
    reader = 2 if agents == 3 and chance.random() < 0.4 else 1
    names = ("first", "second", "third")
    return Trial(
        number=number,
        kind=kind,
        stage=chance.choice(kind.stages),
        pipeline=_pipeline(spans, agents),
        inputs={f"text{i}": _text(number, chance, tasks, tokens_of) for i in range(spans)},
        upstream=names[reader - 1],
        reader=names[reader],
        seed=chance.randrange(1 << 30),
    )


def _pipeline(spans: int, agents: int) -> Pipeline:
    texts = "\n".join(f"{{text{i}}}" for i in range(spans))
    chain = [
        Agent("first", system="You read notes.", prompt=f"Notes:\n{texts}\nWhat are they about?"),
        Agent("second", system="You check.", prompt=f"Notes:\n{texts}\nAnswer:\n{{first}}\nIs that right?"),
        Agent(
            "third", system="You judge.", prompt=f"Answers:\n{{first}}\n{{second}}\nNotes:\n{texts}\nSum up."
        ),
    ]
    return Pipeline(chain[:agents], name=f"chain-{agents}-{spans}")


def _text(number: int, chance: random.Random, tasks: Tasks, tokens_of: Callable[[str], int]) -> str:
    """Natural text of 64 tokens or a little more that no other trial has."""
    text = f"Note {number}-{chance.randrange(10_000)}."
    while tokens_of(text) < _SPAN_TOKENS + 2:
        task = chance.choice(tasks.rows)
        words = f"{task.text} {task.answer}".split()
        at = chance.randrange(max(1, len(words) - 12))
        text += " " + " ".join(words[at : at + 12])
    return text


def shares(trials: Sequence[Trial], backends: Sequence[str]) -> list[list[Trial]]:
    """Trials of each backend: of every kind as many, to one."""
    out: list[list[Trial]] = [[] for _ in backends]
    met: Counter[str] = Counter()
    for trial in trials:
        out[met[trial.kind.name] % len(backends)].append(trial)
        met[trial.kind.name] += 1
    for at, share in enumerate(out):
        random.Random(f"order-{at}").shuffle(share)
    return out


@contextmanager
def campaign_environment() -> Iterator[None]:
    """Of this process and of those that Ray starts: test mode, and KV over sockets, so that the owner of a
    segment takes part in a transfer and a stopped one is noticed."""
    wanted = {TEST_MODE_ENV: "1", "UCX_TLS": os.environ.get("UCX_TLS", "tcp")}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Campaign:
    """Runs trials, and keeps what they show.

    Attributes:
        pulls: pulls that brought bytes, by backend; relayed: spans.
        failures: every trial that was not as it should be, so that it can be looked into.
    """

    def __init__(self, settings: FaultsSettings) -> None:
        self._settings = settings
        self._seen: dict[str, list[Seen]] = {kind: [] for kind in settings.kinds}
        self.pulls: Counter[str] = Counter()
        self.relayed = 0
        self.failures: list[dict[str, Any]] = []

    def run(
        self, backend: str, trials: Sequence[Trial], room: CleanRoom, advance: Callable[[str], None]
    ) -> None:
        """Run trials over one backend, on a cluster of their own; on a new one after each that hangs."""
        left = list(trials)
        while left:
            with WatchedCluster(self._settings.cluster(backend), agents_hint=left[0].pipeline) as cluster:
                while left:
                    trial, begin = left.pop(0), time.monotonic()
                    seen = run_trial(cluster, room, trial, self._settings)
                    self.keep(backend, trial, seen)
                    log.info(
                        "trial %d, %s at %s over %s: hit %s, fallbacks %s, %s in %.1f s",
                        trial.number,
                        trial.kind.name,
                        trial.stage,
                        backend,
                        seen.hit,
                        dict(seen.fallbacks),
                        seen.error or "answered",
                        time.monotonic() - begin,
                    )
                    advance(f"{backend}: {trial.kind.name}")
                    if seen.hang:
                        break

    def keep(self, backend: str, trial: Trial, seen: Seen) -> None:
        """Add what a trial showed."""
        self._seen[trial.kind.name].append(seen)
        self.pulls += seen.pulls
        self.relayed += seen.relayed
        if seen.failed:
            what = {
                "trial": trial.number,
                "kind": trial.kind.name,
                "stage": trial.stage,
                "backend": backend,
                "wrong": seen.wrong,
                "hang": seen.hang,
                "leases": seen.leases,
                "blocks": seen.blocks,
                "crashes": seen.crashes,
                "uncounted": seen.uncounted,
                "error": seen.error,
            }
            self.failures.append(what)
            log.error("a trial failed: %s", what)

    @property
    def trials(self) -> int:
        """That have been run."""
        return sum(map(len, self._seen.values()))

    def rows(self) -> list[FaultRow]:
        """One per kind, and one for all."""
        every = [seen for found in self._seen.values() for seen in found]
        return [fault_row(kind, found) for kind, found in self._seen.items() if found] + [
            fault_row("all", every)
        ]


# --- one trial ----------------------------------------------------------------------------------------------


def run_trial(cluster: WatchedCluster, room: CleanRoom, trial: Trial, settings: FaultsSettings) -> Seen:
    """One pipeline under one fault, judged. The cluster is whole again afterwards, unless the trial hangs."""
    seen = Seen()
    cluster.forget()
    hand = Stagehand(cluster, trial)
    before = cluster.reset(_BACK_TIMEOUT_S)
    try:
        error = _run_pipeline(cluster, trial, hand, settings)
    except TimeoutError:
        seen.hang = True
        return seen
    finally:
        hand.go_on()
    turns = list(cluster.turns)
    seen.error = "" if error is None else type(error).__name__
    # The clean room works while a killed worker comes back.
    seen.wrong = room.wrong(turns)
    try:
        cluster.await_alive(_BACK_TIMEOUT_S)
        events = () if hand.target is None else cluster.facts(hand.target).events
        seen.leases, seen.blocks = cluster.rest(settings.lease_ttl_s + _REST_MARGIN_S)
        after = cluster.reset(_BACK_TIMEOUT_S)
        seen.crashes = sum(after[w] != pid and pid not in hand.killed for w, pid in before.items())
    except (RelayError, RayError) as lost:
        log.error("trial %d: the cluster is not whole again: %s", trial.number, lost)  # noqa: TRY400
        seen.hang = True
        return seen
    judge(seen, trial, hand.acted_at, [reply for _, reply in turns], events, cluster.losses)
    if error is not None and not isinstance(error, RelayError):
        seen.uncounted = True  # an error that tells the user nothing
    return seen


def _run_pipeline(
    cluster: WatchedCluster, trial: Trial, hand: Stagehand, settings: FaultsSettings
) -> Exception | None:
    """The error that the pipeline ended in, if any.

    Raises:
        TimeoutError: it has not ended by its deadline.
    """
    ended: list[Exception | None] = []

    def run() -> None:
        try:
            cluster.run(
                trial.pipeline,
                trial.inputs,
                max_new_tokens=settings.max_new_tokens,
                on_event=hand.on_event,
            )
            ended.append(None)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what the trial is about
            ended.append(error)

    thread = threading.Thread(target=run, name=f"pipeline-{trial.number}", daemon=True)
    thread.start()
    thread.join(settings.deadline_s)
    if not ended:
        raise TimeoutError
    return ended[0]
