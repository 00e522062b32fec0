"""`relay ls`, `evict`, `pin`, `unpin` and `directory`, against real shards and an owner that really frees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from relay_cluster import cli
from tests.transport.directory_rigs import wait_for_shards
from tests.transport.rigs import wait_for
from transport.directory.client import DirectoryClient
from transport.directory.shard import create_shards, kill_shards
from transport.settings import DirectorySettings
from transport.types import BlockId, BlockRef, Incarnation, NodeId, Owner, Segment, SegmentKey, WorkerId

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SETTINGS = DirectorySettings(shards=2, heartbeat_s=0.2, call_timeout_s=5.0, replicas=2)
ME = Owner(WorkerId("w0"), Incarnation(1), NodeId("n0"), {})
PREFIX = "relay-directory-test"


def segment(i: int) -> Segment:
    refs = (BlockRef(BlockId(i), 1, 1000, (0,)),)
    variant = "x~naive" if i % 4 == 0 else ""
    return Segment(SegmentKey("space-of-a-model", bytes([i] * 16)), 64, 0, refs, variant=variant)


class Holder:
    """A worker's side: what it holds, and what an operator made it free."""

    def __init__(self, client: DirectoryClient) -> None:
        self.client = client
        self.held = {s.key: s for s in map(segment, range(16))}
        self.freed: list[SegmentKey] = []
        client.start_owner(ME, lambda: list(self.held.values()), self.drop)

    def drop(self, segments: Sequence[Segment]) -> None:
        for s in segments:
            del self.held[s.key]
            self.freed.append(s.key)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, namespace="relay", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def holder(cluster: None) -> Iterator[Holder]:
    shards = create_shards(SETTINGS, prefix=PREFIX)
    wait_for_shards(shards)
    client = DirectoryClient(shards, SETTINGS)
    yield Holder(client)
    client.close()
    kill_shards(PREFIX)


def relay(*arguments: str) -> Any:
    """A command's JSON, from within the process that has joined Ray already."""
    done = CliRunner().invoke(cli.app, [*arguments, "--json", "-"], env={"COLUMNS": "100", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_ls_filters_and_shows_replicas_once(holder: Holder) -> None:
    rows = relay("ls")
    assert [row["digest"] for row in rows] == [k.digest.hex() for k in holder.held]
    assert rows[1] | {"idle_s": 0} == {
        "space": "space-of-a-model",
        "digest": "01" * 16,
        "tokens": 64,
        "bytes": 1000,
        "variant": "exact",
        "context": "",
        "owner": "w0",
        "node": "n0",
        "leases": 0,
        "pins": {},
        "idle_s": 0,
        "complete": True,
    }
    assert len(relay("ls", "--variant", "rectified")) == 4
    assert len(relay("ls", "0a0a")) == len(relay("ls", "space-of/0A")) == 1
    assert relay("ls", "--owner", "w1") == relay("ls", "--idle-s", "3600") == relay("ls", "other/0a") == []
    assert len(relay("ls", "--limit", "3")) == 3
    lease = holder.client.lease([segment(3).key], holder=WorkerId("w1"), ttl_s=30)
    assert [(r["digest"][:2], r["leases"]) for r in relay("ls", "--leased")] == [("03", 1)]
    holder.client.release(list(lease.values()))


def test_evict_makes_the_owner_free_what_nobody_uses(holder: Holder) -> None:
    lease = holder.client.lease([segment(3).key], holder=WorkerId("w1"), ttl_s=30)
    assert relay("pin", "05", "--ttl-s", "60", "--name", "demo") == {"pinned": 1, "matched": 1}
    assert [list(r["pins"]) for r in relay("ls", "--pinned")] == [["demo"]]
    done = relay("evict", "--owner", "w0", "--variant", "exact")
    assert done == {"segments": 10, "bytes": 10_000, "busy": 2, "left": 0}
    assert len(holder.freed) == 10
    assert {k.digest[0] for k in holder.held} == {0, 3, 4, 5, 8, 12}
    assert relay("unpin", "--name", "demo") == {"matched": 6, "pinned": 0}
    holder.client.release(list(lease.values()))
    assert relay("evict", "--all")["segments"] == 6
    assert holder.held == {}
    assert holder.client.stats()["segments"] == 0


def test_resize_and_stats(holder: Holder) -> None:
    made = relay("directory", "resize", "3")
    assert made == {"epoch": 1, "shards": [f"{PREFIX}-{i}" for i in range(3)]}
    wait_for(lambda: sum(s["segments"] for s in relay("directory", "stats").values()) == 32, "moved", 20)
    assert len(relay("ls")) == 16
    assert len(holder.client.lookup(list(holder.held))) == 16
    assert relay("directory", "resize", "1")["epoch"] == 2
    wait_for(lambda: len(relay("ls")) == 16, "moved back", 20)
    stats = relay("directory", "stats")
    assert stats.keys() == {f"{PREFIX}-0"}
    assert stats[f"{PREFIX}-0"]["memory_bytes"] >= 0


@pytest.mark.slow
def test_a_second_process_attaches(holder: Holder, tmp_path: Path) -> None:
    # By its address: others may run on this machine.
    file = tmp_path / "cluster.yaml"
    file.write_text(f"ray: {{address: '{ray.get_runtime_context().gcs_address}'}}\n", "utf-8")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "relay_cluster", *arguments, "--cluster", str(file)]
        return subprocess.run(line, capture_output=True, text=True, timeout=90, check=False)

    done = command("ls", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 16
    wrong = command("ls", "--directory", "relay-directory-nowhere")
    assert wrong.returncode == 2
    assert PREFIX in wrong.stderr
    done = command("directory", "resize", "3", "--json", "-")
    assert done.returncode == 0, done.stderr
    # The shard that the other process has started outlives it.
    wait_for(lambda: len(holder.client.lookup(list(holder.held))) == 16, "moved", 20)
    assert holder.client.fleet.view.epoch == 1
    assert holder.client.stats()["shards_up"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("evict",), "--all"),
        (("pin", "--ttl-s", "5"), "--all"),
        (("unpin",), "--all"),
        (("ls", "--variant", "exakt"), "neither exact nor rectified"),
    ],
)
def test_what_is_refused_before_anything_is_joined(arguments: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert said in done.output
