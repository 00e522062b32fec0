"""Pulls from two owners of the same bytes: all of them come, from both, and whatever happens to one of the
two, the other one gives the rest."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from tests.transport.conformance import Reader
from tests.transport.rigs import LocalOwner, OwnerSide, RemoteOwner, content, make_lease, wait_for
from transport import nixl, sharing
from transport.auto import available_backends
from transport.errors import ArenaFull
from transport.sharing import SHARED_NBYTES, same_bytes, sources
from transport.types import BlockId, BlockRef, Lease, LeaseId, Outcome, Transfer

KIB = 1 << 10
BLOCK = 256 * KIB
PARTS = (64 * KIB, 64 * KIB, 128 * KIB)
BLOCKS = 16
BUDGET = (2 * BLOCKS + 4) * (BLOCK + KIB)
SEED = 5
OVER_A_NETWORK = {"UCX_TLS": "tcp"}  # so that the owner has to take part in the transfer

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not works, reason=why))
    for name, (works, why) in available_backends().items()
    if name != "inprocess"
]


def _both(one: OwnerSide, other: OwnerSide, refs: Sequence[list[BlockRef]], ttl_s: float = 30.0) -> Lease:
    """A lease of one owner's copy, and of the other's."""
    first, second = make_lease(one.owner, refs[0], ttl_s), make_lease(other.owner, refs[1], ttl_s)
    return replace(first, others=(replace(second, id=LeaseId("l2")),))


class _Pulled:
    """A pull, and what was seen of it."""

    def __init__(self, reader: Reader, lease: Lease, **options: Any) -> None:
        arena = reader.arena
        self.handed: list[int] = []
        on_part: Callable[[int], None] = options.pop("on_part", lambda _: None)

        def hand(part: int) -> None:
            self.handed.append(part)
            on_part(part)

        into = arena.allocate(len(lease.located.segment.blocks))
        self.blocks = list(into)
        self.transfer: Transfer = reader.transport.pull(
            lease, into, **{"timeout_s": 10.0, **options}, on_part=hand
        )
        self.content = [bytes(arena.payload(block).numpy()) for block in into]
        if self.transfer.outcome is not Outcome.TIMED_OUT:
            arena.free(into)

    @property
    def given(self) -> dict[str, int]:
        """Bytes by owner."""
        out: dict[str, int] = {}
        for share in self.transfer.shares:
            out[share.source] = out.get(share.source, 0) + share.nbytes
        return out

    def expect_all(self) -> None:
        assert self.transfer.outcome is Outcome.PULLED, self.transfer
        assert (self.transfer.detail, self.transfer.nbytes) == ("", BLOCKS * BLOCK)
        assert self.handed == [0, 1, 2]
        assert self.content == [content(BLOCK, SEED + at).tobytes() for at in range(BLOCKS)]
        assert sum(self.given.values()) == BLOCKS * BLOCK, "every byte is counted once"


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Reader, LocalOwner, LocalOwner]]:
    """A reader and two owners in this process, none of which is slow, whatever the machine does."""
    monkeypatch.setattr(sharing, "_SLOW_AT_LEAST_S", 60.0)
    with ExitStack() as stack:
        reader = Reader("inprocess", BUDGET, BLOCK, PARTS)
        stack.callback(reader.transport.close)
        owners = [LocalOwner("inprocess", BUDGET, BLOCK, PARTS, name=name) for name in ("a", "b")]
        for owner in owners:
            stack.callback(owner.close)
        yield reader, *owners
        wait_for(lambda: reader.arena.stats().used == 0, "all landing blocks are given back")
        assert reader.arena.stats().quarantined == 0


def test_both_owners_give_half(local: tuple[Reader, LocalOwner, LocalOwner]) -> None:
    reader, a, b = local
    pulled = _Pulled(reader, _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)]))
    pulled.expect_all()
    assert pulled.given == {"a": BLOCKS * BLOCK // 2, "b": BLOCKS * BLOCK // 2}
    stats = reader.transport.stats()
    assert (stats["shared"], stats["moved"], stats["pulls.inprocess"]) == (1, 0, 2)
    assert pulled.transfer.backend == "inprocess"


def test_copies_of_other_bytes_are_not_mixed(local: tuple[Reader, LocalOwner, LocalOwner]) -> None:
    reader, a, b = local
    lease = _both(a, b, [a.publish(BLOCKS, SEED), b.publish(BLOCKS, SEED + 1)])
    assert sources(lease) == (lease,)
    pulled = _Pulled(reader, lease)
    assert pulled.transfer.outcome is Outcome.PULLED
    assert pulled.content == [content(BLOCK, SEED + at).tobytes() for at in range(BLOCKS)]
    assert "shared" not in reader.transport.stats()


@pytest.mark.parametrize("what", [{"variant": "v"}, {"layout": "l"}, {"start": 3}, {"num_tokens": 9}])
def test_same_bytes_means_the_same_in_every_way(
    local: tuple[Reader, LocalOwner, LocalOwner], what: dict[str, Any]
) -> None:
    _, a, b = local
    lease = _both(a, b, [a.publish(2, SEED), b.publish(2, SEED)])
    one, two = lease.located.segment, lease.others[0].located.segment
    assert same_bytes(one, two)
    assert not same_bytes(one, replace(two, **what))
    assert not same_bytes(one, replace(two, blocks=two.blocks[:1]))


@pytest.mark.parametrize("bad", ["corrupt", "freed"])
def test_what_is_wrong_at_one_owner_comes_from_the_other(
    local: tuple[Reader, LocalOwner, LocalOwner], bad: str
) -> None:
    reader, a, b = local
    refs = [s.publish(BLOCKS, SEED) for s in (a, b)]
    if bad == "corrupt":
        a.corrupt(refs[0][1], at=PARTS[0] + 9)  # the second part: the first one has been used by then
    else:
        a.free(refs[0])
    pulled = _Pulled(reader, _both(a, b, refs))
    pulled.expect_all()
    assert reader.transport.stats()["moved"] == 1
    outcomes = [(s.source, s.outcome) for s in pulled.transfer.shares]
    assert ("a", Outcome.CORRUPT if bad == "corrupt" else Outcome.STALE) in outcomes
    assert outcomes.count(("b", Outcome.PULLED)) == 2


def test_wrong_at_both_owners_is_a_failure(local: tuple[Reader, LocalOwner, LocalOwner]) -> None:
    reader, a, b = local
    refs = [s.publish(BLOCKS, SEED) for s in (a, b)]
    for side, held in zip((a, b), refs, strict=True):
        side.corrupt(held[1], at=PARTS[0] + 9)
    pulled = _Pulled(reader, _both(a, b, refs))
    assert (pulled.transfer.outcome, pulled.transfer.nbytes) == (Outcome.CORRUPT, 0)
    assert pulled.transfer.detail
    assert pulled.handed == [0], "part 0 is good everywhere"


def test_a_small_segment_comes_from_one_owner_while_it_gives(
    local: tuple[Reader, LocalOwner, LocalOwner],
) -> None:
    reader, a, b = local
    few = SHARED_NBYTES // BLOCK - 1
    refs = [s.publish(few, SEED) for s in (a, b)]
    assert _Pulled(reader, _both(a, b, refs)).given == {"a": few * BLOCK}
    a.free(refs[0])
    pulled = _Pulled(reader, _both(a, b, refs))
    assert (pulled.transfer.outcome, pulled.given) == (Outcome.PULLED, {"a": 0, "b": few * BLOCK})


def test_without_room_to_land_it_is_pulled_from_one(local: tuple[Reader, LocalOwner, LocalOwner]) -> None:
    reader, a, b = local
    lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
    taken = reader.arena.allocate(reader.arena.num_blocks - BLOCKS - 1)
    pulled = _Pulled(reader, lease)
    assert (pulled.transfer.outcome, pulled.transfer.shares) == (Outcome.PULLED, ())
    assert reader.transport.stats()["unshared"] == 1
    reader.arena.free(taken)


def test_what_on_part_raises_ends_it(local: tuple[Reader, LocalOwner, LocalOwner]) -> None:
    reader, a, b = local
    lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
    into = reader.arena.allocate(BLOCKS)

    def give_up(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reader.transport.pull(lease, into, timeout_s=5.0, on_part=give_up)
    reader.arena.free(into)


def test_a_lease_that_has_ended_is_told(local: tuple[Reader, LocalOwner, LocalOwner]) -> None:
    reader, a, b = local
    lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
    pulled = _Pulled(reader, lease, lease_deadline=time.monotonic() - 1)
    assert (pulled.transfer.outcome, pulled.handed) == (Outcome.LEASE_EXPIRED, [])


def test_many_pulls_at_once_leave_nothing_behind(local: tuple[Reader, LocalOwner, LocalOwner]) -> None:
    reader, a, b = local
    few = SHARED_NBYTES // BLOCK
    refs = [s.publish(few, SEED) for s in (a, b)]
    wrong: list[object] = []

    def pull() -> None:
        for _ in range(10):
            try:
                pulled = _Pulled(reader, _both(a, b, refs))
            except ArenaFull:
                continue  # that of the test itself
            if pulled.content != [content(BLOCK, SEED + at).tobytes() for at in range(few)]:
                wrong.append(pulled.transfer)

    threads = [threading.Thread(target=pull) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


# -- owners in processes of their own ------------------------------------------------------------------------


@pytest.fixture
def far(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Reader, RemoteOwner, RemoteOwner]]:
    """A reader here and two owners elsewhere."""
    for name, value in OVER_A_NETWORK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(nixl, "FAREWELL_S", 1.0)  # not every frozen owner here goes on
    with ExitStack() as stack:
        owners = [RemoteOwner(backend, BUDGET, BLOCK, OVER_A_NETWORK, PARTS, name=name) for name in "ab"]
        for owner in owners:
            stack.callback(owner.close)
        reader = Reader(backend, BUDGET, BLOCK, PARTS)
        stack.callback(reader.transport.close)
        yield reader, *owners
        wait_for(lambda: reader.arena.stats().used == 0, "all landing blocks are given back")
        wait_for(lambda: reader.arena.stats().quarantined == 0, "the quarantine is released")


class _Gate:
    """Stops one owner's attempt behind its first part, until something has been done to that owner."""

    def __init__(self, reader: Reader, owner: str, deed: Callable[[], None]) -> None:
        self._pull = reader.transport._pull_one
        self._owner, self._deed = owner, deed
        self.done = False
        reader.transport._pull_one = self.pull  # type: ignore[method-assign]

    def pull(
        self, lease: Lease, into: Sequence[BlockId], *, on_part: Callable[[int], None], **options: Any
    ) -> Transfer:
        def first_then_the_deed(part: int) -> None:
            on_part(part)
            if lease.located.owner.worker == self._owner and not self.done:
                self.done = True
                self._deed()

        return self._pull(lease, into, on_part=first_then_the_deed, **options)


