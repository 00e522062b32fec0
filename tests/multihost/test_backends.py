"""The transport's conformance suite between two hosts, and what a cut cable and a dead host do to a pull."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Self

import pytest

from tests.multihost.far import FarOwner
from tests.multihost.rig import Lan
from tests.transport.conformance import BLOCK, BUDGET, Reader, RemoteConformance
from tests.transport.conformance_parts import PartsConformance
from tests.transport.rigs import OwnerSide, content, make_lease, wait_for
from transport.auto import available_backends
from transport.types import LeaseId, Outcome

BIG = 1 << 20
PARTS = (BIG // 4, BIG // 4, BIG // 2)
ENDED = (Outcome.TIMED_OUT, Outcome.PEER_GONE)
TIMEOUT_S = 3.0
SLACK_S = 4.0  # of a busy machine
TRIES = 5

ONE_HOST = ("inprocess", "shm")  # a process, or a host, has to be shared

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not works, reason=why))
    for name, (works, why) in available_backends().items()
    if name not in ONE_HOST
]


class _BetweenHosts:
    """Owners live on host 2."""

    backend: ClassVar[str]
    lan: ClassVar[Lan]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _on_the_lan(cls, lan: Lan) -> None:
        cls.lan = lan

    @classmethod
    def make_owner(
        cls, budget: int = BUDGET, block_nbytes: int = BLOCK, parts: Sequence[int] | None = None
    ) -> OwnerSide:
        parts = cls.PARTS if parts is None else parts
        return FarOwner(cls.lan.hosts[2], cls.backend, budget, block_nbytes, {}, parts)


def _suites(name: str) -> dict[str, type]:
    """Both suites for one backend."""
    marks = [pytest.mark.skipif(not works, reason=why) for works, why in [available_backends()[name]]]
    made: dict[str, type] = {}
    for kind, suite in (("", RemoteConformance), ("Parts", PartsConformance)):
        title = f"Test{name.title()}{kind}"
        made[title] = type(
            title, (_BetweenHosts, suite), {"backend": name, "pytestmark": marks, "__module__": __name__}
        )
    return made


for _name in available_backends():
    if _name not in ONE_HOST:
        globals().update(_suites(_name))


@pytest.fixture
def reader(backend: str) -> Iterator[Reader]:
    reader = Reader(backend, 40 << 20, BIG, PARTS)
    yield reader
    reader.transport.close()
    wait_for(lambda: reader.arena.stats().quarantined == 0, "quarantined blocks are released")


class _UnderWay:
    """Does something once bytes have come over the wire; a context manager around what makes them come.
    (Not with the first part: over nixl the parts of a small pull come side by side.)

    Attributes:
        done: it has been done.
    """

    def __init__(self, lan: Lan, deed: Callable[[], None], after_bytes: int = 2 << 20) -> None:
        self._lan, self._deed, self._after_bytes = lan, deed, after_bytes
        self._before = lan.received_bytes(1)
        self._thread = threading.Thread(target=self._watch)
        self.done = False

    def _watch(self) -> None:
        wait_for(lambda: self._lan.received_bytes(1) - self._before > self._after_bytes, "it is under way")
        self._deed()
        self.done = True

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)


@pytest.mark.parametrize("backend", BACKENDS)
class TestFaults:
    def _owner(self, lan: Lan, backend: str) -> FarOwner:
        return FarOwner(lan.hosts[2], backend, 36 << 20, BIG, {}, PARTS)

    def test_bytes_really_cross_the_network(self, lan: Lan, backend: str, reader: Reader) -> None:
        side = self._owner(lan, backend)
        try:
            refs = side.publish(8, seed=1)
            before = lan.received_bytes(1)
            assert reader.outcome(side, refs) is Outcome.PULLED
            assert lan.received_bytes(1) - before >= 8 * BIG
        finally:
            side.close()

    def test_cable_cut_during_a_pull(self, lan: Lan, backend: str, reader: Reader) -> None:
        """It ends by its deadline, nothing lands late in reused memory, and once the cable is in again pulls
        work, from the same owner: UCX must not have ended its process (see `transport/nixl.py`)."""
        side = self._owner(lan, backend)
        try:
            refs = side.publish(16, seed=1)
            assert reader.outcome(side, refs) is Outcome.PULLED, "the peer is known, and the link works"
            lan.shape("40mbit")  # 16 MiB take 3.4 s
            start = time.monotonic()
            with _UnderWay(lan, lambda: lan.cut(2)) as cut:
                assert reader.outcome(side, refs, timeout_s=TIMEOUT_S) in ENDED
            assert cut.done
            assert time.monotonic() - start < TIMEOUT_S + SLACK_S
            reuse = reader.arena.allocate(reader.arena.stats().free - 2)
            for block in reuse:
                reader.arena.payload(block).numpy()[:] = 7
            lan.restore()
            outcomes = self._until_pulled(reader, side, refs[:2])
            wait_for(lambda: reader.arena.stats().quarantined == 0, "the quarantine is released", 20)
            time.sleep(1.0)  # give a late write its chance
            assert all((reader.arena.payload(b).numpy() == 7).all() for b in reuse)
            reader.arena.free(reuse)
            assert side.process.is_alive(), "the owner was ended by UCX"
            assert outcomes[-1] is Outcome.PULLED, outcomes
        finally:
            side.close()

    def _until_pulled(self, reader: Reader, side: OwnerSide, refs: list) -> list[Outcome]:
        """TCP waits longer and longer before it sends again: the first pull after a cut may be too early."""
        outcomes: list[Outcome] = []
        while len(outcomes) < TRIES and Outcome.PULLED not in outcomes:
            outcomes.append(reader.outcome(side, refs, timeout_s=TIMEOUT_S))
        return outcomes

    def test_two_owners_one_of_which_is_slow_or_out_of_reach(
        self, lan: Lan, backend: str, reader: Reader
    ) -> None:
        """The good one gives its half and then the other one's as well, long before the deadline."""
        blocks = 8
        sides = [FarOwner(lan.hosts[n], backend, 20 << 20, BIG, {}, PARTS, f"host{n}") for n in (2, 3)]
        try:
            leases = [make_lease(side.owner, side.publish(blocks, seed=1)) for side in sides]
            both = replace(leases[0], others=(replace(leases[1], id=LeaseId("l2")),))
            for fault in ("", "slow", "cut"):
                if fault == "slow":
                    lan.slow_sender(3, "1mbit")  # half of the blocks take 32 s
                elif fault == "cut":
                    lan.cut(3)
                into = reader.arena.allocate(blocks)
                transfer = reader.transport.pull(both, into, timeout_s=20.0, on_part=None)
                assert transfer.outcome is Outcome.PULLED
                for at, block in enumerate(into):
                    assert bytes(reader.arena.payload(block).numpy()) == content(BIG, 1 + at).tobytes()
                reader.arena.free(into)
                given = Counter({s.source: s.nbytes for s in transfer.shares})
                assert sum(s.nbytes for s in transfer.shares) == blocks * BIG
                if fault == "":
                    assert min(given.values()) > 0
                elif fault == "cut":
                    moved = reader.transport.stats()["moved"]
                    assert [s.nbytes for s in transfer.shares if s.source == "host3"] == [0]
                    assert moved >= 2, "once for the slow one, once for the lost one"
        finally:
            lan.restore()
            for side in sides:
                side.close()

    def test_a_host_without_a_cable_costs_the_deadline_and_no_more(
        self, lan: Lan, backend: str, reader: Reader
    ) -> None:
        side = self._owner(lan, backend)
        try:
            refs = side.publish(2, seed=1)
            lan.cut(2)
            start = time.monotonic()
            assert reader.outcome(side, refs, timeout_s=TIMEOUT_S) in ENDED
            assert time.monotonic() - start < TIMEOUT_S + SLACK_S
            lan.restore()
            assert self._until_pulled(reader, side, refs)[-1] is Outcome.PULLED
        finally:
            side.close()

    def test_power_failure_during_a_pull(self, lan: Lan, backend: str, reader: Reader) -> None:
        """Cable and process go together: nobody is left to say goodbye. Another owner on that host, later,
        is a new peer."""
        side = self._owner(lan, backend)
        refs = side.publish(16, seed=1)
        lan.shape("40mbit")

        def power_off() -> None:
            lan.cut(2)
            side.kill()

        try:
            start = time.monotonic()
            with _UnderWay(lan, power_off) as off:
                assert reader.outcome(side, refs, timeout_s=TIMEOUT_S) in ENDED
            assert off.done
            assert time.monotonic() - start < TIMEOUT_S + SLACK_S
        finally:
            lan.restore()
            side.close()
        other = self._owner(lan, backend)
        try:
            assert reader.outcome(other, other.publish(2, seed=2)) is Outcome.PULLED
        finally:
            other.close()
