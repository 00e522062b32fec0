"""What is learnt of requests that follow each other, on the memory that the service has."""

from __future__ import annotations

import pytest

from relay_cluster.serving.expecting import Hint, rest_of
from relay_cluster.serving.learning import Learner
from relay_cluster.serving.memory import ChatText, Memory
from workers.segment import SlotValue

TASK = (
    "A farmer has {n} sheep and buys 5 more every week, after six weeks he sells half of them to a neighbour."
)
ANSWERS = {
    "planner": "First count the sheep of task {n}, then the weeks.",
    "solver": "There are {n} sheep and a dog.\n\nSo it is, by the plan.",
    "judge": "Yes, {n} is right, as far as I can see.",
}


class Program:
    """Planner, solver and judge, as a framework would run them, with what the service knows of them."""

    def __init__(self, learner: Learner | None = None) -> None:
        self.learner = learner or Learner()
        self.memory = Memory(max_texts=99, max_bytes=1 << 20, min_input_chars=128, common_chars=1 << 16)

    def messages(self, n: int, task: str) -> dict[str, tuple[ChatText, ...]]:
        plan, solution = (ANSWERS[a].format(n=n) for a in ("planner", "solver"))
        users = {
            "planner": f"{task}\n\nMake a plan.",
            "solver": f"{task}\n\nPlan:\n\n{plan}\n\nFollow the plan.",
            "judge": f"Task:\n\n{task}\n\nPlan:\n\n{plan}\n\nAnswer:\n\n{solution}\n\nIs that right?",
        }
        return {a: (ChatText("system", f"You are the {a}."), ChatText("user", u)) for a, u in users.items()}

    def run(self, n: int, task: str) -> dict[str, tuple[Hint, ...]]:
        """Once; what was expected to follow each request."""
        hints: dict[str, tuple[Hint, ...]] = {}
        for agent, messages in self.messages(n, task).items():
            prompt = self.memory.rewrite(messages)
            hints[agent] = self.learner.asked(agent, messages, prompt, 64)
            answer = ANSWERS[agent].format(n=n)
            segment = self.memory.keep_answer(answer, SlotValue(None, tuple(range(20)), 20))
            assert segment is not None
            self.memory.keep_inputs(prompt)
            self.learner.answered(agent, messages, prompt, segment, answer)
        return hints


@pytest.mark.parametrize("task", [TASK, TASK + " Long:" + " {n} sheep." * 20, "Task {n}, which is short."])
def test_what_follows_twice_is_expected_the_third_time(task: str) -> None:
    program = Program()
    for n in (1, 2):
        assert program.run(n, task.format(n=n)) == {"planner": (), "solver": (), "judge": ()}
    hints = program.run(3, task.format(n=3))
    assert hints["judge"] == ()
    following = {"planner": "solver", "solver": "judge"}
    for agent, follower in following.items():
        (hint,) = hints[agent]
        assert (hint.agent, hint.max_new_tokens, hint.source) == (follower, 64, "learnt")
        real = program.messages(3, task.format(n=3))[follower]
        assert rest_of(hint.head, ANSWERS[agent].format(n=3), real) == hint.tail, "the request itself"


def test_one_that_does_not_come_has_to_be_seen_twice_again() -> None:
    program = Program()
    for n in (1, 2):
        program.run(n, TASK.format(n=n))
    (hint,) = program.run(3, TASK.format(n=3))["planner"]
    program.learner.ended(hint, came=False)
    assert [len(program.run(n, TASK.format(n=n))["planner"]) for n in (4, 5, 6)] == [0, 0, 1]


def test_one_that_comes_stays_learnt() -> None:
    program = Program()
    for n in (1, 2):
        program.run(n, TASK.format(n=n))
    (hint,) = program.run(3, TASK.format(n=3))["planner"]
    program.learner.ended(hint, came=True)
    assert len(program.run(4, TASK.format(n=4))["planner"]) == 1


def test_programs_that_never_repeat_teach_nothing_and_fill_nothing() -> None:
    learner, memory = Learner(), Memory(max_texts=99, max_bytes=1 << 20, min_input_chars=128, common_chars=0)
    for n in range(600):
        messages = (ChatText("user", f"Question {n}, quite another one than all the others."),)
        prompt = memory.rewrite(messages)
        assert learner.asked(f"agent-{n}", messages, prompt, 8) == ()
        learner.answered(f"agent-{n}", messages, prompt, f"seg-{n}", f"An answer to question {n}.")
    assert len(learner._answers) == 256
    assert learner._chars == sum(a.chars for a in learner._answers.values())
    assert len(learner._patterns) <= 256
    filler = (ChatText("user", "y" * 60_000),)
    for n in range(100):
        learner.answered("a", filler, memory.rewrite(filler), f"long-{n}", f"A long answer, number {n}.")
    assert learner._chars == sum(a.chars for a in learner._answers.values()) <= 4 << 20


def test_a_long_request_is_not_learnt_from() -> None:
    program = Program()
    for n in (1, 2, 3):
        assert program.run(n, "x" * 70_000) == {"planner": (), "solver": (), "judge": ()}
    assert not program.learner._answers
