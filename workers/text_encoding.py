"""Text -> token ids, without text ever becoming a control token."""

from __future__ import annotations

import re
import threading
from itertools import pairwise
from typing import Any

_GUARD = "\n"
ENCODING = threading.Lock()
"""transformers keeps `split_special_tokens` as state of the shared tokenizer and releases the GIL while it
encodes: without the lock, two threads turn control tokens into text and text into control tokens."""


def _id_set(value: Any) -> set[int]:
    if value is None:
        return set()
    return {int(v) for v in value} if isinstance(value, (list, tuple, set)) else {int(value)}


def stop_token_ids(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """Ids that end an answer: the generation config's, and the tokenizer's end of sequence."""
    return frozenset(
        _id_set(getattr(generation_config, "eos_token_id", None)) | _id_set(tokenizer.eos_token_id)
    )


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that the tokenizer marks as special. Added tokens not so marked (`<think>` of Qwen3) are
    content."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


def control_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that no text of a user or author may produce: the special ones, and added tokens that the chat
    template writes, whether marked special or not."""
    source = chat_template_of(tokenizer) or ""
    written = {
        i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.content.strip() and token.content in source
    }
    return special_token_ids(tokenizer) | written


def chat_template_of(tokenizer: Any) -> str | None:
    """Source of the chat template that would be used; None when there is none."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return template.get("default")
    return template


class TextEncoder:
    """Tokenises text that is not trusted: control tokens spelt out in it stay text.

    Every text is encoded as if it stood in the middle of a prompt: SentencePiece-like tokenizers put a blank
    before the first word of whatever they are given, which would change the text at every seam.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._controls = control_token_ids(tokenizer)
        spelt = [
            tokenizer.added_tokens_decoder[i].content
            for i in self._controls
            if i in tokenizer.added_tokens_decoder
        ]
        longest_first = sorted(filter(None, spelt), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._guard = self._plain(_GUARD)
        self._needs_guard = self._plain("a") != self._plain(_GUARD + "a")[len(self._guard) :]

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of `text`, none of them a control token (the unknown token excepted)."""
        if not text:
            return ()
        ids = self._middle(text)
        if self._controls.isdisjoint(ids) or self._pattern is None:
            return tuple(ids)
        # The tokenizer recognised one all the same (an added token not marked special): cut it after its
        # first character, so that the two halves are tokenised apart.
        cuts = [match.start() + 1 for match in self._pattern.finditer(text) if len(match.group()) > 1]
        if not cuts:
            return tuple(ids)
        edges = [0, *cuts, len(text)]
        return tuple(i for a, b in pairwise(edges) for i in self.encode(text[a:b]))

    def encode_first(self, text: str) -> tuple[int, ...]:
        """As `encode`, for text that opens a prompt."""
        ids = self._plain(text)
        return tuple(ids) if self._controls.isdisjoint(ids) else self.encode(text)

    def encode_trusted(self, text: str, *, first: bool) -> tuple[int, ...]:
        """Token ids of a piece of the chat template: control tokens are parsed, none is added."""
        if self._needs_guard and not first:
            ids = self._trusted(_GUARD + text)
            if ids[: len(self._guard)] == self._guard:
                return tuple(ids[len(self._guard) :])
        return tuple(self._trusted(text))

    def _plain(self, text: str) -> list[int]:
        with ENCODING:
            return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _trusted(self, text: str) -> list[int]:
        with ENCODING:
            return self._tokenizer.encode(text, add_special_tokens=False)

    def _middle(self, text: str) -> list[int]:
        if not self._needs_guard:
            return self._plain(text)
        guarded = self._plain(_GUARD + text)
        size = len(self._guard)
        # The guard may have merged with the text ("\n" + "\n..."); then the text's own encoding is the best
        # we have.
        return guarded[size:] if guarded[:size] == self._guard else self._plain(text)
