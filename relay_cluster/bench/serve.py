"""`relay bench serve`: pipelines of three agents over HTTP, relay on beside relay off on one service.

    document -> planner -> solver (document, plan) -> judge (document, plan, solution)

A round runs as many pipelines at once as its concurrency says, first with relay and then without, or the
other way about in every second round, on the same documents: a request with relay off finds nothing and
leaves nothing behind, so the order makes no difference to what the other one finds. No document is in two
rounds.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from relay_cluster.bench.common import Advance, Document, mean, progress, quantile
from relay_cluster.bench.serve_client import Answer, ServiceClient
from relay_cluster.bench.serve_matching import measure_matching
from relay_cluster.bench.serve_rows import ServeRow
from relay_cluster.bench.texts import Tasks

PARTS = ("overhead", "next", "pipelines", "matching")
AGENTS = ("planner", "solver", "judge")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchSettings:
    """What is measured.

    Attributes:
        parts: of PARTS.
        concurrency: numbers of pipelines at a time; pipelines: for each of them, with relay and without.
        seconds: of one concurrency, and of the pairs; no round begins after them, so there may be fewer.
        document_chars: of the text that all three agents of a pipeline get.
        answer_tokens: most tokens of an answer.
        overhead_requests: warm requests of one token, one after another.
        next_pairs: planner and solver, one after the other, with a hint of the second and without; the
            solver's answer is one token.
        remembered: texts of the matching; matching_chars: of its prompts; matching_rounds: prompts.
        timeout_s: of a request.
    """

    parts: tuple[str, ...] = PARTS
    concurrency: tuple[int, ...] = (1, 4, 8)
    pipelines: int = 20
    seconds: float = 1800.0
    document_chars: int = 2400
    answer_tokens: int = 64
    overhead_requests: int = 200
    next_pairs: int = 8
    remembered: int = 10_000
    matching_chars: int = 32 << 10
    matching_rounds: int = 200
    timeout_s: float = 300.0
    seed: int = 0


class Documents:
    """Texts of the tasks in an order of chance. When all are used, they come again with other numbers, so
    that two documents have little in common that is long enough to be relayed."""

    def __init__(self, tasks: Tasks, seed: int) -> None:
        self._chance = random.Random(f"documents-{seed}")
        self._texts = [f"{task.text} {task.answer}".strip() for task in tasks.rows]
        self._left: list[str] = []
        self._passes = 0

    def take(self, chars: int) -> str:
        """The next document, about so long: whole tasks."""
        parts: list[str] = []
        while sum(map(len, parts)) < chars:
            if not self._left:
                self._left = self._chance.sample(self._texts, len(self._texts))
                self._passes += 1
            text = self._left.pop()
            parts.append(text if self._passes == 1 else _NUMBER.sub(self._other_number, text))
        return "\n\n".join(parts)

    def _other_number(self, found: re.Match[str]) -> str:
        return str(self._chance.randrange(1, 10 ** len(found[0]) + 1))


@dataclass(slots=True)
class _Tally:
    """What one mode did at one concurrency. seconds: while its rounds ran."""

    answers: dict[str, list[Answer]] = field(default_factory=lambda: {agent: [] for agent in AGENTS})
    errors: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AGENTS, 0))
    seconds: float = 0.0


def run_serve(settings: ServeBenchSettings, tasks: Tasks, client: ServiceClient, facts: Any) -> Document:
    """Measure a service that answers.

    Args:
        facts: about the service, for the document's settings.
    """
    documents = Documents(tasks, settings.seed)
    load = 2 * settings.pipelines * len(settings.concurrency) if "pipelines" in settings.parts else 0
    total = load + len(set(settings.parts) - {"pipelines"}) + 1
    rows: list[ServeRow] = []
    interrupted = False
    with progress("serve", total) as advance:
        try:
            asyncio.run(_requests(settings, documents, client, rows, advance))
        except KeyboardInterrupt:
            if not rows:
                raise
            interrupted = True  # minutes of measuring are not to be lost
        if "matching" in settings.parts and not interrupted:
            rows += measure_matching(
                remembered=settings.remembered,
                chars=settings.matching_chars,
                rounds=settings.matching_rounds,
                seed=settings.seed,
            )
            advance("matching")
    values = {
        **asdict(settings),
        **facts,
        "interrupted": interrupted,
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
    }
    return Document("serve", values, rows)


async def _requests(
    settings: ServeBenchSettings,
    documents: Documents,
    client: ServiceClient,
    rows: list[ServeRow],
    advance: Advance,
) -> None:
    """rows: gets those of every part that has ended."""
    async with client:
        # Nobody's first request: what is loaded or compiled at first use is not the service's speed.
        for relay in (True, False):
            await _pipeline(client, documents.take(settings.document_chars), relay, 8, _Tally())
        advance("warm")
        if "overhead" in settings.parts:
            rows += await _overhead(settings, client)
            advance("overhead")
        if "next" in settings.parts:
            rows += await _next(settings, documents, client)
            advance("next")
        for concurrency in settings.concurrency if "pipelines" in settings.parts else ():
            rows += await _load(settings, documents, client, concurrency, advance)


async def _load(
    settings: ServeBenchSettings,
    documents: Documents,
    client: ServiceClient,
    concurrency: int,
    advance: Advance,
) -> list[ServeRow]:
    tallies = {True: _Tally(), False: _Tally()}
    left, number = settings.pipelines, 0
    end = time.monotonic() + settings.seconds
    while left and (number == 0 or time.monotonic() < end):
        texts = [documents.take(settings.document_chars) for _ in range(min(concurrency, left))]
        left -= len(texts)
        for relay in (True, False) if number % 2 == 0 else (False, True):
            begin = time.perf_counter()
            tally = tallies[relay]
            await asyncio.gather(
                *(_pipeline(client, text, relay, settings.answer_tokens, tally) for text in texts)
            )
            tally.seconds += time.perf_counter() - begin
            for _ in texts:
                advance(f"{concurrency} at once, relay {'on' if relay else 'off'}")
        number += 1
    return [_row(concurrency, relay, agent, tallies) for relay in (True, False) for agent in ("all", *AGENTS)]


async def _pipeline(client: ServiceClient, text: str, relay: bool, tokens: int, tally: _Tally) -> None:
    """One program, as an agent framework would run it; it ends at the first error."""
    said: list[str] = []
    for agent in AGENTS:
        answer = await client.ask(*_prompt(agent, text, said), tokens, relay=relay)
        if answer is None:
            tally.errors[agent] += 1
            return
        tally.answers[agent].append(answer)
        said.append(answer.text)


def _prompt(agent: str, text: str, said: Sequence[str]) -> tuple[str, str]:
    """(system message, user message)"""
    if agent == "planner":
        return "You make short plans.", f"{text}\n\nMake a plan in a few steps."
    if agent == "solver":
        return "You solve problems.", f"{text}\n\nPlan:\n\n{said[0]}\n\nFollow the plan."
    user = f"Task:\n\n{text}\n\nPlan:\n\n{said[0]}\n\nAnswer:\n\n{said[1]}\n\nIs the answer right?"
    return "You judge answers.", user


def _row(concurrency: int, relay: bool, agent: str, tallies: dict[bool, _Tally]) -> ServeRow:
    agents = AGENTS if agent == "all" else (agent,)
    tally = tallies[relay]
    answers = [answer for one in agents for answer in tally.answers[one]]
    other = [answer.ttft_s for one in agents for answer in tallies[False].answers[one]]
    ttfts = [answer.ttft_s for answer in answers]
    whole = agent == "all" and answers and tally.seconds
    return ServeRow(
        part="pipelines",
        what=agent,
        concurrency=concurrency,
        relay=relay,
        requests=len(answers),
        errors=sum(tally.errors[one] for one in agents),
        throughput_rps=len(answers) / tally.seconds if whole else None,
        tokens_per_s=sum(a.answer_tokens for a in answers) / tally.seconds if whole else None,
        ttft_s_p50=_quantile(ttfts, 0.5),
        ttft_s_p95=_quantile(ttfts, 0.95),
        ttft_s_p99=_quantile(ttfts, 0.99),
        speedup=quantile(other, 0.5) / quantile(ttfts, 0.5) if ttfts and other else None,
        prompt_tokens=mean([a.prompt_tokens for a in answers]) if answers else None,
        cached_tokens=mean([a.cached_tokens for a in answers]) if answers else None,
    )


def _quantile(values: Sequence[float], q: float) -> float | None:
    return quantile(values, q) if values else None


async def _next(settings: ServeBenchSettings, documents: Documents, client: ServiceClient) -> list[ServeRow]:
    """The second of two agents, whose prompt is prepared while the first one writes, or not."""
    tallies = {True: _Tally(), False: _Tally()}
    end = time.monotonic() + settings.seconds
    for number in range(settings.next_pairs):
        if number and time.monotonic() > end:
            break
        for hinted in (True, False) if number % 2 == 0 else (False, True):
            await _pair(
                client, documents.take(settings.document_chars), settings.answer_tokens, hinted, tallies
            )
    other = [answer.ttft_s for answer in tallies[False].answers["solver"]]
    return [_next_row(hinted, tally, other) for hinted, tally in tallies.items()]


async def _pair(
    client: ServiceClient, text: str, tokens: int, hinted: bool, tallies: dict[bool, _Tally]
) -> None:
    mark = "\0"  # in no document
    system, user = _prompt("solver", text, [mark])
    before, behind = user.split(mark)
    content = [before, {"relay_slot": "this"}, behind]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    then = {"messages": messages, "max_tokens": 1} if hinted else None
    plan = await client.ask(*_prompt("planner", text, []), tokens, relay=True, then=then)
    answer = plan and await client.ask(*_prompt("solver", text, [plan.text]), 1, relay=True)
    if answer is None:
        tallies[hinted].errors["solver"] += 1
    else:
        tallies[hinted].answers["solver"].append(answer)


def _next_row(hinted: bool, tally: _Tally, other: Sequence[float]) -> ServeRow:
    answers = tally.answers["solver"]
    ttfts = [answer.ttft_s for answer in answers]
    return ServeRow(
        part="next",
        what="hint" if hinted else "no hint",
        concurrency=1,
        relay=True,
        requests=len(answers),
        errors=tally.errors["solver"],
        ttft_s_p50=_quantile(ttfts, 0.5),
        ttft_s_p95=_quantile(ttfts, 0.95),
        ttft_s_p99=_quantile(ttfts, 0.99),
        speedup=quantile(other, 0.5) / quantile(ttfts, 0.5) if ttfts and other else None,
        prompt_tokens=mean([a.prompt_tokens for a in answers]) if answers else None,
        cached_tokens=mean([a.cached_tokens for a in answers]) if answers else None,
        prepared_tokens=mean([a.prepared_tokens for a in answers]) if answers else None,
    )


async def _overhead(settings: ServeBenchSettings, client: ServiceClient) -> list[ServeRow]:
    """One short chat again and again: its prompt is in the prefix cache, so the worker has next to nothing to
    do."""
    found: dict[str, list[float]] = {"http": [], "service": []}
    errors = 0
    for _ in range(settings.overhead_requests):
        answer = await client.ask("Be brief.", "Hello", 1, relay=True)
        if answer is None:
            errors += 1
            continue
        found["http"].append(answer.ttft_s - answer.worker_ttft_s)
        found["service"].append(answer.service_ttft_s - answer.worker_ttft_s)
    return [
        ServeRow(
            part="overhead",
            what=what,
            requests=len(seconds),
            errors=errors,
            seconds_p50=_quantile(seconds, 0.5),
            seconds_p99=_quantile(seconds, 0.99),
        )
        for what, seconds in found.items()
    ]
