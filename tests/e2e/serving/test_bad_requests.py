"""Requests that cannot be answered, against a live service with a real model. (Those that are broken below
HTTP's bodies are in tests/relay_cluster/test_serving_http.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.serving.bad_requests import check_bad_requests
from tests.e2e.serving.live import Live, eventually
from tests.fuzzing import fuzz
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_bad_requests_get_their_status_and_leave_the_service_as_it_was(live: Live) -> None:
    check_bad_requests(live.url, "sk-red")
    assert eventually(live.settled)


@pytest.mark.long
def test_what_the_schema_allows_is_answered_and_the_rest_is_refused(live: Live, tmp_path: Path) -> None:
    fuzz(
        live.url, tmp_path, model=DEFAULT_MODEL, key="sk-red", phases="coverage,fuzzing,stateful", examples=20
    )
    assert eventually(live.settled)
    assert live.metric("relay_requests_running") == 0
