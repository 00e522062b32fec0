"""Streaming under fire, on a real cluster: every answer is full prefill's and nothing is left behind.

The whole campaign is `relay bench stream-faults`; what its harm does is in
tests/relay_cluster/test_stream_faults.py.
"""

from __future__ import annotations

import pytest

from relay_cluster.bench.common import check_document
from relay_cluster.bench.stream_fault_rows import StreamFaultRow
from relay_cluster.bench.stream_faults import KINDS, StreamFaultsSettings, run_stream_faults
from relay_cluster.bench.texts import load_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]


def test_no_answer_is_wrong_and_nothing_is_left() -> None:
    document = run_stream_faults(StreamFaultsSettings(trials=len(KINDS), seed=2), load_tasks([]))
    check_document(document.to_json())
    assert document.settings["failures"] == []
    rows = {row.kind: row for row in document.rows if isinstance(row, StreamFaultRow)}
    assert set(rows) == {*KINDS, "all"}
    whole = rows["all"]
    assert whole.trials == len(KINDS)
    assert whole.hits >= 3, "kills and cancelled runs at least"
    assert (whole.wrong_outputs, whole.hangs, whole.leaked_blocks, whole.leaked_preparations) == (0, 0, 0, 0)
    assert whole.prepared_tokens > 0
    assert rows["writer_killed"].retries == 1
