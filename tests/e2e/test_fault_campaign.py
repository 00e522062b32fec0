"""Faults in a real cluster: no answer is ever wrong, and the report says what happened.

One cluster serves the whole module; the worker processes, shards and transports are the real ones. Answers
are judged by the campaign's clean room (`relay_cluster.bench.fault_oracle`), which is itself put to the test:
with verification switched off in the workers, it must find wrong answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from relay_cluster.bench.common import check_document
from relay_cluster.bench.fault_cluster import WatchedCluster, send, signals
from relay_cluster.bench.fault_kinds import (
    BEFORE_LOOKUP,
    IN_PULL,
    KINDS,
    PUBLISHING,
    READER_DECODE,
    UPSTREAM_DECODE,
    Kind,
    Stagehand,
    Trial,
)
from relay_cluster.bench.fault_oracle import CleanRoom
from relay_cluster.bench.faults import (
    WORKERS,
    Campaign,
    FaultsSettings,
    campaign_environment,
    draw_trials,
    run_trial,
)
from relay_cluster.bench.texts import Tasks, load_tasks
from relay_cluster.cluster import Result
from relay_cluster.config import ClusterConfig
from relay_cluster.pipeline import Agent, Pipeline
from tests.e2e.conftest import QUESTION
from transport.errors import ConfigError
from transport.faults import TEST_MODE_ENV, FaultKind, FaultSpec
from transport.types import BlockId, Segment
from workers.messages import Reply, Request
from workers.segment import SlotValue
from workers.settings import SamplingSettings

# Twice as many seconds as a busy machine of two cores was seen to need for the cluster and the campaign.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

_LONG = pytest.mark.long
W0, W1 = WORKERS
# Patient, or a busy machine would meet deadlines that no fault has made it meet.
SETTINGS = FaultsSettings(
    seed=5,
    backends=("auto",),
    max_new_tokens=8,
    lease_ttl_s=4.0,
    pull_timeout_s=3.0,
    call_timeout_s=3.0,
)
NOTES = {"notes": QUESTION}
PAIR = Pipeline(
    [
        Agent("first", system="You read notes.", prompt="Notes:\n{notes}\nWhat are they about?"),
        Agent("second", system="You check.", prompt="Notes:\n{notes}\nAnswer:\n{first}\nIs that right?"),
    ],
    name="pair",
)
_MET, _TRIES = 2, 4
"""Of each kind so many trials are to meet their fault, within so many."""
EXHAUSTIVE = "cacheblend:r=1"
"""Pulls what it can and recomputes all of it: the answer of full prefill, whatever was relayed."""


@pytest.fixture(scope="module")
def tasks() -> Tasks:
    return load_tasks([])


@pytest.fixture(scope="module")
def config() -> ClusterConfig:
    """A campaign's cluster without exact prefix caches: the same notes are read as if for the first time in
    every trial, so that the clean room need not answer again what it has answered once."""
    config = SETTINGS.cluster("auto")
    return config.model_copy(update={"worker": replace(config.worker, prefix_cache_bytes=0)})


@pytest.fixture(scope="module")
def room(config: ClusterConfig) -> Iterator[CleanRoom]:
    with CleanRoom(config.model, config.worker, WORKERS) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared(config: ClusterConfig) -> Iterator[WatchedCluster]:
    with campaign_environment(), WatchedCluster(config, agents_hint=PAIR) as running:
        yield running


def trials_of(settings: FaultsSettings, tasks: Tasks, room: CleanRoom) -> list[Trial]:
    """Drawn kinds and stages, all with the same two agents."""
    return [
        replace(trial, pipeline=PAIR, inputs=NOTES, upstream="first", reader="second")
        for trial in draw_trials(settings, tasks, room.tokens_of)
    ]


@pytest.fixture
def cluster(shared: WatchedCluster) -> Iterator[WatchedCluster]:
    """The module's cluster, whole and empty, and still so afterwards."""
    shared.forget()
    yield shared
    shared.await_alive(120.0)
    assert shared.rest(15.0) == (0, 0), "leases or blocks were not given back"
    shared.reset(120.0)


