"""Requests that are expected: their prompts are prepared while the answer that they will contain is written.

    a request with a hint -> what stands before the answer is sent to the next agent's worker at once
    tokens of the answer  -> drafts, one at a time for each expected request
    the answer's end      -> a last draft, with what will stand behind the answer
    the next request      -> fits: it goes to that worker, with the prompt as it was prepared
                             never comes, or does not fit: dropped after a while, and counted

A draft is computed exactly and compared by the worker with the request's own token ids (see
workers/preparing.py), so a wrong hint costs work and never an answer. All methods belong to one event loop.
Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal, Protocol

from relay_cluster.ahead import CHUNK_TOKENS
from relay_cluster.serving.memory import ChatText, Found, Memory, Rewritten, plain, segment_id
from relay_cluster.serving.seeds import cuts_word
from transport.errors import RelayError
from transport.types import WorkerId
from workers.messages import Draft, Reply, Request
from workers.segment import Message, SlotValue
from workers.settings import SamplingSettings

log = logging.getLogger(__name__)

_SLOT: Final = "answer"
"""Where the answer goes; the memory's own slots have numbers."""
_SLACK_TOKENS: Final = 16
"""Room for seams that are tokenised otherwise in the request than in its draft."""
MOST_CHARS: Final = 1 << 20
"""Of an expected prompt. A longer one is not prepared: the event loop would stand still for it."""

