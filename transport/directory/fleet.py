"""The shards as one client sees them: which there are, which of them answer, and calls to several at once.

A shard that does not answer is left alone for a moment, so that not every request pays the deadline again.
A newer list of shards is taken from whichever reply carries it, and told to shards that know an older one.
This module does not know what the calls mean.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import ray
import ray.exceptions

from transport.directory import wire
from transport.directory.ring import Ring
from transport.directory.view import View
from transport.errors import RelayError
from transport.latency import Latencies
from transport.settings import DirectorySettings
from transport.types import SegmentKey

logger = logging.getLogger(__name__)

_PAST_RINGS: Final = 8


class ShardFailed(Exception):
    """A shard did not answer in time, or is not there.

    Attributes:
        gone: its process is known to be dead, and with it every lease that it had granted.
    """

    def __init__(self, why: str, *, gone: bool = False) -> None:
        super().__init__(why)
        self.gone = gone


class Calls(Protocol):
    """How to reach shards. Ray in production; tests pass plain objects."""

    def find(self, name: str) -> Any:
        """The shard of that name. Raises ShardFailed."""
        ...

    def send(self, shard: Any, method: str, request: bytes) -> Any:
        """Start a call, and return something for `wait`. Raises ShardFailed."""
        ...

    def wait(self, pending: Any, timeout_s: float) -> bytes:
        """The call's reply. Raises ShardFailed."""
        ...


class RayCalls:
    """Calls over Ray actor handles in the current namespace."""

    def find(self, name: str) -> Any:
        """The actor of that name. Raises ShardFailed."""
        if not ray.is_initialized():
            raise ShardFailed("this process has left Ray")
        try:
            return ray.get_actor(name)
        except ValueError as fault:
            raise ShardFailed("no actor of that name", gone=True) from fault
        except ray.exceptions.RayError as fault:
            raise ShardFailed(type(fault).__name__) from fault

    def send(self, shard: Any, method: str, request: bytes) -> Any:
        """Submit without waiting. Raises ShardFailed."""
        if not ray.is_initialized():  # a call would start a Ray of its own
            raise ShardFailed("this process has left Ray")
        try:
            # A watch may take long, and must not keep the shard from other calls.
            return shard.watch.remote(request) if method == "watch" else shard.serve.remote(method, request)
        except ray.exceptions.RayError as fault:
            raise ShardFailed(str(fault)) from fault

    def wait(self, pending: Any, timeout_s: float) -> bytes:
        """Wait for the reply.

        Raises:
            ShardFailed: none in time. RelayError: the shard failed inside the call, which is a bug.
        """
        try:
            return ray.get(pending, timeout=max(timeout_s, 0.0))
        except ray.exceptions.GetTimeoutError as fault:
            raise ShardFailed("no reply within the deadline") from fault
        except ray.exceptions.RayTaskError as fault:
            raise RelayError(f"a directory shard failed inside a call, which is a bug: {fault}") from fault
        except ray.exceptions.ActorDiedError as fault:
            raise ShardFailed("its process has died", gone=True) from fault
        except ray.exceptions.RayError as fault:
            raise ShardFailed(type(fault).__name__) from fault


class Answer(NamedTuple):
    """A shard's result, as packed by the call, and which life of the shard gave it."""

    incarnation: int
    result: Any


