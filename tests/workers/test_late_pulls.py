"""A backend that overruns its own deadline: what it brings then is neither used nor told as a hit."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tests.workers.stores import Cluster, key, reasons
from transport.types import BlockId, Lease, Outcome, Transfer
from workers import fetching


@pytest.mark.parametrize("pipelined", [False, True])
def test_what_comes_after_it_was_given_up_stays_a_miss(
    monkeypatch: pytest.MonkeyPatch, pipelined: bool
) -> None:
    cluster = Cluster()
    a, b = cluster.desk("a"), cluster.desk("b")
    a.put("x", 2)
    a.put("y", 2)
    pull, go_on = b.transport.pull, threading.Event()
    monkeypatch.setattr(fetching, "_SLACK_S", 0.05)
    monkeypatch.setattr(b.store._fetching, "_pull_timeout_s", 0.1)

    def overrun(lease: Lease, into: Sequence[BlockId], **options: Any) -> Transfer:
        if lease.located.segment.key == key("x"):
            assert go_on.wait(10)
        return pull(lease, into, **{**options, "timeout_s": 5.0})

    monkeypatch.setattr(b.transport, "pull", overrun)
    wanted = {key("x"): 1, key("y"): 1}
    got = b.store.acquire(wanted, pipelined=pipelined)
    try:
        assert reasons(got) == {"x": "timed_out"}
        assert got.hits.keys() == got.pulled.keys() == {key("y")}
        go_on.set()
        assert got.settle(10)
        assert got.hits.keys() == got.pulled.keys() == {key("y")}, "the segment came after all"
        assert reasons(got) == {"x": "timed_out"}
        told = {at.segment.key: t for at, t in got.transfers}
        assert (told[key("x")].outcome, told[key("x")].nbytes) == (Outcome.TIMED_OUT, 0)
        assert "given up" in told[key("x")].detail
        assert told[key("y")].outcome is Outcome.PULLED
    finally:
        go_on.set()
        b.store.release(got)
    assert b.arena.stats().used == 0, "nobody would have freed its blocks"
    assert cluster.directory.stats()["leases"] == 0  # type: ignore[attr-defined]
