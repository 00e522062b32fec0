"""`relay bench decode` on small settings, with the real model."""

from __future__ import annotations

import pytest

from relay_cluster.bench.common import check_document
from relay_cluster.bench.decode_rows import DecodeRow
from relay_cluster.bench.texts import load_tasks

pytestmark = [pytest.mark.slow, pytest.mark.bench, pytest.mark.timeout(600)]


def test_decode_counts_the_same_tokens_on_both_sides() -> None:
    from relay_cluster.bench.decode import DecodeSettings, run_decode

    settings = DecodeSettings(batches=(1, 3), prompt_tokens=24, new_tokens=6, repeats=2)
    found = run_decode(settings, load_tasks([]))
    check_document(found.to_json())
    rows = [row for row in found.rows if isinstance(row, DecodeRow)]
    assert [row.batch for row in rows] == [1, 3]
    for row in rows:
        assert (row.new_tokens, row.samples) == (6, 2)
        assert row.prompt_tokens > 24
        assert 0 < row.ratio_min <= row.ratio <= row.ratio_max
        assert row.tokens_per_s > 0
