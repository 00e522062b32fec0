"""`relay bench chain --stream`: whole runs of KVCOMM's chain, with and without readers that get ready early.

    agent k reads   prefix | input | answer 1 | ... | answer k-1     and answers with `output_tokens` tokens

Every run is made by the product's own executor: drafts, placement, requests, publishing and Ray are inside
all times, which are taken at the caller. The modes of a round run one after another on the same text, each as
a tenant of its own, so that no run finds what another one has left in a prefix cache or in the directory.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from relay_cluster.bench.chain import make_roles
from relay_cluster.bench.chain_stream_rows import ChainStreamRow
from relay_cluster.bench.common import BASE, Document, common_prefix, median, progress, rounds
from relay_cluster.bench.texts import Tasks, TextPool
from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig
from relay_cluster.executor import Executor, OnToken, RunOptions
from relay_cluster.pipeline import Pipeline, Stream
from relay_cluster.turns import Turn
from transport.errors import ConfigError
from transport.types import WorkerId
from workers.messages import Comparison, Draft, Reply, Request, ShadowCheck

MODES = (BASE, "off", "exact", "auto", "relay")
"""The first computes every prompt in full; the others are values of `--stream`."""
_STREAM: Mapping[str, Stream] = {
    BASE: "off",
    "off": "off",
    "exact": "exact",
    "auto": "auto",
    "relay": "relay",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainStreamSettings:
    """What is measured. modes: of `MODES`; full_prefill is always measured. method: of all but "exact".
    repeats: timed rounds; cold: one before that is not counted. The rest as in ChainSettings."""

    modes: tuple[str, ...] = MODES
    method: str = "auto"
    agents: int = 5
    prefix_tokens: int = 512
    input_tokens: int = 1000
    output_tokens: int = 512
    repeats: int = 3
    cold: bool = True
    seed: int = 0


@dataclass(slots=True)
class _Sample:
    """One run."""

    after_s: float
    wall_s: float
    turns: dict[str, Turn]
    wasted: int

    @property
    def decode_rate(self) -> float:
        """Tokens per second of all agents while they decoded."""
        replies = [t.reply for t in self.turns.values()]
        return sum(len(r.token_ids) - 1 for r in replies) / sum(r.decode_s for r in replies)


def parse_modes(text: str) -> tuple[str, ...]:
    """Modes of a comma-separated list, the base first.

    Raises:
        ConfigError: one of them is not known.
    """
    named = tuple(dict.fromkeys(filter(None, (mode.strip() for mode in text.split(",")))))
    unknown = sorted(set(named) - set(MODES))
    if unknown or not named:
        raise ConfigError(f'--stream "{text}": modes are {", ".join(MODES[1:])}, separated by commas.')
    return (BASE, *(m for m in named if m != BASE))


def run_chain_stream(settings: ChainStreamSettings, tasks: Tasks, config: ClusterConfig) -> Document:
    """Start the cluster, run the chains, stop the cluster.

    Raises:
        ConfigError: fewer than two workers, too little text, or a prompt beyond the model's context.
    """
    from transformers import AutoTokenizer

    from workers.model import resolve

    if config.workers == "auto":
        config = config.model_copy(update={"workers": 2})
    if config.worker_count(settings.agents) < 2:
        raise ConfigError("streaming needs two workers, a writer and a reader. Set `workers: 2` or more.")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(resolve(config.model)))
    pool = TextPool(tasks, tokenizer, settings.seed)
    roles = make_roles(settings, tokenizer, pool)
    pipeline = Pipeline([role.agent for role in roles], name="chain", model=config.model)
    steps = (settings.repeats + settings.cold) * len(settings.modes)
    found: dict[str, list[_Sample]] = {mode: [] for mode in settings.modes}
    with progress("chain", steps) as advance, Cluster(config, agents_hint=pipeline) as cluster:
        for turn in rounds(settings.modes, settings.repeats, settings.seed):
            if turn.cold and not settings.cold:
                continue
            text = tokenizer.decode(pool.take(settings.input_tokens))
            for mode in turn.order:
                sample = _run(cluster, pipeline, settings, mode, text)
                advance(f"{mode}: {sample.wall_s:.1f} s")
                if not turn.cold:
                    found[mode].append(sample)
        infos = list(cluster.workers.values())
    facts = {
        **asdict(settings),
        "model": config.model,
        "workers": len(infos),
        "device": "+".join(dict.fromkeys(i.device for i in infos)),
        "threads": config.worker.threads,
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "inside": "a whole run by the product's executor: drafts, Ray, admission, look-up, lease, transfer, "
        "prefill, decoding, publishing",
        "prefix": "a tenant for every run: nothing of a prompt is in a prefix cache or in the directory "
        "beforehand, the agents' own prefixes included",
        "answers": "greedy, stop and special tokens held back until output_tokens",
    }
    return Document("chain_stream", facts, [_row(mode, settings, found) for mode in settings.modes])


def _run(
    cluster: Cluster, pipeline: Pipeline, settings: ChainStreamSettings, mode: str, text: str
) -> _Sample:
    """One run of the whole chain."""
    options = RunOptions(
        method=BASE if mode == BASE else settings.method,
        compare=None,
        repeats=1,
        max_new_tokens=settings.output_tokens,
        seed=settings.seed,
        max_retries=0,
        stream=_STREAM[mode],
    )
    run_id = f"chain-{mode}-{uuid.uuid4().hex[:8]}"
    clock = _Clock()
    before = _wasted(cluster)
    executor = Executor(pipeline, _Fixed(cluster, run_id), options, run_id, clock.on_event)
    turns, wall_s = executor.run({"input": text})
    *_, before_last, last = pipeline.order
    after_s = clock.first[last] - clock.last[before_last]
    return _Sample(after_s, wall_s, turns, _wasted(cluster) - before)


def _wasted(cluster: Cluster) -> int:
    return sum(s["prepared_tokens_wasted"] for s in cluster.stats().values())


@dataclass(slots=True)
class _Clock:
    """Instants (time.perf_counter) of every agent's first and latest token."""

    first: dict[str, float] = field(default_factory=dict[str, float])
    last: dict[str, float] = field(default_factory=dict[str, float])

    def on_event(self, kind: str, agent: str, *more: Any) -> None:
        """See executor.OnEvent."""
        if kind == "token":
            now = time.perf_counter()
            self.first.setdefault(agent, now)
            self.last[agent] = now


