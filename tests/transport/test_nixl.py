"""What only the nixl backend promises: quarantine while the agent lives, an idle owner, its address."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transport.conformance import Reader
from tests.transport.rigs import RemoteOwner, wait_for
from transport import nixl
from transport.arena import Arena
from transport.nixl_puller import Pace, Posts
from transport.pulling import ReadFailed
from transport.types import Outcome

HAS_NIXL, WHY = nixl.probe()
pytestmark = [pytest.mark.nixl, pytest.mark.skipif(not HAS_NIXL, reason=WHY)]
BIG = 1 << 20


def test_quarantine_lasts_as_long_as_a_pull_keeps_the_agent_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polling for the second pull also progresses the abandoned read, which then lands late."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    side = RemoteOwner("nixl", 36 << 20, BIG, {"UCX_TLS": "tcp"})
    reader = Reader("nixl", 40 << 20, BIG)
    try:
        refs = side.publish(16, seed=1)
        side.signal(signal.SIGSTOP)
        outcomes: list[Outcome] = []
        patient = threading.Thread(target=lambda: outcomes.append(reader.outcome(side, refs, timeout_s=20)))
        patient.start()
        wait_for(lambda: reader.arena.stats().used == 16, "the patient pull has begun")
        assert reader.outcome(side, refs, timeout_s=0.3) is Outcome.TIMED_OUT
        stats = reader.arena.stats()
        assert (stats.used, stats.quarantined) == (16, 16), "the patient pull keeps the agent alive"
        assert reader.transport.stats()["nixl.retiring"] == 1
        side.signal(signal.SIGCONT)
        patient.join(20)
        assert outcomes == [Outcome.PULLED]
        wait_for(lambda: reader.arena.stats().quarantined == 0, "its end releases the quarantine")
        assert reader.outcome(side, refs) is Outcome.PULLED, "over a new agent"
        assert reader.transport.stats()["nixl.renewals"] == 1
    finally:
        reader.transport.close()
        side.close()


def test_an_owner_that_was_stopped_while_it_was_read_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX would end its process: the reader had given up and closed the connection. So it must not, yet."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    side = RemoteOwner("nixl", 36 << 20, BIG, {"UCX_TLS": "tcp"})
    reader = Reader("nixl", 40 << 20, BIG)
    try:
        refs = side.publish(32, seed=1)
        for _ in range(2):
            assert reader.outcome(side, refs) is Outcome.PULLED
            side.signal(signal.SIGSTOP)
            assert reader.outcome(side, refs, timeout_s=0.3) is Outcome.TIMED_OUT
            assert reader.arena.stats().quarantined == 32, "for what may still come"
            side.signal(signal.SIGCONT)
            wait_for(lambda: reader.arena.stats().quarantined == 0, "all has come, and is thrown away")
            assert side.process.is_alive()
        assert reader.outcome(side, refs) is Outcome.PULLED, "from the same process"
    finally:
        reader.transport.close()
        side.close()


@pytest.mark.parametrize("ended_by", ["time", "the owner's death", "our own close"])
def test_a_farewell_ends(monkeypatch: pytest.MonkeyPatch, ended_by: str) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(nixl, "FAREWELL_S", 0.3 if ended_by == "time" else 60.0)
    side = RemoteOwner("nixl", 36 << 20, BIG, {"UCX_TLS": "tcp"})
    reader = Reader("nixl", 40 << 20, BIG)
    try:
        refs = side.publish(16, seed=1)
        side.signal(signal.SIGSTOP)
        assert reader.outcome(side, refs, timeout_s=0.3) is Outcome.TIMED_OUT
        assert reader.arena.stats().quarantined == 16
        if ended_by == "the owner's death":
            side.kill()
        elif ended_by == "our own close":
            reader.transport.close()
        wait_for(lambda: reader.arena.stats().quarantined == 0, "the quarantine is released")
    finally:
        reader.transport.close()
        side.close()


def test_an_idle_owner_uses_less_than_a_twentieth_of_a_core() -> None:
    transport = nixl.NixlTransport("idle")
    transport.register(Arena(8 << 20, BIG))
    try:

        def share_of_a_core() -> float:
            cpu, wall = time.process_time(), time.monotonic()
            time.sleep(0.4)
            return (time.process_time() - cpu) / (time.monotonic() - wall)

        # On a crowded machine one window may catch other work of this process: a spinning agent fails all.
        wait_for(lambda: share_of_a_core() < 0.05, "an idle window")
    finally:
        transport.close()


@given(st.binary(max_size=200))
def test_any_address_is_read_or_refused(data: bytes) -> None:
    with pytest.raises(ReadFailed) as failed:
        nixl.Address.unpack(data)
    assert failed.value.outcome is Outcome.NO_ROUTE


def test_address_survives_packing() -> None:
    address = nixl.Address("w0.5.owner", b"\x00meta", 0x7F0000000000, 1088, 10, "cuda", 3)
    assert nixl.Address.unpack(address.pack()) == address


def test_loading_sets_ucx_defaults_and_leaves_logging_alone() -> None:
    nixl.load_bindings()
    assert os.environ["UCX_TCP_USER_TIMEOUT"]
    assert logging.raiseExceptions
    assert logging.getLogger("nixl").handlers == []


def test_a_slow_link_has_little_in_flight_and_a_fast_one_much() -> None:
    """What is in flight together ends together: on a slow link all parts of a segment at its end."""
    pace = Pace()
    assert (pace.step_bytes, pace.window_bytes) == (1 << 20, 4 << 20), "nothing is known yet"
    pace.learn(64 << 10, 1.0)
    assert pace.bytes_per_s == 0, "a small pull tells how long a round trip takes, not the rate"
    pace.learn(15_000_000, 0.12)
    assert 2 * pace.step_bytes <= pace.window_bytes < 4 << 20
    assert 3e-4 < pace.nap_s < 1e-3, "no more than a socket's buffer takes"
    pace.learn(64 << 20, 0.01)
    assert (pace.step_bytes, pace.window_bytes, pace.nap_s) == (8 << 20, 32 << 20, 1e-4)


@given(rate=st.floats(1e5, 1e11), round_trip_s=st.floats(1e-5, 0.5))
def test_the_window_never_keeps_the_rate_down(rate: float, round_trip_s: float) -> None:
    """A link that brings a window per round trip must get a larger one next time, up to the most."""
    pace = Pace(rate, round_trip_s)
    window = pace.window_bytes
    pace.learn(64 << 20, (64 << 20) * round_trip_s / window)
    assert pace.window_bytes > window or window == 32 << 20 or pace.bytes_per_s * 0.016 > window


def test_a_pull_over_a_slow_link_comes_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate that was learned, parts land one by one, not all behind the last."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    side = RemoteOwner("nixl", 36 << 20, BIG, {"UCX_TLS": "tcp"})
    reader = Reader("nixl", 40 << 20, BIG)
    most: list[int] = []
    start = Posts.start

    def watched(self: Posts, *args: Any) -> None:
        start(self, *args)
        most.append(self.nbytes)

    monkeypatch.setattr(Posts, "start", watched)
    # What ends before the next is posted makes room: here nothing may, so that the window alone decides.
    monkeypatch.setattr(Posts, "first_is_done", lambda self: False)
    try:
        refs = side.publish(16, seed=1)
        assert reader.outcome(side, refs) is Outcome.PULLED
        assert max(most) <= 5 * BIG, "nothing is known of the link yet"
        rates = iter((1e11, 1e8))
        monkeypatch.setattr(Pace, "learn", lambda self, *_: setattr(self, "bytes_per_s", next(rates, 1e8)))
        assert reader.outcome(side, refs) is Outcome.PULLED  # and now it counts as fast
        most.clear()
        assert reader.outcome(side, refs) is Outcome.PULLED  # and from now on as slow
        assert max(most) >= 15 * BIG
        most.clear()
        assert reader.outcome(side, refs) is Outcome.PULLED
        assert max(most) <= 4 * BIG
    finally:
        reader.transport.close()
        side.close()
