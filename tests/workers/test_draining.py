"""A worker that drains: what it runs goes on, and nothing new begins."""

from __future__ import annotations

import pytest

from transport.errors import WorkerDraining, WorkerLost
from workers.actor import _Calls


def test_new_requests_are_refused_and_the_rest_goes_on() -> None:
    calls = _Calls()
    with calls.one("r1"), calls.one():
        assert calls.drain(True) == 2
        with pytest.raises(WorkerDraining, match="request r2 was not begun"), calls.one("r2"):
            pytest.fail("it has begun")
        with calls.one():  # belongs to a request that was answered here
            assert calls.running == 3
    assert calls.drain(True) == 0
    assert calls.drain(False) == 0
    with calls.one("r3"):
        assert calls.running == 1


def test_a_call_that_fails_runs_no_more() -> None:
    calls = _Calls()
    with pytest.raises(RuntimeError, match="broken"), calls.one("r1"):
        raise RuntimeError("broken")
    assert calls.running == 0


def test_whoever_knows_of_lost_workers_knows_what_to_do() -> None:
    assert issubclass(WorkerDraining, WorkerLost)