@dataclass(frozen=True, slots=True)
class _Fixed:
    """The cluster, for answers of a fixed length, as a tenant of its own; see executor.Workers."""

    cluster: Cluster
    tenant: str

    def worker_for(self, agent: str) -> WorkerId:
        return self.cluster.worker_for(agent)

    def model_for(self, agent: str) -> str:
        return self.cluster.model_for(agent)

    def generate(
        self, worker: WorkerId, request: Request, on_token: OnToken, stop: threading.Event
    ) -> tuple[Reply, float]:
        return self.cluster.generate(worker, self._fixed(request), on_token, stop)

    def prepare_ahead(self, worker: WorkerId, draft: Draft) -> int:
        return self.cluster.prepare_ahead(worker, replace(draft, request=self._fixed(draft.request)))

    def compare(
        self, worker: WorkerId, request: Request, reply: Reply, base_method: str, repeats: int
    ) -> Comparison:
        return self.cluster.compare(worker, self._fixed(request), reply, base_method, repeats)

    def shadow(
        self,
        worker: WorkerId,
        request: Request,
        answer: tuple[int, ...],
        probe: str | None,
        timeout_s: float,
    ) -> ShadowCheck:
        return self.cluster.shadow(worker, self._fixed(request), answer, probe, timeout_s)

    def cancel(self, worker: WorkerId, request_id: str) -> None:
        self.cluster.cancel(worker, request_id)

    def _fixed(self, request: Request) -> Request:
        sampling = replace(request.sampling, min_new_tokens=request.sampling.max_new_tokens)
        return replace(request, sampling=sampling, tenant=self.tenant)


def _row(mode: str, settings: ChainStreamSettings, found: Mapping[str, list[_Sample]]) -> ChainStreamRow:
    samples, base = found[mode], found[BASE]
    last = [list(s.turns.values())[-1].reply for s in samples]

    def over(samples: list[_Sample], value: Callable[[_Sample], float]) -> float:
        return median([value(s) for s in samples])

    after = [s.after_s for s in samples]
    walls = [s.wall_s for s in samples]
    rate = over(samples, lambda s: s.decode_rate)
    return ChainStreamRow(
        mode=mode,
        method=BASE if mode == BASE else "exact_prefix" if mode == "exact" else settings.method,
        agents=settings.agents,
        output_tokens=settings.output_tokens,
        prompt_tokens=last[0].prompt_tokens,
        samples=len(samples),
        ttft_after_last_token_s=median(after),
        ttft_s_min=min(after),
        ttft_s_max=max(after),
        speedup=over(base, lambda s: s.after_s) / median(after),
        wall_s=median(walls),
        wall_s_min=min(walls),
        wall_s_max=max(walls),
        wall_ratio=median(walls) / over(base, lambda s: s.wall_s),
        writers_tokens_per_s=rate,
        upstream_tokens_per_s_ratio=rate / over(base, lambda s: s.decode_rate),
        prepared_tokens=median([r.prepared_tokens for r in last]),
        relayed_tokens=median([r.relayed_tokens for r in last]),
        same_tokens=_same(samples, base),
        wasted_tokens=over(samples, lambda s: s.wasted),
    )


def _same(samples: list[_Sample], base: list[_Sample]) -> float:
    """Share of all answers' tokens up to their first difference from full prefill's of the same round."""
    same = total = 0
    for ours, theirs in zip(samples, base, strict=True):
        for name, turn in theirs.turns.items():
            wanted = turn.reply.token_ids
            same += common_prefix(ours.turns[name].reply.token_ids, wanted)
            total += len(wanted)
    return same / total
