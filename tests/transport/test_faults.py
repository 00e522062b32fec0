"""Faults on purpose: what each does to a pull, an arena or a directory call, and when they are refused."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.transport.conformance import Reader
from tests.transport.directory_rigs import ME, SETTINGS, PlainCalls, segment
from tests.transport.rigs import LocalOwner, content
from transport.arena import Arena
from transport.directory.client import DirectoryClient
from transport.directory.faulty import FaultyCalls, worker_calls
from transport.directory.shard import Shard
from transport.errors import ArenaFull, ConfigError
from transport.faults import ENDED, READ, TEST_MODE_ENV, FaultKind, Faults, FaultSpec, make_faults
from transport.settings import FaultSettings
from transport.types import BlockId, Outcome, WorkerId

BLOCK = 40_000
BUDGET = 2 << 20

FAILING = {
    FaultKind.DROP: Outcome.PEER_GONE,
    FaultKind.HANG: Outcome.TIMED_OUT,
    FaultKind.CORRUPT: Outcome.CORRUPT,
    FaultKind.TRUNCATE: Outcome.CORRUPT,
    FaultKind.STALE: Outcome.STALE,
    FaultKind.LEASE_EXPIRY: Outcome.LEASE_EXPIRED,
}


@pytest.fixture
def test_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEST_MODE_ENV, "1")


@pytest.fixture(params=["inprocess", "tcp"])
def ends(request: pytest.FixtureRequest, test_mode: None) -> Iterator[tuple[LocalOwner, Reader, Faults]]:
    """An owner, and a reader whose pulls can be disturbed."""
    side = LocalOwner(request.param, BUDGET, BLOCK)
    reader = Reader(request.param, BUDGET, BLOCK)
    reader.arena.faults = faults = Faults()
    yield side, reader, faults
    reader.transport.close()
    side.close()
    assert reader.arena.stats().quarantined == 0


def test_a_configured_fault_is_refused_outside_of_test_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TEST_MODE_ENV, raising=False)
    assert make_faults(FaultSettings()) is None
    with pytest.raises(ConfigError, match=r"transport\.faults .*RELAY_TEST_MODE=1"):
        make_faults(FaultSettings(drop=0.5))
    monkeypatch.setenv(TEST_MODE_ENV, "0")
    with pytest.raises(ConfigError, match="RELAY_TEST_MODE=1"):
        make_faults(FaultSettings(directory_delay=1.0))


def test_arming_is_refused_outside_of_test_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TEST_MODE_ENV, "1")
    faults = make_faults(FaultSettings())
    assert faults is not None
    faults.arm(FaultSpec(kind=FaultKind.DROP))
    monkeypatch.delenv(TEST_MODE_ENV)
    with pytest.raises(ConfigError, match="arming drop"):
        faults.arm(FaultSpec(kind=FaultKind.DROP))


def test_every_setting_is_a_fault_and_every_fault_that_strikes_by_chance_a_setting() -> None:
    by_chance = {kind for kind in FaultKind if kind is not FaultKind.REUSE}  # which is an owner's deed
    assert {str(k) for k in by_chance} == set(FaultSettings.__slots__) - {"delay_ms", "seed"}
    for kind in by_chance:
        settings = FaultSettings(**{str(kind): 0.25})
        assert settings.probability(kind) == 0.25
        assert settings.enabled
    assert not FaultSettings(seed=3, delay_ms=1).enabled


@pytest.mark.parametrize("kind", FAILING)
def test_an_armed_fault_ends_one_pull_as_the_real_one_would(
    ends: tuple[LocalOwner, Reader, Faults], kind: FaultKind
) -> None:
    side, reader, faults = ends
    refs = side.publish(3, seed=1)
    faults.arm(FaultSpec(kind=kind))
    deadline = time.monotonic() + (0.05 if kind is FaultKind.LEASE_EXPIRY else 30.0)
    # Long enough for a busy machine where it is not the time that ends the pull.
    timeout_s = 0.05 if FAILING[kind] is Outcome.TIMED_OUT else 10.0
    outcome = reader.outcome(side, refs, timeout_s=timeout_s, lease_deadline=deadline)
    assert outcome is FAILING[kind]
    assert [e.what for e in faults.events()] == [READ, kind, ENDED]
    assert faults.events()[-1].outcome == outcome
    if kind is FaultKind.DROP:
        faults.clear()  # a dropped lease stays dropped, and the rig's leases share one name
    # It hits once; the blocks came back and the next pull is whole.
    assert reader.outcome(side, refs) is Outcome.PULLED
    assert reader.arena.stats().free == reader.arena.num_blocks
    assert [side.arena.verify(r.block, r, side.owner.incarnation) for r in refs] == [Outcome.PULLED] * 3


def test_a_delayed_read_still_arrives(ends: tuple[LocalOwner, Reader, Faults]) -> None:
    side, reader, faults = ends
    refs = side.publish(1, seed=1)
    faults.arm(FaultSpec(kind=FaultKind.DELAY, delay_ms=50))
    transfer, into = reader.pull(side, refs)
    assert transfer.outcome is Outcome.PULLED
    assert transfer.seconds >= 0.05
    assert bytes(reader.arena.payload(into[0]).numpy()) == content(BLOCK, 1).tobytes()


def test_a_read_that_is_delayed_beyond_its_deadline_times_out(
    ends: tuple[LocalOwner, Reader, Faults],
) -> None:
    side, reader, faults = ends
    refs = side.publish(1, seed=1)
    faults.arm(FaultSpec(kind=FaultKind.DELAY, delay_ms=80))
    assert reader.outcome(side, refs, timeout_s=0.02) is Outcome.TIMED_OUT


def test_times_counts_pulls_and_clear_disarms(ends: tuple[LocalOwner, Reader, Faults]) -> None:
    side, reader, faults = ends
    refs = side.publish(1, seed=1)
    faults.arm(FaultSpec(kind=FaultKind.CORRUPT, times=2))
    outcomes = [reader.outcome(side, refs) for _ in range(3)]
    assert outcomes == [Outcome.CORRUPT, Outcome.CORRUPT, Outcome.PULLED]
    faults.arm(FaultSpec(kind=FaultKind.CORRUPT))
    faults.clear()
    assert faults.events() == ()
    assert reader.outcome(side, refs) is Outcome.PULLED


def test_a_segment_whose_blocks_are_freed_and_reused_while_the_read_waits_is_stale(
    ends: tuple[LocalOwner, Reader, Faults],
) -> None:
    """The real thing beside STALE: the owner does it, between the reader's lease and its read."""
    side, reader, _ = ends
    refs = side.publish(2, seed=1)

    class Owner(Faults):
        def before_read(self, *args: Any, **kwargs: Any) -> None:
            side.free(refs)
            again = side.publish(2, seed=9)
            assert {r.block for r in again} == {r.block for r in refs}

    reader.arena.faults = Owner()
    assert reader.outcome(side, refs) is Outcome.STALE


