"""Three agents, planner, solver and judge, in Microsoft's Agent Framework, which AutoGen has become. Nothing
in it knows of relay_cluster: what makes it one of its clients is the URL.

    make serve                                       # in another terminal
    pip install 'relay-cluster[clients]'
    python examples/agent_framework_three_agents.py --base-url http://127.0.0.1:8000/v1

The workflow hands the whole conversation from agent to agent, so what one of them wrote stands in the prompts
of those after it as a message of its own.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from agent_framework import Agent, AgentExecutor, AgentResponse, Workflow, WorkflowBuilder
from agent_framework.openai import OpenAIChatCompletionClient

TASK = (
    "A farmer in a valley has 17 sheep and buys 5 more every week at the market. After six weeks he sells "
    "half of his flock to a neighbour, who already has 40 sheep, and a wolf takes two of the rest. In the "
    "seventh week he buys twelve lambs and gives three of them to his daughter. How many has he got now?"
)
AGENTS = {
    "planner": "You make short plans. Make a plan in a few steps.",
    "solver": "You solve problems. Follow the plan.",
    "judge": "You judge answers. Is the answer right?",
}


def build(client: OpenAIChatCompletionClient, **options: Any) -> Workflow:
    """The workflow; options: of every request, as the OpenAI API names them."""
    agents = [
        AgentExecutor(Agent(client, instructions, name=name, default_options=options), id=name)
        for name, instructions in AGENTS.items()
    ]
    return WorkflowBuilder(start_executor=agents[0], output_from="all").add_chain(agents).build()


async def run(workflow: Workflow, task: str) -> dict[str, AgentResponse]:
    """What each agent said."""
    responses = (await workflow.run(task)).get_outputs()
    return dict(zip(AGENTS, responses, strict=True))


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
    client = OpenAIChatCompletionClient(options.model, api_key=options.api_key, base_url=options.base_url)
    workflow = build(client, max_tokens=options.max_tokens, temperature=0, seed=1)
    task = options.text.read_text("utf-8") if options.text else TASK
    for name, said in asyncio.run(run(workflow, task)).items():
        usage: Any = said.usage_details or {}
        print(f"--- {name}: {dict(usage)}\n{said.text}\n")


if __name__ == "__main__":
    main()
