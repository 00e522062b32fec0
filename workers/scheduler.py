"""Continuous batching on one worker: the thread that runs ragged steps.

    StepLoop   one thread: choose (choosing.py) -> Engine.step -> hand every sequence its result -> again

Sequences join and leave between steps. All other tensor work of a worker (scatter, publish copies) is
`call`ed onto the same thread, because decoding slowed down as soon as a second thread had run parallel
operators (12.6 to 9-10 tokens/s in one process; on the cluster 7.7 became 9.3 with one thread). We take the
cause to be libgomp: a team per thread, and less spinning at barriers once team threads outnumber the cores.
The loop knows nothing of prompts, segments or transport.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch

from transport.errors import Cancelled, DeadlineExceeded, RelayError
from workers.attention import MassSpan
from workers.budget import RideAlong, Turns, Urgency
from workers.choosing import BACKGROUND_ROWS, Share, choose
from workers.engine import Engine, Part, PartResult, StepGivenUp
from workers.heal import Heal
from workers.methods.base import HealMode
from workers.prefill import Prefill
from workers.pulled import SegmentLost
from workers.sampling import Sampler
from workers.shadow import Evidence

log = logging.getLogger(__name__)

T = TypeVar("T")

_STALL_POLL_S = 0.05
_ROWS_PER_PASS = 20
"""Rows whose arithmetic takes as long as a pass over the weights; measured for SmolLM2 on a core."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A sampled token; `first` ends the time to first token. at: time.perf_counter() instant. scores: see
    Sampler.scores."""

    token: int
    first: bool
    at: float
    scores: tuple[float, tuple[tuple[int, float], ...]] | None = None


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The sequence ended. reason: "stop", "length", "scored" or "prepared"."""

    reason: str


@dataclass(frozen=True, slots=True)
class FailedEvent:
    error: BaseException


Event = TokenEvent | FinishedEvent | FailedEvent


@dataclass(eq=False, slots=True)
class Sequence:
    """A request inside the loop: prefill, then decode (or score a given continuation).

    Attributes:
        prefill: its rows; the loop drives it until its first logits are there.
        sampler: draws tokens; None for scoring.
        max_new_tokens, stop_ids: when to end.
        forced: continuation to score; logits of all its positions go to `scored`.
        capture_mass: record the context mass of decoded tokens.
        deadline: time.monotonic() instant.
        heal: recomputes stale entries between decode steps; None where nothing is to be healed.
        evidence: what is kept for a shadow check; None when this request is not sampled.
        urgency: NOW where somebody waits for it; else see `workers/budget.py`.
        group: whose work it is, among those that can wait and share the room.
        enough: set by whoever reads the answer when its text has reached a stop text.
        ending: why the answer ended, while its last stale entries are still being healed; else "".
        stalled_s: seconds for which its prefill could not go on because layers had yet to arrive;
            stalled_since: time.perf_counter() instant since when that is so now.
    """

    prefill: Prefill
    sampler: Sampler | None
    max_new_tokens: int
    stop_ids: frozenset[int]
    deadline: float
    forced: tuple[int, ...] = ()
    capture_mass: bool = True
    heal: Heal | None = None
    evidence: Evidence | None = None
    urgency: Urgency = Urgency.NOW
    group: str = ""
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    enough: threading.Event = field(default_factory=threading.Event)
    tokens: list[int] = field(default_factory=list[int])
    fed: int = 0
    logits: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    ending: str = ""
    finished: bool = False
    prefill_entries: tuple[int, int] = (0, 0)
    prefill_seconds: float = 0.0
    first_logits_at: float = 0.0
    stalled_s: float = 0.0
    stalled_since: float | None = None
    steps: int = 0

    @property
    def decoding(self) -> bool:
        return self.prefill.finished

    @property
    def scored(self) -> torch.Tensor:
        """[1 + continuation fed so far, vocab] of a scoring sequence."""
        return torch.cat(self.logits)

    @property
    def stale(self) -> int:
        """Cache entries that healing still has to recompute; 0 without healing."""
        return 0 if self.heal is None else self.heal.stale(self.fed)

    @property
    def following(self) -> tuple[int, ...]:
        """Tokens to feed next. A forced continuation goes in one step, unless healing runs between its
        tokens as it would between decoded ones."""
        if self.ending:
            return ()
        if not self.forced:
            return (self.tokens[-1],)
        return self.forced[self.fed : self.fed + 1] if self.stale else self.forced[self.fed :]

    @property
    def fed_ids(self) -> tuple[int, ...]:
        return self.forced[: self.fed] if self.forced else tuple(self.tokens[: self.fed])


class _Job(NamedTuple):
    """Work for the engine's thread; see StepLoop.call."""

    work: Callable[[], object]
    future: Future[Any]
    polite: bool


