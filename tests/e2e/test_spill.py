"""A cluster whose arenas are too small for the pipeline: what was evicted is relayed all the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from relay_cluster import Agent, Cluster, Pipeline
from tests.e2e.conftest import small_cluster
from transport.types import WorkerId
from workers.messages import Reply, Request
from workers.segment import SlotValue
from workers.settings import SamplingSettings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

W0, W1 = WorkerId("w0"), WorkerId("w1")
ARENA_BYTES = 13 << 20
"""Four blocks of 64 tokens."""
PAIR = Pipeline([Agent("draft", prompt="Think of a plan."), Agent("judge", prompt="{d0}\n{d1}\nWhich?")])


def _request(agent: str, method: str, **values: SlotValue) -> Request:
    return Request(
        id=f"{agent}-{time.time_ns()}",
        agent=agent,
        prompt=PAIR[agent].prompt,
        values=values,
        method=method,
        publish=agent == "draft",
        sampling=SamplingSettings(max_new_tokens=2),
    )


def _draft(cluster: Cluster, number: int) -> Reply:
    """An answer of 70 tokens, two blocks, that the worker need not decode. Any ids will do."""
    ids = tuple(1000 + 17 * number + i % 97 for i in range(70))
    return cluster.replay(W0, _request("draft", "auto"), ids)


def test_a_peer_has_spilled_segments_brought_back(tmp_path: Path) -> None:
    spill = {
        "host_bytes": 7 << 20,
        "disk_bytes": 64 << 20,
        "disk_dir": str(tmp_path),
        "promote_timeout_s": 20.0,
    }
    config = small_cluster(
        # Deadlines for a busy machine: this is not about them.
        transport={"arena_bytes": ARENA_BYTES, "pull_timeout_s": 20.0, "spill": spill},
        directory={"lease_ttl_s": 60.0, "call_timeout_s": 10.0, "owner_timeout_s": 60.0},
    )
    with Cluster(config, agents_hint=PAIR) as cluster:
        drafts = [_draft(cluster, i) for i in range(4)]
        spilled = cluster.stats()[W0]["memory"]
        values = {f"d{i}": reply.output for i, reply in enumerate(drafts[:2])}
        reply, _ = cluster.generate(W1, _request("judge", "auto", **values), lambda *_: None)
        owner, reader = (cluster.stats()[w]["memory"] for w in (W0, W1))
        assert len(list(tmp_path.glob("relay-spill-w?-*[0-9]"))) == 2
        assert cluster.directory_stats()["leases"] == 0
    assert (spilled["spills"], spilled["promotions"]) == (2, 0)
    assert (owner["promotions"], owner["not_promoted"], owner["lost"]) == (2, {}, {})
    assert owner["disk_reads"] > 0
    assert reader["leases"] == reader["landing_blocks"] == 0
    assert reply.fallbacks == ()
    assert reply.relayed_tokens == sum(d.output.kv_tokens for d in drafts[:2])
    assert {t.transfer.source for t in reply.transfers} == {W0}
    assert list(tmp_path.iterdir()) == [], "workers remove their files when the cluster ends"
