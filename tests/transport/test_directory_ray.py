"""Real shard actors: the operations, and a killed shard whose owners announce everything again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from tests.transport.rigs import wait_for
from transport.directory.client import DirectoryClient
from transport.directory.shard import create_shards, find_shards
from transport.settings import DirectorySettings
from transport.types import (
    BlockId,
    BlockRef,
    Incarnation,
    NodeId,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SETTINGS = DirectorySettings(shards=2, heartbeat_s=0.2, call_timeout_s=5.0)
ME = Owner(WorkerId("w0"), Incarnation(1), NodeId("n0"), {"tcp": b"x"})
ALL = [Segment(SegmentKey("s", bytes([i])), 1, 0, (BlockRef(BlockId(i), 1, 100, (0,)),)) for i in range(20)]
KEYS = [s.key for s in ALL]


@pytest.fixture(scope="module")
def shards() -> Iterator[dict[str, Any]]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, namespace="test-directory", log_to_driver=False)
    yield create_shards(SETTINGS)
    ray.shutdown()


def test_operations_over_ray(shards: dict[str, Any]) -> None:
    assert find_shards(SETTINGS).keys() == shards.keys()
    client = DirectoryClient(list(shards), SETTINGS)
    client.publish(ME, ALL)
    assert client.lookup(KEYS)[KEYS[0]].owner == ME
    leases = client.lease(KEYS[:5], holder=WorkerId("w1"), ttl_s=30)
    assert all(client.renew(list(leases.values()), ttl_s=30).values())
    assert len(client.evict(ME, nbytes=10**9)) == 15
    client.release(list(leases.values()))
    assert len(client.evict(ME, nbytes=10**9)) == 5
    assert client.stats()["shards_up"] == 2
    client.close()


def test_retract_over_ray_comes_in_order(shards: dict[str, Any]) -> None:
    client = DirectoryClient(shards, SETTINGS)
    client.publish(ME, ALL)
    client.retract(ME, ALL[:10])  # not waited for
    found = client.lookup(KEYS)
    assert found.keys() == set(KEYS[10:])
    assert found.unanswered == frozenset()
    client.publish(ME, ALL[:10])
    assert client.lookup(KEYS).keys() == set(KEYS)
    client.evict(ME, nbytes=10**9)
    client.close()


def test_a_killed_shard_returns_and_owners_announce_again(shards: dict[str, Any]) -> None:
    client = DirectoryClient(shards, SETTINGS)
    client.start_owner(ME, lambda: ALL)
    assert len(client.lookup(KEYS)) == 20
    before = client.stats()["republished"]
    victim = next(iter(shards.values()))
    ray.kill(victim, no_restart=False)
    wait_for(lambda: client.stats()["republished"] > before, "segments are published again", 30)
    wait_for(lambda: len(client.lookup(KEYS)) == 20, "and found again", 10)
    client.close()
