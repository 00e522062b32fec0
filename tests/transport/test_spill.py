"""Spill tiers with real memory, real files and real file-system limits."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.transport.rigs import content, wait_for
from transport.settings import MIB, SpillSettings
from transport.spill import Spill
from transport.spill_files import Payload, SpillFolder
from transport.types import BlockId, BlockRef, Incarnation, Segment, SegmentKey, WorkerId

BLOCK = 4096
ME, LIFE = WorkerId("w0"), Incarnation(7)


def segment(name: str, blocks: int = 1, generation: int = 1) -> Segment:
    refs = tuple(BlockRef(BlockId(i), generation, BLOCK, (0,)) for i in range(blocks))
    return Segment(SegmentKey("space", name.encode()), blocks, 0, refs, spilled=True)


def payloads(name: str, blocks: int = 1) -> list[Payload]:
    seed = int.from_bytes(name.encode(), "big")
    return [content(BLOCK, seed + i) for i in range(blocks)]


class Rig:
    """A spill, what it has lost, and its folder."""

    def __init__(self, parent: Path, **settings: int) -> None:
        self.parent = parent
        self.lost: list[str] = []
        self.spill = Spill(SpillSettings(disk_dir=str(parent), **settings), ME, LIFE, self._lost)

    def _lost(self, segments: Sequence[Segment]) -> None:
        self.lost += [s.key.digest.decode() for s in segments]

    def put(self, name: str, blocks: int = 1) -> bool:
        return self.spill.put(segment(name, blocks), payloads(name, blocks))

    def load(self, name: str) -> list[bytes] | None:
        loaded = self.spill.load(segment(name).key)
        return None if loaded is None else [bytes(p) for p in loaded[1]]

    def flushed(self) -> None:
        assert self.spill.flush(10.0)

    def files(self) -> list[Path]:
        return sorted(self.parent.glob("relay-spill-*/*"))

    def tier(self, name: str) -> tuple[int, int]:
        tier = self.spill.stats()["tiers"][name]
        assert tier["bytes"] <= tier["budget_bytes"]
        return tier["segments"], tier["bytes"]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(parent: Path = tmp_path, **settings: int) -> Rig:
        made.append(Rig(parent, **settings))
        return made[-1]

    yield make
    for one in made:
        one.spill.close()
        assert one.files() == [], "a spill removes its files"
        assert not list(one.parent.glob("relay-spill-*"))


def expected(name: str, blocks: int = 1) -> list[bytes]:
    return [bytes(p) for p in payloads(name, blocks)]


# -- tiers and budgets --------------------------------------------------------------------------------------


def test_the_host_tier_keeps_the_latest_within_its_budget(rig: Callable[..., Rig]) -> None:
    r = rig(host_bytes=3 * BLOCK)
    for name in "abcd":
        assert r.put(name)
    assert r.tier("host") == (3, 3 * BLOCK)
    assert (r.lost, r.spill.stats()["lost"]) == (["a"], {"budget": 1})
    assert (r.load("a"), r.load("d")) == (None, expected("d"))
    assert not r.put("large", blocks=4)
    assert r.lost == ["a"], "what was not taken is told by `put`"
    assert r.spill.stats()["lost"] == {"budget": 1, "too_large": 1}
    r.put("e", blocks=2)
    assert r.lost == ["a", "b", "c"]


def test_host_overflows_to_disk_and_disk_loses_the_oldest(rig: Callable[..., Rig]) -> None:
    r = rig(host_bytes=BLOCK, disk_bytes=2 * (BLOCK + 200))
    for name in "abcd":
        assert r.put(name)
        r.flushed()
        assert sum(f.stat().st_size for f in r.files()) == r.tier("disk")[1]
    assert (r.tier("host")[0], r.tier("disk")[0]) == (1, 2)
    assert (r.lost, r.spill.stats()["lost"]) == (["a"], {"budget": 1})
    for name in "bcd":
        assert r.load(name) == expected(name)
    assert r.spill.stats()["read"] == 2
    assert not r.put("large", blocks=3)
    assert (r.tier("disk")[0], r.spill.stats()["lost"]["too_large"]) == (2, 1)


def test_without_a_host_tier_it_goes_straight_to_disk(rig: Callable[..., Rig]) -> None:
    r = rig(disk_bytes=MIB)
    assert r.put("a", blocks=3)
    assert r.load("a") == expected("a", 3), "readable while it is queued, too"
    r.flushed()
    assert (r.tier("host"), r.tier("queued"), r.tier("disk")[0]) == ((0, 0), (0, 0), 1)
    assert r.load("a") == expected("a", 3)
    assert [oct(p.stat().st_mode & 0o777) for p in (r.files()[0], r.files()[0].parent)] == ["0o600", "0o700"]


def test_a_full_queue_loses_what_comes(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    write = SpillFolder.write
    monkeypatch.setattr(SpillFolder, "write", lambda *args: (gate.wait(10), write(*args))[1])
    r = rig(disk_bytes=64 * MIB, queue_bytes=MIB)
    taken = [r.put(f"{i:03d}") for i in range(2 * MIB // BLOCK)]
    assert sum(taken) == MIB // BLOCK
    assert r.spill.stats()["lost"] == {"queue_full": MIB // BLOCK}
    gate.set()
    r.flushed()
    assert r.tier("disk")[0] == MIB // BLOCK


def test_dropped_while_it_is_written(rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    writing, gate = threading.Event(), threading.Event()
    write = SpillFolder.write

    def slow(*args: object) -> object:
        writing.set()
        gate.wait(10)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(SpillFolder, "write", slow)
    r = rig(disk_bytes=MIB)
    r.put("a")
    assert writing.wait(10)
    assert r.spill.drop(segment("a").key) is not None
    gate.set()
    r.flushed()
    assert (r.files(), r.tier("disk"), r.lost) == ([], (0, 0), [])


def test_a_key_is_kept_once_and_dropped_by_identity(rig: Callable[..., Rig]) -> None:
    r = rig(disk_bytes=MIB)
    old, new = segment("a"), segment("a", generation=2)
    for one in (old, new):
        r.spill.put(one, payloads("a"))
        r.flushed()
    assert len(r.files()) == 1
    assert r.spill.drop(old.key, only=old) is None
    assert r.spill.get(old.key) is new
    assert r.spill.segments() == [new]
    assert r.spill.drop(new.key, only=new) is new
    assert (r.files(), r.spill.drop(new.key), r.lost) == ([], None, [])


# -- damaged files are misses, never wrong bytes ------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, other: flip(path, -1),
        lambda path, other: flip(path, -2 * BLOCK),
        lambda path, other: flip(path, 9),
        lambda path, other: flip(path, 45),
        lambda path, other: cut(path, 1),
        lambda path, other: cut(path, path.stat().st_size),
        lambda path, other: path.write_bytes(path.read_bytes() + b"more"),
        lambda path, other: shutil.copy(other, path),
        lambda path, other: path.unlink(),
    ],
    ids=[
        "last byte",
        "first block",
        "schema",
        "key",
        "cut off",
        "empty",
        "longer",
        "another segment's",
        "gone",
    ],
)
def test_a_damaged_file_is_a_counted_miss(
    rig: Callable[..., Rig], damage: Callable[[Path, Path], object]
) -> None:
    r = rig(disk_bytes=MIB)
    for name in "ab":
        r.put(name, blocks=2)
        r.flushed()
    first, second = r.files()
    damage(first, second)
    assert r.load("a") is None
    assert (r.lost, r.spill.stats()["lost"]) == (["a"], {"damaged": 1})
    assert r.spill.get(segment("a").key) is None
    assert r.load("b") == expected("b", 2)


def test_an_older_life_of_the_same_blocks_is_not_taken(tmp_path: Path) -> None:
    one = SpillFolder(str(tmp_path), ME, Incarnation(1))
    two = SpillFolder(str(tmp_path), ME, Incarnation(2))
    try:
        path = one.write(segment("a"), payloads("a"))
        with pytest.raises(Exception, match="another segment's"):
            two.read(path, segment("a"))
        with pytest.raises(Exception, match="another segment's"):
            one.read(path, replace(segment("a"), blocks=(BlockRef(BlockId(0), 2, BLOCK, 0),)))
        assert np.array_equal(one.read(path, segment("a"))[0], payloads("a")[0])
    finally:
        one.close()
        two.close()


# -- the disk fails -----------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_loses_that_segment_only(
    rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    r = rig(disk_bytes=8 * MIB)
    with file_size_limit(MIB):
        for name in ("large", "larger"):
            r.put(name, blocks=300)
            r.flushed()
        assert "File too large" in r.spill.stats()["fault"]
        r.put("small")
        r.flushed()
    assert (r.lost, r.spill.stats()["lost"]) == (["large", "larger"], {"disk_error": 2})
    assert caplog.text.count("cannot be spilled to disk") == 1, "said once, not for every segment"
    assert r.spill.stats()["fault"] == ""
    assert len(r.files()) == 1
    assert r.load("small") == expected("small")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    where = tmp_path / "tiny"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, timeout=10, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield where
    subprocess.run(["umount", str(where)], timeout=10, check=True)


def test_a_full_disk_loses_hits_and_recovers(tiny_disk: Path, rig: Callable[..., Rig]) -> None:
    r = rig(tiny_disk, disk_bytes=64 * MIB)  # the budget promises more than the disk has
    for i in range(10):
        r.put(str(i), blocks=10)
        r.flushed()
    stats = r.spill.stats()
    kept = r.tier("disk")[0]
    assert 0 < kept < 10
    assert stats["lost"] == {"disk_error": 10 - kept}
    assert "No space left" in stats["fault"]
    assert all(r.load(str(i)) == (expected(str(i), 10) if i < kept else None) for i in range(10))
    for i in range(kept):
        r.spill.drop(segment(str(i)).key)
    r.put("later", blocks=10)
    r.flushed()
    assert (r.load("later"), r.spill.stats()["fault"]) == (expected("later", 10), "")


def test_a_folder_that_cannot_be_made_leaves_the_host_tier(rig: Callable[..., Rig], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    r = rig(tmp_path / "file" / "spill", host_bytes=BLOCK, disk_bytes=MIB)
    assert r.put("a")
    assert r.put("b")
    assert (r.lost, r.load("b")) == (["a"], expected("b"))
    assert (
        r.spill.stats()["tiers"]["disk"]["budget_bytes"],
        "Not a directory" in r.spill.stats()["fault"],
    ) == (0, True)


# -- lives --------------------------------------------------------------------------------------------------

LEAVE_FILES = """
    import sys, time
    import numpy as np
    from transport.spill_files import SpillFolder
    from transport.types import *
    key = SegmentKey("space", b"left")
    folder = SpillFolder(sys.argv[1], WorkerId("w0"), Incarnation(int(sys.argv[2])))
    folder.write(Segment(key, 1, 0, (BlockRef(BlockId(0), 1, 16, (0,)),)), [np.zeros(16, np.uint8)])
    print("ready", flush=True)
    time.sleep(60)