# --- a short campaign ---------------------------------------------------------------------------------------


def test_no_fault_makes_an_answer_wrong(shared: WatchedCluster, room: CleanRoom, tasks: Tasks) -> None:
    """Two trials of every fault that needs no new process; of the others, some follow or are long."""
    kinds = tuple(name for name in KINDS if not name.endswith(("_kill", "_restart")))
    settings = replace(SETTINGS, trials=_TRIES * len(kinds), kinds=kinds)
    campaign = Campaign(settings)
    met: Counter[str] = Counter()
    for trial in trials_of(settings, tasks, room):
        # A fault is done while a pull is held up for a moment: on a busy machine it may come too late.
        if met[trial.kind.name] < _MET:
            seen = run_trial(shared, room, trial, settings)
            campaign.keep("auto", trial, seen)
            met[trial.kind.name] += seen.hit
    rows = {row.kind: row for row in campaign.rows()}
    total = rows["all"]
    assert total.crashes == 0
    assert campaign.failures == []
    assert (total.wrong_outputs, total.hangs, total.leaked_leases, total.leaked_blocks) == (0, 0, 0, 0)
    assert total.uncounted == 0
    assert total.errors == {}
    assert met == dict.fromkeys(kinds, _MET), "a fault that never came tells nothing"
    assert total.trials >= _MET * len(kinds) == 30
    late = sum(rows[kind].trials for kind in ("delay", "link_up", "directory_delay"))
    assert campaign.relayed >= late >= 6, "what is only late must be relayed"
    for kind, reason in {
        "drop": "peer_gone",
        "link_down": "timed_out",
        "disk_full": "not_found",
        "corrupt": "corrupt",
        "truncate": "corrupt",
        "stale": "stale",
        "lease_expiry": "lease_expired",
        "arena_full": "arena_full",
        "directory_drop": "directory_down",
    }.items():
        assert rows[kind].fallbacks.get(reason, 0) >= rows[kind].hits, f"{kind} left no trace"
    check_document(_document(settings, campaign))


def _document(settings: FaultsSettings, campaign: Campaign) -> dict[str, Any]:
    from relay_cluster.bench.common import Document

    return Document("faults", {"trials": settings.trials}, campaign.rows()).to_json()


# --- SIGKILL of any one process -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(shared: WatchedCluster) -> Result:
    result = shared.run(PAIR, NOTES, method=EXHAUSTIVE, max_new_tokens=8)
    assert result["second"].relayed_tokens > 0, "without a relay there is nothing to lose"
    shared.reset(120.0)
    return result


@pytest.mark.parametrize(
    ("kind", "stage", "seed"),
    [
        pytest.param("upstream_kill", UPSTREAM_DECODE, 0, id="upstream worker while it decodes"),
        pytest.param("owner_kill", IN_PULL, 0, id="upstream worker while it is read", marks=_LONG),
        pytest.param("reader_kill", READER_DECODE, 0, id="downstream worker while it decodes", marks=_LONG),
        pytest.param("shard_kill", BEFORE_LOOKUP, 0, id="shard 0 before the lookup"),
        pytest.param("shard_kill", PUBLISHING, 1, id="shard 1 while the upstream publishes", marks=_LONG),
    ],
)
def test_after_sigkill_of_any_one_process_the_answer_is_the_one_without_the_fault(
    cluster: WatchedCluster, undisturbed: Result, kind: str, stage: str, seed: int
) -> None:
    trial = Trial(
        number=0,
        kind=KINDS[kind],
        stage=stage,
        pipeline=PAIR,
        inputs=NOTES,
        upstream="first",
        reader="second",
        seed=seed,
    )
    hand = Stagehand(cluster, trial)
    result = cluster.run(PAIR, NOTES, method=EXHAUSTIVE, max_new_tokens=8, on_event=hand.on_event)
    assert hand.acted_at is not None, hand.trouble
    for agent in ("first", "second"):
        assert result[agent].tokens == undisturbed[agent].tokens
    lost = {"upstream_kill": "first", "reader_kill": "second"}.get(kind)
    assert {a: result[a].retries for a in ("first", "second")} == {
        a: int(a == lost) for a in ("first", "second")
    }
    if kind == "owner_kill":
        assert {f.reason for f in result["second"].fallbacks} == {"peer_gone"}


