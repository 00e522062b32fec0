"""What placement goes by: how fast workers and links were of late, what they have to do, and how long agents'
prompts and answers are.

    began(), first_token(), ended()   a request is on a worker
    answered()                        its reply: lengths, rates, transfers, and who holds what now
    views(), links(), task()          the same as `router.py` takes it

Thread-safe. Time is an argument (time.monotonic()); nothing here waits, and a wrong figure costs time only.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from relay_cluster.router import (
    ASSUMED_DECODE_S,
    ASSUMED_PREFILL_S,
    Links,
    LinkSpeed,
    Read,
    Task,
    WorkerView,
)
from transport.types import Outcome, WorkerId
from workers.break_even import DECAY, LineFit
from workers.messages import Reply
from workers.segment import SlotValue, digest_tokens

K = TypeVar("K")
V = TypeVar("V")

DECODE_SHARE = 0.2
"""Part by which one more sequence makes a decode step longer: (113 - 46) ms / 7 of 46 ms at batch 8
(docs/results/decode.json). So much of a running answer's time is in the way of others."""
MOST_SEGMENTS = 8192
"""Segments whose holder is kept in mind; the oldest are forgotten first."""
_LEAST_TOKENS = 16
"""A prefill of fewer tokens says more about the step it rode in than about tokens."""


@dataclass(slots=True)
class _Mean:
    """Of the latest measurements; about the last 7 count."""

    weight: float = 0.0
    total: float = 0.0

    def observe(self, value: float) -> None:
        self.weight = DECAY * self.weight + 1
        self.total = DECAY * self.total + value

    def get(self, otherwise: float) -> float:
        return self.total / self.weight if self.weight else otherwise


@dataclass(slots=True)
class _Lengths:
    """Of an agent's requests, in tokens. own: of the prompt beside its prefix and its upstreams' answers."""

    prefix: int
    own: int
    answer: _Mean


@dataclass(slots=True)
class _Running:
    """A request on a worker: when it began (None: it is only placed there yet), and what it was expected to
    take (prefill, decode), in seconds."""

    worker: WorkerId
    began: float | None
    prefill_s: float
    decode_s: float
    first_at: float | None = None

    def left_s(self, now: float) -> float:
        """Seconds for which it still holds up others."""
        if self.first_at is None:
            done_s = 0.0 if self.began is None else now - self.began
            return max(0.0, self.prefill_s - done_s) + DECODE_SHARE * self.decode_s
        # Beyond what was expected it is still there: never quite nothing.
        return DECODE_SHARE * max(0.05 * self.decode_s, self.decode_s - (now - self.first_at)) + 1e-6


