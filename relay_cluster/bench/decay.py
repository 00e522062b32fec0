"""`relay bench decay`: does the gain last while novel queries keep arriving?

Every query is new: an upstream agent's answer to a task that nobody has seen enters the arena, and one reader
asks for its first token with it, once under the method and once under full prefill, in alternating order. The
arena holds only a part of all that is published, so from some query on every new segment makes the worker
evict an older one. A cache that clings to the wrong segments, or loses time in evicting, shows as a falling
speed-up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from relay_cluster.bench.common import BASE, DecayRow, Document, mean_or_none, median, progress, split_method
from relay_cluster.bench.texts import Tasks, TextPool
from transport.errors import ConfigError
from workers.desk import Desk, load_for_desk, open_desk
from workers.fidelity import again
from workers.messages import Reply, Request
from workers.segment import SlotValue
from workers.settings import DEFAULT_MODEL, SamplingSettings, WorkerSettings

_SYSTEM = "You read the work of a colleague and give the result in one sentence."
_UPSTREAM_SYSTEM = "You work on a task and write down every step."


@dataclass(frozen=True, slots=True, kw_only=True)
class DecaySettings:
    """What is measured.

    Attributes:
        method: the one that is watched.
        queries: novel queries, one after another.
        span_tokens: tokens of every upstream answer.
        fresh_tokens: tokens of the reader's own question, its template not counted.
        window: queries that one row sums up.
        arena_spans: answers that the arena holds; later ones push earlier ones out.
        warm_queries: queries before the first row, which are not measured.
    """

    method: str
    model: str = DEFAULT_MODEL
    queries: int = 500
    span_tokens: int = 256
    fresh_tokens: int = 32
    window: int = 50
    arena_spans: int = 32
    warm_queries: int = 2
    seed: int = 0
    threads: int = 0


@dataclass(slots=True)
class _Window:
    """Samples since the last row."""

    ttft_s: list[float] = field(default_factory=list[float])
    base_s: list[float] = field(default_factory=list[float])
    reuse: list[float | None] = field(default_factory=list[float | None])
    relayed: int = 0


def run_decay(settings: DecaySettings, tasks: Tasks) -> Document:
    """Run all queries.

    Raises:
        ConfigError: the arena would hold every answer, so that nothing is ever evicted.
    """
    if settings.arena_spans >= settings.queries:
        raise ConfigError(
            f"--arena-spans {settings.arena_spans} holds all {settings.queries} answers: nothing would be "
            "evicted. Take more --queries or a smaller arena."
        )
    worker = WorkerSettings(threads=settings.threads, cache_tokens=2 * settings.span_tokens + 1024)
    loaded, profile = load_for_desk(settings.model, worker)
    per_span = loaded.layout.blocks_for(settings.span_tokens)
    pool = TextPool(tasks, loaded.tokenizer, settings.seed)
    with (
        progress("decay", settings.queries + settings.warm_queries) as advance,
        open_desk(
            "decay", loaded, profile, arena_blocks=settings.arena_spans * per_span, settings=worker
        ) as desk,
    ):
        rows = _Bench(desk, settings, pool, advance).run()
    facts = {
        **asdict(settings),
        "device": str(loaded.device),
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "arena_blocks": settings.arena_spans * per_span,
        "spans_made_by": "replay: natural text taken as the answer of an upstream agent in its own context",
        "speedup": "median over the window of full_prefill's TTFT / median of the method's, same queries",
        "warm_peak": "the largest speed-up of a window so far",
    }
    return Document("decay", facts, rows)


class _Bench:
    def __init__(
        self, desk: Desk, settings: DecaySettings, pool: TextPool, advance: Callable[[str], None]
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._pool = pool
        self._advance = advance
        self._published = 0
        self._resolved = settings.method

    def run(self) -> list[DecayRow]:
        settings, agent = self._settings, self._desk.agent
        agent.prepare(_SYSTEM, self._reader(0, SlotValue(text="x")).prompt)
        for number in range(settings.warm_queries):
            self._query(-1 - number)
            self._advance("warming up")
        rows: list[DecayRow] = []
        window, peak = _Window(), 0.0
        for number in range(1, settings.queries + 1):
            ours, base = self._query(number)
            window.ttft_s.append(ours.ttft_s)
            window.base_s.append(base.ttft_s)
            window.reuse.append(ours.reuse)
            window.relayed += ours.relayed_tokens > 0
            if number % settings.window == 0 or number == settings.queries:
                row = self._row(number, window, peak)
                rows.append(row)
                window, peak = _Window(), row.warm_peak
            self._advance(f"query {number}")
        return rows

    def _query(self, number: int) -> tuple[Reply, Reply]:
        """(the method's reply, full prefill's) to one novel query."""
        settings, agent = self._settings, self._desk.agent
        upstream = Request(
            id=f"up{number}",
            agent="worker",
            system=_UPSTREAM_SYSTEM,
            prompt="Task:\n{task}\n\nWork on it.",
            values={"task": SlotValue(token_ids=self._pool.take(24))},
            method=BASE,
        )
        answer = self._pool.take(settings.span_tokens + 1)
        reply = agent.replay(upstream, answer)
        self._published += len(reply.published)
        request = self._reader(number, reply.output)
        order = (settings.method, BASE) if number % 2 else (BASE, settings.method)
        replies = {method: agent.generate(again(request, method)) for method in order}
        self._resolved = replies[settings.method].resolved_method or settings.method
        return replies[settings.method], replies[BASE]

    def _reader(self, number: int, work: SlotValue) -> Request:
        return Request(
            id=f"read{number}",
            agent="reader",
            system=_SYSTEM,
            prompt="A colleague wrote:\n{work}\n\n{question}",
            values={
                "work": work,
                "question": SlotValue(token_ids=self._pool.take(self._settings.fresh_tokens)),
            },
            sampling=SamplingSettings(max_new_tokens=1),
        )

    def _row(self, number: int, window: _Window, peak: float) -> DecayRow:
        ours, base = median(window.ttft_s), median(window.base_s)
        speedup = base / ours
        held = len(self._desk.agent.store.segments())
        method, params = split_method(self._settings.method, self._resolved)
        return DecayRow(
            method=method,
            params=params,
            queries=number,
            speedup=speedup,
            warm_peak=max(peak, speedup),
            of_peak=speedup / max(peak, speedup),
            ttft_s_median=ours,
            base_ttft_s_median=base,
            reuse=mean_or_none(window.reuse),
            relayed_share=window.relayed / len(window.ttft_s),
            evicted=self._published - held,
            segments=held,
        )