"""


def test_leftovers_of_a_killed_worker_are_removed_and_a_living_ones_files_are_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(LEAVE_FILES), str(tmp_path)]
    dead, alive = (
        subprocess.Popen([*command, life], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        for life in "12"
    )
    (tmp_path / "relay-spill-notes").mkdir()
    (tmp_path / "relay-spill-notes.lock").touch()
    try:
        for process in (dead, alive):
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        dead.send_signal(signal.SIGKILL)
        dead.wait(10)
        assert (tmp_path / "relay-spill-w0-1" / "00000001.kv").exists()
        folder = SpillFolder(str(tmp_path), ME, Incarnation(3))
        left = {p.name for p in tmp_path.iterdir() if p.is_dir()}
        assert left == {"relay-spill-w0-2", "relay-spill-w0-3", "relay-spill-notes"}
        assert (tmp_path / "relay-spill-w0-2" / "00000001.kv").exists()
        folder.close()
        folder.close()
    finally:
        for process in (dead, alive):
            process.kill()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()


def test_close_ends_the_thread_and_refuses_more(tmp_path: Path) -> None:
    r = Rig(tmp_path, disk_bytes=MIB)
    r.put("a")
    r.spill.close()
    r.spill.close()
    assert not r.put("b")
    assert r.load("b") is None
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "relay-spill-w0"], "the writer ends")
    assert list(tmp_path.iterdir()) == []
