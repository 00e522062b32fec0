"""One simulated worker: slots, cache memory, and the step loop.

Which rows go into a step is decided by the engine's own `workers.scheduler.choose`; what the step takes, by
`simulation.device`. Steps that only decode, with nobody waiting, are taken several at a time; whoever arrives
is let in at the end of the step that runs, as in the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, cast

import simpy

from relay_cluster.simulation.device import Device
from transport.types import Owner
from workers.break_even import Speeds
from workers.budget import RideAlong, Turns, Urgency
from workers.scheduler import BACKGROUND_ROWS, Sequence, Share, choose
from workers.settings import WorkerSettings

_MOST_STEPS = 32
"""Decode steps that are taken at once: the context grows meanwhile, and with it what a step takes."""

Steps = Generator[simpy.Event, Any, None]


@dataclass(eq=False, slots=True)
class Rows:
    """A request in the step loop, with the attributes by which `choose` decides.

    Attributes:
        urgency, group: as the engine's sequences have them: prefill ahead can wait, and is shared out by
            group.
        known: prompt rows that can be computed, of which `computed` are; whole: there will be no more.
        held_back: rows that wait for bytes that are still on their way.
        row_flops: of a row, where it does not depend on its place in the prompt (a plan's average).
        context: tokens in the cache. answer: tokens to decode; written: so far.
        extra_s: engine time that its first step takes on top.
        every: call `told` whenever so many tokens more are written.
    """

    answer: int
    first: simpy.Event
    done: simpy.Event
    urgency: Urgency = Urgency.NOW
    group: str = ""
    known: int = 0
    computed: int = 0
    whole: bool = False
    held_back: int = 0
    row_flops: float | None = None
    context: int = 0
    written: int = 0
    extra_s: float = 0.0
    prefill_s: float = 0.0
    decoding: bool = False
    every: int = 0
    told: Callable[[], None] | None = None
    heal: None = None
    ending: str = ""
    stale: int = 0
    prefill: Rows = field(init=False)

    def __post_init__(self) -> None:
        self.prefill = self  # `choose` asks `sequence.prefill.rows_left`

    @property
    def rows_left(self) -> int:
        return max(0, self.known - self.computed - self.held_back)

    @property
    def following(self) -> tuple[int, ...]:
        """One row per step, once it decodes."""
        return (0,)

    @property
    def wants_rows(self) -> bool:
        return self.decoding or self.rows_left > 0


class SimulatedWorker:
    """A worker.

    Args:
        owner: its name and node.
        settings: as a real worker's.
    """

    def __init__(
        self, env: simpy.Environment, owner: Owner, device: Device, settings: WorkerSettings
    ) -> None:
        self.env = env
        self.owner = owner
        self.settings = settings
        self.slots = simpy.Resource(env, settings.max_sequences)
        self.memory = simpy.Container(env, settings.cache_tokens, settings.cache_tokens)
        self.speeds = Speeds()
        self.prefixes: dict[str, int] = {}
        self.busy_s = 0.0
        self.steps = 0
        self._ride = RideAlong(settings.ahead_share, BACKGROUND_ROWS)
        self._turns = Turns()
        self._device = device
        self._sequences: list[Rows] = []
        self._current: list[Rows] = []
        self._wake: simpy.Event | None = None
        self._ended = env.event()
        env.process(self._run())

    def has_room(self, tokens: int) -> bool:
        """Whether a slot and memory are free, and nobody waits for either."""
        slot = self.slots.count < self.slots.capacity and not self.slots.queue
        return slot and self.memory.level >= tokens and not self.memory.get_queue

    def submit(self, rows: Rows) -> None:
        """Let a request join from the next step on."""
        self._sequences.append(rows)
        self.wake()

    def leave(self, rows: Rows) -> None:
        """Take a request out, finished or not."""
        if rows in self._sequences:
            self._sequences.remove(rows)

    def wake(self) -> None:
        """Something has changed that the loop may be waiting for."""
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()

    def settled(self, rows: Rows) -> Steps:
        """Wait until no step that runs has rows of the request."""
        while rows in self._current:
            yield self._ended

    def _run(self) -> Steps:
        env = self.env
        while True:
            ready = [rows for rows in self._sequences if rows.wants_rows]
            if not ready:
                self._wake = env.event()
                yield self._wake
                continue
            shares = self._shares(ready)
            seconds = self._seconds(shares)
            # Where somebody waits to ride along, the next step may be another one.
            alike = all(rows.urgency is Urgency.NOW for rows in ready)
            steps = self._steps_at_once(shares) if alike else 1
            self._current = [cast("Rows", share.sequence) for share in shares]
            if steps == 1:
                yield env.timeout(seconds)
            else:
                begin, self._wake = env.now, env.event()
                yield env.timeout(steps * seconds) | self._wake
                steps = max(1, min(steps, math.ceil((env.now - begin) / seconds - 1e-9)))
                rest_s = begin + steps * seconds - env.now
                if rest_s > 0:
                    yield env.timeout(rest_s)
            self._learn(shares, seconds)
            self.busy_s += steps * seconds
            self.steps += steps
            self._current = []
            for share in shares:
                self._advance(cast("Rows", share.sequence), share.rows, steps, seconds)
            ended, self._ended = self._ended, env.event()
            ended.succeed()

    def _shares(self, ready: list[Rows]) -> list[Share]:
        """Rows of the next step: the engine's own choice, which looks at no more than what `Rows` has. As
        `StepLoop` has it, rows of prefill ahead ride along by what steps took lately."""
        most = self.settings.max_rows_per_step
        later = [rows for rows in ready if rows.urgency is not Urgency.NOW]
        if not later:
            return choose(cast("list[Sequence]", ready), most)
        urgent = [rows for rows in ready if rows.urgency is Urgency.NOW]
        ride = self._ride.rows(len(urgent)) if all(rows.decoding for rows in urgent) else 0
        in_turn = [later[i] for i in self._turns.order(rows.group for rows in later)]
        return choose(cast("list[Sequence]", [*urgent, *in_turn]), most, ride)

    def _learn(self, shares: list[Share], seconds: float) -> None:
        """Take in what a step took, and who had rows in it; as `StepLoop` does."""
        later = [share for share in shares if share.sequence.urgency is not Urgency.NOW]
        for share in later:
            self._turns.took(share.sequence.group, share.rows)
        urgent = [share for share in shares if share.sequence.urgency is Urgency.NOW]
        if urgent and all(share.sequence.decoding for share in urgent):
            extra = sum(share.rows for share in later)
            self._ride.observe(sum(share.rows for share in urgent), extra, seconds)

    def _seconds(self, shares: list[Share]) -> float:
        """What a step takes."""
        flops, context, extra_s = 0.0, 0, 0.0
        for share in shares:
            rows = cast("Rows", share.sequence)
            extra_s += rows.extra_s
            rows.extra_s = 0.0
            if rows.decoding:
                flops += self._device.decode_flops(rows.context)
                context += rows.context
            elif rows.row_flops is None:
                flops += self._device.prefill_flops(rows.computed, rows.computed + share.rows)
            else:
                flops += rows.row_flops * share.rows
            if not rows.decoding and rows.whole and rows.computed + share.rows >= rows.known:
                flops += self._device.costs.head_flops
        return extra_s + self._device.step_s(flops, len(shares), context)

    def _steps_at_once(self, shares: list[Share]) -> int:
        """How many steps go on like this one, as long as nobody comes."""
        steps = _MOST_STEPS
        for share in shares:
            rows = cast("Rows", share.sequence)
            if not rows.decoding:
                return 1
            steps = min(steps, rows.answer - rows.written)
            if rows.every:
                steps = min(steps, rows.every - rows.written % rows.every)
        return max(1, steps)

    def _advance(self, rows: Rows, chosen: int, steps: int, seconds: float) -> None:
        if not rows.decoding:
            rows.computed += chosen
            rows.prefill_s += seconds
            if rows.whole and rows.computed >= rows.known:
                rows.decoding = True
                self._wrote(rows, 1)
                rows.first.succeed()
        else:
            rows.context += steps
            self._wrote(rows, steps)

    def _wrote(self, rows: Rows, tokens: int) -> None:
        before, rows.written = rows.written, rows.written + tokens
        # The last tokens make no draft of their own: `Writing` waits a moment for what comes with them, and
        # that is the answer, whose reader is asked itself.
        ended = rows.written >= rows.answer
        enough = rows.every and before // rows.every != rows.written // rows.every
        if rows.told is not None and enough and not ended:
            rows.told()
        if ended:
            self.leave(rows)
            rows.done.succeed()