@pytest.mark.parametrize("backend", BACKENDS)
class TestOwnersElsewhere:
    def test_both_give_half(self, far: tuple[Reader, RemoteOwner, RemoteOwner], backend: str) -> None:
        reader, a, b = far
        pulled = _Pulled(reader, _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)]))
        pulled.expect_all()
        assert min(pulled.given.values()) > 0
        assert pulled.transfer.backend == backend

    @pytest.mark.parametrize("victim", ["a", "b"])
    def test_killed_in_the_middle(
        self, far: tuple[Reader, RemoteOwner, RemoteOwner], backend: str, victim: str
    ) -> None:
        reader, a, b = far
        lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
        _Pulled(reader, lease).expect_all()  # the peers are known
        gate = _Gate(reader, victim, (a if victim == "a" else b).kill)
        pulled = _Pulled(reader, lease)
        assert gate.done
        pulled.expect_all()
        survivor = "b" if victim == "a" else "a"
        assert pulled.given[survivor] >= BLOCKS * BLOCK // 2
        if backend == "tcp":  # which asks for one part after the other, so that the last one cannot be there
            assert pulled.given[survivor] > BLOCKS * BLOCK // 2
            assert pulled.given[victim] > 0, "what it gave is not asked for again"
            assert reader.transport.stats()["moved"] == 1
            assert [s.outcome for s in pulled.transfer.shares if s.source == victim] == [Outcome.PEER_GONE]

    def test_dead_from_the_beginning(
        self, far: tuple[Reader, RemoteOwner, RemoteOwner], backend: str
    ) -> None:
        reader, a, b = far
        lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
        a.kill()
        pulled = _Pulled(reader, lease)
        pulled.expect_all()
        assert pulled.given == {"a": 0, "b": BLOCKS * BLOCK}

    def test_frozen(self, far: tuple[Reader, RemoteOwner, RemoteOwner], backend: str) -> None:
        """The other one gives all long before the deadline, and what the frozen one sends when it goes on
        reaches nobody."""
        reader, a, b = far
        lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
        _Pulled(reader, lease).expect_all()
        a.signal(signal.SIGSTOP)
        try:
            pulled = _Pulled(reader, lease, timeout_s=6.0)
            pulled.expect_all()
            if backend == "shm":  # its memory is read without its help
                assert pulled.given == dict.fromkeys("ab", BLOCKS * BLOCK // 2)
                return
            assert pulled.given == {"a": 0, "b": BLOCKS * BLOCK}
            assert pulled.transfer.seconds < 5.0, "it does not wait for the frozen one's deadline"
            told = {s.source: s for s in pulled.transfer.shares if s.outcome is not Outcome.PULLED}
            assert set(told) == {"a"}
            reuse = reader.arena.allocate(BLOCKS)
            for block in reuse:
                reader.arena.payload(block).numpy()[:] = 7
        finally:
            a.signal(signal.SIGCONT)
        time.sleep(1.0)  # give a late write its chance
        assert all((reader.arena.payload(block).numpy() == 7).all() for block in reuse)
        reader.arena.free(reuse)

    def test_both_dead(self, far: tuple[Reader, RemoteOwner, RemoteOwner], backend: str) -> None:
        reader, a, b = far
        lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
        a.kill()
        b.kill()
        pulled = _Pulled(reader, lease)
        assert (pulled.transfer.outcome, pulled.handed) == (Outcome.PEER_GONE, [])

    def test_both_frozen(self, far: tuple[Reader, RemoteOwner, RemoteOwner], backend: str) -> None:
        reader, a, b = far
        lease = _both(a, b, [s.publish(BLOCKS, SEED) for s in (a, b)])
        for side in (a, b):
            side.signal(signal.SIGSTOP)
        began = time.monotonic()
        pulled = _Pulled(reader, lease, timeout_s=1.0)
        assert pulled.transfer.outcome is Outcome.TIMED_OUT
        assert time.monotonic() - began < 4.0