class Asked(dict[str, Answer]):
    """Answers by shard; those that failed are missing. moved: shards that did nothing, since they know a
    newer list of shards, which has been adopted."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: set[str] = set()


class _Placement(NamedTuple):
    view: View
    ring: Ring


class Fleet:
    """The directory's shards. Thread-safe.

    Args:
        shards: name -> handle, or names alone, which are looked up when they are needed.
        settings: deadlines, replicas.
        calls: how to reach a shard; Ray unless a test says otherwise.
        epoch: of this list of shards.
    """

    def __init__(
        self,
        shards: Mapping[str, Any] | Sequence[str],
        settings: DirectorySettings,
        calls: Calls | None = None,
        *,
        epoch: int = 0,
    ) -> None:
        names = tuple(shards)
        self.settings = settings
        self._calls: Calls = calls or RayCalls()
        self._handles: dict[str, Any] = dict(shards) if isinstance(shards, Mapping) else {}
        self._placement = _Placement(View(epoch, names), Ring(sorted(names)))
        self._past: list[_Placement] = []
        self._lock = threading.Lock()
        self._down_until: dict[str, float] = {}
        self._silent_since: dict[str, float] = {}
        self._gone: set[str] = set()
        self._refreshed_at = 0.0
        self.failures = 0
        self.latencies = Latencies()

    # -- membership --------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        return self._placement.view

    @property
    def ring(self) -> Ring:
        return self._placement.ring

    @property
    def shards(self) -> tuple[str, ...]:
        return self._placement.view.shards

    def replicas(self, key: SegmentKey) -> tuple[str, ...]:
        """The shards that know the key, the one that is asked first in front."""
        return self._placement.ring.replicas(key, self.settings.replicas)

    def adopt(self, view: View) -> None:
        """Take a list of shards over, if it is newer than ours."""
        with self._lock:
            if view.epoch <= self.view.epoch or not view.shards:
                return
            self._past = [*self._past, self._placement][-_PAST_RINGS:]
            self._placement = _Placement(view, Ring(sorted(view.shards)))
        logger.info("the directory has %d shards now (epoch %d)", len(view.shards), view.epoch)

    def has_moved(self) -> bool:
        """Whether `take_past` has something to tell."""
        return bool(self._past)

    def take_past(self) -> list[Ring]:
        """The rings that were replaced since this was called last."""
        with self._lock:
            past, self._past = self._past, []
        return [p.ring for p in past]

    def refresh(self) -> None:
        """Ask shards that answer whether there is a newer list; at most once per heartbeat."""
        with self._lock:
            if time.monotonic() - self._refreshed_at < self.settings.heartbeat_s:
                return
            self._refreshed_at = time.monotonic()
        self.ask(dict.fromkeys(self.shards, ()), "view")

    # -- calls -------------------------------------------------------------------------------------------

    def ask(
        self,
        parts: Mapping[str, Sequence[Any]],
        method: str,
        *,
        even_down: bool = False,
        timeout_s: float | None = None,
    ) -> Asked:
        """Call `method` on several shards at once, with packed arguments for each.

        Args:
            even_down: also those that have been left alone since they did not answer.
            timeout_s: for all of them together; None: call_timeout_s.
        """
        limit_s = self.settings.call_timeout_s if timeout_s is None else timeout_s
        begin = time.monotonic()
        deadline = begin + limit_s
        pending: dict[str, Any] = {}
        out = Asked()
        for name, arguments in parts.items():
            if not even_down and self.is_down(name):
                continue
            call = self.send(name, method, arguments)
            if call is not None:
                pending[name] = call
        for name, call in pending.items():
            try:
                reply = wire.unpack_reply(self._calls.wait(call, deadline - time.monotonic()))
            except ShardFailed as fault:
                self._mark_down(name, method, fault)
                continue
            self._mark_up(name)
            self._compare(name, reply)
            if reply.status == wire.OK:
                out[name] = Answer(reply.incarnation, reply.result)
            else:
                out.moved.add(name)
        if pending and method != "watch":  # which takes as long as there is no news
            self.latencies.observe(method, time.monotonic() - begin)
        return out

    def send(self, name: str, method: str, arguments: Sequence[Any]) -> Any:
        """Start a call without waiting for it. None, and the shard is marked, where that fails."""
        try:
            if name not in self._handles:
                self._handles[name] = self._calls.find(name)
            return self._calls.send(
                self._handles[name], method, wire.pack_request(self.view.epoch, arguments)
            )
        except ShardFailed as fault:
            self._mark_down(name, method, fault)
            return None

    def _compare(self, name: str, reply: wire.Reply) -> None:
        if reply.view is not None:
            self.adopt(reply.view)
        elif reply.epoch < self.view.epoch and name in self.shards:
            # It has restarted, or was not told yet. Nobody waits for this.
            self.send(name, "set_view", [wire.pack_view(self.view)])

    # -- who answers -------------------------------------------------------------------------------------

    def is_down(self, name: str) -> bool:
        """Whether it is left alone for now."""
        with self._lock:
            return self._down_until.get(name, 0.0) > time.monotonic()

    def is_dead(self, name: str) -> bool:
        """Whether no lease that it has granted can be in use any more: its process is gone, or it has been
        silent for so long that it would have dropped this owner, and every lease on its copies has ended."""
        quiet_s = self.settings.owner_timeout_s + self.settings.max_lease_s
        with self._lock:
            since = self._silent_since.get(name)
            return name in self._gone or (since is not None and time.monotonic() - since > quiet_s)

    def _mark_down(self, name: str, method: str, fault: ShardFailed) -> None:
        now = time.monotonic()
        with self._lock:
            self.failures += 1
            first = name not in self._down_until
            self._down_until[name] = now + self.settings.heartbeat_s
            self._silent_since.setdefault(name, now)
            if fault.gone:
                self._gone.add(name)
                self._handles.pop(name, None)  # a new actor of that name has another handle
        log = logger.warning if first else logger.debug
        log("directory shard %s did not answer %s (%s)", name, method, fault)

    def _mark_up(self, name: str) -> None:
        with self._lock:
            self._silent_since.pop(name, None)
            self._gone.discard(name)
            if self._down_until.pop(name, None) is not None:
                logger.info("directory shard %s answers again", name)
