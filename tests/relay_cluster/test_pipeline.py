"""The graph that prompts draw, and every way to draw it wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.pipeline import Agent, Pipeline, Slot, find_problems, parse_template
from transport.errors import ConfigError, PipelineError


def diamond() -> Pipeline:
    return Pipeline(
        [
            Agent("judge", "{question} {pro} {con}"),
            Agent("pro", "{question} {plan} in favour"),
            Agent("con", "{plan} against"),
            Agent("plan", "Plan: {question}"),
        ]
    )


def test_slots_are_the_edges() -> None:
    graph = diamond()
    assert graph.inputs == ("question",)
    assert graph.levels == (("plan",), ("pro", "con"), ("judge",))
    assert graph.order == ("plan", "pro", "con", "judge")
    assert graph.upstreams["judge"] == ("pro", "con")
    assert graph.consumers == {
        "question": ("judge", "pro", "plan"),
        "judge": (),
        "pro": ("judge",),
        "con": ("judge",),
        "plan": ("pro", "con"),
    }


def test_order_keeps_the_written_order_where_it_may() -> None:
    graph = Pipeline([Agent("c", "{q}"), Agent("a", "{q}"), Agent("b", "{q}")])
    assert graph.order == ("c", "a", "b")


def test_a_slot_may_appear_twice() -> None:
    agent = Agent("b", "{a} again: {a}")
    assert agent.slots == ("a",)
    assert agent.parts == (Slot("a"), " again: ", Slot("a"))
    assert Pipeline([Agent("a", "{q}"), agent]).upstreams["b"] == ("a",)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain", ("plain",)),
        ("{a}", (Slot("a"),)),
        ("{a}{b}", (Slot("a"), Slot("b"))),
        ("x {a}", ("x ", Slot("a"))),
        ('{{"k": 1}} {a}', ('{"k": 1} ', Slot("a"))),
        ("{{{a}}}", ("{", Slot("a"), "}")),
        ("{{a}}", ("{a}",)),
        ("{my-agent_2}", (Slot("my-agent_2"),)),
        ("", ()),
    ],
)
def test_template(text: str, parts: tuple[str | Slot, ...]) -> None:
    assert parse_template(text) == parts


@pytest.mark.parametrize(
    "text", ["{", "}", "{a", "a}", "{}", "{a b}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{1}"]
)
def test_bad_slot_syntax(text: str) -> None:
    with pytest.raises(PipelineError, match="bad slot"):
        parse_template(text)


@given(st.text())
def test_escaped_text_is_text(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert "".join(map(str, parse_template(escaped))) == text


def message(*agents: Agent, declared: list[str] | None = None) -> str:
    with pytest.raises(PipelineError) as caught:
        Pipeline(agents, name="p", declared_inputs=declared)
    return str(caught.value)


def test_cycle_is_printed_along_the_flow() -> None:
    text = message(Agent("a", "{q} {c}"), Agent("b", "{a}"), Agent("c", "{b}"))
    assert (
        "cycle: a -> b -> c -> a" in text or "cycle: b -> c -> a -> b" in text or "c -> a -> b -> c" in text
    )


def test_self_reference() -> None:
    assert "slot {a} refers to the agent itself" in message(Agent("a", "{q} {a}"))


def test_duplicate_names() -> None:
    assert "2 agents have this name" in message(Agent("a", "{q}"), Agent("a", "x"))


def test_empty_prompt_and_no_agents() -> None:
    assert "the prompt is empty" in message(Agent("a", "  \n"))
    assert "at least one agent" in message()


def test_bad_agent_name() -> None:
    assert "a name is made of letters" in message(Agent("my agent", "{q}"))


def test_unknown_slot_with_declared_inputs() -> None:
    agents = [Agent("solver", "{question}"), Agent("critic", "{solvr} {qestion} {zzz}")]
    text = message(*agents, declared=["question"])
    assert 'slot {solvr} names neither an agent nor a declared input. Did you mean "solver"?' in text
    assert 'Did you mean "question"?' in text
    assert "{zzz} names neither an agent nor a declared input. Known: solver, question." in text


def test_declared_input_with_an_agents_name() -> None:
    assert "has the name of an agent" in message(Agent("a", "{q}"), declared=["q", "a"])


def test_slot_in_a_system_message() -> None:
    text = message(Agent("a", "{q}"), Agent("b", "{a}", system="Review {a}."))
    assert "{a} would not be filled" in text


def test_braces_in_a_system_message_are_text() -> None:
    assert find_problems([Agent("a", "{q}", system='Answer as {"x": 1}')]) == ()


def test_everything_wrong_is_said_at_once() -> None:
    text = message(Agent("a", ""), Agent("b", "{b}"), Agent("c", "{"))
    assert len(text.splitlines()) == 4


def test_inputs_of_a_run() -> None:
    graph = diamond()
    assert graph.check_inputs({"question": "why?"}) == {"question": "why?"}
    with pytest.raises(
        PipelineError, match=r'missing input "question" \(slot \{question\} of "judge", "pro", "plan"\)'
    ):
        graph.check_inputs({})
    with pytest.raises(PipelineError, match=r'unknown input "questoin".*Did you mean "question"'):
        graph.check_inputs({"question": "why?", "questoin": "why?"})
    with pytest.raises(PipelineError, match=r"rows:3: .*must be text, not int"):
        graph.check_inputs({"question": 3}, where="rows:3: ")


def test_missing_input_that_looks_like_an_agent() -> None:
    graph = Pipeline([Agent("solver", "{question}"), Agent("critic", "{solvr}")])
    with pytest.raises(PipelineError, match=r'missing input "solvr".*Did you mean "solver"'):
        graph.check_inputs({"question": "?"})


def test_agent_by_name() -> None:
    assert diamond()["con"].name == "con"
    with pytest.raises(ConfigError, match=r'no agent "jugde".*Did you mean "judge"'):
        diamond()["jugde"]


@given(st.integers(1, 6), st.randoms(use_true_random=False))
def test_order_respects_every_edge(count: int, random: object) -> None:
    names = [f"a{i}" for i in range(count)]
    edges = {name: [up for up in names[:i] if random.random() < 0.5] for i, name in enumerate(names)}  # type: ignore[attr-defined]
    agents = [Agent(name, "{q} " + " ".join(f"{{{up}}}" for up in edges[name])) for name in names]
    random.shuffle(agents)  # type: ignore[attr-defined]
    order = Pipeline(agents).order
    assert sorted(order) == names
    assert all(order.index(up) < order.index(name) for name in names for up in edges[name])
