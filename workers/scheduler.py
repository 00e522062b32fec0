"""Continuous batching on one worker: which rows go into the next ragged step, and the thread that runs the
steps.

    choose()   pure: decode rows first, then prefill rows by age, within the cap of rows per step
    StepLoop   one thread: choose -> Engine.step -> hand every sequence its result -> again

Sequences join and leave between steps. All other tensor work of a worker (scatter, publish copies) is
`call`ed onto the same thread, because decoding slowed down as soon as a second thread had run parallel
operators (12.6 to 9-10 tokens/s in one process; on the cluster 7.7 became 9.3 with one thread). We take the
cause to be libgomp: a team per thread, and less spinning at barriers once team threads outnumber the cores.
The loop knows nothing of prompts, segments or transport.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from transport.errors import Cancelled, DeadlineExceeded, RelayError
from workers.attention import MassSpan
from workers.engine import Engine, Part, PartResult
from workers.prefill import Prefill
from workers.sampling import Sampler

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A sampled token; `first` ends the time to first token. at: time.perf_counter() instant."""

    token: int
    first: bool
    at: float


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The sequence ended. reason: "stop", "length" or "scored"."""

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
    """

    prefill: Prefill
    sampler: Sampler | None
    max_new_tokens: int
    stop_ids: frozenset[int]
    deadline: float
    forced: tuple[int, ...] = ()
    capture_mass: bool = True
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    tokens: list[int] = field(default_factory=list[int])
    fed: int = 0
    scored: torch.Tensor | None = None
    finished: bool = False
    prefill_entries: tuple[int, int] = (0, 0)
    prefill_seconds: float = 0.0
    first_logits_at: float = 0.0
    steps: int = 0

    @property
    def decoding(self) -> bool:
        return self.prefill.finished


def choose(sequences: Seq[Sequence], max_rows: int) -> list[tuple[Sequence, int]]:
    """Rows of the next step: one for every decoding sequence, then prefill rows in order of arrival.

    Decode rows are never held back; prefill fills what is left of `max_rows` and gets at least 16 rows, so
    that it goes on even when many sequences decode.
    """
    decoding = [s for s in sequences if s.decoding]
    chosen = [(s, max(1, len(s.forced))) for s in decoding]
    room = max(16, max_rows - sum(n for _, n in chosen))
    for sequence in sequences:
        if not sequence.decoding and room > 0:
            part_rows = min(room, sequence.prefill.rows_left)
            chosen.append((sequence, part_rows))
            room -= part_rows
    return chosen


class StepLoop:
    """Owns the engine thread. `submit` from any thread; events come back on the sequence's queue."""

    def __init__(self, engine: Engine, *, max_rows: int, checkpoint_layer: int) -> None:
        self._engine = engine
        self._max_rows = max_rows
        self._checkpoint_layer = checkpoint_layer
        self._sequences: list[Sequence] = []
        self._jobs: list[tuple[Callable[[], object], Future[Any]]] = []
        self._changed = threading.Condition()
        self._stopping = False
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

    def call(self, job: Callable[[], T], *, timeout_s: float = 60.0) -> T:
        """Run `job` on the engine's thread between two steps, and return what it returns or raise what it
        raises.

        Raises:
            RelayError: the loop was stopped. DeadlineExceeded: not done within `timeout_s`.
        """
        if threading.current_thread() is self._thread:
            return job()
        future: Future[T] = Future()
        with self._changed:
            if self._stopping:
                raise RelayError("the worker is shutting down and takes no new requests.")
            self._jobs.append((job, future))
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
                while not (self._sequences or self._jobs or self._stopping):
                    self._changed.wait(1.0)
                jobs, self._jobs = self._jobs, []
                if self._stopping:
                    leftovers, self._sequences = self._sequences, []
                    break
                batch = [s for s in self._sequences if not self._gave_up(s)]
            for job, future in jobs:
                _do(job, future)
            if batch:
                self._step(batch)
            with self._changed:
                self._sequences = [s for s in self._sequences if not s.finished]
        for _, future in jobs:
            future.cancel()
        for sequence in leftovers:
            _fail(sequence, RelayError("the worker shut down before the request was finished."))

    def _gave_up(self, sequence: Sequence) -> bool:
        if sequence.cancelled.is_set():
            _fail(sequence, Cancelled("the request was cancelled."))
        elif time.monotonic() > sequence.deadline:
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
        for sequence, rows in choose(batch, self._max_rows):
            with _failing(sequence):
                work.append((sequence, self._part(sequence, rows)))
        results = self._compute(work)
        seconds = time.perf_counter() - begin
        for (sequence, part), result in zip(work, results, strict=True):
            sequence.steps += 1
            if result is not None:
                with _failing(sequence):
                    self._advance(sequence, part, result, seconds)

    def _compute(self, work: list[tuple[Sequence, Part]]) -> list[PartResult | None]:
        """Results of all parts; None for a sequence that failed. When a step breaks, its parts are run one by
        one (they only write to their own rows), so that one bad request does not end the others."""
        if not work:
            return []
        try:
            return list(self._engine.step([part for _, part in work]))
        except Exception as error:
            if len(work) == 1:
                _fail(work[0][0], error)
                log.exception("a step failed")
                return [None]
            log.warning("a step of %d parts failed (%r); running them one by one", len(work), error)
        return [self._compute([one])[0] for one in work]

    def _part(self, sequence: Sequence, rows: int) -> Part:
        if not sequence.decoding:
            return sequence.prefill.next_part(rows)
        start = sequence.prefill.num_tokens + sequence.fed
        ids = sequence.forced or (sequence.tokens[-1],)
        prompt_end = sequence.prefill.num_tokens
        return Part(
            cache=sequence.prefill.cache,
            positions=torch.arange(start, start + len(ids)),
            token_ids=torch.tensor(ids),
            logits_rows=tuple(range(len(ids))),
            checkpoint_layer=self._checkpoint_layer,
            masses=(MassSpan(prompt_end, 1 << 60),) if sequence.capture_mass else (),
        )

    def _advance(self, sequence: Sequence, part: Part, result: PartResult, seconds: float) -> None:
        if sequence.decoding:
            sequence.fed += part.rows
            if sequence.forced:
                assert sequence.scored is not None  # set when the prefill ended
                sequence.scored = torch.cat([sequence.scored, result.logits])
                _finish(sequence, "scored")
                return
        else:
            fresh, rectified = sequence.prefill.done(part, result)
            sequence.prefill_entries = (
                sequence.prefill_entries[0] + fresh,
                sequence.prefill_entries[1] + rectified,
            )
            sequence.prefill_seconds += seconds
            if not sequence.prefill.finished:
                return
            sequence.first_logits_at = time.perf_counter()
            assert sequence.prefill.logits is not None  # that is what finished means
            sequence.scored = sequence.prefill.logits[None]
            if sequence.sampler is None:
                if not sequence.forced:
                    _finish(sequence, "scored")
                return
        logits = result.logits[-1]
        self._sample(sequence, logits)

    def _sample(self, sequence: Sequence, logits: torch.Tensor) -> None:
        assert sequence.sampler is not None  # scoring sequences never get here
        token = sequence.sampler.sample(logits)
        sequence.tokens.append(token)
        sequence.events.put(TokenEvent(token, len(sequence.tokens) == 1, time.perf_counter()))
        if token in sequence.stop_ids:
            _finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.max_new_tokens:
            _finish(sequence, "length")


@contextmanager
def _failing(sequence: Sequence) -> Iterator[None]:
    """Whatever goes wrong inside ends this sequence and no other."""
    try:
        yield
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
