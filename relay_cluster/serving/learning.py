"""Which request follows an answer, learnt from those that did.

    request of "planner" -> answer -> request of "solver" that contains the answer:
        what stands around the answer is kept as a pattern, in which everything that the planner's own request
        had as well is a reference into that
    the same pattern twice -> the planner's next request is filled in: a hint of the solver's

One learner belongs to one tenant and one model. It keeps the texts of a few hundred requests at most, and
tells them to nobody. Pure and not thread-safe.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from relay_cluster.serving.expecting import Hint
from relay_cluster.serving.memory import ChatText, Rewritten

_TWICE: Final = 2
"""Once may be chance."""
_MOST_ANSWERS: Final = 256
_MOST_AGENTS: Final = 256
_MOST_PATTERNS: Final = 4
"""Of one agent; those that were not seen for longest go."""
_MOST_HINTS: Final = 2
_MOST_CHARS: Final = 64 << 10
"""Of a request; longer ones are not learnt from."""
_MOST_KEPT_CHARS: Final = 4 << 20
"""Of all answered requests that are kept."""
_MOST_PARAGRAPHS: Final = 64
_LEAST_CHARS: Final = 16
"""A shorter text that two requests share may be chance."""
_BREAK: Final = "\n\n"


class Ref(NamedTuple):
    """A text of the earlier request.

    Attributes:
        kind: "slot" (of its prompt), "message" or "paragraph" (of a message).
        at: number of the slot or the message. paragraph: number within the message.
    """

    kind: str
    at: int
    paragraph: int = 0


Template = tuple[str | Ref, ...]
_Messages = tuple[tuple[str, Template], ...]


@dataclass(frozen=True, slots=True)
class _Pattern:
    """A request relative to the one whose answer it contains. head, tail: as `Hint` has them."""

    agent: str
    head: _Messages


@dataclass(slots=True)
class _Seen:
    """How often a pattern was seen, and what was last seen of it."""

    times: int
    tail: _Messages
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Learnt:
    """A request that was answered: who asked, its texts by reference, and the answer."""

    agent: str
    texts: Mapping[Ref, str]
    answer: str

    @property
    def chars(self) -> int:
        return len(self.answer) + sum(map(len, self.texts.values()))


@dataclass(slots=True)
class Learner:
    """Of one tenant and one model."""

    _answers: OrderedDict[str, Learnt] = field(default_factory=OrderedDict[str, Learnt])
    _patterns: OrderedDict[str, OrderedDict[_Pattern, _Seen]] = field(
        default_factory=OrderedDict[str, OrderedDict[_Pattern, _Seen]]
    )
    _hinted: OrderedDict[Hint, tuple[str, _Pattern]] = field(
        default_factory=OrderedDict[Hint, tuple[str, _Pattern]]
    )
    _chars: int = 0

    def asked(
        self, agent: str, messages: Sequence[ChatText], prompt: Rewritten, max_new_tokens: int
    ) -> tuple[Hint, ...]:
        """A request has come: learn from the answer in it, and say what is expected to follow.

        Args:
            agent: who asks. prompt: the messages with their slots.
        """
        if sum(len(m.text) for m in messages) > _MOST_CHARS:
            return ()
        self._learn(agent, messages, prompt, max_new_tokens)
        texts = self._texts(messages, prompt)
        known = self._patterns.get(agent, {})
        often = sorted((s.times, n, p) for n, (p, s) in enumerate(known.items()) if s.times >= _TWICE)
        hints: list[Hint] = []
        for _, _, pattern in sorted(often, key=lambda item: item[:2], reverse=True)[:_MOST_HINTS]:
            hint = _filled(pattern, known[pattern], texts)
            if hint is not None:
                self._hinted[hint] = (agent, pattern)
                hints.append(hint)
        while len(self._hinted) > _MOST_ANSWERS:
            self._hinted.popitem(last=False)
        return tuple(hints)

    def answered(
        self, agent: str, messages: Sequence[ChatText], prompt: Rewritten, segment: str, answer: str
    ) -> None:
        """The request was answered. segment: names the answer."""
        if sum(len(m.text) for m in messages) > _MOST_CHARS or len(answer) < _LEAST_CHARS:
            return
        kept = Learnt(agent, self._texts(messages, prompt), answer)
        before = self._answers.pop(segment, None)
        self._chars += kept.chars - (before.chars if before else 0)
        self._answers[segment] = kept
        while len(self._answers) > _MOST_ANSWERS or self._chars > _MOST_KEPT_CHARS:
            self._chars -= self._answers.popitem(last=False)[1].chars

    def ended(self, hint: Hint, *, came: bool) -> None:
        """What became of a hint: one whose request did not come has to be seen again, twice."""
        agent, pattern = self._hinted.pop(hint, ("", None))
        seen = None if pattern is None else self._patterns.get(agent, {}).get(pattern)
        if seen is not None and not came:
            seen.times = 0

    def _learn(
        self, agent: str, messages: Sequence[ChatText], prompt: Rewritten, max_new_tokens: int
    ) -> None:
        found = {f.id for f in prompt.found if f.kind == "response"}
        latest = next((s for s in reversed(self._answers) if s in found), None)
        if latest is None:
            return
        before = self._answers[latest]
        number = next((n for n, m in enumerate(messages) if before.answer in m.text), None)
        if number is None:
            return  # quoted without its last blanks
        role, text = messages[number]
        at = text.find(before.answer)
        head = (*messages[:number], ChatText(role, text[:at]))
        tail = (ChatText(role, text[at + len(before.answer) :]), *messages[number + 1 :])
        pattern = _Pattern(agent, _abstract(head, before.texts))
        known = self._patterns.setdefault(before.agent, OrderedDict())
        self._patterns.move_to_end(before.agent)
        seen = known.setdefault(pattern, _Seen(0, (), 0))
        seen.times += 1
        seen.tail, seen.max_new_tokens = _abstract(tail, before.texts), max_new_tokens
        known.move_to_end(pattern)
        while len(known) > _MOST_PATTERNS:
            known.popitem(last=False)
        while len(self._patterns) > _MOST_AGENTS:
            self._patterns.popitem(last=False)

    def _texts(self, messages: Sequence[ChatText], prompt: Rewritten) -> dict[Ref, str]:
        """Everything of a request that a later one may repeat."""
        answers = {f.slot: self._answers[f.id].answer for f in prompt.found if f.id in self._answers}
        texts: dict[Ref, str] = {}
        for number, (slot, value) in enumerate(prompt.values.items()):
            texts[Ref("slot", number)] = value.text or answers.get(slot, "")
        for number, message in enumerate(messages):
            texts[Ref("message", number)] = message.text
            for place, part in enumerate(message.text.split(_BREAK)[:_MOST_PARAGRAPHS]):
                texts[Ref("paragraph", number, place)] = part
        return {ref: text for ref, text in texts.items() if len(text) >= _LEAST_CHARS}


def _abstract(messages: Sequence[ChatText], texts: Mapping[Ref, str]) -> _Messages:
    """The messages, with references for what the earlier request had as well, the longest first. A system
    message is the agent's own, and stands as it is."""
    longest = sorted(texts.items(), key=lambda item: (-len(item[1]), item[0]))
    return tuple((m.role, (m.text,) if m.role == "system" else _cut(m.text, longest)) for m in messages)


def _cut(text: str, longest: Sequence[tuple[Ref, str]]) -> Template:
    for number, (ref, known) in enumerate(longest):
        at = text.find(known)
        if at >= 0:
            rest = longest[number:]
            return (*_cut(text[:at], rest[1:]), ref, *_cut(text[at + len(known) :], rest))
    return (text,) if text else ()


def _filled(pattern: _Pattern, seen: _Seen, texts: Mapping[Ref, str]) -> Hint | None:
    """The pattern as a hint of what follows a request with these texts; None where one of them is not
    there."""
    sides: list[tuple[ChatText, ...]] = []
    for side in (pattern.head, seen.tail):
        if any(isinstance(part, Ref) and part not in texts for _, parts in side for part in parts):
            return None
        sides.append(tuple(ChatText(role, "".join(_spelt(parts, texts))) for role, parts in side))
    head, tail = sides
    hint = Hint(agent=pattern.agent, head=head, tail=tail, max_new_tokens=seen.max_new_tokens)
    return replace(hint, source="learnt")


def _spelt(parts: Template, texts: Mapping[Ref, str]) -> Iterator[str]:
    return (texts[part] if isinstance(part, Ref) else part for part in parts)
