"""schemathesis against the service: requests made from /openapi.json, right ones and wrong ones, and answers
held to what it says. The worker is played; the service before a real model is fuzzed in tests/e2e/serving.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from relay_cluster.serving.tenants import Tenants
from tests.fuzzing import fuzz
from tests.relay_cluster.scripted_service import MODEL, running

KEY = "sk-test"


def check(folder: Path, key: str | None, phases: str, examples: int) -> None:
    tenants = Tenants({hashlib.sha256(key.encode()).hexdigest(): "acme"} if key else {})
    with running(tenants, max_waiting=64) as live:
        live.worker.goes_on.set()
        fuzz(live.url, folder, model=MODEL, key=key, phases=phases, examples=examples)
        assert live.healthy()
        assert live.service.places.running == 0


def test_requests_and_answers_are_what_the_schema_says(tmp_path: Path) -> None:
    check(tmp_path, KEY, "fuzzing", 10)


@pytest.mark.long
@pytest.mark.parametrize("key", [None, KEY])
def test_all_that_the_schema_allows_and_forbids(tmp_path: Path, key: str | None) -> None:
    check(tmp_path, key, "coverage,fuzzing,stateful", 100)
