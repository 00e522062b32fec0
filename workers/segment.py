"""Prompt -> token ids and spans: which tokens of a prompt may have KV somewhere, and under which key.

A prompt is a chat template, the author's literal text and slots. The chat template is rendered once, with a
private-use character (a *sentinel*) in the place of every literal and slot, so nobody's text passes through
it: it cannot trim or alter text, and text cannot forge its control tokens. The rendered template is cut at
the sentinels and every piece is tokenised alone; only the template's own pieces may contain control tokens.
The ids of an upstream output are spliced as they were decoded, never re-tokenised.

This module does not know where segments live, which method reuses them, or how a model computes.
"""

from __future__ import annotations

import hashlib
import re
import string
import struct
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transport.errors import ModelError, PipelineError, PromptTooLong
from transport.types import SegmentKey
from workers.methods.base import Span
from workers.text_encoding import ENCODING, TextEncoder, chat_template_of

_DIGEST_TAG = b"relay.tokens/1"
_DIGEST_BYTES = 16
_FIRST_SENTINEL = 0xF0000  # plane 15, private use: no script, no whitespace, not in any tokenizer's rules
_SLOT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_JOIN = "\n\n"
"""Stands between system text and prompt where the model has no system role."""


@dataclass(frozen=True, slots=True)
class SlotValue:
    """What fills a slot: raw text, or token ids decoded upstream. Exactly one of them is given.

    Attributes:
        text: user input or a tool's result; tokenised by the prompt builder.
        token_ids: spliced as they are.
        kv_tokens: how many leading ids of `token_ids` have KV in the published segment, whose key is the
            digest of exactly these; 0 when there is none. Not used for text.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    kv_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise PipelineError("a slot's value is either text or token ids, exactly one of them")
        if not 0 <= self.kv_tokens <= len(self.token_ids or ()):
            raise PipelineError(
                f"kv_tokens {self.kv_tokens} of a value with {len(self.token_ids or ())} token ids"
            )


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat. content: a template, in which `{slot}` marks a slot."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a template: fixed token ids, or a slot (then without ids)."""

    token_ids: tuple[int, ...] = ()
    slot: str | None = None


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A rendered, tokenised prompt with holes. Reusable for any number of requests."""

    pieces: tuple[Piece, ...]

    @property
    def leading_ids(self) -> tuple[int, ...]:
        """Fixed ids before the first slot: the same in every request."""
        return self.pieces[0].token_ids if self.pieces and self.pieces[0].slot is None else ()

    @property
    def slots(self) -> tuple[str, ...]:
        """Slot names, each once, in order of first appearance."""
        return tuple(dict.fromkeys(p.slot for p in self.pieces if p.slot is not None))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a prompt, and the spans that tile them without gap or overlap."""

    token_ids: tuple[int, ...]
    spans: tuple[Span, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    def tokens_of(self, span: Span) -> tuple[int, ...]:
        return self.token_ids[span.start : span.stop]


def tenant_space(space: str, tenant: str) -> str:
    """The space of one tenant's segments; `space` itself for the tenant "" (requests of one owner)."""
    if not tenant:
        return space
    return hashlib.blake2b(f"{len(space)}:{space}:{tenant}".encode(), digest_size=_DIGEST_BYTES).hexdigest()


def digest_tokens(token_ids: Sequence[int]) -> bytes:
    """BLAKE2b (16 bytes) over a schema tag, the count and the ids, all as little-endian u32."""
    body = struct.pack(f"<{len(token_ids) + 1}I", len(token_ids), *token_ids)
    return hashlib.blake2b(_DIGEST_TAG + body, digest_size=_DIGEST_BYTES).digest()


def open_key(space: str, tenant: str, request_id: str) -> SegmentKey:
    """Of the answer to a request while it is written: nobody can know the ids that it will have."""
    body = b"open answer\0" + request_id.encode()
    return SegmentKey(tenant_space(space, tenant), hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest())


def splice(
    output_ids: Sequence[int],
    *,
    stop_ids: Collection[int],
    special_ids: Collection[int],
    tokenizer: Any,
    finish_reason: str,
) -> SlotValue:
    """Make a slot value of an upstream answer.

    Args:
        output_ids: ids as decoded, with or without the stop token at the end.
        stop_ids: see `stop_token_ids`.
        special_ids: see `special_token_ids`; one in the middle of the answer becomes plain text for the
            reader, and only the ids before it keep their KV.
        tokenizer: the model's.
        finish_reason: "stop" when a stop token ended the answer; its KV is then complete, because the last
            real token was fed to the model to get the stop token. Otherwise the last token was never fed.
    """
    ids = list(output_ids)
    complete = finish_reason == "stop"
    if ids and ids[-1] in stop_ids:
        ids.pop()
        complete = True
    kv_tokens = len(ids) if complete else max(len(ids) - 1, 0)
    control = set(special_ids) | set(stop_ids)
    first = next((n for n, i in enumerate(ids) if i in control), None)
    kv_tokens = _without_last_blanks(ids, min(kv_tokens, len(ids) if first is None else first), tokenizer)
    if first is None:
        return SlotValue(token_ids=tuple(ids), kv_tokens=kv_tokens)
    encoder = TextEncoder(tokenizer)
    plain: list[int] = []
    for i in ids:
        plain.extend(
            encoder.encode(tokenizer.decode([i], skip_special_tokens=False)) if i in control else (i,)
        )
    return SlotValue(token_ids=tuple(plain), kv_tokens=kv_tokens)


def _without_last_blanks(ids: Sequence[int], count: int, tokenizer: Any) -> int:
    """How many of the first `count` ids spell the text before its last blanks. The rest is not worth a
    segment of its own: with and without these blanks, which clients like to strip, it is then the same."""

    def spelt(upto: int) -> str:
        return tokenizer.decode(ids[:upto], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    whole = spelt(count)
    stripped = whole.rstrip()
    while count and len(stripped) < len(whole) and not stripped.startswith(spelt(count)):
        count -= 1
    return count


# -- templates --


@dataclass(frozen=True, slots=True)
class _Part:
    """Author's literal text, or a slot."""

    text: str = ""
    slot: str | None = None


def _parse(prompt_text: str) -> list[_Part]:
    try:
        fields = list(string.Formatter().parse(prompt_text))
    except ValueError as error:
        raise PipelineError(
            f"bad slot syntax: {error}. Write {{{{ and }}}} for braces that are text."
        ) from error
    parts: list[_Part] = []
    literal = ""
    for text, name, spec, conversion in fields:
        literal += text  # the parser cuts at every escaped brace; one run of text is tokenised as one
        if name is None:
            continue
        if spec or conversion or not _SLOT_NAME.fullmatch(name):
            raise PipelineError(
                f"bad slot {{{name}}}: a slot is one name, like {{solver}}. Write {{{{ and }}}} for braces "
                "that are text."
            )
        if literal:
            parts.append(_Part(literal))
        parts.append(_Part(slot=name))
        literal = ""
    if literal:
        parts.append(_Part(literal))
    return parts


class PromptBuilder:
    """Builds prompts of one model for one space of segments.

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        space: see SegmentKey.
        min_segment_tokens: a slot with fewer tokens gets no key.
        max_context: most tokens of prompt plus answer.
    """

    def __init__(self, tokenizer: Any, space: str, min_segment_tokens: int, max_context: int) -> None:
        self._tokenizer = tokenizer
        self._space = space
        self._min_tokens = min_segment_tokens
        self._max_context = max_context

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self._tokenizer)

    def template(self, system: str | None, prompt_text: str) -> PromptTemplate:
        """Render and tokenise everything that does not depend on a request.

        Args:
            system: system message, literal; None or "" leaves it to the chat template (some add a default
                one).
            prompt_text: user message with `{slots}`; `{{` and `}}` are braces.

        Raises:
            PipelineError: bad slot syntax.
            ModelError: the chat template fails, or drops, repeats or reorders the text it is given.
        """
        head = [_Part(system)] if system else []
        body = _parse(prompt_text)
        if chat_template_of(self._tokenizer) is None:
            parts = [*head, *([_Part(_JOIN)] if head else []), *body]
            return self._finish(self._pieces(_merge(parts), opening=True))
        return self._cut(*self._render(head, body))

    def raw_template(self, prompt_text: str) -> PromptTemplate:
        """As `template`, of text that is continued as it is, with no chat template around it."""
        return self._finish(self._pieces(_parse(prompt_text), opening=True))

    def chat_template(self, messages: Sequence[Message]) -> PromptTemplate:
        """As `template`, of a whole chat; the chat template decides which roles may follow each other.

        Raises:
            ModelError: the model has no chat template, or it refuses or spoils these messages.
        """
        if chat_template_of(self._tokenizer) is None:
            raise ModelError("the model has no chat template: send it a plain prompt instead of messages.")
        turns = [(m.role, _parse(m.content)) for m in messages]
        try:
            return self._cut(*self._render_chat(turns))
        except ModelError:
            if len(turns) < 2 or (turns[0][0], turns[1][0]) != ("system", "user"):
                raise
        # No system role: the system text opens the user message, as in `template`.
        opening = ("user", _merge([*turns[0][1], _Part(_JOIN), *turns[1][1]]))
        return self._cut(*self._render_chat([opening, *turns[2:]]))

    def _render_chat(self, turns: Sequence[tuple[str, list[_Part]]]) -> tuple[str, list[_Part]]:
        parts = [part for _, body in turns for part in body]
        marks = iter(_sentinels(len(parts)))
        messages = [{"role": role, "content": "".join(next(marks) for _ in body)} for role, body in turns]
        return self._checked(self._apply(messages), parts), parts

    def _cut(self, rendered: str, parts: Sequence[_Part]) -> PromptTemplate:
        """Cut a rendered template at its sentinels, and tokenise what is between them."""
        pieces: list[Piece] = []
        rest = rendered
        for sentinel, part in zip(_sentinels(len(parts)), parts, strict=True):
            before, rest = rest.split(sentinel)
            pieces.append(Piece(self._encoder.encode_trusted(before, first=not pieces)))
            pieces.extend(self._pieces([part]))
        pieces.append(Piece(self._encoder.encode_trusted(rest, first=not pieces)))
        return self._finish(pieces)

    def build(
        self,
        template: PromptTemplate,
        values: Mapping[str, SlotValue],
        max_new_tokens: int = 0,
        tenant: str = "",
    ) -> Prompt:
        """Fill the slots and tile the prompt with spans.

        A text slot is keyed as a whole (the first agent that computes it publishes it); of a spliced slot
        exactly the ids with KV are keyed, and the rest is a span of its own. The last token of a prompt is
        never part of a keyed span: a slot that ends the prompt gives it up and keeps its key.

        Raises:
            PipelineError: a value is missing or unknown, or the prompt has no token at all.
            PromptTooLong: prompt plus `max_new_tokens` exceeds the model's context.
        """
        _check_values(template.slots, values)
        filled = {name: self._fill(values[name]) for name in template.slots}
        space = tenant_space(self._space, tenant)
        ids: list[int] = []
        spans: list[Span] = []
        for piece in template.pieces:
            runs = [(piece.token_ids, False)] if piece.slot is None else filled[piece.slot]
            for run, keyed in runs:
                if run:
                    key = SegmentKey(space, digest_tokens(run)) if keyed else None
                    spans.append(Span(len(ids), len(ids) + len(run), piece.slot, key))
                    ids.extend(run)
        if not ids:
            raise PipelineError(
                "the prompt is empty: it has no text and every slot is empty. Add text to the prompt."
            )
        if len(ids) + max_new_tokens > self._max_context:
            raise PromptTooLong(self._too_long(len(ids), max_new_tokens, spans))
        return Prompt(tuple(ids), tuple(self._free_last_token(spans)))

    def known(
        self, template: PromptTemplate, values: Mapping[str, SlotValue], open_slots: AbstractSet[str]
    ) -> tuple[int, ...]:
        """Ids of the prompt up to where the first of `open_slots` may still grow: whatever the open slots
        will hold in the end, `build` begins with them.

        Raises:
            PipelineError: a value is missing or unknown.
        """
        _check_values(template.slots, values)
        ids: list[int] = []
        for piece in template.pieces:
            if piece.slot is None:
                ids.extend(piece.token_ids)
            elif piece.slot in open_slots and values[piece.slot].token_ids is None:
                break  # a text that grows may be tokenised otherwise
            else:
                for run, _ in self._fill(values[piece.slot]):
                    ids.extend(run)
                if piece.slot in open_slots:
                    break
        return tuple(ids)

    def _fill(self, value: SlotValue) -> list[tuple[tuple[int, ...], bool]]:
        """Runs of ids of a slot, and whether each is keyed."""
        if value.token_ids is None:
            ids = self._encoder.encode(value.text or "")
            return [(ids, len(ids) >= self._min_tokens)]
        if value.kv_tokens < self._min_tokens:
            return [(value.token_ids, False)]
        return [(value.token_ids[: value.kv_tokens], True), (value.token_ids[value.kv_tokens :], False)]

    def _free_last_token(self, spans: list[Span]) -> list[Span]:
        last = spans[-1]
        if last.key is None:
            return spans
        tail = Span(last.stop - 1, last.stop, last.slot)
        if len(last) - 1 < self._min_tokens:
            return [*spans[:-1], Span(last.start, last.stop, last.slot)]
        # The key is still that of the whole segment: a reader may use fewer tokens than a segment has.
        return [*spans[:-1], Span(last.start, last.stop - 1, last.slot, last.key), tail]

    def _too_long(self, tokens: int, max_new_tokens: int, spans: Sequence[Span]) -> str:
        sizes: dict[str, int] = {}
        for span in spans:
            if span.slot is not None:
                sizes[span.slot] = sizes.get(span.slot, 0) + len(span)
        longest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        slots = ", ".join(f"{{{name}}} {size}" for name, size in longest) or "none"
        return (
            f"the prompt has {tokens} tokens and the answer may have {max_new_tokens}, together more than "
            f"the model's context of {self._max_context}. Longest slots: {slots}. Shorten the inputs, lower "
            "max_new_tokens (of this agent or of those before it), or take a model with a longer context."
        )

    def _pieces(self, parts: Sequence[_Part], *, opening: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            encode = self._encoder.encode_first if opening and not pieces else self._encoder.encode
            pieces.append(Piece(slot=part.slot) if part.slot is not None else Piece(encode(part.text)))
        return pieces

    def _finish(self, pieces: Sequence[Piece]) -> PromptTemplate:
        """Put the beginning-of-sequence token first where the tokenizer would and the template does not; join
        neighbouring fixed pieces, so that they make one span."""
        joined: list[Piece] = []
        for piece in [Piece(self._bos(pieces)), *pieces]:
            if piece.slot is None and joined and joined[-1].slot is None:
                joined[-1] = Piece(joined[-1].token_ids + piece.token_ids)
            elif piece.slot is not None or piece.token_ids:
                joined.append(piece)
        return PromptTemplate(tuple(joined))

    def _bos(self, pieces: Sequence[Piece]) -> tuple[int, ...]:
        bos: int | None = self._tokenizer.bos_token_id
        with ENCODING:
            added = list(self._tokenizer.encode(""))[:1]
        if bos is None or added != [bos]:
            return ()
        first = next((p for p in pieces if p.slot is not None or p.token_ids), None)
        written = first is not None and first.token_ids[:1] == (bos,)
        return () if written else (bos,)

    def _render(self, head: list[_Part], body: list[_Part]) -> tuple[str, list[_Part]]:
        """The rendered template with sentinels, and the part that each of them stands for, in order."""
        split = len(head)
        marks = "".join(_sentinels(split + len(body)))
        user = {"role": "user", "content": marks[split:]}
        if not head:
            return self._checked(self._apply([user]), body), body
        parts = [*head, *body]
        try:
            rendered = self._apply([{"role": "system", "content": marks[:split]}, user])
            return self._checked(rendered, parts), parts
        except ModelError:
            # No system role (Gemma 2 raises, others drop it): the system text opens the user message.
            folded = _merge([*head, _Part(_JOIN), *body])
            content = "".join(_sentinels(len(folded)))
            return self._checked(self._apply([{"role": "user", "content": content}]), folded), folded

    def _apply(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            raise ModelError(
                f"the model's chat template fails: {error}. Mend it in the tokenizer's folder."
            ) from error

    def _checked(self, rendered: str, parts: Sequence[_Part]) -> str:
        marks = _sentinels(len(parts))
        found = [c for c in rendered if c in set(marks)]
        if found != marks:
            fault = (
                "drops" if len(found) < len(marks) else "repeats" if len(found) > len(marks) else "reorders"
            )
            raise ModelError(
                f"the model's chat template {fault} parts of the message that it is given, so slots cannot "
                "be placed. Mend the chat template in the tokenizer's folder, or take another model."
            )
        return rendered


def _sentinels(count: int) -> list[str]:
    return [chr(_FIRST_SENTINEL + n) for n in range(count)]


def _merge(parts: Sequence[_Part]) -> list[_Part]:
    """Join neighbouring literals, so that they are tokenised as one text."""
    merged: list[_Part] = []
    for part in parts:
        if part.slot is None and merged and merged[-1].slot is None:
            merged[-1] = _Part(merged[-1].text + part.text)
        else:
            merged.append(part)
    return merged


def _check_values(slots: Sequence[str], values: Mapping[str, SlotValue]) -> None:
    if missing := [name for name in slots if name not in values]:
        raise PipelineError(
            f"no value for slot {', '.join(f'{{{n}}}' for n in missing)}. Give one for each slot."
        )
    if unknown := [name for name in values if name not in slots]:
        known = ", ".join(f"{{{n}}}" for n in slots) or "none"
        raise PipelineError(
            f"value for {', '.join(unknown)}, but the prompt has no such slot. Its slots: {known}."
        )
