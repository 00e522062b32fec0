"""Who may run on a worker: a slot for every request, cache memory for its tokens, a deadline, and cancelling.

    admit()  slots -> cache memory of all requests that come together, at once -> turns
    end()    the engine is done with the sequence -> memory and slot are free again

No calls can wait for each other for ever:
    memory  comes after the slots, for all requests of a call or for none. Who waits for it holds none of it;
            who holds it waits for nothing more, and ends.
    slots   for several requests are gathered by one call at a time. Those that it lacks are held by calls
            that have all of theirs: they run, or wait for memory, and so end.
In any case every wait ends at the request's deadline, with an error.

It knows nothing of prompts' contents, methods, segments or steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from transport.errors import CacheFull, CacheTooSmall, Cancelled
from workers.kv_cache import CachePool
from workers.messages import Request
from workers.methods.base import Reuse
from workers.segment import Prompt
from workers.turn import Clock, Turn

log = logging.getLogger(__name__)

_POLL_S = 0.2
"""A request that waits for a slot looks so often whether it was cancelled."""
_EARLY_CANCELS = 256
"""Cancellations that are kept for requests that have yet to arrive."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that wants to run; answer_tokens: most tokens that it will add to its prompt."""

    request: Request
    reuse: Reuse
    prompt: Prompt
    answer_tokens: int

    @property
    def tokens(self) -> int:
        return len(self.prompt.token_ids) + self.answer_tokens


