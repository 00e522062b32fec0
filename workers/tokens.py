"""Turns token ids into text while they arrive, giving out only what can no longer change.

A character may be split over tokens, and some tokenizers decode a token differently in company. This module
knows nothing of models, and not when an answer ends.
"""

from __future__ import annotations

import re
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenStream:
    """Incremental detokeniser of one answer.

    All that `push` and `finish` return, joined, is `tokenizer.decode(ids, skip_special_tokens=...,
    clean_up_tokenization_spaces=False)` of all ids. (Cleaning up moves blanks of text already given out.)

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if not skip_special_tokens:
            self._skipped = frozenset()
        self._ids: list[int] = []
        self._window = 0  # first id that is still decoded: the context of the next text
        self._given = 0  # ids before this one have been given out
        self._text = ""

    @property
    def text(self) -> str:
        """All text given out so far."""
        return self._text

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is final with it, often "" in the middle of a character."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        # Byte-fallback tokenizers decode a run of byte tokens as a whole: nothing of it is final before it
        # ends.
        if _BYTE_TOKEN.fullmatch(self._tokenizer.convert_ids_to_tokens(token_id) or ""):
            return ""
        before = self._decode(self._ids[self._window : self._given])
        now = self._decode(self._ids[self._window :])
        if now.endswith(_REPLACEMENT) or not now.startswith(before):
            return ""
        self._window, self._given = self._given, len(self._ids)
        return self._give(now[len(before) :])

    def finish(self) -> str:
        """The rest, with U+FFFD for a character that was never completed. Call once, after the last token."""
        whole = self._decode(self._ids)
        self._given = self._window = len(self._ids)
        return self._give(whole[len(self._text) :])

    def _give(self, text: str) -> str:
        self._text += text
        return text

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