class StepLoop:
    """Owns the engine thread. `submit` from any thread; events come back on the sequence's queue."""

    def __init__(
        self, engine: Engine, *, max_rows: int, checkpoint_layer: int, ahead_share: float = 0.1
    ) -> None:
        self._engine = engine
        self._ride = RideAlong(ahead_share, BACKGROUND_ROWS)
        self._turns = Turns()
        self.rode_rows = 0
        self.steps_given_up = 0
        self._max_rows = max_rows
        self._checkpoint_layer = checkpoint_layer
        self.healed_entries = 0
        self.healing_steps = 0
        self._sequences: list[Sequence] = []
        self._jobs: list[_Job] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._holds = 0
        self._woken = False
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Let the sequence join from the next step on.

        Raises:
            RelayError: the loop was stopped.
        """
        with self._changed:
            if self._stopping:
                raise RelayError("the worker is shutting down and takes no new requests.")
            self._sequences.append(sequence)
            self._changed.notify()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep sequences waiting, jobs not, so that all that are submitted meanwhile begin in one step."""
        with self._changed:
            self._holds += 1
        try:
            yield
        finally:
            with self._changed:
                self._holds -= 1
                self._changed.notify()

    def wake(self) -> None:
        """Tell the loop that layers have arrived for which a prefill may be waiting. From any thread."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def call(self, job: Callable[[], T], *, timeout_s: float = 60.0, polite: bool = False) -> T:
        """Run `job` on the engine's thread between two steps, and return what it returns or raise what it
        raises. polite: no step is given up for it.

        Raises:
            RelayError: the loop was stopped. DeadlineExceeded: not done within `timeout_s`.
        """
        if threading.current_thread() is self._thread:
            return job()
        future: Future[T] = Future()
        with self._changed:
            if self._stopping:
                raise RelayError("the worker is shutting down and takes no new requests.")
            self._jobs.append(_Job(job, future, polite))
            self._changed.notify()
        try:
            return future.result(timeout=timeout_s)
        except FutureTimeout:
            if not future.cancel():
                # It is running: whatever memory it writes to must not be freed before it ends.
                return future.result()
            raise DeadlineExceeded(
                f"the worker's engine did not get to a job within {timeout_s:.0f} s."
            ) from None

    def stop(self, *, timeout_s: float = 10.0) -> None:
        """End after the running step; unfinished sequences get a FailedEvent. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._stopping or (self._sequences and not self._holds)):
                    self._changed.wait(1.0)
                jobs, self._jobs = self._jobs, []
                self._woken = False
                if self._stopping:
                    leftovers, self._sequences = self._sequences, []
                    break
                batch = [] if self._holds else [s for s in self._sequences if not self._gave_up(s)]
            for job in jobs:
                _do(job.work, job.future)
            ready = [s for s in batch if _absorb(s)]
            if ready:
                self._step(ready)
            with self._changed:
                self._sequences = [s for s in self._sequences if not s.finished]
                if batch and not ready and self._sequences and not (self._jobs or self._woken):
                    # All wait for layers to arrive. Whoever joins, cancels or brings them wakes the loop; the
                    # limit is for deadlines.
                    self._changed.wait(_STALL_POLL_S)
        for job in jobs:
            job.future.cancel()
        for sequence in leftovers:
            _fail(sequence, RelayError("the worker shut down before the request was finished."))

    def _gave_up(self, sequence: Sequence) -> bool:
        if sequence.cancelled.is_set():
            _fail(sequence, Cancelled("the request was cancelled."))
        elif sequence.enough.is_set() and not sequence.ending:
            self._end(sequence, "stop")
        elif time.monotonic() > sequence.deadline:
            if sequence.ending:  # the answer is whole; only its KV stays unhealed
                _finish(sequence, sequence.ending)
                return True
            _fail(
                sequence,
                DeadlineExceeded(
                    f"the request was not finished by its deadline ({len(sequence.tokens)} tokens done). "
                    "Raise worker.request_timeout_s or lower max_new_tokens."
                ),
            )
        return sequence.finished

    def _step(self, batch: list[Sequence]) -> None:
        begin = time.perf_counter()
        work: list[tuple[Sequence, Part]] = []
        shares = self._shares(batch)
        for share in shares:
            with _failing(share.sequence):
                work += [(share.sequence, part) for part in self._parts(share)]
        try:
            results = self._compute(work)
        except StepGivenUp:
            self.steps_given_up += 1
            return  # the same rows come again
        seconds = time.perf_counter() - begin
        self._learn(shares, seconds)
        for (sequence, part), result in zip(work, results, strict=True):
            if result is not None and not sequence.finished:
                with _failing(sequence):
                    self._advance(sequence, part, result, seconds)

    def _wanted(self, work: list[tuple[Sequence, Part]], before: set[int], done: float) -> bool:
        """Whether a step of prefill ahead, of which a share is `done`, shall be given up: for a request that
        has come meanwhile at once; for the one that is prepared, where computing these rows again, with its
        last ones, is less than what is left of the step. before: who was there when it began."""
        if self._woken or any(not job.polite for job in self._jobs):
            return True
        if any(s.urgency is Urgency.NOW and id(s) not in before for s in self._sequences):
            return True
        rows = sum(part.rows for _, part in work)
        again = rows / (rows + _ROWS_PER_PASS)
        return done < 1 - again and all(sequence.cancelled.is_set() for sequence, _ in work)

    def _shares(self, batch: list[Sequence]) -> list[Share]:
        """Rows of the next step."""
        later = [s for s in batch if s.urgency is not Urgency.NOW]
        if not later and not any(s.stale for s in batch):
            return choose(batch, self._max_rows)
        urgent = [s for s in batch if s.urgency is Urgency.NOW]
        ride = (
            self._ride.rows(sum(len(s.following) for s in urgent)) if all(s.decoding for s in urgent) else 0
        )
        in_turn = [later[i] for i in self._turns.order(s.group for s in later)]
        return choose([*urgent, *in_turn], self._max_rows, ride)

    def _learn(self, shares: list[Share], seconds: float) -> None:
        """Take in what a step took, and who had rows in it."""
        rode = sum(s.rows for s in shares if s.sequence.urgency is not Urgency.NOW)
        for share in shares:
            if share.sequence.urgency is not Urgency.NOW:
                self._turns.took(share.sequence.group, share.rows)
        urgent = [s for s in shares if s.sequence.urgency is Urgency.NOW]
        if not urgent or not all(s.sequence.decoding for s in urgent):
            return  # nobody's next token was held up by what rode along
        self.rode_rows += rode
        healed = [s for s in urgent if s.heal_rows]
        if all(s.sequence.heal is not None and s.sequence.heal.mode is HealMode.IDLE for s in healed):
            extra = rode + sum(s.heal_rows for s in healed)
            self._ride.observe(sum(s.rows for s in urgent), extra, seconds)

    def _compute(self, work: list[tuple[Sequence, Part]]) -> list[PartResult | None]:
        """Results of all parts; None for a sequence that failed. When a step breaks, its parts are run one by
        one, so that one bad request does not end the others.

        That is safe because a part touches no cache but its own sequence's, and there what the broken step
        has done already is done again with the same outcome:
            keys, values, checkpoints   of the part's rows are overwritten.
            drift                       moves the other entries of a span, in each layer just before its
                                        probes' entries are written. Where they were written, the probes do
                                        not change again, up to rounding, and nothing moves. (A step that
                                        breaks between the two, in one and the same layer, moves them twice.)
            attention mass              of the part's rows is added to, so it is put back first; healing has
                                        zeroed its rows' before the step.
        """
        if not work:
            return []
        masses = [_row_masses(part) for _, part in work if part.masses] if len(work) > 1 else []
        before = [mass.clone() for mass in masses]
        try:
            if all(sequence.urgency is Urgency.AHEAD for sequence, _ in work):
                give_up = functools.partial(self._wanted, work, set(map(id, self._sequences)))
                return list(self._engine.step([part for _, part in work], give_up))
            return list(self._engine.step([part for _, part in work]))
        except StepGivenUp:
            raise
        except Exception as error:
            if len(work) == 1:
                _fail(work[0][0], error)
                log.exception("a step failed")
                return [None]
            log.warning("a step of %d parts failed (%r); running them one by one", len(work), error)
        for mass, was in zip(masses, before, strict=True):
            mass.copy_(was)
        return [self._compute([one])[0] for one in work]

    def _parts(self, share: Share) -> list[Part]:
        """A healing chunk goes before the decode row, so that the row already sees what it healed."""
        sequence = share.sequence
        if sequence.urgency is Urgency.AHEAD:
            # Nobody draws a token from it: the head's pass over its weights is left out.
            return [replace(sequence.prefill.next_part(share.rows), logits_rows=())]
        if not sequence.decoding:
            return [sequence.prefill.next_part(share.rows)]
        if not share.heal_rows:
            return [self._decode_part(sequence)]
        assert sequence.heal is not None  # only then are there rows to heal
        chunk = sequence.heal.next_part(share.heal_rows, sequence.fed_ids, sequence.following)
        if chunk.logits_rows or sequence.ending:
            return [chunk]
        return [chunk, self._decode_part(sequence)]

    def _decode_part(self, sequence: Sequence) -> Part:
        start = sequence.prefill.num_tokens + sequence.fed
        ids = sequence.following
        return Part(
            cache=sequence.prefill.cache,
            positions=torch.arange(start, start + len(ids)),
            token_ids=torch.tensor(ids),
            logits_rows=tuple(range(len(ids))),
            checkpoint_layer=self._checkpoint_layer,
            masses=(decoded_mass(sequence.prefill),) if sequence.capture_mass else (),
        )

    def _advance(self, sequence: Sequence, part: Part, result: PartResult, seconds: float) -> None:
        if not sequence.decoding:
            self._advance_prefill(sequence, part, result, seconds)
            return
        heal = sequence.heal
        if heal is not None and int(part.positions[0]) < sequence.prefill.num_tokens + sequence.fed:
            self.healed_entries += heal.done(part, sequence.fed)
            self.healing_steps += 1
        if part.logits_rows:
            sequence.steps += 1
            sequence.fed += len(part.logits_rows)
            self._take_logits(sequence, result.logits)
        elif sequence.ending and not sequence.stale:
            _finish(sequence, sequence.ending)

    def _advance_prefill(self, sequence: Sequence, part: Part, result: PartResult, seconds: float) -> None:
        sequence.steps += 1
        fresh, rectified = sequence.prefill.done(part, result)
        sequence.prefill_entries = (
            sequence.prefill_entries[0] + fresh,
            sequence.prefill_entries[1] + rectified,
        )
        sequence.prefill_seconds += seconds
        if sequence.urgency is Urgency.AHEAD and not sequence.prefill.rows_left:
            _finish(sequence, "prepared")
            return
        if not sequence.prefill.finished:
            return
        sequence.first_logits_at = time.perf_counter()
        assert sequence.prefill.logits is not None  # that is what finished means
        if sequence.evidence is not None:
            sequence.evidence.take_values(sequence.prefill.cache)
        self._take_logits(sequence, sequence.prefill.logits[None])

    def _take_logits(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """logits: [rows, vocab] after the tokens fed last."""
        if sequence.evidence is not None:
            sequence.evidence.take_logits(logits)
        if sequence.sampler is not None:
            self._sample(sequence, logits[-1])
            return
        sequence.logits.append(logits)
        if sequence.fed == len(sequence.forced):
            self._end(sequence, "scored")

    def _sample(self, sequence: Sequence, logits: torch.Tensor) -> None:
        assert sequence.sampler is not None  # scoring sequences never get here
        token = sequence.sampler.sample(logits)
        sequence.tokens.append(token)
        scores = sequence.sampler.scores(logits, token)
        sequence.events.put(TokenEvent(token, len(sequence.tokens) == 1, time.perf_counter(), scores))
        if token in sequence.stop_ids:
            self._end(sequence, "stop")
        elif len(sequence.tokens) >= sequence.max_new_tokens:
            self._end(sequence, "length")

    def _end(self, sequence: Sequence, reason: str) -> None:
        """The answer is whole: finish, or first heal what little is left."""
        if sequence.heal is not None and 0 < sequence.stale <= sequence.heal.finish_rows:
            sequence.ending = reason
        else:
            _finish(sequence, reason)


def _absorb(sequence: Sequence) -> bool:
    """Take in the layers that have arrived for a prefill; whether the sequence can go on now."""
    if sequence.decoding:
        return True
    ready = False
    with _failing(sequence):
        ready = sequence.prefill.absorb()
    now = time.perf_counter()
    if sequence.stalled_since is not None:
        sequence.stalled_s += now - sequence.stalled_since
    sequence.stalled_since = None if ready or sequence.finished else now
    return ready


def decoded_mass(prefill: Prefill) -> MassSpan:
    """The mass span of whatever is decoded after a prompt."""
    return MassSpan(prefill.num_tokens, 1 << 60)


def _row_masses(part: Part) -> torch.Tensor:
    """[positions from the first to the last row] view of the context mass."""
    return part.cache.mass[int(part.positions[0]) : int(part.positions[-1]) + 1]


@contextmanager
def _failing(sequence: Sequence) -> Iterator[None]:
    """Whatever goes wrong inside ends this sequence and no other."""
    try:
        yield
    except SegmentLost as error:  # not a fault of ours: whoever waits starts again without the segment
        _fail(sequence, error)
    except Exception as error:
        log.exception("a sequence failed")
        _fail(sequence, error)


def _do(job: Callable[[], object], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(job())
    except BaseException as error:  # noqa: BLE001 - raised in the thread that asked
        future.set_exception(error)


def _finish(sequence: Sequence, reason: str) -> None:
    sequence.finished = True
    sequence.events.put(FinishedEvent(reason))


def _fail(sequence: Sequence, error: BaseException) -> None:
    if not sequence.finished:
        sequence.finished = True
        sequence.events.put(FailedEvent(error))