# --- the five cases of vllm#52234, and the others of its kind -----------------------------------------------


class Relay:
    """An answer of `first` on w0, and the request of `second` on w1 that wants to relay it."""

    def __init__(self, cluster: WatchedCluster) -> None:
        self.cluster = cluster
        self.notes = SlotValue(text=QUESTION)
        self.upstream = self._publish("first", notes=self.notes)
        values = {"notes": self.notes, "first": self.upstream.output}
        self.asked = self._request("second", **values)
        self.full = self.answer(replace(self.asked, id=f"{self.asked.id}-full", method="full_prefill"))

    def _request(self, agent: str, *, publish: bool = False, **values: SlotValue) -> Request:
        return Request(
            id=f"{agent}-{id(values)}",
            agent=agent,
            system=PAIR[agent].system,
            prompt=PAIR[agent].prompt,
            values=values,
            publish=publish,
            sampling=SamplingSettings(max_new_tokens=8),
        )

    def _publish(self, agent: str, **values: SlotValue) -> Reply:
        request = self._request(agent, publish=True, **values)
        reply, _ = self.cluster.generate(W0, request, _nothing)
        return reply

    def answer(self, request: Request) -> Reply:
        return self.cluster.generate(W1, request, _nothing)[0]

    def segments(self) -> list[Segment]:
        """What the directory knows of the relay, with the owner's arena behind it."""
        keys = [p.key for p in self.upstream.published]
        assert len(keys) == 2, "the notes and the answer"
        found = self.cluster.directory.lease(keys, holder=W1, ttl_s=5.0).values()
        self.cluster.directory.release(list(found))
        self.owner = next(iter(found)).located.owner  # a look-up does not tell where it is reached
        return [lease.located.segment for lease in found]

    def enter(self, segments: list[Segment]) -> None:
        """Let the directory name these as w0's, as after a bug or a race of its own."""
        self.cluster.directory.publish(self.owner, segments)


def _nothing(*_: object) -> None:
    """Tokens are not watched here."""


def _unknown_reference(relay: Relay) -> None:
    relay.cluster.inject(W0, None)  # the owner gives up all that it has published


def _out_of_range_blocks(relay: Relay) -> None:
    relay.enter(
        [
            replace(s, blocks=tuple(replace(b, block=BlockId(b.block + 1_000_000)) for b in s.blocks))
            for s in relay.segments()
        ]
    )


def _consumed_reference_used_again(relay: Relay) -> None:
    relay.cluster.inject(W0, FaultSpec(kind=FaultKind.REUSE))


def _stale_reference_to_the_blocks_of_another_prompt(relay: Relay) -> None:
    old = relay.segments()
    relay.cluster.inject(W0, None)
    other = relay._publish("first", notes=SlotValue(text=f"Quite another note. {QUESTION}"))
    new = [x.segment for x in relay.cluster.directory.lookup([p.key for p in other.published]).values()]
    reused = {b.block for s in old for b in s.blocks} & {b.block for s in new for b in s.blocks}
    assert reused, "the test needs blocks that hold another prompt's KV now"
    relay.enter(old)


def _lease_expiry(relay: Relay) -> None:
    relay.cluster.inject(W1, FaultSpec(kind=FaultKind.LEASE_EXPIRY, times=9))


def _receive_fails(relay: Relay) -> None:
    relay.cluster.inject(W1, FaultSpec(kind=FaultKind.DROP, times=9))


def _corrupt_payload(relay: Relay) -> None:
    relay.cluster.inject(W1, FaultSpec(kind=FaultKind.CORRUPT, times=9))


