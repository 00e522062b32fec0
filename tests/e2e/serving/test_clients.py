"""Programs of agent frameworks, as they are in examples/, against a live service. The frameworks are in the
extra `clients`, which `make test-clients` installs."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest

from tests.e2e.serving.live import Live
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[3] / "examples"
TOKENS = 14
FULL = {"relay": {"reuse": "full_prefill"}}
OFF = {"relay": {"enabled": False}}

Said = list[str]
Program = Callable[..., Said]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # langgraph looks for it there
    spec.loader.exec_module(module)
    return module


def langgraph(live: Live, task: str, extra_body: dict[str, Any] | None = None) -> Said:
    pytest.importorskip("langgraph", reason="needs the extra `clients`: make test-clients")
    pytest.importorskip("langchain_openai", reason="needs the extra `clients`: make test-clients")
    from langchain_openai import ChatOpenAI

    module = example("langgraph_three_agents")
    url, limits = f"{live.url}/v1", {"max_tokens": TOKENS, "temperature": 0, "seed": 7, "max_retries": 0}
    model = ChatOpenAI(base_url=url, api_key="sk-red", model=DEFAULT_MODEL, extra_body=extra_body, **limits)
    notes = module.build(model).invoke({"task": task})
    return [notes[name].text for name in module.AGENTS]


def agent_framework(live: Live, task: str, extra_body: dict[str, Any] | None = None) -> Said:
    pytest.importorskip("agent_framework", reason="needs the extra `clients`: make test-clients")
    from agent_framework.openai import OpenAIChatCompletionClient

    module = example("agent_framework_three_agents")
    options: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "seed": 7}
    if extra_body:
        options["extra_body"] = extra_body

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="sk-red") as connection:
            client = OpenAIChatCompletionClient(DEFAULT_MODEL, async_client=connection)
            return await module.run(module.build(client, **options), task)

    said = asyncio.run(run())
    return [said[name].text for name in module.AGENTS]


PROGRAMS = [langgraph, agent_framework]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_framework_is_relayed_by_its_url_alone(live: Live, program: Program) -> None:
    trains = "Two trains are 300 km apart; one does 80 km/h and the other 70. When do they meet?"
    task = f"{trains} ({program.__name__})"
    live.recorder.reports.clear()
    said = program(live, task)
    reports = live.recorder.reports
    assert len(said) == len(reports) == 3
    assert all(said)
    assert [report["fallbacks"] for report in reports] == [[], [], []]
    planner, solver, judge = reports
    for report, earlier in ((solver, [planner]), (judge, [planner, solver])):
        found = {found["id"]: found["relayed"] for found in report["found"]}
        assert all(found[one["segment"]] for one in earlier), "each answer that it read was relayed"
        assert report["relayed_tokens"] > 0


@pytest.mark.parametrize("program", PROGRAMS)
def test_full_prefill_says_what_relay_off_says(live: Live, program: Program) -> None:
    task = f"A tank holds 240 litres and loses 15 an hour. When is it half empty? ({program.__name__})"
    live.recorder.reports.clear()
    full = program(live, task, FULL)
    assert [bool(report["found"]) for report in live.recorder.reports] == [False, True, True]
    off = program(live, task, OFF)
    assert full == off
    assert all(full)
    assert [report["relayed_tokens"] for report in live.recorder.reports] == [0] * 6
