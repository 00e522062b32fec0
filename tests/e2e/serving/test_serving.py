"""The service with real clients: the openai package against uvicorn, two worker processes, the real model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.serving.live import Live, eventually
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUESTION = (
    "A farmer has 17 sheep and buys 5 more every week. After six weeks he sells half of his flock to a "
    "neighbour. How many sheep are left?"
)
TOKENS = 14
"""Of most answers: this model on this machine decodes about ten a second."""


def three_agents(client: openai.OpenAI, question: str, *, agents: int = 3, **options: Any) -> list[Any]:
    """A program as users have it: it knows nothing of relay. agents: only the first few of them."""

    def ask(system: str, user: str) -> Any:
        return client.chat.completions.create(
            model=DEFAULT_MODEL,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
            max_tokens=TOKENS,
            temperature=0,
            seed=7,
            **options,
        )

    plan = ask("You make plans.", question)
    said = plan.choices[0].message.content
    solution = ask("You solve problems.", f"{question}\n\nA plan:\n\n{said}\n\nSolve the problem.")
    solved = solution.choices[0].message.content
    if agents == 2:
        return [plan, solution]
    verdict = ask("You judge solutions.", f"Plan:\n\n{said}\n\nSolution:\n\n{solved}\n\nIs it right?")
    return [plan, solution, verdict]


def relay(answer: Any) -> dict[str, Any]:
    return answer.model_extra["relay"]


def test_an_unchanged_program_is_relayed(live: Live) -> None:
    plan, solution, verdict = three_agents(live.client(), QUESTION)
    assert relay(plan)["found"] == []
    ids = [relay(a)["segment"] for a in (plan, solution, verdict)]
    assert all(ids)
    found = [{f["id"]: f["relayed"] for f in relay(a)["found"]} for a in (solution, verdict)]
    assert found[0].get(ids[0]), "the plan, in the solver's prompt"
    assert len(found[0]) == 2, "and the question"
    assert found[1] == {ids[0]: True, ids[1]: True}
    for answer in (solution, verdict):
        details = answer.usage.prompt_tokens_details
        assert details.cached_tokens >= relay(answer)["relayed_tokens"] > 2 * (TOKENS - 4)
        assert relay(answer)["fallbacks"] == []
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    # Where: nobody else is at work, so the router may put them beside what they read.
    assert {relay(a)["worker"] for a in (plan, solution, verdict)} <= {"w0", "w1"}
    assert live.settled()


def test_full_prefill_says_the_same_as_with_relay_off(live: Live) -> None:
    question = QUESTION + " Say it briefly."
    client = live.client()
    full = three_agents(client, question, agents=2, extra_body={"relay": {"reuse": "full_prefill"}})
    off = three_agents(client, question, agents=2, extra_body={"relay": {"enabled": False}})
    assert [a.choices[0].message.content for a in full] == [a.choices[0].message.content for a in off]
    assert len(relay(full[1])["found"]) == 2, "ids were spliced, nothing was reused"
    assert [relay(a)["relayed_tokens"] for a in (*full, *off)] == [0] * 4
    assert [relay(a)["segment"] for a in off] == [None, None]


def test_tenants_never_meet(live: Live) -> None:
    question = QUESTION + " Whose sheep are they?"
    red = three_agents(live.client("sk-red"), question, agents=2)
    blue = three_agents(live.client("sk-blue"), question, agents=2)
    assert len(relay(red[1])["found"]) == 2
    assert relay(blue[0])["found"] == []
    assert relay(blue[0])["relayed_tokens"] == relay(blue[0])["prefix_tokens"] == 0
    assert blue[0].usage.prompt_tokens_details.cached_tokens == 0, "not even a prefix is shared"
    assert relay(blue[1])["relayed_tokens"] > 0, "with itself a tenant shares"


def test_streams_and_async_clients_get_the_same_text(live: Live) -> None:
    import asyncio

    ask: dict[str, Any] = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": "Count from one to ten: one, two, "}],
        "max_tokens": TOKENS,
        "temperature": 0.8,
        "seed": 3,
    }
    whole = live.client().chat.completions.create(**ask).choices[0].message.content
    stream = live.client().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert len(reasons) == 1
    assert chunks[-1].usage is not None
    assert len(chunks) >= chunks[-1].usage.completion_tokens, "tokens come one by one"

    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="sk-blue", max_retries=0) as client:
            one = client.chat.completions.create(**ask)
            two = client.chat.completions.create(**ask, stream=True)
            answer, pieces = await asyncio.gather(one, two)
            streamed = [c.choices[0].delta.content or "" async for c in pieces if c.choices]
            return [answer.choices[0].message.content or "", "".join(streamed)]

    assert asyncio.run(both()) == [whole, whole]


def test_stop_texts_end_an_answer_and_what_is_left_is_relayed(live: Live) -> None:
    client = live.client()
    messages: Any = [{"role": "user", "content": "Write a long story about a dog and its owner."}]
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "messages": messages, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**ask, max_tokens=24).choices[0].message.content
    assert whole
    stop = whole[-18:-10]
    at = whole.find(stop)
    for stream in (False, True):
        if stream:
            chunks = list(client.chat.completions.create(**ask, max_tokens=24, stop=[stop], stream=True))
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            answer = client.chat.completions.create(**ask, max_tokens=24, stop=[stop])
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (whole[:at], "stop")
    follow = [*messages, {"role": "assistant", "content": whole[:at]}, {"role": "user", "content": "Go on."}]
    next_one = client.chat.completions.create(model=DEFAULT_MODEL, messages=follow, max_tokens=2)
    assert [f["kind"] for f in relay(next_one)["found"]] == ["response"]
    assert relay(next_one)["relayed_tokens"] > 5


def test_logprobs_and_plain_completions(live: Live) -> None:
    client = live.client()
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(
        **ask, messages=[{"role": "user", "content": "Hello!"}], logprobs=True, top_logprobs=3
    )
    scored = answer.choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    assert len(scored.content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for row in scored.content:
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 3
        assert (row.top_logprobs[0].token, row.top_logprobs[0].logprob) == (row.token, row.logprob), "greedy"
    text = client.completions.create(**ask, prompt="The capital of France is", logprobs=2)
    assert "Paris" in text.choices[0].text
    assert text.choices[0].logprobs is not None
    assert "".join(text.choices[0].logprobs.tokens or []) == text.choices[0].text
    streamed = client.completions.create(**ask, prompt="The capital of France is", stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text.choices[0].text


def said_by_the_example(number: int, live: Live, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program of the page prints."""
    text = (Path(__file__).parents[3] / "docs" / "service.md").read_text("utf-8")
    example = re.findall(r"```python\n(from openai.*?)```", text, flags=re.DOTALL)[number]
    changes = {
        "http://127.0.0.1:8000": live.url,
        '"none"': '"sk-blue"',
        "max_tokens=64": f"max_tokens={TOKENS}",
    }
    for written, ours in changes.items():
        assert written in example
        example = example.replace(written, ours)
    exec(compile(example, "service.md", "exec"), {})
    return capsys.readouterr().out


