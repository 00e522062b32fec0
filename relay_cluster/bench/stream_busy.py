"""Another request on a worker that prepares a reader: its tokens' instants, for `relay bench stream`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from relay_cluster.cluster import Cluster
from transport.errors import Cancelled, RelayError
from transport.types import WorkerId
from workers.messages import Request

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Other:
    """A request that decodes. instants: time.perf_counter of its tokens at the caller."""

    instants: list[float] = field(default_factory=list[float])

    def intervals(self, begin: float, end: float) -> list[float]:
        """Seconds between its tokens, of those that came between two instants."""
        return [b - a for a, b in pairwise(t for t in self.instants if begin <= t <= end)]


@contextmanager
def other_request(cluster: Cluster, worker: WorkerId, request: Request) -> Iterator[Other]:
    """Let `request`, which is to have more tokens than needed, decode on `worker` inside the block.

    Raises:
        RelayError: it does not begin, or ended before the block did.
    """
    other, begun, stop = Other(), threading.Event(), threading.Event()
    ended: list[BaseException | None] = []

    def took(*_: object) -> None:
        other.instants.append(time.perf_counter())
        begun.set()

    def run() -> None:
        try:
            cluster.generate(worker, request, took, stop)
            ended.append(None)
        except RelayError as error:
            ended.append(error)
        begun.set()

    thread = threading.Thread(target=run, name="other-request", daemon=True)
    thread.start()
    try:
        if not begun.wait(_START_TIMEOUT_S) or ended:
            raise RelayError(f"the other request did not begin: {ended or 'no token'}")
        yield other
        if ended:
            raise RelayError(f"the other request ended too soon: {ended[0] or 'it was answered'}")
    finally:
        stop.set()
        thread.join(_END_TIMEOUT_S)
        if ended and isinstance(ended[0], Cancelled):
            cluster.cancel(worker, request.id)