Source = Literal["asked", "learnt"]
Outcome = Literal["came", "expired", "cancelled", "displaced", "failed"]
SOURCES: Final[tuple[Source, ...]] = ("asked", "learnt")
OUTCOMES: Final[tuple[Outcome, ...]] = ("came", "expired", "cancelled", "displaced", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """The request that is expected to follow an answer.

    Attributes:
        agent: who will ask.
        head: its messages up to where the answer begins, which is the end of the last one.
        tail: its messages from where the answer ends on; the first one goes on behind it.
        max_new_tokens: most tokens of its own answer, for which room is kept.
        source: whether the client has said so, or it was learnt.
    """

    agent: str
    head: tuple[ChatText, ...]
    tail: tuple[ChatText, ...]
    max_new_tokens: int
    source: Source = "asked"

    @property
    def chars(self) -> int:
        return sum(len(m.text) for m in (*self.head, *self.tail))


@dataclass(frozen=True, slots=True)
class Taken:
    """What a request that was expected begins with.

    Attributes:
        request_id: that it must have. worker: that has prepared. prompt: as it was prepared.
    """

    request_id: str
    worker: WorkerId
    prompt: Rewritten


class Preparers(Protocol):
    """What is needed of the workers; see `Answering`."""

    def preparer_for(self, agent: str, model: str, writer: WorkerId) -> WorkerId:
        """Who shall prepare; `writer` writes meanwhile. Raises RelayError."""
        ...

    async def prepare(self, worker: WorkerId, draft: Draft) -> int:
        """Compute what is known of a draft. Raises RelayError."""
        ...

    def give_up(self, worker: WorkerId, request_id: str) -> None:
        """Cancel without waiting for it."""
        ...


@dataclass(eq=False, slots=True)
class _Expected:
    """One expected request.

    Attributes:
        request: as it will be asked, but for its slots.
        head: the prompt before the answer, as it was rewritten when the hint came: a later rewriting may put
            slots elsewhere, and its token ids would not be those that are prepared.
        room_tokens: most tokens of the answer.
        ids: of the answer so far. answers: (text, value) that it may be quoted as, once it has ended.
        whole: the prompt with the tail that was expected, once the answer has ended.
        news: set when a draft is worth sending.
    """

    key: tuple[str, str]
    hint: Hint
    request: Request
    worker: WorkerId
    head: Rewritten
    room_tokens: int
    ids: list[int] = field(default_factory=list[int])
    answers: tuple[tuple[str, SlotValue], ...] = ()
    whole: Rewritten | None = None
    sent: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    def draft(self) -> Draft:
        """All that is known now."""
        self.sent = len(self.ids)
        if self.whole is not None:
            return Draft(request=_with(self.request, self.whole), open_slots=frozenset(), room_tokens=0)
        prompt = joined(self.head, SlotValue(token_ids=tuple(self.ids)), "", plain(self.hint.tail))
        room = max(0, self.room_tokens - len(self.ids)) + _SLACK_TOKENS
        return Draft(request=_with(self.request, prompt), open_slots=frozenset({_SLOT}), room_tokens=room)


class Readers:
    """Those that an answer is written for. Leave it when the answer has ended, however that was."""

    def __init__(self, expecting: Expecting, all_of_them: Sequence[_Expected]) -> None:
        self._expecting = expecting
        self._all = all_of_them
        self._answered = False

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._answered:
            self._expecting.drop(self._all, "cancelled")

    def add(self, token_id: int) -> None:
        """One more token."""
        for one in self._all:
            one.ids.append(token_id)
            if len(one.ids) - one.sent >= CHUNK_TOKENS:
                one.news.set()

    def answered(self, reply: Reply) -> None:
        """The answer has ended, and is remembered."""
        self._answered = True
        self._expecting.await_requests(self._all, reply)


class Expecting:
    """All requests that one service expects.

    Args:
        workers: who prepare.
        memory_of: (tenant, model) -> what is remembered.
        timeout_s: a request that has not come so long after the answer is dropped.
        most: expected at a time; the oldest ones go first.
        on_end: hears of (tenant, model) and hint how each of them ended.
    """

    def __init__(
        self,
        workers: Preparers,
        memory_of: Callable[[str, str], Memory],
        *,
        timeout_s: float,
        most: int,
        on_end: Callable[[tuple[str, str], Hint, Outcome], None],
    ) -> None:
        self._workers = workers
        self._memory_of = memory_of
        self._timeout_s = timeout_s
        self._most = most
        self._on_end = on_end
        self._open: dict[_Expected, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(
        self, key: tuple[str, str], hints: Iterable[Hint], writer: WorkerId, room_tokens: int
    ) -> Readers:
        """An answer is going to be written, by `writer`.

        Args:
            key: tenant and model. room_tokens: most tokens of the answer.
        """
        found = [self._expect(key, hint, writer, room_tokens) for hint in hints if hint.chars <= MOST_CHARS]
        return Readers(self, [one for one in found if one is not None])

    def _expect(
        self, key: tuple[str, str], hint: Hint, writer: WorkerId, room_tokens: int
    ) -> _Expected | None:
        tenant, model = key
        try:
            worker = self._workers.preparer_for(hint.agent, model, writer)
        except RelayError as error:
            log.info("%s is not prepared: %s", hint.agent, error)
            self._on_end(key, hint, "failed")
            return None
        request = Request(
            id=f"req-{uuid.uuid4().hex}",
            agent=hint.agent,
            tenant=tenant,
            sampling=SamplingSettings(max_new_tokens=hint.max_new_tokens),
            prefix_first=True,
        )
        head = self._memory_of(*key).rewrite(hint.head)
        one = _Expected(key, hint, request, worker, head, room_tokens)
        self._open[one] = None
        while len(self._open) > self._most:
            self.drop([next(iter(self._open))], "displaced")
        one.news.set()
        one.task = asyncio.get_running_loop().create_task(self._follow(one), name=f"ahead-{request.id}")
        return one

    async def _follow(self, one: _Expected) -> None:
        """Send drafts, one at a time: what is written meanwhile goes into the next one."""
        try:
            ended = False
            while one in self._open and not ended:
                await one.news.wait()
                one.news.clear()
                ended = one.whole is not None
                await self._workers.prepare(one.worker, one.draft())
        except RelayError as error:
            # Only time is lost: the request itself will say what is wrong.
            log.info("%s is not prepared: %s", one.hint.agent, error, extra={"request": one.request.id})
            self.drop([one], "failed")

    def await_requests(self, ended: Iterable[_Expected], reply: Reply) -> None:
        """The answer that these contain has ended."""
        answers = _quotes(reply)
        for one in ended:
            if one not in self._open:
                continue
            if not answers:  # its text is not what its ids spell: no prompt can be recognised by it
                self.drop([one], "failed")
                continue
            one.answers = answers
            one.whole = self._whole(one, one.hint.tail, *answers[0])
            one.news.set()
            loop = asyncio.get_running_loop()
            one.timer = loop.call_later(self._timeout_s, self.drop, [one], "expired")

    def take(self, key: tuple[str, str], texts: Sequence[ChatText]) -> Taken | None:
        """What stands ready for a request with these messages; None where it was not expected."""
        for one in self._open:
            if one.key != key:
                continue
            for text, value in one.answers:
                rest = rest_of(one.hint.head, text, texts)
                if rest is None:
                    continue
                expected = rest == one.hint.tail and one.whole is not None and text == one.answers[0][0]
                prompt = one.whole if expected else self._whole(one, rest, text, value)
                assert prompt is not None  # known since the answer's end
                self._close(one, "came")
                return Taken(one.request.id, one.worker, prompt)
        return None

    def drop(self, some: Iterable[_Expected], outcome: Outcome) -> None:
        """Give up what was prepared for some, unless they have ended already."""
        for one in some:
            if one in self._open:
                self._close(one, outcome)
                self._workers.give_up(one.worker, one.request.id)

    def close(self) -> None:
        """Expect nothing any more. Idempotent."""
        self.drop(list(self._open), "cancelled")

    def _close(self, one: _Expected, outcome: Outcome) -> None:
        del self._open[one]
        if one.timer is not None:
            one.timer.cancel()
        if one.task is not None and one.task is not asyncio.current_task():
            one.task.cancel()  # a draft that is under way is ended by its worker, who has the request now
        self._on_end(one.key, one.hint, outcome)

    def _whole(self, one: _Expected, rest: tuple[ChatText, ...], text: str, value: SlotValue) -> Rewritten:
        tail = self._memory_of(*one.key).rewrite(rest, first_slot=len(one.head.values))
        return joined(one.head, value, text, tail)


def rest_of(head: Sequence[ChatText], answer: str, texts: Sequence[ChatText]) -> tuple[ChatText, ...] | None:
    """What follows `head` and the answer in these messages; None where they do not begin so. Pure."""
    last = len(head) - 1
    if len(texts) <= last or tuple(texts[:last]) != tuple(head[:last]) or texts[last].role != head[last].role:
        return None
    begin = head[last].text + answer
    message = texts[last].text
    if not message.startswith(begin) or cuts_word(message, len(begin)):
        return None
    return (ChatText(head[last].role, message[len(begin) :]), *texts[last + 1 :])


def joined(head: Rewritten, value: SlotValue, text: str, tail: Rewritten) -> Rewritten:
    """A prompt: `head`, the answer, `tail`, whose first message goes on behind it. Pure.

    Args:
        text: the answer's, for what is told of it; "" while it is written.
    """
    before, behind = head.messages[-1], tail.messages[0]
    middle = Message(before.role, before.content + "{" + _SLOT + "}" + behind.content)
    found = (Found(_SLOT, segment_id(text), "response", len(text)),) if text and value.kv_tokens else ()
    return Rewritten(
        (*head.messages[:-1], middle, *tail.messages[1:]),
        {**head.values, _SLOT: value, **tail.values},
        (*head.found, *found, *tail.found),
        (*head.inputs, *tail.inputs),
        (*head.asked, *tail.asked),
    )


def _with(request: Request, prompt: Rewritten) -> Request:
    return replace(request, messages=prompt.messages, values=prompt.values)


def _quotes(reply: Reply) -> tuple[tuple[str, SlotValue], ...]:
    """How a client may quote an answer: as it was, or without the blanks at its end."""
    text, output = reply.output_text, reply.output
    if not text or not output.token_ids or not reply.text.startswith(text):
        return ()
    stripped = SlotValue(None, output.token_ids[: output.kv_tokens], output.kv_tokens)
    more = ((reply.kv_text, stripped),) if reply.kv_text not in ("", text) else ()
    return ((text, output), *more)
