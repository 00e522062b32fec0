"""`relay.next`: the next agent's worker prepares while this answer is written. The openai client, two worker
processes, the real model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.serving.live import Live, eventually
from tests.e2e.serving.test_serving import QUESTION, relay
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKENS = 12
SYSTEM = "You solve problems."


def ask(
    live: Live, messages: list[dict[str, Any]], key: str = "sk-red", tokens: int = TOKENS, **said: Any
) -> Any:
    return live.client(key).chat.completions.create(
        model=DEFAULT_MODEL,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=tokens,
        temperature=0,
        seed=7,
        extra_body={"relay": said} if said else None,
    )


def planner(question: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "You make plans."}, {"role": "user", "content": question}]


def solver(question: str, *plan: Any) -> list[dict[str, Any]]:
    """plan: a text, or the slot where it will be."""
    parts = [f"{question}\n\nA plan:\n\n", *plan, "\n\nSolve the problem."]
    content = "".join(parts) if all(isinstance(p, str) for p in parts) else parts
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def hint(question: str, **more: Any) -> dict[str, Any]:
    return {"messages": solver(question, {"relay_slot": "this"}), "max_tokens": TOKENS, **more}


def ends(live: Live, outcome: str, source: str = "asked") -> float:
    return live.total("relay_expected_requests_total", source=source, outcome=outcome)


def nothing_prepared(live: Live) -> bool:
    return all(s["preparations"] == 0 for s in live.cluster.stats().values()) and live.settled()


def test_the_next_agents_prompt_is_prepared_and_used(live: Live) -> None:
    question = f"{QUESTION} He has a dog."
    before, passes_before = ends(live, "came"), passes(live)
    plan = ask(live, planner(question), next=hint(question))
    # Who prepares has no other work: a pass of its own over the weights is one of the solver's prompt.
    assert eventually(lambda: any(n > passes_before[w] for w, n in passes(live, preparing=True).items()))
    solved = ask(live, solver(question, plan.choices[0].message.content))
    told = relay(solved)
    assert told["prepared_tokens"] > 0
    assert told["worker"] != relay(plan)["worker"], "the writer's own has no idle step"
    assert told["prepared_tokens"] <= solved.usage.prompt_tokens_details.cached_tokens
    assert told["fallbacks"] == []
    assert [f["id"] for f in told["found"]] == [relay(plan)["segment"]]
    assert solved.choices[0].message.content
    assert ends(live, "came") == before + 1
    assert eventually(lambda: nothing_prepared(live))


@pytest.mark.long
def test_a_hint_changes_nothing_but_the_time(live: Live) -> None:
    """Everything that is prepared is computed in full, so the answer is that of the same prompt unprepared,
    with nothing relayed. (The same, not full_prefill: that one does not splice the plan's own ids.)"""
    question = f"{QUESTION} He has a cat."
    plan = ask(live, planner(question), next=hint(question)).choices[0].message.content
    assert eventually(lambda: prepared_whole(live))
    solved = ask(live, solver(question, plan), reuse="exact_prefix")
    again = ask(live, solver(question, plan), key="sk-blue", reuse="exact_prefix")
    assert relay(solved)["prepared_tokens"] == solved.usage.prompt_tokens - 1, "all but the last one"
    assert relay(again)["prepared_tokens"] == 0
    assert solved.choices[0].message.content == again.choices[0].message.content


def passes(live: Live, *, preparing: bool = False) -> dict[str, int]:
    """Passes over the weights of every worker, or of those that have prepared something."""
    stats = live.cluster.stats().items()
    return {w: s["weight_passes"] for w, s in stats if s["preparations"] or not preparing}


def prepared_whole(live: Live) -> bool:
    """The last draft has been computed: a preparation is open, and no worker has a step to do."""
    before = passes(live, preparing=True)
    time.sleep(1.0)  # between two looks; a step of this model takes less
    return bool(before) and passes(live, preparing=True) == before


@pytest.mark.long
@pytest.mark.parametrize("wrong", ["another question", "another agent", "a longer answer", "full_prefill"])
def test_a_wrong_hint_costs_work_and_never_an_answer(live: Live, wrong: str) -> None:
    question = f"{QUESTION} He owns a {wrong}."
    about = f"{QUESTION} No, wait." if wrong == "another question" else question
    tokens = TOKENS + 150 if wrong == "a longer answer" else TOKENS
    with expecting_for(live, 0.5):
        plan = ask(live, planner(question), next=hint(about)).choices[0].message.content
    messages = solver(question, plan)
    if wrong == "another agent":
        messages[0]["content"] = "You solve problems slowly."
    reuse = "full_prefill" if wrong == "full_prefill" else "exact_prefix"
    solved = ask(live, messages, tokens=tokens, reuse=reuse)
    assert relay(solved)["prepared_tokens"] == 0
    off = ask(live, messages, tokens=tokens, enabled=False)
    if wrong == "full_prefill":
        assert solved.choices[0].message.content == off.choices[0].message.content
    assert solved.choices[0].message.content
    assert eventually(lambda: nothing_prepared(live))


@contextmanager
def expecting_for(live: Live, timeout_s: float) -> Iterator[None]:
    """Let what is expected from now on be dropped sooner."""
    expecting = live.service._expecting
    before, expecting._timeout_s = expecting._timeout_s, timeout_s
    try:
        yield
    finally:
        expecting._timeout_s = before


@pytest.mark.long
def test_a_request_that_never_comes_is_dropped_and_counted(live: Live) -> None:
    question = f"{QUESTION} He has a goat."
    before = ends(live, "expired")
    with expecting_for(live, 0.2):
        ask(live, planner(question), next=hint(question))
    assert eventually(lambda: ends(live, "expired") == before + 1)
    assert eventually(lambda: nothing_prepared(live))
    assert live.metric("relay_requests_expected") == 0


@pytest.mark.long
def test_a_client_that_goes_away_ends_the_preparation(live: Live) -> None:
    question = f"{QUESTION} He has a cow."
    before = ends(live, "cancelled")
    stream = live.client().chat.completions.create(
        model=DEFAULT_MODEL,
        messages=planner(question),  # type: ignore[arg-type]
        max_tokens=1500,
        stream=True,
        extra_body={"relay": {"next": hint(question)}},
    )
    for _, _chunk in zip(range(4), stream, strict=False):
        pass
    assert live.metric("relay_requests_expected") == 1
    stream.close()
    assert eventually(lambda: ends(live, "cancelled") == before + 1)
    assert eventually(lambda: nothing_prepared(live))


@pytest.mark.long
def test_another_tenant_never_gets_what_was_prepared(live: Live) -> None:
    question = f"{QUESTION} He has a horse."
    plan = ask(live, planner(question), next=hint(question)).choices[0].message.content
    blue = ask(live, solver(question, plan), key="sk-blue")
    assert (relay(blue)["prepared_tokens"], relay(blue)["found"]) == (0, [])
    red = ask(live, solver(question, plan))
    assert relay(red)["prepared_tokens"] > 0
    assert eventually(lambda: nothing_prepared(live))


@pytest.mark.long
def test_what_follows_what_is_learnt_where_it_is_asked_for(live: Live) -> None:
    settings = live.service.settings
    before, told = ends(live, "came", "learnt"), []
    live.service.settings = replace(settings, learn_next="on")
    try:
        for animal in ("ducks", "geese", "swans"):
            question = f"{QUESTION} He also has {animal} and feeds them every morning at seven o'clock."
            plan = ask(live, planner(question)).choices[0].message.content
            told.append(relay(ask(live, solver(question, plan)))["prepared_tokens"])
    finally:
        live.service.settings = settings
    assert told[:2] == [0, 0]
    assert told[2] > 0
    assert ends(live, "came", "learnt") == before + 1
    assert eventually(lambda: nothing_prepared(live))
