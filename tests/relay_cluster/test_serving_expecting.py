"""Which request an expected one is, what is sent while an answer is written, and that nothing stays; workers
are played by a recorder. (Real ones: tests/e2e/serving/test_next.py.)"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from relay_cluster.serving.expecting import Expecting, Hint, joined, rest_of
from relay_cluster.serving.memory import ChatText, Memory, plain
from tests.replies import make_reply
from transport.errors import RelayError, WorkerLost
from transport.types import WorkerId
from workers.messages import Draft, Reply, Request
from workers.segment import Message, SlotValue

KEY = ("red", "m")
W0, W1 = WorkerId("w0"), WorkerId("w1")
PLAN = "Count the sheep, then the weeks."
HEAD = (ChatText("system", "You solve {problems}."), ChatText("user", "Task.\n\nPlan:\n\n"))
TAIL = (ChatText("user", "\n\nFollow it."),)
HINT = Hint(agent="solver", head=HEAD, tail=TAIL, max_new_tokens=7)


def request(answer: str = PLAN, behind: str = TAIL[0].text) -> tuple[ChatText, ...]:
    """The messages of the request that the hint speaks of."""
    return (HEAD[0], ChatText("user", HEAD[1].text + answer + behind))


def reply(text: str = PLAN, kv_text: str | None = None) -> Reply:
    ids = tuple(range(20))
    return make_reply(
        W0,
        Request(id="r", agent="planner"),
        model="m",
        text=text,
        token_ids=ids,
        output=SlotValue(token_ids=ids, kv_tokens=19),
        output_text=text,
        kv_text=text if kv_text is None else kv_text,
    )


class Preparers:
    """Write down what they are asked; the first draft can be held back."""

    def __init__(self, fault: RelayError | None = None) -> None:
        self.drafts: list[Draft] = []
        self.given_up: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self._fault = fault

    def preparer_for(self, agent: str, model: str, writer: WorkerId) -> WorkerId:
        return W1 if writer == W0 else W0

    async def prepare(self, worker: WorkerId, draft: Draft) -> int:
        self.drafts.append(draft)
        await self.hold.wait()
        if self._fault is not None:
            raise self._fault
        return 0

    def give_up(self, worker: WorkerId, request_id: str) -> None:
        self.given_up.append(request_id)


class Rig:
    """What a service expects, and how each of it ended."""

    def __init__(self, preparers: Preparers | None = None, timeout_s: float = 60.0, most: int = 8) -> None:
        self.workers = preparers or Preparers()
        self.ends: list[str] = []
        memory = Memory(max_texts=9, max_bytes=1 << 20, min_input_chars=128, common_chars=0)
        self.expecting = Expecting(
            self.workers,
            lambda tenant, model: memory,
            timeout_s=timeout_s,
            most=most,
            on_end=lambda key, hint, how: self.ends.append(how),
        )

    def written(self, hint: Hint = HINT, last: Reply | None = None) -> None:
        """An answer, from its beginning to its end."""
        with self.expecting.begin(KEY, [hint], W0, 64) as readers:
            readers.answered(last or reply())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("texts", "rest"),
    [
        (request(), TAIL),
        (request(behind=""), (ChatText("user", ""),)),
        (request(behind=" Go."), (ChatText("user", " Go."),)),
        ((*request(), ChatText("assistant", "a")), (*TAIL, ChatText("assistant", "a"))),
        (request(answer="Another plan."), None),
        (HEAD, None),
        (HEAD[:1], None),
        ((ChatText("system", "Else."), request()[1]), None),
        ((HEAD[0], ChatText("tool", request()[1].text)), None),
    ],
)
def test_a_request_fits_that_begins_with_head_and_answer(
    texts: tuple[ChatText, ...], rest: tuple[ChatText, ...] | None
) -> None:
    assert rest_of(HEAD, PLAN, texts) == rest


def test_an_answer_does_not_end_within_a_word() -> None:
    assert rest_of(HEAD, "Four", request("Four", "teen")) is None
    assert rest_of(HEAD, "Four", request("Four", " ten")) is not None


def test_a_prompt_is_put_together_without_losing_braces() -> None:
    prompt = joined(plain(HEAD), SlotValue(token_ids=(1,), kv_tokens=1), PLAN, plain(TAIL))
    assert prompt.messages == (
        Message("system", "You solve {{problems}}."),
        Message("user", "Task.\n\nPlan:\n\n{answer}\n\nFollow it."),
    )
    assert [(f.slot, f.kind, f.chars) for f in prompt.found] == [("answer", "response", len(PLAN))]


@pytest.mark.asyncio
async def test_drafts_grow_with_the_answer_and_the_request_gets_what_was_prepared() -> None:
    rig = Rig()
    drafts = rig.workers.drafts
    with rig.expecting.begin(KEY, [HINT], W0, 64) as readers:
        await until(lambda: len(drafts) == 1)
        rig.workers.hold.clear()
        for token in range(20):
            readers.add(token)
        await until(lambda: len(drafts) == 2)
        readers.answered(reply())
        rig.workers.hold.set()
    await until(lambda: len(drafts) == 3)
    assert [d.request.values["answer"].token_ids for d in drafts[:2]] == [(), tuple(range(20))]
    assert [d.open_slots for d in drafts] == [{"answer"}, {"answer"}, frozenset()]
    assert {(d.request.id, d.request.tenant, d.request.sampling.max_new_tokens) for d in drafts} == {
        (drafts[0].request.id, "red", 7)
    }
    assert rig.expecting.take(("blue", "m"), request()) is None, "another tenant's"
    taken = rig.expecting.take(KEY, request())
    assert taken is not None
    assert (taken.request_id, taken.worker) == (drafts[0].request.id, W1)
    assert (taken.prompt.messages, taken.prompt.values) == (
        drafts[2].request.messages,
        drafts[2].request.values,
    )
    assert rig.expecting.take(KEY, request()) is None, "there was one"
    assert (rig.ends, rig.workers.given_up, len(rig.expecting)) == (["came"], [], 0)


@pytest.mark.asyncio
async def test_blanks_at_the_end_and_another_ending_are_no_matter() -> None:
    rig = Rig()
    for behind, count, ending in (("\n\nElse?", 19, "\n\nElse?"), (" \n\nFollow it.", 20, "\n\nFollow it.")):
        rig.written(last=reply(PLAN + " ", kv_text=PLAN))
        taken = rig.expecting.take(KEY, request(behind=behind))
        assert taken is not None
        assert taken.prompt.values["answer"].token_ids == tuple(range(count))
        assert taken.prompt.messages[-1].content == f"{HEAD[1].text}{{answer}}{ending}"
    rig.expecting.close()


@pytest.mark.asyncio
async def test_one_that_never_comes_is_dropped_and_so_are_the_oldest_of_too_many() -> None:
    rig = Rig(timeout_s=0.01, most=2)
    rig.written()
    await until(lambda: rig.ends == ["expired"])
    assert rig.expecting.take(KEY, request()) is None
    with rig.expecting.begin(KEY, [HINT] * 3, W0, 64) as readers:
        assert (rig.ends, len(rig.expecting)) == (["expired", "displaced"], 2)
        readers.answered(reply())
    rig.expecting.close()
    assert rig.ends == ["expired", "displaced", "cancelled", "cancelled"]
    assert len(rig.workers.given_up) == 4


@pytest.mark.asyncio
async def test_an_answer_that_is_left_early_takes_its_readers_along() -> None:
    rig = Rig()

    def leave() -> None:
        with rig.expecting.begin(KEY, [HINT], W0, 64) as readers:
            readers.add(1)
            raise RelayError("the client is gone")

    with pytest.raises(RelayError):
        leave()
    assert (rig.ends, len(rig.workers.given_up), len(rig.expecting)) == (["cancelled"], 1, 0)


@pytest.mark.asyncio
async def test_a_worker_that_fails_costs_the_preparation_alone() -> None:
    rig = Rig(Preparers(WorkerLost("killed")))
    with rig.expecting.begin(KEY, [HINT], W0, 64) as readers:
        await until(lambda: rig.ends == ["failed"])
        readers.add(1)
        readers.answered(reply())
    assert rig.expecting.take(KEY, request()) is None
    assert rig.ends == ["failed"]


@pytest.mark.asyncio
async def test_an_answer_whose_text_is_not_its_ids_is_not_waited_for() -> None:
    rig = Rig()
    rig.written(last=reply(""))
    assert (rig.ends, len(rig.expecting)) == (["failed"], 0)
