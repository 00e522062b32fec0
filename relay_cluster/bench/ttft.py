"""`relay bench ttft`: time from a request at the worker to its first logits, segments local.

A role has read `span_tokens` tokens of upstream text, as one span or as several, and has `fresh_tokens`
tokens of its own to read; its system prompt lies in the exact local prefix cache. Upstream texts are
natural text that upstream agents are taken to have answered (`AgentWorker.replay`), each in its own
context: their KV is that of decoding.

Every round runs every method once on the same prompt. Plain transformers runs on the same thread and the
same ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from relay_cluster.bench.common import (
    BASE,
    TRANSFORMERS,
    Document,
    TimingRow,
    learners,
    mean_or_none,
    median,
    progress,
    rounds,
)
from relay_cluster.bench.texts import Tasks, TextPool
from relay_cluster.bench.timing import POSITIONS, timing_row
from transport.errors import ConfigError
from workers.agent import AgentWorker
from workers.compare import agreement
from workers.desk import Desk, load_for_desk, open_desk
from workers.fidelity import again, distance, reference_answer, reference_logits
from workers.messages import Distance, Request
from workers.methods.base import ModelProfile
from workers.model import LoadedModel
from workers.plain import PlainModel
from workers.segment import SlotValue
from workers.settings import DEFAULT_MODEL, WorkerSettings

WARM_PROMPTS = 3
"""Other prompts that a learning method (`kvcomm`) sees in full before it is measured."""

_SYSTEM = (
    "You are the last reader in a chain of colleagues. You read what they wrote, keep to the facts that they "
    "give, and answer the question at the end in plain words. Where they disagree, say so, and say whom you "
    "follow and why."
)
_UPSTREAM_SYSTEM = (
    "You are colleague number {n}. You work on one part of a larger task and write down what you find."
)
_UPSTREAM = "The task so far:\n{task}\n\n{earlier}\n\nWrite your part."
_QUESTION = "question"


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftSettings:
    """What is measured.

    Attributes:
        methods: as users write them, the base first.
        span_tokens: tokens of upstream text, one block of rows each.
        spans: into how many spans the text is split; 0 stands for 4 to 8 by its length.
        fresh_tokens: tokens outside spans and prefix.
        repeats: timed rounds, after a cold one.
        prompts: different prompts over which the rounds go, and fidelity is averaged.
        transformers: measure plain transformers as well.
    """

    methods: tuple[str, ...]
    model: str = DEFAULT_MODEL
    span_tokens: tuple[int, ...] = (512, 1024, 2048)
    spans: tuple[int, ...] = (1, 0)
    fresh_tokens: int = 64
    repeats: int = 5
    prompts: int = 3
    seed: int = 0
    threads: int = 0
    transformers: bool = True


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A prompt, and full prefill's answer to it with the logits before each of its tokens."""

    request: Request
    token_ids: tuple[int, ...]
    answer: tuple[int, ...]
    reference: torch.Tensor


@dataclass(slots=True)
class _Samples:
    """What was measured of one method on one shape."""

    cold_s: float
    ttft_s: list[float]
    distances: dict[int, Distance]
    resolved: str = ""
    prefix_tokens: int = 0


def composite_spans(span_tokens: int) -> int:
    """Spans of a composite: 4 up to 512 tokens, 6 at 1,024, 8 from 2,048 on."""
    return min(8, max(4, 4 + 2 * round(math.log2(span_tokens / 512))))


def run_ttft(settings: TtftSettings, tasks: Tasks) -> Document:
    """Measure every shape.

    Raises:
        ConfigError: too little text, or a prompt that the model's context does not hold.
    """
    worker = WorkerSettings(
        threads=settings.threads, cache_tokens=2 * max(settings.span_tokens) + 2048, request_timeout_s=1800
    )
    loaded, profile = load_for_desk(settings.model, worker)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    shapes = [
        (tokens, spans or composite_spans(tokens))
        for tokens in settings.span_tokens
        for spans in settings.spans
    ]
    warm = WARM_PROMPTS if learners(settings.methods) else 0
    # Anchors of a learning method lie in the arena too: a segment's size each, and once more in the pool.
    one = max(settings.span_tokens) // loaded.layout.block_tokens + 16
    blocks = (settings.prompts + 3 * warm) * one
    pool = TextPool(tasks, loaded.tokenizer, settings.seed)
    names = [*settings.methods, *([TRANSFORMERS] if settings.transformers else [])]
    steps = len(shapes) * (settings.prompts + warm + (settings.repeats + 1) * len(names))
    with (
        progress("ttft", steps) as advance,
        open_desk("bench", loaded, profile, arena_blocks=blocks, settings=worker) as desk,
    ):
        bench = _Bench(
            desk, settings, pool, PlainModel(settings.model) if settings.transformers else None, advance
        )
        rows = [row for tokens, spans in dict.fromkeys(shapes) for row in bench.shape(tokens, spans)]
    return Document("ttft", _facts(settings, tasks, loaded, profile), rows)


