"""A worker that is stopped, and not dead: nobody tells, so its silence has to be noticed."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import pytest

from relay_cluster import Cluster
from tests.e2e.conftest import PIPELINE, QUESTION, small_cluster
from transport.errors import WorkerLost

# Over a minute on two cores; the campaign of test_fault_campaign.py stops owners in every run.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

FROZEN_S = 6.0
TOKENS = 16


class _Stopper:
    """Stops the worker of an agent at its first token."""

    def __init__(self, cluster: Cluster, agent: str) -> None:
        self._cluster, self._agent = cluster, agent
        self._once = threading.Lock()
        self.pid = 0

    def on_event(self, kind: str, agent: str, *_: Any) -> None:
        if (kind, agent) == ("token", self._agent) and self._once.acquire(blocking=False):
            self.pid = self._cluster.workers[self._cluster._placed[agent]].pid
            os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGCONT)


def test_a_frozen_worker_s_request_is_answered_by_another_one() -> None:
    with Cluster(small_cluster(runtime={"frozen_timeout_s": FROZEN_S}), agents_hint=PIPELINE) as cluster:
        whole = cluster.run(PIPELINE, question=QUESTION, method="full_prefill", max_new_tokens=TOKENS)
        stopper = _Stopper(cluster, "critic")
        try:
            result = cluster.run(
                PIPELINE,
                question=QUESTION,
                method="full_prefill",
                max_new_tokens=TOKENS,
                on_event=stopper.on_event,
            )
        finally:
            stopper.go_on()
        assert stopper.pid
        critic = result["critic"]
        assert (critic.retries, critic.worker) == (1, "w0")
        assert critic.tokens == whole["critic"].tokens
        assert any("w1 has given no sign of life" in note for note in critic.notes)
        # It has gone on, and is a full member again.
        deadline = time.monotonic() + 90
        while not cluster._answers(cluster._placed["critic"], 5.0) or len(cluster.stats()) < 2:
            assert time.monotonic() < deadline
        again = cluster.run(PIPELINE, question=QUESTION, method="full_prefill", max_new_tokens=TOKENS)
        assert (again["critic"].worker, again["critic"].retries) == ("w1", 0)
        assert again["critic"].tokens == whole["critic"].tokens


def test_the_only_worker_frozen_is_a_clear_error_in_bounded_time() -> None:
    config = small_cluster(workers=1, runtime={"frozen_timeout_s": 3.0, "max_retries": 1})
    with Cluster(config, agents_hint=PIPELINE) as cluster:
        stopper = _Stopper(cluster, "solver")
        began = time.monotonic()
        try:
            with pytest.raises(WorkerLost, match=r"w0.*frozen|w0 has given no sign of life"):
                cluster.run(PIPELINE, question=QUESTION, max_new_tokens=TOKENS, on_event=stopper.on_event)
            assert time.monotonic() - began < 200, "the request's own deadline is 600 s"
        finally:
            stopper.go_on()
