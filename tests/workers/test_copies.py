"""What a reader has pulled it offers to others: then a segment has several owners, of which any may go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.workers.stores import Cluster, Desk, key, names, numbers, reasons
from transport.errors import DirectoryUnavailable
from transport.types import BlockId, Lease, Outcome, Transfer


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.close()
    cluster.check()


def _keeping(cluster: Cluster, name: str, blocks: int = 8) -> Desk:
    desk = cluster.desk(name, blocks)
    desk.store._fetching._keep_pulled = True
    return desk


def _until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _offered(cluster: Cluster, copies: int) -> None:
    """Wait until the directory knows so many copies."""
    _until(lambda: cluster.directory.stats()["segments"] == copies)  # type: ignore[attr-defined]


def test_a_copy_is_held_and_offered_and_read_by_the_next_one(cluster: Cluster) -> None:
    a, b, c = cluster.desk("a"), _keeping(cluster, "b"), cluster.desk("c")
    a.put("x", 2, value=3.0, consumers=3)
    assert b.read("x") == {"x": {3.0}}
    _offered(cluster, 2)
    assert (b.stats()["adopted"], b.stats()["held_blocks"], b.stats()["pins"]) == (1, 2, 0)
    assert b.store.segments()[0].producer == a.store.segments()[0].producer
    a.store.withdraw(key("x"))
    assert c.read("x") == {"x": {3.0}}, "from the copy alone"
    got = b.get("x")
    assert [t.backend for _, t in got.transfers] == ["local"], "the second time nothing travels"
    b.store.release(got)


def test_a_reader_takes_parts_from_both(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.sharing.SHARED_NBYTES", 1)
    monkeypatch.setattr("transport.sharing._SLOW_AT_LEAST_S", 60.0)  # on a busy machine
    a, b, c = cluster.desk("a"), _keeping(cluster, "b"), cluster.desk("c", 16)
    a.put("x", 4, value=3.0, consumers=3)
    b.read("x")
    _offered(cluster, 2)
    got = c.get("x")
    assert numbers(got, "x") == {3.0}
    half = 2 * c.store._layout.block_nbytes
    told = {at.owner.worker: (t.source, t.nbytes, t.outcome) for at, t in got.transfers}
    assert told == {"a": ("a", half, Outcome.PULLED), "b": ("b", half, Outcome.PULLED)}
    assert c.stats()["leases"] == 2
    c.store.release(got)
    assert c.transport.stats()["shared"] == 1


def test_the_rest_comes_from_the_other_owner(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.sharing.SHARED_NBYTES", 1)
    a, b, c = cluster.desk("a"), _keeping(cluster, "b"), cluster.desk("c", 16)
    a.put("x", 4, value=3.0, consumers=3)
    a.put("y", 4, value=4.0, consumers=3)
    b.read("x", "y")
    _offered(cluster, 4)
    a.transport.close()  # and nobody tells the directory
    got = c.get("x")
    assert (reasons(got), numbers(got, "x")) == ({}, {3.0})
    told = sorted((t.source, t.outcome) for _, t in got.transfers)
    assert told == [("a", Outcome.PEER_GONE), ("b", Outcome.PULLED), ("b", Outcome.PULLED)]
    c.store.release(got)
    assert c.transport.stats()["moved"] == 1
    assert c.read("y") == {"y": {4.0}}


def test_an_owner_that_did_not_answer_is_not_asked_for_the_next_one(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = cluster.desk("a"), _keeping(cluster, "b"), cluster.desk("c", 16)
    a.put("x", consumers=3)
    b.read("x")
    _offered(cluster, 2)
    got = c.get()
    (lease,) = c.store._lease([key("x")], got)
    first, *others = (lease.lease, *lease.lease.others)
    assert len(others) == 1
    got.lost[(first.located.owner.worker, first.located.owner.incarnation)] = Outcome.TIMED_OUT
    tried: list[str] = []
    pull = c.transport.pull

    def watched(lease: Lease, into: Sequence[BlockId], **options: Any) -> Transfer:
        tried.append(lease.located.owner.worker)
        assert lease.others == ()
        return pull(lease, into, **options)

    monkeypatch.setattr(c.transport, "pull", watched)
    c.store._fetching.begin(got, [lease], pipelined=False, on_landed=None)
    assert tried == [others[0].located.owner.worker]
    assert numbers(got, "x") == {1.0}
    c.store.release(got)


def test_copies_make_room_first_and_cost_nobody_a_segment(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), _keeping(cluster, "b", 6)
    for name in ("x", "y"):
        a.put(name, 2, value=3.0, consumers=3)
    b.put("own", 2)
    b.read("x", "y")
    _offered(cluster, 5)
    assert b.arena.stats().free == 0
    b.put("more", 2)
    b.put("still more", 2)
    assert names(b.store.segments()) == ["more", "own", "still more"]
    assert b.stats()["evictions"] == {"lru": 0, "consumed": 2, "operator": 0, "spill": 0}
    assert b.stats()["backpressure"] == 0


@pytest.mark.parametrize(("consumers", "kept"), [(0, False), (1, False), (2, True)])
def test_what_nobody_else_reads_is_not_kept(cluster: Cluster, consumers: int, kept: bool) -> None:
    a, b = cluster.desk("a"), _keeping(cluster, "b")
    a.put("x", consumers=consumers)
    b.read("x")
    assert b.stats()["adopted"] == int(kept)
    _offered(cluster, 1 + kept)


def test_a_reader_that_leaves_nothing_behind_keeps_nothing(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), _keeping(cluster, "b")
    a.put("x", consumers=2)
    b.store.release(b.store.acquire({key("x"): 1}, keep=False))
    assert (b.stats()["adopted"], b.arena.stats().used) == (0, 0)


def test_copies_can_be_taken_back_and_nothing_else(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), _keeping(cluster, "b")
    a.put("x", consumers=2)
    b.put("own", consumers=2)
    b.read("x")
    _offered(cluster, 3)
    b.store.holding.withdraw_copies([key("x"), key("own"), key("unknown")])
    assert names(b.store.segments()) == ["own"]
    _offered(cluster, 2)


def test_every_copy_has_been_read_when_all_readers_have(cluster: Cluster) -> None:
    a, b, c = cluster.desk("a", 2), _keeping(cluster, "b"), cluster.desk("c")
    a.put("x", consumers=2)
    a.put("lru")
    b.read("x")
    _offered(cluster, 3)
    c.read("x")  # wherever from
    a.put("more")
    assert names(a.store.segments()) == ["lru", "more"], "what all have read goes before the least recent"


def test_a_copy_that_cannot_be_offered_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = cluster.desk("a"), _keeping(cluster, "b")
    a.put("x", 2, value=3.0, consumers=3)

    def down(*_: Any) -> None:
        raise DirectoryUnavailable("no shard answers")

    monkeypatch.setattr(cluster.directory, "publish", down)
    assert b.read("x") == {"x": {3.0}}
    _until(lambda: b.arena.stats().used == 0)
    assert b.store.segments() == []


def test_an_exact_segment_takes_the_place_of_a_copy_that_is_not(cluster: Cluster) -> None:
    a, b = cluster.desk("a"), _keeping(cluster, "b")
    a.put("x", 2, variant="v~epic", consumers=3)
    b.read("x")
    _offered(cluster, 2)
    b.put("x", 2, value=5.0, variant="v")
    assert [s.variant for s in b.store.segments()] == ["v"]
    assert b.arena.stats().used == 2