@pytest.mark.long
def test_the_example_of_a_hint_works(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by_the_example(1, live, capsys)
    assert int(re.search(r"^(\d+) of \d+ prompt tokens were ready", said, re.MULTILINE)[1]) > 0  # type: ignore[index]


def test_the_example_of_the_docs_works(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by_the_example(0, live, capsys)
    assert int(re.search(r"^(\d+) prompt tokens were not computed", said, re.MULTILINE)[1]) > 0  # type: ignore[index]
    assert "'kind': 'response'" in said


def test_bad_requests_get_the_clients_own_errors(live: Live) -> None:
    client = live.client()
    hello: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.AuthenticationError):
        live.client("sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=hello)
    with pytest.raises(openai.BadRequestError, match="context") as long:
        client.chat.completions.create(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "sheep " * 9000}], stream=True
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as role:
        client.chat.completions.create(model=DEFAULT_MODEL, messages=[{"role": "wizard", "content": ""}])  # type: ignore[list-item]
    assert role.value.param == "messages[0].role"
    with pytest.raises(openai.APIStatusError) as huge:
        client.chat.completions.create(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "x" * (5 << 20)}]
        )
    assert huge.value.status_code == 413
    assert [m.id for m in client.models.list()] == [DEFAULT_MODEL]
    assert httpx.get(f"{live.url}/healthz").json() == {"status": "ok", "workers": {"w0": "up", "w1": "up"}}
    assert live.settled()


def walk_away(live: Live, *, stream: bool) -> None:
    """Ask for a long answer, and close the connection while it is made."""
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 1500,
        "temperature": 0,
        "stream": stream,
    }
    headers = {"Authorization": "Bearer sk-red"}
    timeout = httpx.Timeout(30.0, read=30.0 if stream else 1.5)
    url = f"{live.url}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=timeout) as response:
            lines = response.iter_lines()
            for _ in range(8):
                next(lines)
    except httpx.ReadTimeout:
        assert not stream


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_leaves_nothing_behind(live: Live, stream: bool) -> None:
    before = live.metric("relay_cancelled_requests_total")
    walk_away(live, stream=stream)
    assert eventually(live.settled)
    assert eventually(lambda: live.metric("relay_cancelled_requests_total") == before + 1)
    assert live.metric("relay_requests_running") == 0
