"""`relay bench pull` on small settings: a real cluster of two workers."""

from __future__ import annotations

import pytest

from relay_cluster.bench.common import check_document
from relay_cluster.bench.pull_rows import PullRow
from relay_cluster.bench.texts import load_tasks
from relay_cluster.config import ClusterConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.bench, pytest.mark.timeout(300)]


def test_pulls_are_timed_beside_calls() -> None:
    from relay_cluster.bench.pull import PullSettings, run_pull

    settings = PullSettings(backends=("tcp",), blocks=(1, 2), samples=5)
    config = ClusterConfig.model_validate({"name": "bench", "workers": 2, "ray": {"num_cpus": 2}})
    found = run_pull(settings, load_tasks([]), config)
    check_document(found.to_json())
    rows = [row for row in found.rows if isinstance(row, PullRow)]
    assert [(row.backend, row.blocks, row.samples) for row in rows] == [("tcp", 1, 5), ("tcp", 2, 5)]
    assert rows[1].bytes == 2 * rows[0].bytes > 0
    for row in rows:
        parts = row.lookup_s_p50 + row.lease_s_p50 + row.read_s_p50
        assert parts > 0
        assert max(row.lookup_s_p50, row.lease_s_p50, row.read_s_p50) < row.seconds_p90
        assert row.ratio == pytest.approx(row.seconds_p50 / row.call_s_p50)
