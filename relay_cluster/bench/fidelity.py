"""`relay bench fidelity`: how far every method's answers are from full prefill's.

Prompts come from chains whose spans are really decoded (`cases.py`). Full prefill answers each greedily;
every method is teacher-forced on that answer (KL, top-1), then answers freely itself (exact prefix, final
number). Nothing here is timed, so free-running answers of several prompts share their steps, in batches
that do not
depend on timing: the same seed gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from relay_cluster.bench.cases import Answers, Case, Sample, decode_cases, make_cases, publish_case
from relay_cluster.bench.common import (
    BASE,
    Document,
    FidelityRow,
    common_prefix,
    learners,
    mean,
    mean_or_none,
    median,
    progress,
    quantile,
    split_method,
)
from relay_cluster.bench.texts import Task, Tasks, final_number
from transport.settings import WireFormat
from workers.agent import AgentWorker
from workers.desk import Desk, load_for_desk, open_desk
from workers.fidelity import again, distance, reference_logits
from workers.messages import Distance, Reply
from workers.methods import parse_reuse
from workers.settings import DEFAULT_MODEL, SamplingSettings, WorkerSettings

POSITIONS = 64
"""Teacher-forced positions, and tokens of a free-running answer."""
HEAD = 32
ANSWER_TOKENS = 160
"""Room for the final number of a maths answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelitySettings:
    """What is measured.

    Attributes:
        methods: as users write them, the base first.
        samples: prompts.
        span_tokens: longest decoded answer.
        heal: add heal=always to every method that reuses.
        greedy: let every method answer freely.
        answers: judge the final numbers of maths prompts as well; slow.
        batch: requests that are decoded together.
        cases_cache: folder for decoded answers; None: decode them anew.
        wire: format in which segments travel.
    """

    methods: tuple[str, ...]
    model: str = DEFAULT_MODEL
    samples: int = 64
    span_tokens: int = 128
    heal: bool = False
    greedy: bool = True
    answers: bool = False
    batch: int = 8
    seed: int = 0
    threads: int = 0
    cases_cache: Path | None = None
    wire: WireFormat = "raw"


@dataclass(frozen=True, slots=True)
class Judged:
    """One method on one prompt.

    Attributes:
        resolved: the method with every parameter; heal: its healing mode.
        greedy_prefix: tokens up to the first difference of the free-running answers, POSITIONS when none.
        agrees, right: of the final number; None where it was not asked for.
    """

    kind: str
    resolved: str
    heal: str
    distance: Distance
    greedy_prefix: int | None
    agrees: bool | None
    right: bool | None


def run_fidelity(settings: FidelitySettings, tasks: Tasks) -> Document:
    """Decode the chains, measure, sum up.

    Raises:
        ConfigError: too few tasks, or a case file that is not ours.
    """
    worker = WorkerSettings(
        threads=settings.threads,
        max_sequences=max(16, settings.batch),
        cache_tokens=max(16_384, settings.batch * 2048),
        request_timeout_s=3600,
    )
    cases = make_cases(tasks, settings.samples, settings.seed)
    loaded, profile = load_for_desk(settings.model, worker, wire=settings.wire)
    methods = healed(settings.methods) if settings.heal else settings.methods
    # A group's segments are held together: at most nine for a prompt, each with its last block partly filled.
    per_span = loaded.layout.blocks_for(max(settings.span_tokens, 512))
    with (
        open_desk(
            "fidelity", loaded, profile, arena_blocks=10 * settings.batch * per_span, settings=worker
        ) as desk,
        progress("fidelity", len(cases) + settings.samples * len(methods)) as advance,
    ):
        answers = Answers.open(
            settings.cases_cache,
            space=loaded.space,
            data=tasks.digest,
            seed=settings.seed,
            max_tokens=settings.span_tokens,
        )
        decode_cases(
            desk.agent,
            cases,
            answers,
            max_tokens=settings.span_tokens,
            batch=settings.batch,
            advance=advance,
        )
        judged = _Bench(desk, settings, methods, advance).run(cases, answers)
    rows = [
        row
        for kind in ("single", "composite", "all")
        for method in methods
        if (row := _row(method, kind, judged[method]))
    ]
    return Document("fidelity", _facts(settings, tasks, str(loaded.device), cases, methods), rows)


def healed(methods: Sequence[str]) -> tuple[str, ...]:
    """The same methods with heal=always, where there is anything to heal."""
    out: list[str] = []
    for text in methods:
        if parse_reuse(text).method.exact:
            out.append(text)
        else:
            has_items = "=" in text or (text.startswith("auto:"))
            out.append(f"{text}{'+' if has_items else ':'}heal=always")
    return tuple(dict.fromkeys(out))


def _facts(
    settings: FidelitySettings, tasks: Tasks, device: str, cases: Sequence[Case], methods: Sequence[str]
) -> dict[str, Any]:
    own = asdict(settings)
    del own["cases_cache"]  # where it lies says nothing about what was measured
    return {
        **own,
        "methods": list(methods),
        "device": device,
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "chains": len(cases),
        "spans_made_by": "decoded greedily by full_prefill, then replayed into the arena",
        "single": "one relayed span, the task computed; composite: the task and three to seven answers",
        "kl": f"against full_prefill, teacher-forced on its greedy answer, up to {POSITIONS} tokens; every "
        "prompt counts alike",
        "greedy_prefix": f"a whole answer that is the same counts as {POSITIONS}",
        "learning": "kvcomm learns from every prompt after it was measured; its first prompts are computed",
    }