def _facts(
    settings: TtftSettings, tasks: Tasks, loaded: LoadedModel, profile: ModelProfile
) -> dict[str, Any]:
    return {
        **asdict(settings),
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "torch_threads": torch.get_num_threads(),
        "profile_measured": profile.measured,
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "spans_made_by": "replay: natural text taken as the answer of an upstream agent in its own context; "
        "its KV is that of decoding, by full prefill, in two passes instead of token by token",
        "inside_ttft": "admission, look-up, lease, local pin, rotation, rectification, fresh prefill, first "
        "logits",
        "prefix": "the role's system prompt is in the exact local prefix cache (prepare); full_prefill and "
        "transformers compute the whole prompt",
        "learning": f"kvcomm has seen {WARM_PROMPTS} other prompts of the same template in full",
        "speedup": "median of full_prefill / median, same rounds",
        "speedup_quoted": "the same against the faster of full_prefill and transformers of the same shape",
        "kl": f"against full_prefill, teacher-forced on its greedy answer, up to {POSITIONS} tokens",
    }


class _Bench:
    def __init__(
        self,
        desk: Desk,
        settings: TtftSettings,
        pool: TextPool,
        plain: PlainModel | None,
        advance: Callable[[str], None],
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._pool = pool
        self._plain = plain
        self._advance = advance

    @property
    def _agent(self) -> AgentWorker:
        return self._desk.agent

    def shape(self, span_tokens: int, spans: int) -> list[TimingRow]:
        """All rows of one shape of prompt."""
        settings = self._settings
        what = f"{span_tokens} tokens in {spans} span{'s' if spans > 1 else ''}"
        prompts: list[_Prompt] = []
        for number in range(settings.prompts):
            prompts.append(self._prompt(span_tokens, spans, number))
            self._advance(f"{what}: prompt {number + 1}")
        self._agent.prepare(prompts[0].request.system, prompts[0].request.prompt)
        names = [*settings.methods, *([TRANSFORMERS] if self._plain else [])]
        self._warm(what, span_tokens, spans)
        found = {name: _Samples(0.0, [], {}) for name in names}
        for turn in rounds(names, settings.repeats, settings.seed):
            which = turn.index % len(prompts)
            for name in turn.order:
                seconds = self._sample(name, prompts[which], which, found[name])
                if turn.cold:
                    found[name].cold_s = seconds
                else:
                    found[name].ttft_s.append(seconds)
                self._advance(f"{what}: {name}")
        self._desk.clear()
        return self._rows(span_tokens, spans, len(prompts[0].token_ids), found)

    def _warm(self, what: str, span_tokens: int, spans: int) -> None:
        """Let methods that learn see other prompts of the same template, computed in full."""
        names = learners(self._settings.methods)
        for number in range(WARM_PROMPTS if names else 0):
            request = self._request(span_tokens, spans, self._settings.prompts + number)
            for name in names:
                self._agent.score(replace(again(request, name), publish=True), ())
            self._advance(f"{what}: {', '.join(names)} learns")

    # -- prompts -------------------------------------------------------------------------------------------

    def _prompt(self, span_tokens: int, spans: int, number: int) -> _Prompt:
        request = self._request(span_tokens, spans, number)
        ids = self._agent.render(request).token_ids
        answer = reference_answer(self._agent, request, POSITIONS)
        return _Prompt(request, ids, answer, reference_logits(self._agent, request, answer))

    def _request(self, span_tokens: int, spans: int, number: int) -> Request:
        """A reader's request whose upstream segments are published."""
        text = self._pool.take(span_tokens + spans)
        cuts = [round(i * span_tokens / spans) for i in range(spans + 1)]
        values: dict[str, SlotValue] = {}
        earlier = SlotValue(text="(nothing yet)")
        at = 0
        for n in range(spans):
            size = cuts[n + 1] - cuts[n]
            # One token more than the span: the last token of an answer has no KV of its own.
            earlier = self._publish(n, number, earlier, text[at : at + size + 1])
            values[f"part{n + 1}"] = earlier
            at += size + 1
        return self._reader(values, number)

    def _publish(self, n: int, number: int, earlier: SlotValue, answer: tuple[int, ...]) -> SlotValue:
        request = Request(
            id=f"up-{len(answer)}-{number}-{n}",
            agent=f"upstream{n + 1}",
            system=_UPSTREAM_SYSTEM.format(n=n + 1),
            prompt=_UPSTREAM,
            values={"task": SlotValue(token_ids=self._pool.take(40)), "earlier": earlier},
            method=BASE,
        )
        reply = self._agent.replay(request, answer)
        if not any(p.slot is None for p in reply.published):
            raise ConfigError(f"a span of {len(answer)} tokens was not published: {'; '.join(reply.notes)}")
        kept = reply.output.kv_tokens
        assert reply.output.token_ids is not None  # an answer is made of ids
        return SlotValue(token_ids=reply.output.token_ids[:kept], kv_tokens=kept)

    def _reader(self, values: dict[str, SlotValue], number: int) -> Request:
        """The measured prompt; the question is as long as it takes to come to `fresh_tokens`."""
        template = "\n\n".join("{" + name + "}" for name in values) + "\n\n{" + _QUESTION + "}"
        prompt = f"What your colleagues wrote:\n{template}"

        def request(question: tuple[int, ...]) -> Request:
            return Request(
                id=f"reader-{number}",
                agent="reader",
                system=_SYSTEM,
                prompt=prompt,
                values={**values, _QUESTION: SlotValue(token_ids=question)},
                publish=False,
            )

        bare = self._agent.render(request(()))
        fixed = sum(len(s) for s in bare.spans[1:] if s.key is None)
        missing = self._settings.fresh_tokens - fixed
        if missing < 1:
            raise ConfigError(
                f"--fresh-tokens {self._settings.fresh_tokens} is too small: the template around "
                f"{len(values)} spans alone has {fixed} tokens. Take at least {fixed + 1}."
            )
        return request(self._pool.take(missing))

    # -- samples -------------------------------------------------------------------------------------------

    def _sample(self, name: str, prompt: _Prompt, which: int, found: _Samples) -> float:
        """One timed run; the first one of every prompt is compared with the reference as well."""
        if name == TRANSFORMERS:
            return self._sample_plain(prompt, which, found)
        scored = self._agent.score(again(prompt.request, name), prompt.answer[:-1])
        found.resolved, found.prefix_tokens = scored.resolved_method, scored.prefix_tokens
        if which not in found.distances:
            found.distances[which] = distance(self._agent, name, scored, prompt.reference)
        return scored.ttft_s

    def _sample_plain(self, prompt: _Prompt, which: int, found: _Samples) -> float:
        plain = self._plain
        assert plain is not None  # only then is it among the names
        seconds = self._agent.on_engine(lambda: plain.first_logits(prompt.token_ids)[0])
        if which not in found.distances:
            logits = self._agent.on_engine(lambda: plain.logits(prompt.token_ids, prompt.answer[:-1]))
            kl, same = self._agent.on_engine(lambda: agreement(prompt.reference, logits))
            found.distances[which] = Distance(TRANSFORMERS, kl, same, None, 0, 1.0, 1.0)
        return seconds

    # -- rows ----------------------------------------------------------------------------------------------

    def _rows(
        self, span_tokens: int, spans: int, prompt_tokens: int, found: dict[str, _Samples]
    ) -> list[TimingRow]:
        base_s = median(found[BASE].ttft_s)
        quoted = min((n for n in (BASE, TRANSFORMERS) if n in found), key=lambda n: median(found[n].ttft_s))
        prefix = prompt_tokens - span_tokens - self._settings.fresh_tokens
        return [
            timing_row(
                name,
                samples.resolved or name,
                list(samples.distances.values()),
                samples.ttft_s,
                base_s=base_s,
                quoted=(quoted, median(found[quoted].ttft_s)),
                flops=(
                    mean_or_none([d.flop_ratio_predicted for d in samples.distances.values()]),
                    mean_or_none([d.flop_ratio for d in samples.distances.values()]),
                ),
                reuse=mean_or_none([d.reuse for d in samples.distances.values()]),
                agent=None,
                span_tokens=span_tokens,
                spans=spans,
                fresh_tokens=self._settings.fresh_tokens,
                prefix_tokens=prefix,
                prompt_tokens=prompt_tokens,
                ttft_s_cold=samples.cold_s,
                stages=None,
            )
            for name, samples in found.items()
        ]
