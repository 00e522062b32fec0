"""`relay bench stream`: from the writer's last token to the reader's first.

    reader's prompt   template | known text | what the writer writes | fresh text

Two workers of a real cluster, one core each on the machine of the README. In every round the writer decodes
its answer once for each way to prepare the reader meanwhile, and before and after each while nobody follows;
after the last one the reader is asked under full prefill and under relay. Every time is taken at the caller;
Ray, look-up, lease, transfer and publishing are inside.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean

from relay_cluster.ahead import Ahead, Written
from relay_cluster.bench.common import BASE, Document, median, progress
from relay_cluster.bench.stream_busy import other_request
from relay_cluster.bench.stream_rows import StreamRow
from relay_cluster.bench.texts import Tasks, TextPool
from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig
from relay_cluster.pipeline import Agent, Pipeline
from transport.errors import ConfigError
from transport.types import WorkerId
from workers.messages import Draft, Reply, Request, Token
from workers.segment import SlotValue
from workers.settings import SamplingSettings

MODES = ("full_prefill", "relay", "exact", "auto", "busy")
"""The first two begin when the writer has ended; the others are prepared while it writes: "busy" as "exact",
on a worker that decodes another request meanwhile."""
_FOLLOWED = ("exact", "auto", "busy")
_METHOD = {
    "full_prefill": BASE,
    "relay": "auto",
    "exact": "exact_prefix",
    "auto": "auto",
    "busy": "exact_prefix",
}
_JUDGE_TIMEOUT_S = 120.0

_WRITER = Agent("writer", "Notes:\n{known}\n\nGo on.", system="You think a problem through.")
_READER = Agent(
    "reader",
    "Notes:\n{known}\n\nA colleague wrote:\n{writer}\n\n{fresh}",
    system="You check what others write.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSettings:
    """What is measured.

    Attributes:
        modes: of `MODES`; full_prefill is always measured.
        known_tokens, streamed_tokens: of the known text and of the writer's answer.
        fresh_tokens: lengths of the text behind them, one shape of prompt each.
        repeats: timed rounds of every shape, after one that is not counted.
    """

    modes: tuple[str, ...] = MODES
    known_tokens: int = 1000
    streamed_tokens: int = 512
    fresh_tokens: tuple[int, ...] = (64, 16)
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Sample:
    after_s: float
    reply: Reply
    row_layers: int
    logits_max_diff: float
    kl_first: float
    writer_rate: float
    writer_ratio: float | None = None
    other_ratio: float | None = None


@dataclass(slots=True)
class _Shape:
    """The samples of one shape of prompt."""

    fresh: int
    samples: dict[str, list[_Sample]] = field(default_factory=dict[str, list[_Sample]])


def run_stream(settings: StreamSettings, tasks: Tasks, config: ClusterConfig) -> Document:
    """Start the cluster, measure, stop the cluster.

    Raises:
        ConfigError: fewer than two workers, an unknown mode, or too little text.
    """
    unknown = sorted(set(settings.modes) - set(MODES))
    if unknown:
        raise ConfigError(f"--modes {', '.join(unknown)}: not a mode. Modes are {', '.join(MODES)}.")
    if config.worker_count(2) < 2:
        raise ConfigError("stream needs two workers, a writer and a reader. Set `workers: 2` or more.")
    settings = replace(settings, modes=(BASE, *(m for m in settings.modes if m != BASE)))
    pipeline = Pipeline([_WRITER, _READER], name="stream", model=config.model)
    followed = sum(mode in _FOLLOWED for mode in settings.modes)
    steps = len(settings.fresh_tokens) * (settings.repeats + 1) * (1 + followed)
    with progress("stream", steps) as advance, Cluster(config, agents_hint=pipeline) as cluster:
        bench = _Bench(cluster, settings, _pool(tasks, config.model, settings.seed), advance)
        rows = [row for fresh in settings.fresh_tokens for row in bench.rows(fresh)]
        infos = list(cluster.workers.values())
    facts = {
        **asdict(settings),
        "model": config.model,
        "workers": len(infos),
        "device": "+".join(dict.fromkeys(i.device for i in infos)),
        "threads": config.worker.threads,
        "data": list(tasks.sources),
        "inside": "publishing the writer's answer, Ray dispatch, admission, look-up, lease, transfer, "
        "rectification, the rest of the prefill, first token",
        "prefix": "nothing of the reader's prompt is in its exact prefix cache, but for its own template",
    }
    return Document("stream", facts, rows)


def _pool(tasks: Tasks, model: str, seed: int) -> TextPool:
    from transformers import AutoTokenizer

    from workers.model import resolve

    return TextPool(tasks, AutoTokenizer.from_pretrained(str(resolve(model))), seed)


class _Bench:
    def __init__(
        self, cluster: Cluster, settings: StreamSettings, pool: TextPool, advance: Callable[[str], None]
    ) -> None:
        self._cluster = cluster
        self._settings = settings
        self._pool = pool
        self._advance = advance
        self._writer, self._reader = list(cluster.workers)[:2]
        self._writing = (0.0, 0.0)  # instants between which the latest answer was written

    def rows(self, fresh: int) -> list[StreamRow]:
        """All modes with prompts that end in so many fresh tokens."""
        shape = _Shape(fresh, samples={mode: [] for mode in self._settings.modes})
        for number in range(self._settings.repeats + 1):
            found = _Shape(fresh, samples={mode: [] for mode in self._settings.modes})
            self._round(found)
            if number:  # the first one is cold
                for mode, samples in found.samples.items():
                    shape.samples[mode] += samples
        return [self._row(shape, mode) for mode in self._settings.modes]

    def _round(self, shape: _Shape) -> None:
        """Every mode once, on the same text; before and after each that follows the writer, it writes alone:
        the speed of a shared machine changes within minutes."""
        settings = self._settings
        known = self._pool.take(settings.known_tokens)
        fresh = SlotValue(token_ids=self._pool.take(shape.fresh))
        given = {"known": SlotValue(token_ids=known, kv_tokens=len(known)), "fresh": fresh}
        written, rate, ended = self._write(given, lambda *_: None)
        for mode in settings.modes:
            if mode in _FOLLOWED:
                once = self._busy if mode == "busy" else self._followed
                sample, before = once(given, mode), rate
                written, rate, ended = self._write(given, lambda *_: None)
                ratio = sample.writer_rate / fmean((before, rate))
                shape.samples[mode].append(replace(sample, writer_ratio=ratio))
                self._advance(f"{shape.fresh} fresh: {mode}")
        for mode in settings.modes:
            if mode not in _FOLLOWED:
                request = self._request(_READER, {**given, "writer": written.output}, _METHOD[mode])
                shape.samples[mode].append(self._ask(request, ended, rate))
                ended = time.perf_counter()  # for the next one, which waits for nobody
        self._advance(f"{shape.fresh} fresh: unprepared")

    def _busy(self, given: Mapping[str, SlotValue], mode: str) -> _Sample:
        """As `_followed`, while the reader's worker decodes another request; and how much longer that one's
        tokens take, on average, than while the same is written and nobody prepared."""
        means: list[float] = []
        sample: _Sample | None = None
        for prepares in (False, True):
            sampling = SamplingSettings(
                max_new_tokens=4 * self._settings.streamed_tokens,
                min_new_tokens=4 * self._settings.streamed_tokens,
            )
            other = replace(self._request(_WRITER, given, BASE), sampling=sampling, shadow_tokens=0)
            with other_request(self._cluster, self._reader, other) as tokens:
                if prepares:
                    # The check of the reader's logits waits until nobody wants the engine.
                    sample = self._followed(given, mode, tokens.end)
                else:
                    self._write(given, lambda *_: None)
                means.append(fmean(tokens.intervals(*self._writing)))
        assert sample is not None  # the second time
        return replace(sample, other_ratio=means[1] / means[0])

    def _followed(
        self, given: Mapping[str, SlotValue], mode: str, asked: Callable[[], None] = lambda: None
    ) -> _Sample:
        """The reader is prepared while the writer writes, by the code that pipelines use."""
        room = self._settings.streamed_tokens
        empty = self._request(_READER, {**given, "writer": SlotValue(token_ids=())}, _METHOD[mode])

        def draft(_: str, written: Mapping[str, Written]) -> Draft:
            ids = written[_WRITER.name].token_ids
            values = {**empty.values, "writer": SlotValue(token_ids=ids)}
            return Draft(
                request=replace(empty, values=values),
                open_slots=frozenset({"writer"}),
                room_tokens=room - len(ids),
            )

        before = self._row_layers()
        ahead = Ahead(_At(self._cluster, self._reader), draft)
        try:
            ahead.start(_READER.name, empty.id, [_WRITER.name])
            written, rate, ended = self._write(
                given, lambda number, token: ahead.writing.add(_WRITER.name, number, token.id)
            )
            ahead.writing.answered(_WRITER.name, written.output)
            ahead.asked(_READER.name, self._reader)
            request = replace(empty, values={**empty.values, "writer": written.output})
            return self._ask(request, ended, rate, before, asked)
        finally:
            ahead.close()

    def _write(
        self, given: Mapping[str, SlotValue], on_token: Callable[[int, Token], None]
    ) -> tuple[Reply, float, float]:
        """(the writer's reply, its tokens per second, instant of its last token at the caller)."""
        count = self._settings.streamed_tokens
        begin = last = 0.0

        def took(number: int, token: Token) -> None:
            nonlocal begin, last
            last = time.perf_counter()
            begin = begin or last
            on_token(number, token)

        sampling = SamplingSettings(max_new_tokens=count, min_new_tokens=count)
        request = replace(
            self._request(_WRITER, given, BASE), sampling=sampling, publish=True, shadow_tokens=0
        )
        reply, _ = self._cluster.generate(self._writer, request, took)
        self._writing = (begin, last)
        return reply, (len(reply.token_ids) - 1) / reply.decode_s, last

    def _ask(
        self,
        request: Request,
        ended: float,
        rate: float,
        before: int | None = None,
        asked: Callable[[], None] = lambda: None,
    ) -> _Sample:
        """The reader's first token, and how far its logits are from full prefill's. asked: called between
        the two."""
        before = self._row_layers() if before is None else before
        first: list[float] = []
        reply, _ = self._cluster.generate(self._reader, request, lambda *_: first.append(time.perf_counter()))
        work = self._row_layers() - before
        asked()
        check = self._cluster.shadow(self._reader, request, reply.token_ids, None, _JUDGE_TIMEOUT_S)
        return _Sample(first[0] - ended, reply, work, check.logits_max_diff, check.kl_first, rate)

    def _request(self, agent: Agent, values: Mapping[str, SlotValue], method: str) -> Request:
        return Request(
            id=f"stream-{agent.name}-{uuid.uuid4().hex[:8]}",
            agent=agent.name,
            system=agent.system,
            prompt=agent.prompt,
            values={slot: values[slot] for slot in agent.slots},
            method=method,
            sampling=SamplingSettings(max_new_tokens=1),
            publish=False,
            shadow_tokens=1,
        )

    def _row_layers(self) -> int:
        """(token, layer) entries that the reader has computed so far."""
        return self._cluster.stats()[self._reader]["row_layers"]

    def _row(self, shape: _Shape, mode: str) -> StreamRow:
        samples = shape.samples[mode]
        times = [s.after_s for s in samples]
        base = shape.samples[BASE]
        reply = samples[0].reply
        written = self._settings.streamed_tokens
        others = [s.other_ratio for s in samples if s.other_ratio is not None]
        ratios = [s.writer_ratio for s in samples if s.writer_ratio is not None]
        return StreamRow(
            mode=mode,
            method=reply.resolved_method or _METHOD[mode],
            known_tokens=reply.prompt_tokens - written - shape.fresh,
            streamed_tokens=written,
            fresh_tokens=shape.fresh,
            samples=len(samples),
            ttft_after_last_token_s=median(times),
            ttft_s_min=min(times),
            ttft_s_max=max(times),
            speedup=median([s.after_s for s in base]) / median(times),
            upstream_tokens_per_s_ratio=median(ratios) if ratios else None,
            other_interval_ratio=median(others) if others else None,
            prepared_tokens=median([s.reply.prepared_tokens for s in samples]),
            relayed_tokens=median([s.reply.relayed_tokens for s in samples]),
            logits_max_diff=max(s.logits_max_diff for s in samples),
            kl_first=max(s.kl_first for s in samples),
            extra_flops_ratio=median([s.row_layers for s in samples]) / median([s.row_layers for s in base])
            - 1,
        )


@dataclass(frozen=True, slots=True)
class _At:
    """The cluster, with every reader on one worker."""

    cluster: Cluster
    worker: WorkerId

    def worker_for(self, agent: str) -> WorkerId:
        """The worker."""
        return self.worker

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        """See Cluster."""
        return self.cluster.prepare_ahead(worker, draft)

    def cancel(self, worker: WorkerId, request_id: str) -> None:
        """See Cluster."""
        self.cluster.cancel(worker, request_id)
