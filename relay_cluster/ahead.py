"""Prefill ahead, seen from the driver: while upstream agents write, the workers of those that will read them
are told what is known of their prompts.

Every reader has a thread that sends drafts, one at a time. What is written meanwhile goes into the next one,
so a slow reader gets fewer drafts, and never holds the writer up. A draft says everything that is known: one
that is lost, or that a dead worker had, costs only work. Which tokens are used is decided by the worker that
has them (workers/preparing.py); this module knows nothing of KV.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from transport.errors import RelayError
from transport.types import WorkerId
from workers.messages import Draft
from workers.segment import SlotValue

log = logging.getLogger(__name__)

CHUNK_TOKENS = 8
"""A reader is sent a draft for so many new tokens. A pass over the weights for one token costs about as much
as for eight; what has not been sent when the last token comes is computed with the rest of the prompt."""
NO_CHUNKS = 1 << 40
"""No number of new tokens is worth a draft: their KV is pulled, which needs none."""
_WAKE_S = 1.0
_GRACE_S = 0.02
"""A draft is held back so long: after a writer's last token its reader's request comes in this time, and
would otherwise find its worker busy with those few tokens alone."""


class Workers(Protocol):
    """What prefill ahead needs of a cluster."""

    def worker_for(self, agent: str) -> WorkerId: ...
    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        """See AgentWorker.prepare_ahead. Raises RelayError."""
        ...

    def cancel(self, worker: WorkerId, request_id: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Written:
    """What an agent has written so far. value: its output once it has answered; tries: how often it has begun
    again."""

    token_ids: tuple[int, ...] = ()
    value: SlotValue | None = None
    tries: int = 0


class Writing:
    """What all agents of a run have written so far. Thread-safe.

    Args:
        chunk_tokens: so many new tokens are worth a draft.
    """

    def __init__(self, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self._chunk_tokens = chunk_tokens
        self._ids: dict[str, list[int]] = {}
        self._values: dict[str, SlotValue] = {}
        self._tries: Counter[str] = Counter()
        self._changed = threading.Condition()
        self._closed = False

    def add(self, agent: str, count: int, token_id: int) -> None:
        """The agent's token number `count`. The first one begins its answer, also when it is made again."""
        with self._changed:
            ids = self._ids.setdefault(agent, [])
            if count <= len(ids):
                del ids[count - 1 :]
            ids.append(token_id)
            self._changed.notify_all()

    def again(self, agent: str) -> None:
        """The agent's request is made again, under another id."""
        with self._changed:
            self._tries[agent] += 1
            self._changed.notify_all()

    def answered(self, agent: str, value: SlotValue) -> None:
        """The agent has answered; value: what its readers get."""
        with self._changed:
            self._values[agent] = value
            self._changed.notify_all()

    def so_far(self, agents: Iterable[str]) -> dict[str, Written]:
        """Of each of `agents`."""
        with self._changed:
            return {
                a: Written(tuple(self._ids.get(a, ())), self._values.get(a), self._tries[a]) for a in agents
            }

    def close(self) -> None:
        """Nothing more comes; wakes all that wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, agents: Iterable[str], seen: Mapping[str, Written], stop: threading.Event) -> bool:
        """Until there is enough new for a draft; False when there will be none."""
        names = list(agents)

        def enough() -> bool:
            for name in names:
                was = seen[name]
                if (was.value is None and name in self._values) or was.tries != self._tries[name]:
                    return True
                ids = self._ids.get(name, ())
                if len(ids) - len(was.token_ids) >= self._chunk_tokens or len(ids) < len(was.token_ids):
                    return True
            return False

        with self._changed:
            # Woken by every token; the limit is for `stop`, which nobody notifies of.
            while not (self._closed or stop.is_set() or enough()):
                self._changed.wait(_WAKE_S)
        stop.wait(_GRACE_S)
        return not (self._closed or stop.is_set())


@dataclass(eq=False, slots=True)
class _Reader:
    """An agent whose prompt is prepared. worker: that has drafts of it; request_id: of the drafts."""

    agent: str
    request_id: str
    upstreams: tuple[str, ...]
    stop: threading.Event = field(default_factory=threading.Event)
    worker: WorkerId | None = None


class Ahead:
    """Prepares the agents of one run.

    Args:
        workers: the cluster.
        draft_of: (agent, what its upstream agents have written) -> its draft.
        chunk_tokens: see Writing.
    """

    def __init__(
        self,
        workers: Workers,
        draft_of: Callable[[str, Mapping[str, Written]], Draft],
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        self.writing = Writing(chunk_tokens)
        self._workers = workers
        self._draft_of = draft_of
        self._readers: dict[str, _Reader] = {}
        self._lock = threading.Lock()

    def start(self, agent: str, request_id: str, upstreams: Iterable[str]) -> None:
        """Begin to prepare an agent."""
        reader = _Reader(agent, request_id, tuple(upstreams))
        with self._lock:
            self._readers[agent] = reader
        threading.Thread(target=self._follow, args=[reader], name=f"ahead-{agent}", daemon=True).start()

    def asked(self, agent: str, worker: WorkerId) -> None:
        """The agent's request goes to `worker` now: no further drafts, and what another worker has prepared
        is given up."""
        reader = self._end(agent)
        if reader is not None and reader.worker not in (None, worker):
            self._give_up(reader)

    def close(self) -> None:
        """Give up everything that has not been asked for. Idempotent."""
        self.writing.close()
        with self._lock:
            agents = list(self._readers)
        for agent in agents:
            reader = self._end(agent)
            if reader is not None and reader.worker is not None:
                self._give_up(reader)

    def _end(self, agent: str) -> _Reader | None:
        with self._lock:
            reader = self._readers.pop(agent, None)
        if reader is not None:
            reader.stop.set()
        return reader

    def _give_up(self, reader: _Reader) -> None:
        assert reader.worker is not None  # only then is there something
        try:
            self._workers.cancel(reader.worker, reader.request_id)
        except RelayError as error:
            log.warning("what %s has prepared for %s stays there: %s", reader.worker, reader.agent, error)

    def _follow(self, reader: _Reader) -> None:
        while not reader.stop.is_set():
            seen = self.writing.so_far(reader.upstreams)
            if all(w.value is not None for w in seen.values()):
                return  # its request comes now
            try:
                self._send(reader, seen)
            except RelayError as error:
                # Only time is lost: the request itself will say what is wrong.
                log.warning("%s is not prepared: %s", reader.agent, error)
                return
            if not self.writing.wait(reader.upstreams, seen, reader.stop):
                return

    def _send(self, reader: _Reader, seen: Mapping[str, Written]) -> None:
        draft = self._draft_of(reader.agent, seen)
        if reader.worker is None:
            reader.worker = self._workers.worker_for(reader.agent)
        self._workers.prepare_ahead(reader.worker, draft)
