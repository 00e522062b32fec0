"""`relay bench decode`: how fast a worker decodes beside `transformers.generate` on the same weights.

Every round decodes the same prompts once with each, in alternating order: ours through the worker's own
calls, with everything recorded that later agents need (keys and values, checkpoints, context mass); theirs
with their own cache, prefill taken off. Both must go on for the full number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from relay_cluster.bench.common import BASE, Document, median, progress
from relay_cluster.bench.decode_rows import DecodeRow
from relay_cluster.bench.texts import Tasks, TextPool
from workers.desk import Desk, load_for_desk, open_desk
from workers.messages import Request
from workers.plain import PlainModel
from workers.segment import SlotValue
from workers.settings import DEFAULT_MODEL, SamplingSettings, WorkerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """What is measured.

    Attributes:
        batches: numbers of requests that decode together.
        prompt_tokens: of each, its template not counted; new_tokens: decoded by each.
        repeats: timed rounds after a cold one.
    """

    model: str = DEFAULT_MODEL
    batches: tuple[int, ...] = (1, 8)
    prompt_tokens: int = 128
    new_tokens: int = 64
    repeats: int = 5
    seed: int = 0
    threads: int = 0


def run_decode(settings: DecodeSettings, tasks: Tasks) -> Document:
    """Run all rounds."""
    room = max(settings.batches) * (settings.prompt_tokens + settings.new_tokens + 256)
    worker = WorkerSettings(
        threads=settings.threads, cache_tokens=room, max_sequences=max(16, *settings.batches)
    )
    loaded, profile = load_for_desk(settings.model, worker)
    pool = TextPool(tasks, loaded.tokenizer, settings.seed)
    blocks = loaded.layout.blocks_for(settings.prompt_tokens + settings.new_tokens)
    with (
        progress("decode", len(settings.batches) * (settings.repeats + 1)) as advance,
        open_desk(
            "decode", loaded, profile, arena_blocks=4 * max(settings.batches) * blocks, settings=worker
        ) as desk,
    ):
        plain = PlainModel(settings.model)
        rows = [_measure(desk, plain, pool, settings, batch, advance) for batch in settings.batches]
    facts = {
        **asdict(settings),
        "device": str(loaded.device),
        "data": list(tasks.sources),
        "data_digest": tasks.digest,
        "capture": "keys, values, checkpoints and context mass of every token, as for publishing",
        "tokens_per_s": "of the whole batch, from its first token to its last",
    }
    return Document("decode", facts, rows)


def _measure(
    desk: Desk,
    plain: PlainModel,
    pool: TextPool,
    settings: DecodeSettings,
    batch: int,
    advance: Callable[[str], None],
) -> DecodeRow:
    ours: list[float] = []
    theirs: list[float] = []
    tokens = 0
    for number in range(settings.repeats + 1):
        texts = [pool.take(settings.prompt_tokens) for _ in range(batch)]
        requests = [_request(settings, f"{batch}-{number}-{i}", text) for i, text in enumerate(texts)]
        prompts = [desk.agent.render(request).token_ids for request in requests]
        tokens = len(prompts[0])
        runs = [lambda r=requests: _ours(desk, r), lambda p=prompts: _plain(plain, p, settings.new_tokens)]
        rates: dict[int, float] = {}
        for which in (0, 1) if number % 2 else (1, 0):
            rates[which] = runs[which]()
        desk.clear()
        if number:
            ours.append(rates[0])
            theirs.append(rates[1])
        advance(f"batch {batch}")
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return DecodeRow(
        batch=batch,
        prompt_tokens=tokens,
        new_tokens=settings.new_tokens,
        samples=len(ratios),
        tokens_per_s=median(ours),
        plain_tokens_per_s=median(theirs),
        ratio=median(ratios),
        ratio_min=min(ratios),
        ratio_max=max(ratios),
    )


def _request(settings: DecodeSettings, name: str, text: tuple[int, ...]) -> Request:
    return Request(
        id=f"decode-{name}",
        agent="writer",
        prompt="{text}",
        values={"text": SlotValue(token_ids=text)},
        method=BASE,
        sampling=SamplingSettings(max_new_tokens=settings.new_tokens, min_new_tokens=settings.new_tokens),
    )


def _ours(desk: Desk, requests: Sequence[Request]) -> float:
    """Tokens per second."""
    replies = desk.agent.generate_all(requests)
    return sum(len(reply.token_ids) - 1 for reply in replies) / max(reply.decode_s for reply in replies)


def _plain(plain: PlainModel, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
    """Tokens per second, prefill and first token taken off."""
    first = plain.generate(prompts, 1)
    return len(prompts) * (new_tokens - 1) / (plain.generate(prompts, new_tokens) - first)
