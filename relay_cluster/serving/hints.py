"""`relay.next`: what a client says of the request that will follow its answer, as pydantic models.

    "next": {"agent": "solver", "max_tokens": 64, "messages": [
        {"role": "system", "content": "You solve problems."},
        {"role": "user", "content": ["Plan:\\n\\n", {"relay_slot": "this"}, "\\n\\nFollow the plan."]}]}

`{"relay_slot": "this"}` stands where this answer's text will be.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from relay_cluster.serving.memory import ChatText

_STRICT = ConfigDict(extra="ignore", strict=True)
_MOST_MESSAGES = 4096
_MOST_PARTS = 4096
MOST_HINTS = 4
ROLES = {"developer": "system", "function": "tool"}
"""Roles that are another's."""


class AnswerSlot(BaseModel):
    """Where the text of this request's answer will stand."""

    model_config = _STRICT
    relay_slot: Literal["this"]


class NextText(BaseModel):
    """A part of a message that is known."""

    model_config = _STRICT
    type: Literal["text"] = "text"
    text: str


def _as_parts(value: object) -> object:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list):
        return parts
    return [{"text": part} if isinstance(part, str) else part for part in parts]


_Part = AnswerSlot | NextText
_Written = str | Annotated[list[str | _Part], Field(max_length=_MOST_PARTS)]


class NextMessage(BaseModel):
    """A message of the next request; its parts are put together without anything between them."""

    model_config = _STRICT
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        list[_Part],
        Field(max_length=_MOST_PARTS),
        BeforeValidator(_as_parts, json_schema_input_type=_Written),
    ]


_SLOT_RULE: dict[str, Any] = {
    "properties": {
        "messages": {
            "contains": {
                "properties": {
                    "content": {"type": "array", "contains": {"type": "object", "required": ["relay_slot"]}}
                },
                "required": ["content"],
            }
        }
    }
}
"""What `NextRequest._has_a_slot` asks for, for the published schema."""


class NextRequest(BaseModel):
    """The request that is expected to contain this request's answer.

    Attributes:
        messages: as it will have them.
        agent, pipeline: as it will have them in its own `relay`; where only the agent is named, the pipeline
            is this request's.
        max_tokens: as it will have it; default: serve.default_max_tokens. One that asks for more cannot use
            what was prepared.
    """

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra={"allOf": [_SLOT_RULE]})
    messages: Annotated[list[NextMessage], Field(min_length=1, max_length=_MOST_MESSAGES)]
    agent: Annotated[str, Field(max_length=128)] | None = None
    pipeline: Annotated[str, Field(max_length=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _has_a_slot(self) -> NextRequest:
        if not any(isinstance(part, AnswerSlot) for m in self.messages for part in m.content):
            raise PydanticCustomError(
                "missing",
                "no part is {slot}, where the answer would stand",
                {"slot": '{"relay_slot": "this"}'},
            )
        return self

    def split(self) -> tuple[tuple[ChatText, ...], tuple[ChatText, ...]]:
        """The texts before the first slot, and those behind it; what stands behind a second one is not
        known."""
        head: list[ChatText] = []
        tail: list[ChatText] = []
        found = False
        for message in self.messages:
            role, text = ROLES.get(message.role, message.role), ""
            for part in message.content:
                if isinstance(part, NextText):
                    text += part.text
                elif found:
                    return tuple(head), (*tail, ChatText(role, text))
                else:
                    head.append(ChatText(role, text))
                    found, text = True, ""
            (tail if found else head).append(ChatText(role, text))
        return tuple(head), tuple(tail)


def _as_hints(value: object) -> object:
    """One is a list of one."""
    return value if value is None or isinstance(value, list) else [value]


_Several = Annotated[list[NextRequest], Field(max_length=MOST_HINTS)]
_NextWritten = NextRequest | _Several | None  # pyright: ignore[reportOperatorIssue]
Next = Annotated[
    list[NextRequest] | None,
    Field(max_length=MOST_HINTS),
    BeforeValidator(_as_hints, json_schema_input_type=_NextWritten),
]
"""One or a few requests, each of which is expected to contain the answer."""
