"""How much sooner the agents of langgraph_three_agents.py begin to answer because their prompts are relayed.

    python examples/measure_langgraph.py --base-url http://127.0.0.1:8000/v1 --data gsm8k_test.jsonl

The program runs as it is, streamed. Every round has a document of its own and runs the program on it once in
each mode, in changing order: `auto` (nothing but the URL says that there is relay), `full_prefill` (texts are
found, all is computed: the answers must be those of `off`) and `off`. The first round warms up and is not
counted.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_openai import ChatOpenAI
from langgraph_three_agents import AGENTS, build

MODES: dict[str, dict[str, Any] | None] = {
    "auto": None,
    "full_prefill": {"relay": {"reuse": "full_prefill"}},
    "off": {"relay": {"enabled": False}},
}


ORDERS = (("auto", "full_prefill", "off"), ("off", "auto", "full_prefill"), ("auto", "off", "full_prefill"))
"""`auto` before `full_prefill`, which leaves the document behind for it; `off` leaves nothing."""


class FirstTokens(BaseCallbackHandler):
    """Seconds from each call of the model to its first text."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0
        self._waiting = False

    def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:
        self._begin, self._waiting = time.perf_counter(), True

    def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
        if self._waiting and token:
            self.seconds.append(time.perf_counter() - self._begin)
            self._waiting = False


def documents(data: Path, chars: int, count: int) -> list[str]:
    """Rows of a data file one after another, in an order of chance, none in two documents."""
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines() if line.strip()]
    random.Random(0).shuffle(rows)
    found: list[str] = []
    parts: list[str] = []
    for row in rows:
        parts.append(f"{row['question']} {row['answer']}")
        if sum(map(len, parts)) >= chars:
            found.append("\n\n".join(parts))
            parts = []
            if len(found) == count:
                return found
    raise SystemExit(f"{data} has text for {len(found)} documents, and {count} are needed")


def run(options: argparse.Namespace, mode: str, text: str) -> tuple[list[float], list[str], list[int]]:
    """(seconds to first token, texts, prompt tokens) of the three agents."""
    first = FirstTokens()
    model = ChatOpenAI(
        base_url=options.base_url,
        api_key=options.api_key,
        model=options.model,
        max_tokens=options.max_tokens,
        temperature=0,
        seed=1,
        streaming=True,
        stream_usage=True,
        callbacks=[first],
        extra_body=MODES[mode],
    )
    notes = build(model).invoke({"task": text})
    return (
        first.seconds,
        [notes[agent].text for agent in AGENTS],
        [(notes[agent].usage_metadata or {}).get("input_tokens", 0) for agent in AGENTS],
    )


def main() -> None:
    """Measure, print a table, and write JSON where it was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="of the service [%(default)s]")
    parser.add_argument("--api-key", default="none", help="any text where the service asks for no key")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="[%(default)s]")
    parser.add_argument("--data", type=Path, required=True, help="rows with question and answer, as GSM8K's")
    parser.add_argument("--chars", type=int, default=2400, help="of a document, at least [%(default)s]")
    parser.add_argument("--max-tokens", type=int, default=64, help="of every answer [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="[%(default)s]")
    parser.add_argument(
        "--seconds", type=float, default=600, help="start no round after so many [%(default)s]"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    seconds: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    tokens: list[list[int]] = []
    same = rounds = 0
    end = time.monotonic() + options.seconds
    for number, text in enumerate(documents(options.data, options.chars, options.rounds + 1)):
        found = {mode: run(options, mode, text) for mode in ORDERS[number % len(ORDERS)]}
        if not number:
            continue
        rounds += 1
        for mode, (ttfts, _, prompt) in found.items():
            seconds[mode].append(ttfts)
            tokens.append(prompt)
        same += found["full_prefill"][1] == found["off"][1]
        print(
            f"round {number}",
            {mode: [round(s, 3) for s in one[0]] for mode, one in found.items()},
            flush=True,
        )
        if time.monotonic() > end:
            break
    rows: list[dict[str, Any]] = []
    for at, agent in enumerate(AGENTS):
        off = statistics.median(ttfts[at] for ttfts in seconds["off"])
        for mode in MODES:
            median = statistics.median(ttfts[at] for ttfts in seconds[mode])
            rows.append(
                {"agent": agent, "mode": mode, "ttft_s_median": median, "off_over_this": off / median}
            )
            print(f"{agent:8} {mode:13} {1e3 * median:7.0f} ms to first token, {off / median:5.2f}x of off")
    prompts = [round(statistics.mean(one[at] for one in tokens)) for at in range(len(AGENTS))]
    print(f"prompt tokens {prompts}; full_prefill said what off said in {same} of {rounds} rounds")
    if options.json:
        settings = {k: getattr(options, k) for k in ("model", "chars", "max_tokens")}
        document = {
            "schema": "relay.example.langgraph/1",
            "settings": {
                **settings,
                "rounds": rounds,
                "data": options.data.name,
                "prompt_tokens_mean": prompts,
            },
            "full_prefill_equals_off": same,
            "rows": rows,
            "ttft_s": seconds,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
