"""Thousands of publishes, pulls, evictions, spills and promotions leave nothing behind: no memory, no
descriptor, no block, no lease, no file."""

from __future__ import annotations

import gc
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from tests.workers.stores import Cluster, Desk
from workers.layout import KVLayout

# Large enough for a leak of one segment in a few cycles to stand out of the allocator's noise.
LAYOUT = KVLayout(
    num_layers=4,
    num_kv_heads=2,
    head_dim=32,
    hidden_size=64,
    dtype="float32",
    block_tokens=32,
    checkpoint_layer=0,
)
BLOCKS = 4
"""Blocks of a segment, 293 kB in all."""
NAMES = 12
RSS_TOLERANCE = 12 << 20


@dataclass(frozen=True)
class Footprint:
    """What the process holds, after a garbage collection."""

    rss: int
    descriptors: int
    threads: int
    files: int
    leases: float
    segments: float
    used: tuple[int, ...]
    quarantined: tuple[int, ...]
    registered: tuple[int, ...]
    spilled: tuple[int, ...]


def footprint(cluster: Cluster, disk_dir: Path) -> Footprint:
    for desk in cluster.desks.values():
        desk.flush()
    gc.collect()
    process = psutil.Process(os.getpid())
    directory = cluster.directory.stats()
    arenas = [desk.arena.stats() for desk in cluster.desks.values()]
    tiers = [desk.stats()["tiers"] for desk in cluster.desks.values()]
    return Footprint(
        rss=process.memory_info().rss,
        descriptors=process.num_fds(),
        # Those that pull are as many as were ever needed at once, and bounded.
        threads=sum(not t.name.startswith("relay-pull") for t in threading.enumerate()),
        files=sum(1 for _ in disk_dir.rglob("*.kv")),
        leases=directory["leases"],
        segments=directory["segments"],
        used=tuple(a.used for a in arenas),
        quarantined=tuple(a.quarantined for a in arenas),
        registered=tuple(a.nbytes for a in arenas),
        spilled=tuple(t[name]["bytes"] for t in tiers for name in ("host", "disk")),
    )


def cycle(a: Desk, b: Desk, i: int) -> None:
    """Publish one, pull it and one that has been spilled, and now and then take one back."""
    name, older = str(i % NAMES), str((i - 7) % NAMES)
    a.put(name, BLOCKS, value=float(i % NAMES), consumers=i % 3)
    got = b.get(name, older)
    assert name in [str(k.digest, "ascii") for k in got.pulled]
    for k, pulled in got.pulled.items():
        assert float(pulled.blocks[-1].checkpoint[0, 0]) == float(k.digest)
    b.store.release(got)
    if i % 31 == 0:
        a.store.withdraw(next(s.key for s in a.store.segments()))


def soak(
    backend: str, disk_dir: Path, *, warm: int, cycles: int, also: Callable[[Desk], object] = lambda _: None
) -> None:
    """Run cycles, and compare what is held after the first `warm` of them with what is held at the end."""
    torch.set_num_threads(1)
    cluster = Cluster(backend, disk_dir, LAYOUT)
    try:
        a = cluster.desk("a", blocks=4 * BLOCKS + 2, host_blocks=3 * BLOCKS, disk_blocks=4 * BLOCKS)
        b = cluster.desk("b", blocks=3 * BLOCKS)
        begin: Footprint | None = None
        for i in range(cycles):
            if i == warm:
                begin = footprint(cluster, disk_dir)
            cycle(a, b, i)
            also(a)
        assert begin is not None
        end = footprint(cluster, disk_dir)
        cluster.check()
        stats = a.stats()
        assert (
            min(stats["spills"], stats["promotions"], stats["disk_writes"], stats["disk_reads"]) > warm // 20
        )
        compare(begin, end)
    finally:
        cluster.close()
    assert not list(disk_dir.glob("relay-spill-*"))


def compare(begin: Footprint, end: Footprint) -> None:
    assert end.rss - begin.rss < RSS_TOLERANCE, f"{(end.rss - begin.rss) >> 20} MiB more"
    # UCX opens a descriptor or two when it likes; a leak would be one per cycle.
    assert abs(end.descriptors - begin.descriptors) <= 4
    assert end.threads == begin.threads
    assert (end.leases, end.quarantined) == (0, (0, 0))
    assert end.registered == begin.registered
    # What is held differs with where in its round a cycle ends, within what the budgets allow.
    assert end.segments <= NAMES
    assert end.files <= 4
    assert end.used[0] <= 4 * BLOCKS + 2
    assert end.used[1] == begin.used[1] == 0
    assert end.spilled[0] <= 3 * BLOCKS * LAYOUT.block_nbytes


@pytest.mark.parametrize(
    "backend", ["inprocess", "shm", "tcp", pytest.param("nixl", marks=[pytest.mark.nixl, pytest.mark.slow])]
)
def test_three_hundred_cycles_leave_nothing_behind(backend: str, tmp_path: Path) -> None:
    soak(backend, tmp_path, warm=100, cycles=300)


@pytest.mark.bench
@pytest.mark.parametrize("backend", ["inprocess", "shm", "tcp", pytest.param("nixl", marks=pytest.mark.nixl)])
def test_two_thousand_cycles_leave_nothing_behind(backend: str, tmp_path: Path) -> None:
    soak(backend, tmp_path, warm=200, cycles=2000)


def _touched_pages(nbytes: int) -> mmap.mmap:
    """Memory that the process has not had before, whatever its heap has free."""
    pages = mmap.mmap(-1, nbytes)
    pages.write(b"x" * nbytes)
    return pages


def test_the_soak_would_show_a_leak(tmp_path: Path) -> None:
    kept: list[object] = []
    with pytest.raises(AssertionError, match="MiB more"):
        soak(
            "inprocess",
            tmp_path,
            warm=50,
            cycles=150,
            also=lambda _: kept.append(_touched_pages(1 << 20)),
        )
