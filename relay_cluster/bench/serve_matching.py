"""How long it takes to find remembered texts in a prompt, measured on what the service does it with."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Callable, Sequence

from relay_cluster.bench.common import quantile
from relay_cluster.bench.serve_rows import ServeRow
from relay_cluster.serving.memory import ChatText, Memory
from relay_cluster.serving.settings import ServeSettings
from transport.errors import RelayError
from workers.segment import SlotValue

_ANSWER_CHARS = 600
_IN_PROMPT = 10
_INPUTS = 100
"""Earlier user messages, in which shared parts are looked for."""


def measure_matching(*, remembered: int, chars: int, rounds: int, seed: int) -> list[ServeRow]:
    """Prompts of `chars` characters, each with ten of `remembered` answers in it. Seconds are processor time:
    one thread computes and waits for nothing, so on a core of its own that is all the time that passes.

    Raises:
        RelayError: one of them was not found: there is nothing to time then.
    """
    chance = random.Random(f"matching-{seed}")
    words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 9))) for _ in range(3000)]

    def text(size: int) -> str:
        return " ".join(chance.choices(words, k=size // 4 + 1))[:size]

    settings = ServeSettings()
    memory = Memory(
        max_texts=remembered + 2 * _INPUTS,
        max_bytes=settings.remember_bytes,
        min_input_chars=settings.min_input_chars,
        common_chars=settings.common_chars,
    )
    answers = [text(_ANSWER_CHARS) + "." for _ in range(remembered)]
    for answer in answers:
        memory.keep_answer(answer, SlotValue(None, tuple(range(150)), 149))
    for _ in range(_INPUTS):
        memory.keep_inputs(memory.rewrite([ChatText("user", text(8000))]))
    gap = max(0, chars // _IN_PROMPT - _ANSWER_CHARS - 8)
    prompts = [
        "".join(f"{text(gap)}\n\n{answer}\n\n" for answer in chance.sample(answers, _IN_PROMPT))
        for _ in range(rounds)
    ]

    def rewrite(prompt: str) -> int:
        return len(memory.rewrite([ChatText("user", prompt)]).found)

    return [
        _timed("find", lambda prompt: len(memory.index.find(prompt)), prompts),
        _timed("rewrite", rewrite, prompts),
    ]


def _timed(what: str, call: Callable[[str], int], prompts: Sequence[str]) -> ServeRow:
    seconds: list[float] = []
    call(prompts[0])  # tables of powers are made at first use
    for prompt in prompts:
        begin = time.thread_time()
        found = call(prompt)
        seconds.append(time.thread_time() - begin)
        if found < _IN_PROMPT:
            raise RelayError(f"{found} of {_IN_PROMPT} texts were found: a fault of the matching")
    return ServeRow(
        part="matching",
        what=what,
        requests=len(prompts),
        seconds_p50=quantile(seconds, 0.5),
        seconds_p99=quantile(seconds, 0.99),
    )
