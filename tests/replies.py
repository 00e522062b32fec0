"""Replies as workers give them, for tests of what is done with replies."""

from __future__ import annotations

from typing import Any

from transport.types import NodeId, WorkerId
from workers.messages import Reply, Request, StageTimes
from workers.segment import SlotValue


def make_reply(worker: WorkerId, request: Request, *, model: str, text: str, **facts: Any) -> Reply:
    """A reply that relayed nothing. facts: fields that are to be otherwise."""
    common: dict[str, Any] = {
        "node": NodeId("n"),
        "prompt_tokens": 3,
        "fresh_tokens": 3,
        "relayed_tokens": 0,
        "prefix_tokens": 0,
        "fresh_entries": 9,
        "recomputed_entries": 0,
        "relayed_entries": 0,
        "ttft_s": 0.4,
        "decode_s": 0.1,
        "stages": StageTimes(),
        "transfers": (),
        "fallbacks": (),
        "published": (),
        "token_ids": (1,),
        "output": SlotValue(text=text),
        "finish_reason": "stop",
    }
    of = {"request_id": request.id, "agent": request.agent, "method": request.method}
    return Reply(worker=worker, model=model, text=text, **{**common, **of, **facts})