class Admission:
    """The slots and the cache memory of one worker. Thread-safe; calls block.

    Args:
        pool: the cache memory.
        max_sequences: slots.
        timeout_s: from a request's arrival to its deadline.
    """

    def __init__(self, pool: CachePool, *, max_sequences: int, timeout_s: float) -> None:
        self._pool = pool
        self._max_sequences = max_sequences
        self._timeout_s = timeout_s
        self._slots = threading.BoundedSemaphore(max_sequences)
        self._gathering = threading.BoundedSemaphore(1)
        self._running: dict[str, threading.Event] = {}
        # Cancelled before they arrived: a cancel may overtake its request.
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def running(self) -> int:
        """Requests that are here, waiting ones included."""
        with self._lock:
            return len(self._running)

    def admit(self, arrivals: Sequence[Arrival], background_s: float | None = None) -> list[Turn]:
        """Wait until all of them can run together. Every turn must be given to `end`.

        Args:
            background_s: for what must not be in anybody's way: its deadline, and it does not wait.

        Raises:
            CacheTooSmall: they can never run together.
            CacheFull: no slot or no memory came free in time. Cancelled: one of them was cancelled.
        """
        self._check_room(arrivals)
        clocks = [Clock() for _ in arrivals]
        waits = background_s is None
        limit_s = self._timeout_s if background_s is None else min(self._timeout_s, background_s)
        deadline = time.monotonic() + limit_s
        cancelled = [self._enter(a.request) for a in arrivals]
        with ExitStack() as undo:
            for arrival in arrivals:
                undo.callback(self._leave, arrival.request)
            self._take_slots(len(arrivals), cancelled, deadline if waits else None)
            undo.callback(self._free_slots, len(arrivals))
            caches = self._pool.allocate_all(
                [a.tokens for a in arrivals],
                # Who waits for memory waits in line: a background turn would hold up those behind it.
                timeout_s=deadline - time.monotonic() if waits else 0.0,
                cancelled=cancelled,
            )
            undo.pop_all()
        now = time.perf_counter()
        turns: list[Turn] = []
        for a, event, clock, cache in zip(arrivals, cancelled, clocks, caches, strict=True):
            clock.queue_s = now - clock.arrived
            turns.append(Turn(a.request, a.reuse, a.prompt, deadline, event, clock, cache))
        return turns

    def go_on(self, turn: Turn, arrival: Arrival, *, prepared: int) -> Turn:
        """The turn of a request for which `turn` has held a slot and enough memory, and which begins now; it
        takes the place of `turn`.

        Args:
            prepared: leading tokens of its prompt that stand in the cache.
        """
        deadline = time.monotonic() + self._timeout_s
        return Turn(
            arrival.request,
            arrival.reuse,
            arrival.prompt,
            deadline,
            turn.cancelled,
            Clock(),
            turn.cache,
            prepared=prepared,
        )

    def end(self, turn: Turn) -> None:
        """Give the turn's memory and slot back, once the engine is done with its sequence; one that is not
        finished is cancelled."""
        try:
            if _settled(turn):
                self._pool.free(turn.cache)
            else:
                # Better to lose the extent than to hand memory out that the engine still writes to.
                log.error("request %s does not leave the engine: its cache is not freed", turn.request.id)
        finally:
            self._slots.release()
            self._leave(turn.request)

    def cancel(self, request_id: str) -> bool:
        """End a request at its next step, or as soon as it arrives. Returns whether it was here."""
        with self._lock:
            event = self._running.get(request_id)
            if event is None:
                self._cancelled[request_id] = None
                while len(self._cancelled) > _EARLY_CANCELS:
                    self._cancelled.popitem(last=False)
        if event is not None:
            event.set()
        return event is not None

    def _check_room(self, arrivals: Sequence[Arrival]) -> None:
        """Refuse several requests that would wait for themselves."""
        if len(arrivals) < 2:
            return  # the pool says it of one
        blocks = sum(self._pool.blocks_for(a.tokens) for a in arrivals)
        if blocks > self._pool.num_blocks or len(arrivals) > self._max_sequences:
            raise CacheTooSmall(
                f"{len(arrivals)} requests of {sum(a.tokens for a in arrivals)} tokens do not fit together: "
                f"the worker has {self._pool.num_blocks} cache blocks (worker.cache_tokens; {blocks} needed) "
                f"for at most {self._max_sequences} requests (worker.max_sequences). "
                "Ask for fewer at a time."
            )

    def _take_slots(self, count: int, cancelled: list[threading.Event], deadline: float | None) -> None:
        """All or none of them. deadline: None = do not wait."""
        with ExitStack() as undo, ExitStack() as gathering:
            if count > 1:
                # Two that held half of the slots each would wait for each other.
                self._take(self._gathering, cancelled, deadline)
                gathering.callback(self._gathering.release)
            for _ in range(count):
                self._take(self._slots, cancelled, deadline)
                undo.callback(self._slots.release)
            undo.pop_all()

    def _take(
        self, wanted: threading.Semaphore, cancelled: list[threading.Event], deadline: float | None
    ) -> None:
        if deadline is None:
            if not wanted.acquire(blocking=False):
                raise CacheFull(
                    f"{self._max_sequences} requests are running (worker.max_sequences), and work in the "
                    "background does not wait for one to end."
                )
            return
        while not wanted.acquire(timeout=_POLL_S):
            if any(event.is_set() for event in cancelled):
                raise Cancelled("the request was cancelled while it waited for its turn.")
            if time.monotonic() > deadline:
                raise CacheFull(
                    f"{self._max_sequences} requests are running and too few ended within "
                    f"{self._timeout_s:.0f} s. Raise worker.max_sequences or add workers."
                )

    def _free_slots(self, count: int) -> None:
        for _ in range(count):
            self._slots.release()

    def _enter(self, request: Request) -> threading.Event:
        """Set when the request is cancelled."""
        event = threading.Event()
        with self._lock:
            self._running[request.id] = event
            if request.id in self._cancelled:
                event.set()
        return event

    def _leave(self, request: Request) -> None:
        with self._lock:
            self._running.pop(request.id, None)
            self._cancelled.pop(request.id, None)


def _settled(turn: Turn, timeout_s: float = 60.0) -> bool:
    """Whether the engine is done with the sequence; cancels it if need be and waits for the running step."""
    if turn.sequence is None:
        return True
    if not turn.sequence.finished:
        turn.cancelled.set()
    deadline = time.monotonic() + timeout_s
    while not turn.sequence.finished and time.monotonic() < deadline:
        time.sleep(0.005)
    return turn.sequence.finished