class _Bench:
    def __init__(
        self, desk: Desk, settings: FidelitySettings, methods: Sequence[str], advance: Callable[[str], None]
    ) -> None:
        self._desk = desk
        self._settings = settings
        self._methods = methods
        self._advance = advance

    @property
    def _agent(self) -> AgentWorker:
        return self._desk.agent

    def run(self, cases: Sequence[Case], answers: Answers) -> dict[str, list[Judged]]:
        """Method -> one entry for every prompt."""
        judged: dict[str, list[Judged]] = {method: [] for method in self._methods}
        for group in _groups(cases, self._settings.batch):
            samples = [s for case in group for s in publish_case(self._agent, case, answers.ids[case.id])]
            self._group(samples, judged)
            for method in learners(self._methods):
                for sample in samples:
                    self._agent.score(replace(again(sample.request, method), publish=True), ())
            self._desk.clear()
        return judged

    def _group(self, samples: Sequence[Sample], judged: dict[str, list[Judged]]) -> None:
        base = self._answer(samples, BASE, at_least=POSITIONS)
        forced = [reply.token_ids[:POSITIONS] for reply in base]
        references = [
            reference_logits(self._agent, s.request, ids) for s, ids in zip(samples, forced, strict=True)
        ]
        for method in self._methods:
            free = base if method == BASE or not self._settings.greedy else self._answer(samples, method)
            for sample, ids, reference, full, own in zip(
                samples, forced, references, base, free, strict=True
            ):
                scored = self._agent.score(again(sample.request, method), ids[:-1])
                judged[method].append(
                    self._judge(
                        sample,
                        method,
                        distance(self._agent, method, scored, reference),
                        full,
                        own if self._settings.greedy else None,
                    )
                )
                self._advance(f"{method}: {sample.id}")

    def _answer(self, samples: Sequence[Sample], method: str, *, at_least: int = 0) -> list[Reply]:
        """Free-running answers, batched."""
        replies: list[Reply] = []
        for at in range(0, len(samples), self._settings.batch):
            part = samples[at : at + self._settings.batch]
            replies += self._agent.generate_all(
                again(s.request, method, sampling=SamplingSettings(max_new_tokens=self._length(s, at_least)))
                for s in part
            )
        return replies

    def _length(self, sample: Sample, at_least: int) -> int:
        return max(ANSWER_TOKENS if self._settings.answers and sample.answers else POSITIONS, at_least)

    def _judge(self, sample: Sample, method: str, found: Distance, full: Reply, own: Reply | None) -> Judged:
        reuse = parse_reuse(method, self._agent.profile)
        prefix = agrees = right = None
        if own is not None:
            ours, theirs = own.token_ids[:POSITIONS], full.token_ids[:POSITIONS]
            prefix = POSITIONS if ours == theirs else common_prefix(ours, theirs)
            if self._settings.answers and sample.answers:
                agrees, right = _final(own.text, full.text, sample.task)
        return Judged(sample.kind, reuse.text, str(reuse.heal), found, prefix, agrees, right)


def _final(own: str, full: str, task: Task) -> tuple[bool, bool | None]:
    """(same final number as full prefill, the right one)."""
    number = final_number(own)
    return number == final_number(full), None if task.gold is None else number == task.gold


def _groups(cases: Sequence[Case], batch: int) -> list[list[Case]]:
    """Runs of cases with at most `batch` prompts, at least one case each."""
    groups: list[list[Case]] = []
    count = 0
    for case in cases:
        if not groups or count + case.samples > batch:
            groups.append([])
            count = 0
        groups[-1].append(case)
        count += case.samples
    return groups


def _row(asked: str, kind: str, judged: Sequence[Judged]) -> FidelityRow | None:
    """A method over the prompts of a kind; None when there are none."""
    chosen = [j for j in judged if kind in ("all", j.kind)]
    if not chosen:
        return None
    method, params = split_method(asked, chosen[0].resolved)
    first = [j.distance.kl[0] for j in chosen]
    head = [mean(j.distance.kl[:HEAD]) for j in chosen]
    whole = [mean(j.distance.kl) for j in chosen]
    tails = [mean(j.distance.kl[HEAD:]) if len(j.distance.kl) > HEAD else None for j in chosen]
    prefixes = [j.greedy_prefix for j in chosen if j.greedy_prefix is not None]
    return FidelityRow(
        method=method,
        params=params,
        heal=chosen[0].heal,
        spans=kind,
        samples=len(chosen),
        kl_first_mean=mean(first),
        kl_first_p90=quantile(first, 0.9),
        kl_first_worst=max(first),
        kl32_mean=mean(head),
        kl32_p90=quantile(head, 0.9),
        kl32_worst=max(head),
        kl64_mean=mean(whole),
        kl64_p90=quantile(whole, 0.9),
        kl64_worst=max(whole),
        kl64_tail_mean=mean_or_none(tails),
        top1_32=mean([mean(j.distance.same[:HEAD]) for j in chosen]),
        top1_64=mean([mean(j.distance.same) for j in chosen]),
        first_token_mismatch=mean([not j.distance.same[0] for j in chosen]),
        greedy_prefix_median=median(prefixes) if prefixes else None,
        answer_agreement=mean_or_none([j.agrees for j in chosen]),
        accuracy=mean_or_none([j.right for j in chosen]),
        reuse=mean_or_none([j.distance.reuse for j in chosen]),
    )