def test_only_bytes_that_have_just_landed_are_disturbed(test_mode: None) -> None:
    """For pulls in parts: what was verified and handed over already stays as it is."""
    faults, arena = Faults(), Arena(BUDGET, BLOCK)
    into = arena.allocate(2)
    lease: Any = _lease(into)
    for kind in (FaultKind.CORRUPT, FaultKind.TRUNCATE):
        for block in into:
            arena.payload(block).zero_()
        faults.arm(FaultSpec(kind=kind, nbytes=BLOCK))
        faults.after_read(arena, lease, into, ends=0.0, start=1000, stop=3000)
        touched = {int(i) for b in into for i in arena.payload(b).numpy().nonzero()[0]}
        assert touched
        assert min(touched) >= 1000
        assert max(touched) == 2999
    faults.arm(FaultSpec(kind=FaultKind.STALE))
    faults.after_read(arena, lease, into, ends=0.0, start=1000, stop=3000)
    assert arena.verify(into[0], arena.seal(into[0]), arena.incarnation) is Outcome.PULLED, "no header landed"


def _lease(into: list[BlockId]) -> Any:
    from tests.transport.rigs import make_lease

    return make_lease(ME, [segment(int(b)).blocks[0] for b in into])


@pytest.mark.nixl
def test_a_dropped_read_is_not_saved_by_the_next_backend(test_mode: None) -> None:
    side, reader = LocalOwner("auto", BUDGET, BLOCK), Reader("auto", BUDGET, BLOCK)
    try:
        reader.arena.faults = faults = Faults()
        refs = side.publish(1, seed=1)
        faults.arm(FaultSpec(kind=FaultKind.DROP))
        assert reader.outcome(side, refs) is Outcome.PEER_GONE
        common = set(reader.transport.addresses()) & set(side.owner.addresses)
        assert [e.what for e in faults.events()].count(ENDED) == len(common) >= 2, "one after another"
    finally:
        reader.transport.close()
        side.close()


