"""Three agents, planner, solver and judge, as a LangGraph program. Nothing in it knows of relay_cluster: what
makes it one of its clients is the URL.

    make serve                                       # in another terminal
    pip install 'relay-cluster[clients]'
    python examples/langgraph_three_agents.py --base-url http://127.0.0.1:8000/v1

The solver reads the plan and the judge reads both, so most of their prompts has been computed before:
`cached` in what is printed. `--text FILE` gives them a document to work on.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, TypedDict

from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

TASK = (
    "A farmer in a valley has 17 sheep and buys 5 more every week at the market. After six weeks he sells "
    "half of his flock to a neighbour, who already has 40 sheep, and a wolf takes two of the rest. In the "
    "seventh week he buys twelve lambs and gives three of them to his daughter. How many has he got now?"
)
AGENTS = ("planner", "solver", "judge")


class Notes(TypedDict, total=False):
    """What the agents share: the task, and what each of them said."""

    task: str
    planner: AIMessage
    solver: AIMessage
    judge: AIMessage


def build(model: ChatOpenAI) -> Any:
    """The graph; invoke it with {"task": ...}."""

    def ask(system: str, user: str) -> AIMessage:
        answer = model.invoke([("system", system), ("user", user)])
        assert isinstance(answer, AIMessage)
        return answer

    def planner(notes: Notes) -> Notes:
        said = ask("You make short plans.", f"{notes['task']}\n\nMake a plan in a few steps.")
        return {"planner": said}

    def solver(notes: Notes) -> Notes:
        plan = notes["planner"].text
        return {
            "solver": ask("You solve problems.", f"{notes['task']}\n\nPlan:\n\n{plan}\n\nFollow the plan.")
        }

    def judge(notes: Notes) -> Notes:
        plan, solution = notes["planner"].text, notes["solver"].text
        user = f"Task:\n\n{notes['task']}\n\nPlan:\n\n{plan}\n\nAnswer:\n\n{solution}\n\nIs the answer right?"
        return {"judge": ask("You judge answers.", user)}

    graph = StateGraph(Notes)
    for name, node in (("planner", planner), ("solver", solver), ("judge", judge)):
        graph.add_node(name, node)
    for before, after in ((START, "planner"), ("planner", "solver"), ("solver", "judge"), ("judge", END)):
        graph.add_edge(before, after)
    return graph.compile()


def main() -> None:
    """Run the program once and print what each agent said and how much of its prompt was not computed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="of the service [%(default)s]")
    parser.add_argument("--api-key", default="none", help="any text where the service asks for no key")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="[%(default)s]")
    parser.add_argument("--text", type=Path, help="file with the task [a problem of our own]")
    parser.add_argument("--max-tokens", type=int, default=96, help="of every answer [%(default)s]")
    options = parser.parse_args()
    model = ChatOpenAI(
        base_url=options.base_url,
        api_key=options.api_key,
        model=options.model,
        max_tokens=options.max_tokens,
        temperature=0,
        seed=1,
    )
    task = options.text.read_text("utf-8") if options.text else TASK
    notes = build(model).invoke({"task": task})
    for name in AGENTS:
        said: AIMessage = notes[name]
        usage: Any = said.usage_metadata or {}
        cached = usage.get("input_token_details", {}).get("cache_read", 0)
        print(f"--- {name}: {usage.get('input_tokens')} prompt tokens, {cached} cached\n{said.text}\n")


if __name__ == "__main__":
    main()
