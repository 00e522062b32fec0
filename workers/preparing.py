"""Prefill ahead: prompts whose last part is still being written elsewhere.

    advance()  a draft of the request -> what is certain of its prompt is computed, in steps in which nobody
               else wants the engine, into the cache that the request will use
    take()     the request itself -> its turn, which begins with what was prepared
    discard()  the request will not come

What is prepared is full prefill's, and it is compared with the request's own token ids before it is used: an
upstream agent that was started again, or a branch that was not taken, costs what was computed in vain and
nothing else. A preparation never waits for room, and makes room for any request that would have to wait.
It knows nothing of agents, pipelines or where drafts come from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import takewhile

from transport.errors import CacheFull, Cancelled, DeadlineExceeded
from workers.admission import Admission, Arrival
from workers.ahead_choice import Coming, Outlook, Pace, choose_mode
from workers.budget import Urgency
from workers.choosing import BACKGROUND_ROWS
from workers.methods.base import Span
from workers.prefix_cache import PrefixCache
from workers.segment import Prompt
from workers.turn import Clock, Turn

log = logging.getLogger(__name__)

_MOST_ENDED = 1024
"""Requests that are remembered as over, so that a draft that comes late prepares nothing."""


@dataclass(eq=False, slots=True)
class _Preparation:
    """One request's.

    Attributes:
        turn: holds its slot and its cache.
        ids: computed so far; computed: how many of them were not in the prefix cache.
        begun: instant (time.monotonic) of the first draft, and the most tokens that were to be written then.
        stop: nobody wants more of it; lock: of whoever computes or ends it.
    """

    turn: Turn
    ids: tuple[int, ...] = ()
    computed: int = 0
    begun: tuple[float, int] | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    touched: float = field(default_factory=time.monotonic)


class Preparing:
    """The preparations of one worker. Thread-safe; calls block.

    Args:
        admission: gives slots and memory, to preparations only without waiting.
        prefixes: whose exact prefixes need not be computed.
        compute: prefills a turn's prompt in the background; raises Cancelled when the turn is.
        timeout_s: a preparation that nobody has asked for in so long is dropped.
        shared_cores: see Outlook.cores.
    """

    def __init__(
        self,
        admission: Admission,
        prefixes: PrefixCache,
        compute: Callable[[Turn], None],
        *,
        timeout_s: float,
        shared_cores: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._admission = admission
        self._prefixes = prefixes
        self._compute = compute
        self._timeout_s = timeout_s
        self._shared_cores = shared_cores
        self._open: OrderedDict[str, _Preparation] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._reasons: OrderedDict[str, str] = OrderedDict()
        self._pace = Pace()
        self._used = self._wasted = self._dropped = self._refused = 0

    def stats(self) -> dict[str, int]:
        """Open preparations; tokens that requests have used, and that were computed in vain; preparations
        that had to make room, and drafts that found none."""
        with self._lock:
            return {
                "preparations": len(self._open),
                "prepared_tokens_used": self._used,
                "prepared_tokens_wasted": self._wasted,
                "preparations_dropped": self._dropped,
                "preparations_refused": self._refused,
            }

    def advance(
        self,
        arrival: Arrival,
        known: tuple[int, ...],
        coming: Coming | None = None,
        group: str = "",
        *,
        reason: str = "",
        on_relay: Callable[[], None] = lambda: None,
    ) -> int:
        """Compute what is known of a request's prompt and not yet computed; returns early once the request
        itself, or somebody in greater need of the room, comes.

        Args:
            arrival: how much room it will need in the end.
            known: leading token ids of its prompt, certain or likely.
            coming: what is still to be written, where the relay could serve as well: all of `known` is
                computed only while this worker has the time. None: always.
            group: whose work it is.
            reason: why all of `known` is computed, for people, where `coming` is None.
            on_relay: called before anything is computed, where not all of it is.

        Returns:
            How many leading tokens of `known` stand ready; 0 also where there is no room.

        Raises:
            RelayError: the engine failed, or was not reached in time.
        """
        found = self._find(arrival)
        if found is None:
            return 0
        found.turn.group = group
        with found.lock:
            self._rewind(found, known)
            worth = self._worth(found, arrival, len(known), coming, reason)
            if worth < len(known):
                on_relay()
            known = known[:worth]
            while len(found.ids) < len(known) and not found.stop.is_set():
                try:
                    self._piece(found, known)
                except Cancelled:
                    break
            return len(found.ids)

    def why(self, request_id: str) -> str:
        """What was chosen for a request, and the reason; "" of one that was not prepared. Forgets it."""
        with self._lock:
            return self._reasons.pop(request_id, "")

    def _note(self, request_id: str, reason: str) -> None:
        with self._lock:
            self._reasons[request_id] = reason
            while len(self._reasons) > _MOST_ENDED:
                self._reasons.popitem(last=False)

    def _worth(
        self, found: _Preparation, arrival: Arrival, known: int, coming: Coming | None, reason: str
    ) -> int:
        """How many of the `known` leading tokens are to be computed ahead."""
        request_id = arrival.request.id
        if coming is None:
            self._note(request_id, reason or "exact: the request relays nothing")
            return known
        now = time.monotonic()
        at, room = found.begun = found.begun or (now, coming.room_tokens)
        written, took_s = room - coming.room_tokens, now - at
        left_s = coming.room_tokens * took_s / written if written > 0 and took_s > 0 else None
        fresh = next((s.start for s in arrival.prompt.spans if s.key or s.slot in coming.slots), None)
        choice = choose_mode(
            Outlook(
                missing=max(0, known - len(found.ids)),
                coming=coming.room_tokens,
                rate=self._pace.rate(now),
                left_s=left_s,
                relayable=fresh is not None,
                cores=self._shared_cores(),
            )
        )
        self._note(request_id, choice.reason)
        return known if choice.exact or fresh is None else min(known, max(fresh, len(found.ids)))

    def take(self, arrival: Arrival) -> Turn | None:
        """The turn of a request that was prepared; None when there is nothing to begin with."""
        found = self._close(arrival.request.id)
        if found is None:
            return None
        if found.turn.cancelled.is_set():
            self._admission.end(found.turn)
            raise Cancelled("the request was cancelled while it was prepared.")
        ids = arrival.prompt.token_ids
        ready = min(_common(found.ids, ids), len(ids) - 1)  # the last token's logits are yet to be computed
        if not ready or arrival.tokens > found.turn.cache.capacity:
            self._count(wasted=found.computed)
            self._admission.end(found.turn)
            return None
        vain = min(found.computed, len(found.ids) - ready)
        self._count(used=found.computed - vain, wasted=vain)
        return self._admission.go_on(found.turn, arrival, prepared=ready)

    def discard(self, request_id: str) -> bool:
        """Give up what is prepared for a request that will not come. Returns whether there was something."""
        found = self._close(request_id)
        if found is None:
            return False
        self._count(wasted=found.computed)
        self._admission.end(found.turn)
        return True

    def make_room(self) -> bool:
        """Drop the preparation that was asked for least recently; False when there is none."""
        with self._lock:
            oldest = next(iter(self._open), None)
        if oldest is None:
            return False
        self.discard(oldest)
        with self._lock:
            self._dropped += 1
            self._reasons[oldest] = "relay: what was prepared made room for another request"
            # It may be prepared again, once there is room.
            self._ended.pop(oldest, None)
        return True

    def sweep(self) -> None:
        """Drop what nobody has asked for within `timeout_s`."""
        now = time.monotonic()
        with self._lock:
            overdue = [r for r, p in self._open.items() if now - p.touched > self._timeout_s]
        for request_id in overdue:
            log.warning("a prompt was prepared, and its request never came", extra={"request": request_id})
            self.discard(request_id)

    def _find(self, arrival: Arrival) -> _Preparation | None:
        request_id = arrival.request.id
        self.sweep()
        with self._lock:
            found = self._open.get(request_id)
            if found is not None:
                self._open.move_to_end(request_id)
                found.touched = time.monotonic()
                return found
            if request_id in self._ended:
                return None
            try:
                # Whoever waits for memory is served first; see CachePool.allocate_all.
                (turn,) = self._admission.admit([arrival], background_s=self._timeout_s)
            except CacheFull:
                self._refused += 1
                self._reasons[request_id] = "relay: there was no room to prepare it"
                return None
            found = self._open[request_id] = _Preparation(turn)
            return found

    def _rewind(self, found: _Preparation, known: tuple[int, ...]) -> None:
        """Forget what a newer draft contradicts. An older one contradicts nothing: it says less."""
        same = _common(found.ids, known)
        if same < min(len(found.ids), len(known)):
            vain = min(found.computed, len(found.ids) - same)
            found.ids, found.computed = known[:same], found.computed - vain
            self._count(wasted=vain)

    def _piece(self, found: _Preparation, known: tuple[int, ...]) -> None:
        """Compute one step's rows, so that a request that comes finds all but the last step's."""
        done = len(found.ids)
        # The prefix cache may have the beginning, all but the token whose logits it does not keep.
        begin = done or min(self._prefixes.match(known, found.turn.request.tenant), len(known) - 1)
        stop = min(len(known), begin + BACKGROUND_ROWS)
        turn = replace(
            found.turn,
            prompt=Prompt(known[:stop], (Span(0, stop),)),
            prepared=done,
            deadline=time.monotonic() + self._timeout_s,
            cancelled=found.stop,
            clock=Clock(),
            urgency=Urgency.AHEAD,
        )
        begin = time.monotonic()
        try:
            self._compute(turn)
        except Cancelled:
            if turn.prefill is not None:  # its rows may have come a few in a step
                self._done(found, known[: stop - turn.prefill.rows_left], turn.prefill.prefix_tokens)
            raise
        finally:
            found.turn.sequence = turn.sequence  # who ends the turn waits for it
        assert turn.prefill is not None  # it was computed
        self._done(found, known[:stop], turn.prefill.prefix_tokens)
        now = time.monotonic()
        self._pace.took(stop - turn.prefill.prefix_tokens, now - begin, now)

    def _done(self, found: _Preparation, ids: tuple[int, ...], before: int) -> None:
        """`ids` stand ready, all but the first `before` of them computed just now."""
        found.computed += len(ids) - before
        found.ids = ids

    def _close(self, request_id: str) -> _Preparation | None:
        """Nobody may add to it any more, and nobody does when this returns.

        Raises:
            DeadlineExceeded: the step that runs does not end.
        """
        with self._lock:
            found = self._open.pop(request_id, None)
            self._ended[request_id] = None
            while len(self._ended) > _MOST_ENDED:
                self._ended.popitem(last=False)
        if found is None:
            return None
        found.stop.set()
        if not found.lock.acquire(timeout=self._timeout_s):
            # Better to lose the memory than to hand it out while the engine may write to it.
            raise DeadlineExceeded(f"the preparation of {request_id} did not end in {self._timeout_s:.0f} s.")
        found.lock.release()
        return found

    def _count(self, *, used: int = 0, wasted: int = 0) -> None:
        with self._lock:
            self._used += used
            self._wasted += wasted


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    if a[: len(b)] == b[: len(a)]:
        return min(len(a), len(b))
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