def test_an_arena_refuses_allocations_while_armed(test_mode: None) -> None:
    arena = Arena(BUDGET, BLOCK)
    arena.faults = faults = Faults()
    faults.arm(FaultSpec(kind=FaultKind.ARENA_FULL, times=2))
    assert arena.allocate(0) == []
    for _ in range(2):
        with pytest.raises(ArenaFull, match="injected"):
            arena.allocate(1)
    assert arena.stats().used == 0
    assert len(arena.allocate(1)) == 1


def test_a_full_disk_is_an_os_error(test_mode: None) -> None:
    faults = Faults()
    faults.before_write(10)
    faults.arm(FaultSpec(kind=FaultKind.DISK_FULL))
    with pytest.raises(OSError, match="No space left") as raised:
        faults.before_write(10)
    assert raised.value.errno == errno.ENOSPC
    faults.before_write(10)


def test_dice_follow_their_seed_and_their_probability(test_mode: None) -> None:
    def hits(seed: int) -> list[bool]:
        faults = Faults(FaultSettings(corrupt=0.3, seed=seed))
        return [faults.take(FaultKind.CORRUPT) is not None for _ in range(400)]

    assert hits(1) == hits(1)
    assert hits(1) != hits(2)
    assert 80 <= sum(hits(1)) <= 160
    none = Faults(FaultSettings(drop=1.0))
    assert none.take(FaultKind.CORRUPT) is None
    assert none.take(FaultKind.DROP) is not None


# --- directory calls ----------------------------------------------------------------------------------------


@pytest.fixture
def disturbed(test_mode: None) -> Iterator[tuple[DirectoryClient, PlainCalls, Faults]]:
    settings = replace(SETTINGS, call_timeout_s=0.05)
    calls, faults = PlainCalls({"a": Shard("a", settings, time.monotonic, first=("a",))}), Faults()
    client = DirectoryClient(["a"], settings, calls=FaultyCalls(calls, faults))
    client.publish(ME, [segment(1)])
    calls.sent.clear()
    yield client, calls, faults
    client.close()


def test_a_lost_request_never_reaches_the_shard_and_a_lost_reply_does(
    disturbed: tuple[DirectoryClient, PlainCalls, Faults],
) -> None:
    client, calls, faults = disturbed
    key, holder = segment(1).key, WorkerId("w1")
    for reply, sent, leases in ((False, [], 0), (True, [("a", "lease")], 1)):
        faults.arm(FaultSpec(kind=FaultKind.DIRECTORY_DROP, reply=reply))
        assert client.lease([key], holder=holder, ttl_s=0.2).unanswered == {key}
        assert calls.sent == sent
        assert client.stats()["leases"] == leases  # which also ends the pause after a missed reply
        calls.sent.clear()
    assert key in client.lease([key], holder=holder, ttl_s=0.2)
    time.sleep(0.25)
    assert client.stats()["leases"] == 0, "a lease whose grant got lost ends by itself"


def test_a_late_reply_counts_unless_it_is_later_than_the_deadline(
    disturbed: tuple[DirectoryClient, PlainCalls, Faults],
) -> None:
    client, _, faults = disturbed
    key = segment(1).key
    faults.arm(FaultSpec(kind=FaultKind.DIRECTORY_DELAY, delay_ms=10))
    assert key in client.lookup([key])
    faults.arm(FaultSpec(kind=FaultKind.DIRECTORY_DELAY, delay_ms=500))
    begin = time.monotonic()
    assert client.lookup([key]).unanswered == {key}
    assert time.monotonic() - begin < 0.4, "the deadline bounds the wait, not the delay"


def test_a_fault_waits_for_the_calls_that_it_names(
    disturbed: tuple[DirectoryClient, PlainCalls, Faults],
) -> None:
    client, _, faults = disturbed
    faults.arm(FaultSpec(kind=FaultKind.DIRECTORY_DROP, calls=("publish",)))
    client.announce(ME)
    assert segment(1).key in client.lookup([segment(1).key])
    assert faults.events() == ()
    client.retract(ME, [segment(1)])
    assert faults.take(FaultKind.DIRECTORY_DROP, "publish") is not None, "it is still armed"


def test_without_faults_the_way_to_the_shards_is_plain() -> None:
    assert not isinstance(worker_calls(None), FaultyCalls)
    assert isinstance(worker_calls(Faults()), FaultyCalls)
