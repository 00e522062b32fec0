"""Eviction, spilling and promotion with real stores: back comes what was published, or a counted miss."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.workers.stores import LAYOUT, Cluster, Desk, key, names, numbers, reasons
from transport.directory.local import LocalDirectory
from transport.errors import ArenaFull, DeadlineExceeded, DirectoryUnavailable, TransportError
from transport.faults import TEST_MODE_ENV, FaultKind, Faults, FaultSpec
from transport.types import Owner, Segment, SegmentKey


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(disk_dir=tmp_path)
    yield cluster
    for desk in cluster.desks.values():
        desk.flush()
    cluster.check()
    cluster.close()
    assert list(tmp_path.iterdir()) == [], "no file is left behind"


def fill(desk: Desk, count: int, **options: int) -> None:
    """Publish segments "0", "1", ... of one block, each full of its own number."""
    for i in range(count):
        desk.put(str(i), value=float(i), **options)


# -- eviction order -----------------------------------------------------------------------------------------


def test_what_its_readers_have_read_makes_room_first(cluster: Cluster) -> None:
    a, b, c = cluster.desk("a", blocks=3), cluster.desk("b"), cluster.desk("c")
    a.put("old", consumers=2)
    a.put("x", consumers=2)
    a.put("y")
    b.read("x")
    a.put("new")
    assert names(a.store.segments()) == ["new", "x", "y"], "one of two has read it: the oldest goes"
    c.read("x")
    a.put("newer")
    assert names(a.store.segments()) == ["new", "newer", "y"]
    assert a.stats()["evictions"] == {"lru": 1, "consumed": 1, "operator": 0, "spill": 0}


def test_the_owners_own_read_counts_and_a_failed_pull_does_not(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=2), cluster.desk("b", blocks=1)
    a.put("x", consumers=1)
    a.put("y", consumers=1)
    b.put("in the way")
    kept = b.get("in the way")
    assert b.misses("x") == {"x": "arena_full"}
    b.store.release(kept)
    a.read("y")
    a.put("z")
    assert names(a.store.segments()) == ["x", "z"]


def test_publishing_again_expects_more_readers(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=2), cluster.desk("b")
    first = a.put("x", consumers=1)
    b.read("x")
    again = a.put("x", consumers=1)  # the next run of the pipeline has made the same answer
    assert (again.blocks, again.consumers) == (first.blocks, 2)
    a.put("y")
    b.read("x")
    a.put("z")
    assert names(a.store.segments()) == ["y", "z"]


def test_a_segment_of_unknown_readers_is_not_asked_about_again(cluster: Cluster) -> None:
    a = cluster.desk("a")
    assert a.put("x") is a.put("x", consumers=3)


def test_a_full_arena_is_back_pressure_and_counted(cluster: Cluster) -> None:
    a = cluster.desk("a", blocks=2, host_blocks=8)
    a.put("x", blocks=2)
    reading = a.get("x")
    with pytest.raises(ArenaFull):
        a.put("y")
    with pytest.raises(ArenaFull):
        a.put("larger than the arena", blocks=3)
    assert a.stats()["backpressure"] == 2
    assert numbers(reading, "x") == {1.0}
    a.store.release(reading)


# -- spilled and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_spilled_segment_comes_back_for_its_owner_and_for_others(cluster: Cluster, tier: str) -> None:
    a, b = cluster.desk("a", blocks=2, **{f"{tier}_blocks": 8}), cluster.desk("b")
    fill(a, 5)
    a.flush()
    assert a.stats()["tiers"][tier]["segments"] == 3
    assert (a.stats()["held_blocks"], a.stats()["spills"]) == (2, 3)
    assert names(a.store.segments()) == list("01234")
    assert a.read("0") == {"0": {0.0}}
    a.flush()
    assert b.read("1", "2") == {"1": {1.0}, "2": {2.0}}
    a.flush()
    stats = a.stats()
    assert (stats["promotions"], stats["not_promoted"], stats["evictions"]["lru"]) == (3, {}, 6)
    assert stats["tiers"]["arena"]["segments"] + stats["tiers"][tier]["segments"] == 5
    for i in range(5):
        assert b.read(str(i)) == {str(i): {float(i)}}


def test_every_segment_is_read_right_however_often_it_went_out(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=3, host_blocks=2, disk_blocks=40), cluster.desk("b", blocks=2)
    fill(a, 12)
    for turn in range(36):
        name = str(turn * 5 % 12)
        reader = b if turn % 3 else a
        assert reader.read(name) == {name: {float(name)}}
    a.flush()
    assert a.stats()["tiers"]["arena"]["segments"] <= 3
    assert a.stats()["lost"] == {}
    assert a.stats()["disk_reads"] > 0


def test_consumed_segments_are_not_spilled(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    a.put("x", consumers=1)
    b.read("x")
    a.put("y")
    assert (names(a.store.segments()), a.stats()["spills"]) == (["y"], 0)


def test_a_segment_that_is_read_here_is_spilled_once_and_its_blocks_wait(cluster: Cluster) -> None:
    a = cluster.desk("a", blocks=2, host_blocks=8)
    a.put("x", blocks=2, value=3.0)
    reading = a.get("x")
    a.store.release_bytes(got := a.get("x"))
    cluster.directory.release([*reading.leases, *got.leases])  # as if they had expired
    with pytest.raises(ArenaFull):
        a.put("y")
    assert (a.stats()["doomed_blocks"], a.stats()["pins"], a.stats()["spills"]) == (2, 1, 1)
    assert numbers(reading, "x") == {3.0}
    a.store.release(reading)
    a.store.release(got)
    assert a.read("x") == {"x": {3.0}}


def test_what_the_spill_loses_leaves_the_directory(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=2), cluster.desk("b")
    fill(a, 5)
    assert b.misses("0", "1", "4") == {"0": "not_found", "1": "not_found"}
    assert (a.stats()["lost"], a.stats()["evictions"]["spill"]) == ({"budget": 2}, 2)


def test_withdraw_and_operator_reach_spilled_segments(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    fill(a, 3)
    a.store.withdraw(key("0"))
    found = a.store.find([key("1")])[key("1")].segment
    assert found.spilled
    cluster.directory.retract(a.owner, [found])
    a.store.holding.drop([found], operator=True)
    assert b.misses("0", "1") == {"0": "not_found", "1": "not_found"}
    assert (a.stats()["evictions"]["operator"], a.stats()["tiers"]["host"]["segments"]) == (1, 0)


def test_an_operators_eviction_is_not_spilled(cluster: Cluster) -> None:
    a = cluster.desk("a", host_blocks=8)
    a.put("x", blocks=2)
    gone = cluster.directory.evict(a.owner, nbytes=1)
    assert a.store.holding.drop(gone, operator=True) == 2
    assert (a.store.segments(), a.stats()["spills"], a.stats()["evictions"]["operator"]) == ([], 0, 1)


# -- publishing what is spilled -----------------------------------------------------------------------------


def test_a_new_publish_takes_the_place_of_the_spilled_copy(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    a.put("x", value=1.0)
    a.put("y")
    a.put("x", value=2.0)
    assert (a.stats()["tiers"]["host"]["segments"], names(a.store.segments())) == (1, ["x", "y"])
    assert b.read("x") == {"x": {2.0}}


def test_an_exact_spilled_copy_comes_back_instead_of_a_rectified_new_one(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    a.put("x", value=1.0, variant="c")
    a.put("y")
    assert a.put("x", value=2.0, variant="c~naive").variant == "c"
    assert b.read("x") == {"x": {1.0}}
    assert a.stats()["promotions"] == 1
    a.put("z", value=1.0, variant="c~naive")
    a.put("y2")
    assert a.put("z", value=2.0, variant="c").variant == "c"
    assert b.read("z") == {"z": {2.0}}


# -- faults: a counted miss, never wrong bytes --------------------------------------------------------------


def test_a_damaged_file_is_a_miss(cluster: Cluster, tmp_path: Path) -> None:
    a, b = cluster.desk("a", blocks=1, disk_blocks=8), cluster.desk("b")
    fill(a, 3)
    a.flush()
    for path in tmp_path.glob("relay-spill-*/*.kv"):
        data = bytearray(path.read_bytes())
        data[-LAYOUT.block_nbytes // 2] ^= 4
        path.write_bytes(data)
    for desk in (a, b):
        name = "0" if desk is a else "1"
        assert desk.misses(name) == {name: "not_promoted"}
        assert desk.misses(name) == {name: "not_found"}
    assert (a.stats()["lost"], a.stats()["not_promoted"]) == ({"damaged": 2}, {"not_here": 2})


def test_spilled_memory_that_has_changed_is_a_miss(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    fill(a, 2)
    loaded = a.store.holding._spilling._spill.load(key("0"))
    assert loaded is not None
    loaded[1][0][100] ^= 1
    assert b.misses("0") == {"0": "not_promoted"}
    assert a.stats()["not_promoted"] == {"damaged": 1}
    assert b.misses("0") == {"0": "not_found"}


def test_no_room_to_promote_is_a_miss_and_the_segment_stays_spilled(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    fill(a, 2)
    reading = a.get("1")
    for desk in (a, b):
        assert desk.misses("0") == {"0": "not_promoted"}
    a.store.release(reading)
    assert a.stats()["not_promoted"] == {"arena_full": 2}
    assert b.read("0") == {"0": {0.0}}


def test_what_a_request_has_leased_is_not_evicted_for_the_rest_of_it(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=3, host_blocks=8), cluster.desk("b")
    fill(a, 6)
    assert b.read("0", "4", "1") == {"0": {0.0}, "4": {4.0}, "1": {1.0}}
    got = b.get("2", "3", "0", "1")
    assert reasons(got) == {"3": "not_promoted"}, "three fit, and two of them were there"
    b.store.release(got)
    assert a.stats()["not_promoted"] == {"arena_full": 1}


def test_a_silent_owner_is_asked_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    fill(a, 4)
    asked: list[SegmentKey] = []

    def silent(owner: Owner, keys: Sequence[SegmentKey]) -> frozenset[SegmentKey]:
        asked.extend(keys)
        raise DeadlineExceeded("no answer")

    monkeypatch.setattr(b.store, "_ask_owner", silent)
    assert b.misses("0", "1", "2", "3") == dict.fromkeys("012", "not_promoted")
    assert len(asked) == 1


def test_an_owner_that_cannot_be_asked_is_a_miss(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    fill(a, 2)

    def gone(owner: Owner, keys: Sequence[SegmentKey]) -> frozenset[SegmentKey]:
        raise TransportError(f"{owner.worker} is gone")

    for ask in (gone, None):
        monkeypatch.setattr(b.store, "_ask_owner", ask)
        assert b.misses("0", "1") == {"0": "not_promoted"}, "the other one is there"
    assert a.stats()["promotions"] == 0


def test_a_spilled_copy_does_not_hide_one_that_can_be_leased(cluster: Cluster) -> None:
    a, b, c = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b"), cluster.desk("c")
    a.put("x", value=1.0, variant="c")
    a.put("y")
    b.put("x", value=2.0, variant="c~naive")
    blocked = a.get("y")
    assert c.read("x") == {"x": {2.0}}, "the exact one cannot come back now; a rectified one is there"
    a.store.release(blocked)
    assert c.read("x") == {"x": {1.0}}


class Faulty(LocalDirectory):
    """Fails publishes of spilled segments as told."""

    refuse = False
    lossy = False

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> None:
        spilled = any(s.spilled for s in segments)
        if self.refuse and spilled:
            raise DirectoryUnavailable("down")
        super().publish(owner, segments)
        if self.lossy and spilled:
            raise DirectoryUnavailable("no answer")


@pytest.mark.parametrize("fault", ["refuse", "lossy"])
def test_what_the_directory_does_not_hear_of_is_not_kept(cluster: Cluster, fault: str) -> None:
    cluster.directory = directory = Faulty()
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    setattr(directory, fault, True)
    fill(a, 3)
    assert (names(a.store.segments()), a.stats()["tiers"]["host"]["segments"]) == (["2"], 0)
    setattr(directory, fault, False)
    assert b.misses("0", "1") == {"0": "not_found", "1": "not_found"}


def test_a_stray_entry_of_the_directory_is_taken_back_when_somebody_asks(cluster: Cluster) -> None:
    a, b = cluster.desk("a", blocks=1, host_blocks=8), cluster.desk("b")
    fill(a, 2)
    a.store.holding._spilling._spill.drop(key("0"))  # as if the retraction had been lost
    assert b.misses("0") == {"0": "not_promoted"}
    assert b.misses("0") == {"0": "not_found"}


# -- at once ------------------------------------------------------------------------------------------------


def churn(desks: tuple[Desk, Desk], seed: int, i: int) -> list[tuple[str, set[float]]]:
    """One step of a thread: publish or withdraw something, then read two others."""
    desk, name = desks[(seed + i // 5) % 2], str((seed * 7 + i * 5) % 9)
    if i % 3 == 0:
        desk.put(name, value=float(name), consumers=8 if i % 2 else 0)
    elif i % 29 == 0:
        desk.store.withdraw(key(name))
    return list(desk.read(name, str(i % 9)).items())


def test_many_readers_and_writers_over_all_tiers(cluster: Cluster) -> None:
    a = cluster.desk("a", blocks=4, host_blocks=2, disk_blocks=4)
    b = cluster.desk("b", blocks=5, host_blocks=1)
    seen: list[tuple[str, set[float]]] = []

    def work(seed: int) -> None:
        for i in range(80):
            with contextlib.suppress(ArenaFull):
                seen.extend(churn((a, b), seed, i))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert [(name, found) for name, found in seen if found != {float(name)}] == []
    assert len(seen) > 100
    assert a.stats()["promotions"] + b.stats()["promotions"] > 0
    for desk in (a, b):
        desk.flush()
        for tier in desk.stats()["tiers"].values():
            assert tier["bytes"] <= tier["budget_bytes"]


def test_an_injected_full_disk_loses_segments_and_says_so(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`transport.faults` reaches the spill: what cannot be written is given up, counted, and never read."""
    monkeypatch.setenv(TEST_MODE_ENV, "1")
    a, b = cluster.desk("a", blocks=2, disk_blocks=8), cluster.desk("b")
    a.arena.faults = Faults()
    a.arena.faults.arm(FaultSpec(kind=FaultKind.DISK_FULL))
    for name in ("1", "2", "3", "4"):
        a.put(name)
        a.flush()
    assert a.stats()["lost"] == {"disk_error": 1}
    assert b.misses("1") == {"1": "not_found"}
    assert "2" in b.read("2")