def _owner_gone(relay: Relay) -> None:
    send(relay.cluster.worker_pid(W0), signals()["kill"])


@pytest.mark.parametrize(
    ("case", "reasons"),
    [
        (_unknown_reference, {"not_found"}),
        (_out_of_range_blocks, {"stale"}),
        (_consumed_reference_used_again, {"stale"}),
        (_stale_reference_to_the_blocks_of_another_prompt, {"stale"}),
        (_lease_expiry, {"lease_expired"}),
        (_receive_fails, {"peer_gone"}),
        (_corrupt_payload, {"corrupt"}),
        pytest.param(_owner_gone, {"peer_gone"}, marks=_LONG),
    ],
)
def test_vllm_52234(cluster: WatchedCluster, case: Callable[[Relay], None], reasons: set[str]) -> None:
    """A receive that failed, or read something else: there, HTTP 200 with garbage or with the previous
    prompt's answer, and a failure counter at 0."""
    relay = Relay(cluster)
    before = sum(cluster.stats()[W1]["fallbacks"].values())
    case(relay)
    reply = relay.answer(relay.asked)
    assert reply.token_ids == relay.full.token_ids
    assert reply.relayed_tokens == 0
    assert {f.reason for f in reply.fallbacks} == reasons
    assert all(f.detail for f in reply.fallbacks)
    counted = sum(cluster.stats()[W1]["fallbacks"].values()) - before if case is not _owner_gone else 1
    assert counted > 0, "the failure counter stands still"


# --- the tests' own tests -----------------------------------------------------------------------------------


def test_without_verification_the_campaign_finds_wrong_answers(
    cluster: WatchedCluster, room: CleanRoom, tasks: Tasks
) -> None:
    settings = replace(SETTINGS, seed=1, trials=2, kinds=("truncate",))
    _patch_verification(cluster, off=True)
    try:
        campaign = Campaign(settings)
        for trial in trials_of(settings, tasks, room):
            campaign.keep("auto", trial, run_trial(cluster, room, trial, settings))
    finally:
        _patch_verification(cluster, off=False)
    (row, total) = campaign.rows()
    assert row.hits > 0
    assert row.wrong_outputs > 0, "corrupt KV was used, and the oracle did not notice"
    assert row.uncounted > 0, "a pull that had to fail has succeeded, and nobody noticed"
    assert total.wrong_outputs == row.wrong_outputs
    assert campaign.failures
    assert all("trial" in failure and failure["kind"] == "truncate" for failure in campaign.failures)


def _patch_verification(cluster: WatchedCluster, *, off: bool) -> None:
    """Monkeypatch the arenas' look at checksums inside the worker processes."""

    def patch(_: Any, off: bool = off) -> None:
        from transport.arena import Arena
        from transport.types import Outcome

        if off:
            Arena.verify_for_real = Arena.verify_part  # type: ignore[attr-defined]
            Arena.verify_part = lambda *_: Outcome.PULLED  # type: ignore[method-assign]
        else:
            Arena.verify_part = Arena.verify_for_real  # type: ignore[attr-defined, method-assign]

    handles = [member.handle for member in cluster._members.values()]
    ray.get([handle.__ray_call__.remote(patch) for handle in handles], timeout=30)


def test_a_worker_outside_of_test_mode_refuses_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the processes of the cluster above this cannot be tried: they are in test mode."""
    from workers.faults import fault_facts, inject

    monkeypatch.delenv(TEST_MODE_ENV, raising=False)
    nothing: Any = None
    with pytest.raises(ConfigError, match=TEST_MODE_ENV):
        inject(nothing, FaultSpec(kind=FaultKind.DROP), nothing, nothing, nothing)
    with pytest.raises(ConfigError, match=TEST_MODE_ENV):
        fault_facts(nothing, nothing, nothing)


def test_every_kind_has_a_deed() -> None:
    for name, kind in KINDS.items():
        assert isinstance(kind, Kind)
        assert kind.spec is not None or callable(getattr(Stagehand, f"_{name}"))
