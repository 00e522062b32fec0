"""What the live page says of workers that stand still or die: real processes, real signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from relay_cluster import Cluster
from relay_cluster.serving.app import make_app, start_workers
from relay_cluster.serving.tenants import Tenants
from tests.e2e.conftest import small_cluster
from tests.services import serving
from tests.transport.rigs import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def live() -> Iterator[str]:
    """The address of a service on two workers."""
    with Cluster(small_cluster()) as cluster:
        start_workers(cluster)
        with serving(make_app(cluster, Tenants({}))) as url:
            yield url


def worker(url: str, name: str) -> dict[str, Any]:
    """What the board says of a worker. It would not come within the deadline if it waited for that worker."""
    board = httpx.get(f"{url}/relay/v1/board", timeout=DEADLINE_S).json()
    return next(w for w in board["cluster"]["workers"] if w["worker"] == name)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_worker_that_stands_still_is_shown_and_keeps_nobody_waiting(live: str) -> None:
    with stopped(worker(live, "w1")["pid"]):
        wait_for(lambda: worker(live, "w1")["state"] == "silent", "it stands still", timeout_s=DEADLINE_S)
        assert worker(live, "w1")["cache_blocks"] > 0, "what it said last"
        assert worker(live, "w0")["state"] == "up"
    wait_for(lambda: worker(live, "w1")["state"] == "up", "it goes on", timeout_s=DEADLINE_S)


def test_a_worker_that_dies_is_shown_and_so_is_its_next_life(live: str) -> None:
    before = worker(live, "w1")
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: worker(live, "w1")["state"] != "up", "it is gone", timeout_s=DEADLINE_S)
    wait_for(lambda: worker(live, "w1")["state"] == "up", "Ray starts it again", timeout_s=3 * DEADLINE_S)
    after = worker(live, "w1")
    assert int(after["incarnation"]) > int(before["incarnation"])
    assert after["pid"] != before["pid"]