class Rates:
    """What one driver, or one service, has seen of its workers.

    Args:
        max_agents: agents whose worker and lengths are kept in mind.
    """

    def __init__(self, max_agents: int = 4096) -> None:
        self._max_agents = max_agents
        self._lock = threading.Lock()
        self._prefill: dict[WorkerId, LineFit] = {}
        self._decode: dict[WorkerId, _Mean] = {}
        self._links: dict[tuple[str, str], LineFit] = {}
        self._running: dict[str, _Running] = {}
        self._lengths: OrderedDict[str, _Lengths] = OrderedDict()
        self._homes: OrderedDict[tuple[str, str], dict[WorkerId, None]] = OrderedDict()  # latest last
        self._agents: Counter[WorkerId] = Counter()
        self._segments: OrderedDict[bytes, tuple[WorkerId, int]] = OrderedDict()
        self._token_nbytes = 0  # of the segment that was published last

    # -- what happens --------------------------------------------------------------------------------------

    def planned(self, request_id: str, worker: WorkerId, task: Task) -> None:
        """A request will go to a worker, once those it waits for have answered: others are placed with that
        in mind. `ended` takes it back."""
        self.began(request_id, worker, task, None)

    def began(self, request_id: str, worker: WorkerId, task: Task, now: float | None) -> None:
        """A request goes to a worker. now: None where it is only planned."""
        tokens = task.prefix_tokens + task.fresh_tokens + 1
        with self._lock:
            prefill_s, decode_s = self._speeds(worker)
            self._running[request_id] = _Running(
                worker, now, tokens * prefill_s, (task.answer_tokens or 1) * decode_s
            )

    def first_token(self, request_id: str, now: float) -> None:
        """Its first token is there. Further calls change nothing."""
        with self._lock:
            running = self._running.get(request_id)
            if running is not None and running.first_at is None:
                running.first_at = now

    def ended(self, request_id: str) -> None:
        """It is off its worker, however it ended. Idempotent."""
        with self._lock:
            self._running.pop(request_id, None)

    def answered(self, reply: Reply) -> None:
        """Learn from a reply."""
        computed = reply.prompt_tokens - reply.prefix_tokens - reply.relayed_tokens
        with self._lock:
            if computed >= _LEAST_TOKENS and reply.stages.prefill_s > 0:
                self._prefill.setdefault(reply.worker, LineFit()).observe(computed, reply.stages.prefill_s)
            if len(reply.token_ids) > 1 and reply.decode_s > 0:
                per_token_s = reply.decode_s / (len(reply.token_ids) - 1)
                self._decode.setdefault(reply.worker, _Mean()).observe(per_token_s)
            for slot in reply.transfers:
                t = slot.transfer
                if t.outcome is Outcome.PULLED and t.nbytes and t.source != t.destination:
                    pair = (str(slot.source_node), str(reply.node))
                    self._links.setdefault(pair, LineFit()).observe(t.nbytes, t.seconds)
            for published in reply.published:
                held = (reply.worker, published.nbytes)
                _keep(self._segments, published.key.digest, held, MOST_SEGMENTS)
            self._learn_lengths(reply)

    def placed(self, agent: str, model: str, worker: WorkerId) -> None:
        """An agent goes to a worker, which has its prefix from now on."""
        with self._lock:
            homes = self._homes.setdefault((agent, model), {})
            if worker in homes:
                del homes[worker]
            else:
                self._agents[worker] += 1
            homes[worker] = None
            self._homes.move_to_end((agent, model))
            while len(self._homes) > self._max_agents:
                self._agents.subtract(list(self._homes.popitem(last=False)[1]))

    # -- what is known -------------------------------------------------------------------------------------

    def views(self, workers: Iterable[WorkerView], now: float) -> list[WorkerView]:
        """The same workers, with what is known of them."""
        with self._lock:
            busy: dict[WorkerId, float] = {}
            for running in self._running.values():
                busy[running.worker] = busy.get(running.worker, 0.0) + running.left_s(now)
            out: list[WorkerView] = []
            for view in workers:
                prefill_s, decode_s = self._speeds(view.worker)
                out.append(
                    replace(
                        view,
                        busy_s=busy.get(view.worker, 0.0),
                        agents=self._agents[view.worker],
                        prefill_s=prefill_s,
                        decode_s=decode_s,
                    )
                )
            return out

    def links(self) -> Links:
        """Between nodes, as measured; what was not measured is as assumed."""
        with self._lock:
            between = {pair: LinkSpeed(*fit.line) for pair, fit in self._links.items()}
        return Links(between=between)

    def task(
        self,
        agent: str,
        model: str,
        *,
        values: Mapping[str, SlotValue] | None = None,
        after: Sequence[str] = (),
        max_new_tokens: int = 0,
    ) -> Task:
        """An agent's next request, as far as earlier ones tell.

        Args:
            values: what fills its slots, where that is known already.
            after: agents that it waits for, whose answers are in its prompt.
            max_new_tokens: of its answer, where none was measured.
        """
        with self._lock:
            known = self._lengths.get(agent)
            reads = [self._read(value) for value in (values or {}).values() if value.kv_tokens]
            reads += [self._will_be(upstream) for upstream in after]
            return Task(
                agent=agent,
                model=model,
                prefix_tokens=known.prefix if known else 0,
                fresh_tokens=known.own if known else 0,
                answer_tokens=round(known.answer.get(max_new_tokens)) if known else max_new_tokens,
                reads=tuple(reads),
                homes=tuple(reversed(self._homes.get((agent, model), {}))),
                after=tuple(after),
            )

    @property
    def agents(self) -> int:
        """Agents whose workers are kept in mind."""
        with self._lock:
            return len(self._homes)

    # -- under the lock ------------------------------------------------------------------------------------

    def _speeds(self, worker: WorkerId) -> tuple[float, float]:
        """(seconds per prompt token, per answer token) of a worker; of the others where it has shown none."""
        prefill = [self._prefill[worker]] if worker in self._prefill else list(self._prefill.values())
        decode = [self._decode[worker]] if worker in self._decode else list(self._decode.values())
        prefill_s = sum(f.line[1] for f in prefill) / len(prefill) if prefill else ASSUMED_PREFILL_S
        decode_s = sum(m.get(0.0) for m in decode) / len(decode) if decode else ASSUMED_DECODE_S
        return prefill_s, decode_s

    def _read(self, value: SlotValue) -> Read:
        assert value.token_ids is not None  # text has no kv_tokens
        digest = digest_tokens(value.token_ids[: value.kv_tokens])
        found = self._segments.get(digest)
        if found is None:
            return Read(tokens=value.kv_tokens)
        return Read(value.kv_tokens, found[1], (found[0],))

    def _will_be(self, upstream: str) -> Read:
        """What an agent is going to write, as long as its answers were before."""
        known = self._lengths.get(upstream)
        tokens = round(known.answer.get(0.0)) if known else 0
        return Read(tokens=tokens, nbytes=tokens * self._token_nbytes, source=upstream)

    def _learn_lengths(self, reply: Reply) -> None:
        for published in reply.published:
            if published.tokens:
                self._token_nbytes = published.nbytes // published.tokens
        found = self._lengths.get(reply.agent)
        if found is None:
            found = _Lengths(0, 0, _Mean())
        # What was prepared ahead stands in the cache of that one request, not in the agent's prefix.
        prefix = max(0, reply.prefix_tokens - reply.prepared_tokens)
        found.prefix = prefix or found.prefix
        found.own = max(
            0, reply.prompt_tokens - reply.relayed_tokens - max(found.prefix, reply.prefix_tokens)
        )
        found.answer.observe(len(reply.token_ids))
        _keep(self._lengths, reply.agent, found, self._max_agents)


def _keep(where: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Put it last; the oldest go first where there are more than `most`."""
    where[key] = value
    where.move_to_end(key)
    while len(where) > most:
        where.popitem(last=False)
