"""A silent worker is asked for a sign of life; only one that leaves it unanswered is given up."""

from __future__ import annotations

import pytest

from relay_cluster.watching import ASK_EVERY_S, Watch, WorkerFrozen
from transport.errors import WorkerLost

PATIENCE_S = 30.0


class Worker:
    """Answers until it is frozen, on a clock of its own. Questions are numbers."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked = 0
        self.frozen = False
        self.watch = Watch(
            "w1", self._ask, PATIENCE_S, answered=lambda _: not self.frozen, clock=lambda: self.now
        )

    def _ask(self) -> int:
        self.asked += 1
        return self.asked

    def silent(self, seconds: float) -> None:
        """Check twice a second for so long."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.5
            self.watch.check()


def test_a_busy_worker_may_be_silent_for_ever() -> None:
    worker = Worker()
    worker.silent(10 * PATIENCE_S)
    assert worker.asked > 100
    assert worker.watch.pending is None or not worker.frozen


def test_a_worker_that_speaks_is_not_asked() -> None:
    worker = Worker()
    for _ in range(100):
        worker.now += ASK_EVERY_S / 2
        worker.watch.check()
        worker.watch.heard()
    assert worker.asked == 0


def test_a_frozen_worker_is_lost_after_its_patience() -> None:
    worker = Worker()
    worker.silent(5)
    worker.frozen = True
    worker.silent(PATIENCE_S - 2)
    with pytest.raises(WorkerFrozen, match=r"w1.*no sign of life.*runtime\.frozen_timeout_s") as caught:
        worker.silent(5)
    assert isinstance(caught.value, WorkerLost), "its request is started again elsewhere"
    assert worker.watch.pending is not None, "its answer will tell that it goes on"


def test_one_that_goes_on_in_time_is_as_good_as_before() -> None:
    worker = Worker()
    for _ in range(3):
        worker.frozen = True
        worker.silent(PATIENCE_S - 5)
        worker.frozen = False
        worker.silent(5)
