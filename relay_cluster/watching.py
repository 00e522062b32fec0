"""Whether a silent worker still runs: calls whose answer may take minutes, told apart from calls that nobody
will ever answer.

A worker that computes says nothing for long; one that is stopped (SIGSTOP, a suspended virtual machine), or
whose host cannot be reached, does not either. So whoever waits asks for a sign of life now and then, which a
worker answers on threads of its own however busy it is. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import ray

from transport.errors import DeadlineExceeded, WorkerLost

POLL_S: Final = 0.5
ASK_EVERY_S: Final = 1.0
"""How long a worker may be silent before it is asked; also the pause between two questions."""


def _answered(call: Any) -> bool:
    return bool(ray.wait([call], timeout=0, fetch_local=False)[0])


class Watch:
    """Watches one worker while something is awaited of it.

    Args:
        worker: its name, for the error.
        ask: starts a call that it answers at once (`Worker.info`), and returns a reference to the answer. An
            answer that is an error counts as well: who died is told by the awaited call itself.
        patience_s: so long it may leave that unanswered.
    """

    def __init__(
        self,
        worker: str,
        ask: Callable[[], Any],
        patience_s: float,
        *,
        answered: Callable[[Any], bool] = _answered,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker = worker
        self._ask = ask
        self._patience_s = patience_s
        self._answered = answered
        self._clock = clock
        self._heard_at = clock()
        self._asked_at = 0.0
        self.pending: Any = None
        """The question that has no answer yet."""

    def heard(self) -> None:
        """It has said something."""
        self._heard_at = self._clock()
        self.pending = None

    def check(self) -> None:
        """To be called every second or so while it is silent.

        Raises:
            WorkerLost: a sign of life has been missing for `patience_s`.
        """
        now = self._clock()
        if self.pending is None:
            if now - self._heard_at >= ASK_EVERY_S:
                self.pending, self._asked_at = self._ask(), now
        elif self._answered(self.pending):
            self.heard()
        elif now - self._asked_at > self._patience_s:
            raise WorkerFrozen(
                f"worker {self._worker} has given no sign of life for {now - self._asked_at:.0f} s "
                "(runtime.frozen_timeout_s): its process is stopped, or its host cannot be reached."
            )


class WorkerFrozen(WorkerLost):
    """A worker is there but does not run. It may go on later, and is then as good as before."""


def awaited(call: Any, watch: Watch, timeout_s: float) -> Any:
    """The result of a call to a watched worker.

    Raises:
        WorkerFrozen: see `Watch`. DeadlineExceeded: it runs, but has not answered within `timeout_s`.
        ray.exceptions.RayError: what the call raised.
    """
    deadline = time.monotonic() + timeout_s
    while not ray.wait([call], timeout=min(POLL_S, max(0.0, deadline - time.monotonic())))[0]:
        watch.check()
        if time.monotonic() >= deadline:
            raise DeadlineExceeded(f"no answer within {timeout_s:.0f} s.")
    return ray.get(call)
