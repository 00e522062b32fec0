"""Asks the owners of spilled segments, which are Ray actors, to bring them back into their arenas.

Only keys cross Ray. Knows nothing of how segments are spilled, nor what they are wanted for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import ray
import ray.exceptions

from transport.errors import DeadlineExceeded, TransportError
from transport.types import Owner, SegmentKey, WorkerId


class OwnerCalls:
    """`store.AskOwner` for a worker that is a Ray actor. Thread-safe.

    Its peers are found by name: the actors of one cluster are named alike, but for the worker at the end.

    Args:
        worker: who asks.
        timeout_s: deadline of one call.
    """

    def __init__(self, worker: WorkerId, *, timeout_s: float) -> None:
        context = ray.get_runtime_context()
        self._prefix = str(context.get_actor_name() or "").removesuffix(worker)
        self._namespace = context.namespace
        self._timeout_s = timeout_s
        self._actors: dict[WorkerId, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, owner: Owner, keys: Sequence[SegmentKey]) -> frozenset[SegmentKey]:
        """Those of `keys` that are in the owner's arena now.

        Raises:
            TransportError: the owner is gone. DeadlineExceeded: it does not answer.
        """
        try:
            call = self._actor(owner.worker).promote.remote(int(owner.incarnation), tuple(keys))
            return ray.get(call, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError as fault:
            raise DeadlineExceeded(
                f"{owner.worker} promoted nothing within {self._timeout_s:g} s."
            ) from fault
        except (ray.exceptions.RayError, ValueError) as fault:
            with self._lock:
                self._actors.pop(owner.worker, None)
            raise TransportError(f"{owner.worker} cannot be asked to promote: {fault}") from fault

    def _actor(self, worker: WorkerId) -> Any:
        """The worker's handle, which outlives its restarts. Raises ValueError when there is none."""
        with self._lock:
            actor = self._actors.get(worker)
        if actor is None:
            actor = ray.get_actor(self._prefix + worker, namespace=self._namespace)
            with self._lock:
                self._actors[worker] = actor
        return actor
