"""Transparent relay: what each answer was, and what was asked, so that later prompts that contain it get a
slot there.

    messages -> texts found in them -> templates with slots + values -> (a worker answers) -> remember

An answer is spliced as the token ids that were decoded; an input keeps its text, and whoever computes it
first publishes it. One memory per tenant and model: tenants never meet, and token ids mean nothing to another
model. Knows nothing of HTTP, workers or tokenizers.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

from relay_cluster.serving.matching import Match, TextIndex
from relay_cluster.serving.runs import CommonRuns
from workers.segment import Message, SlotValue

Kind = Literal["response", "input"]

_BETWEEN = "\U0010ffff"
"""Stands between messages while they are searched as one text; no remembered text contains it."""
_BREAK = "\n\n"
_EDGE_PARAGRAPHS = 2
"""Most short paragraphs at either end of an input that are left out of it."""
_SHARED_ROLES = frozenset({"user", "tool"})
"""Whose texts are worth publishing. (A system text opens the prompt: the exact prefix cache has it.)"""


class ChatText(NamedTuple):
    """A message as the client sent it."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Remembered:
    """A text that has KV somewhere, or will have. value: what fills a slot with it."""

    id: str
    kind: Kind
    value: SlotValue


@dataclass(frozen=True, slots=True)
class Found:
    """A slot that was made of a remembered text. chars: its length."""

    slot: str
    id: str
    kind: Kind
    chars: int


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A prompt with slots.

    Attributes:
        messages: templates, as Request.messages has them.
        values: slot -> content.
        found: slots that were remembered.
        inputs: texts to be remembered once they have been computed.
        asked: what users and tools said that was not remembered; later texts may share parts of it.
    """

    messages: tuple[Message, ...]
    values: dict[str, SlotValue]
    found: tuple[Found, ...] = ()
    inputs: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


def segment_id(text: str) -> str:
    """Names a remembered text to its own tenant, in responses and requests."""
    return "seg-" + hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def as_template(text: str) -> str:
    """Text as a template that has no slots."""
    return text.replace("{", "{{").replace("}", "}}")


def plain(messages: Sequence[ChatText]) -> Rewritten:
    """A prompt in which nothing is looked for."""
    return Rewritten(tuple(Message(m.role, as_template(m.text)) for m in messages), {})


class Memory:
    """What one tenant has asked one model, and got from it. Not thread-safe.

    Args:
        max_texts, max_bytes: of what is remembered whole, which is `index`.
        min_input_chars: shorter inputs, or parts of inputs, are not shared.
        common_chars: of inputs in which parts that later ones share are looked for.
    """

    def __init__(self, *, max_texts: int, max_bytes: int, min_input_chars: int, common_chars: int) -> None:
        self.index: TextIndex[Remembered] = TextIndex(max_texts=max_texts, max_bytes=max_bytes)
        self._common = CommonRuns(min_chars=min_input_chars, max_chars=common_chars)
        self._min_input_chars = min_input_chars

    def __len__(self) -> int:
        return len(self.index)

    @property
    def nbytes(self) -> int:
        """Estimated memory."""
        return self.index.nbytes

    def rewrite(
        self, messages: Sequence[ChatText], only: Collection[str] | None = None, *, first_slot: int = 0
    ) -> Rewritten:
        """Put a slot wherever a remembered text stands in a message, and around inputs worth sharing.

        Args:
            only: find nothing but these ids (None: anything).
            first_slot: number of the first slot's name.
        """
        starts = [0, *accumulate(len(m.text) + 1 for m in messages)]
        matches: list[list[Match[Remembered]]] = [[] for _ in messages]
        accept = None if only is None else (lambda value: value.id in only)
        for match in self.index.find(_BETWEEN.join(m.text for m in messages), accept):
            matches[bisect_right(starts, match.start) - 1].append(match)
        draft = _Draft(self._min_input_chars, self._common, first_slot)
        for message, start, found in zip(messages, starts, matches, strict=False):
            draft.add(message, start, found)
        return Rewritten(
            tuple(draft.messages),
            draft.values,
            tuple(draft.found),
            tuple(draft.inputs),
            tuple(draft.asked),
        )

    def keep_answer(self, text: str, value: SlotValue) -> str | None:
        """Remember an answer; its id, or None where it cannot be relayed.

        Args:
            text: what the ids of `value` spell, exactly.
        """
        if not value.kv_tokens or _BETWEEN in text:
            return None
        kept = Remembered(segment_id(text), "response", value)
        return kept.id if self.index.put(text, kept) else None

    def keep_inputs(self, prompt: Rewritten) -> None:
        """Remember what a worker has computed, and published if it could."""
        for text in prompt.asked:
            self._common.add(text)
        for text in prompt.inputs:
            if _BETWEEN not in text and self.index.get(text) is None:
                self.index.put(text, Remembered(segment_id(text), "input", SlotValue(text=text)))


@dataclass(slots=True)
class _Draft:
    """A prompt that is being rewritten."""

    min_input_chars: int
    common: CommonRuns
    first_slot: int
    messages: list[Message] = field(default_factory=list[Message])
    values: dict[str, SlotValue] = field(default_factory=dict[str, SlotValue])
    found: list[Found] = field(default_factory=list[Found])
    inputs: list[str] = field(default_factory=list[str])
    asked: list[str] = field(default_factory=list[str])

    def add(self, message: ChatText, start: int, matches: Sequence[Match[Remembered]]) -> None:
        """start: of the message in the text that was searched."""
        parts: list[str] = []
        done = 0
        for match in matches:
            parts.append(self._gap(message.role, message.text[done : match.start - start]))
            slot = self._slot(match.value.value)
            done = match.stop - start
            self.found.append(Found(slot, match.value.id, match.value.kind, match.stop - match.start))
            parts.append("{" + slot + "}")
        parts.append(self._gap(message.role, message.text[done:]))
        self.messages.append(Message(message.role, "".join(parts)))

    def _gap(self, role: str, text: str) -> str:
        """Text between matches: parts that an earlier text has as well become slots of their own, so that
        whoever shares them next finds them."""
        if role not in _SHARED_ROLES or len(text) < self.min_input_chars:
            return as_template(text)
        self.asked.append(text)
        parts: list[str] = []
        done = 0
        for run in self.common.find(text):
            parts += [self._input(text[done : run.start]), self._input(text[run.start : run.stop])]
            done = run.stop
        return "".join([*parts, self._input(text[done:])])

    def _input(self, text: str) -> str:
        if len(text) < self.min_input_chars:
            return as_template(text)
        start, stop = _core(text, self.min_input_chars)
        self.inputs.append(text[start:stop])
        slot = "{" + self._slot(SlotValue(text=text[start:stop])) + "}"
        return as_template(text[:start]) + slot + as_template(text[stop:])

    def _slot(self, value: SlotValue) -> str:
        name = f"s{self.first_slot + len(self.values)}"
        self.values[name] = value
        return name


def _core(text: str, min_chars: int) -> tuple[int, int]:
    """Where an input's own text stands: without short paragraphs around it, which tell an agent what to do
    with it and are not in another agent's prompt. At least three quarters of the text."""
    start, stop, room = 0, len(text), len(text) // 4
    for _ in range(_EDGE_PARAGRAPHS):
        cut = text.find(_BREAK, start, stop)
        if cut >= 0 and cut - start < min_chars and cut + len(_BREAK) <= room:
            start = cut + len(_BREAK)
        cut = text.rfind(_BREAK, start, stop)
        if cut >= 0 and stop - cut < min_chars and len(text) - cut + start <= room:
            stop = cut
    return start, stop
