"""What goes back to clients: chat completions, completions, their chunks, and the reuse report."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from relay_cluster.serving.errors import ApiError
from relay_cluster.serving.service import Finished
from workers.messages import Token, TokenScore

DONE = b"data: [DONE]\n\n"


class Form(Protocol):
    """How one route writes its answers."""

    def whole(self, text: str, tokens: Sequence[Token], done: Finished) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        ...

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        ...

    def piece(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A chunk of text."""
        ...

    def ending(self, done: Finished, *, usage: bool) -> list[dict[str, Any]]:
        """Chunks after the last token."""
        ...


def event(data: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage_of(done: Finished) -> dict[str, Any]:
    """OpenAI's usage; cached are the tokens that were not computed: relayed, or in the prefix cache."""
    reply = done.reply
    answer = len(reply.token_ids)
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": answer,
        "total_tokens": reply.prompt_tokens + answer,
        "prompt_tokens_details": {"cached_tokens": reply.relayed_tokens + reply.prefix_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def reuse_report(done: Finished) -> dict[str, Any]:
    """What was found and reused, and where the time went; the `relay` field of every answer."""
    reply = done.reply
    relayed = {cost.slot: cost.relayed for cost in reply.span_costs}
    ids = {found.slot: found.id for found in done.prompt.found}
    stages: dict[str, float] = {k: getattr(reply.stages, k) for k in reply.stages.__slots__}
    return {
        "segment": done.segment,
        "agent": reply.agent,
        "worker": reply.worker,
        "method": reply.resolved_method or reply.method,
        "relayed_tokens": reply.relayed_tokens,
        "prefix_tokens": reply.prefix_tokens,
        "prepared_tokens": reply.prepared_tokens,
        "computed_tokens": reply.fresh_tokens - reply.prefix_tokens,
        "reuse": reply.reuse,
        "found": [
            {"id": f.id, "kind": f.kind, "chars": f.chars, "relayed": relayed.get(f.slot, False)}
            for f in done.prompt.found
        ],
        "fallbacks": [
            {"id": ids.get(f.slot), "reason": f.reason, "tokens": f.tokens} for f in reply.fallbacks
        ],
        "ttft_s": done.ttft_s,
        "worker_ttft_s": reply.ttft_s,
        "service_queue_s": done.queue_s,
        "matching_s": done.match_s,
        "stages": stages,
    }


class _Form(ABC):
    """What the two routes have in common."""

    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": f"{self.prefix}-{request_id}", "created": int(time.time()), "model": model}

    def whole(self, text: str, tokens: Sequence[Token], done: Finished) -> dict[str, Any]:
        choice = {
            "index": 0,
            **self._said(text),
            "logprobs": self.logprobs(tokens),
            "finish_reason": done.reply.finish_reason,
        }
        return {
            "object": self.kind,
            **self._head,
            "choices": [choice],
            "usage": usage_of(done),
            "relay": reuse_report(done),
        }

    def piece(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self._chunk({**self._delta(text), "logprobs": self.logprobs(tokens), "finish_reason": None})

    def ending(self, done: Finished, *, usage: bool) -> list[dict[str, Any]]:
        reason = done.reply.finish_reason
        last = self._chunk({**self._delta(""), "logprobs": None, "finish_reason": reason})
        chunks = [{**last, "relay": reuse_report(done)}]
        if usage:
            chunks.append({**self._chunk(None), "usage": usage_of(done)})
        return chunks

    @abstractmethod
    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """The tokens' scores in this API's shape; None where nobody asked."""

    @abstractmethod
    def _said(self, text: str) -> dict[str, Any]:
        """A whole answer, as a choice has it."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """A piece of one."""

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        choices = [] if choice is None else [{"index": 0, **choice}]
        return {"object": self.chunk_kind, **self._head, "choices": choices}


class ChatForm(_Form):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk({"delta": delta, "logprobs": None, "finish_reason": None})]

    def _said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        rows = [
            {**_scored(t.score), "top_logprobs": [_scored(s) for s in t.top]}
            for t in tokens
            if t.score is not None
        ]
        return {"content": rows, "refusal": None} if rows else None


class TextForm(_Form):
    """Of /v1/completions."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def __init__(self, request_id: str, model: str) -> None:
        super().__init__(request_id, model)
        self._offset = 0

    def opening(self) -> list[dict[str, Any]]:
        return []

    def _said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        scores = [(t.score, t.top) for t in tokens if t.score is not None]
        if not scores:
            return None
        offsets: list[int] = []
        for score, _ in scores:
            offsets.append(self._offset)
            self._offset += len(score.text)
        return {
            "tokens": [score.text for score, _ in scores],
            "token_logprobs": [score.logprob for score, _ in scores],
            "top_logprobs": [{s.text: s.logprob for s in top} for _, top in scores],
            "text_offset": offsets,
        }


def _scored(score: TokenScore) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in score.text  # else a part of a character, of unknown bytes
    return {
        "token": score.text,
        "logprob": score.logprob,
        "bytes": list(score.text.encode()) if whole else None,
    }


def broken(error: ApiError) -> bytes:
    """An error after the answer has begun."""
    return event(error.body())
