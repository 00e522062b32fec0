"""What clients send, as pydantic models. Fields that OpenAI's API does not have are ignored; those that it
has and we cannot honour are refused, so that no answer pretends.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from relay_cluster.serving.errors import ApiError
from relay_cluster.serving.hints import ROLES, Next
from relay_cluster.serving.memory import ChatText

_OPEN = ConfigDict(extra="ignore", strict=True)
"""Unknown fields are ignored; a number in quotes is no number, as OpenAI has it."""
_MOST_STOPS = 4
_MOST_MESSAGES = 4096
REUSE = {"exact": "exact_prefix", "rectify": "auto", "anchor": "kvcomm", "dense": "full_prefill"}
"""What neighbours call our methods; any of our own names is taken as well."""
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields of OpenAI's API that we do not honour -> the values beside null that ask for nothing."""


def _publish_unsupported(schema: dict[str, Any]) -> None:
    """Say in the published schema what `_refuse` does."""
    for name, harmless in _UNSUPPORTED.items():
        schema["properties"][name] = {"enum": [None, *harmless], "description": "Not supported otherwise."}
    if "top_logprobs" in schema["properties"]:
        schema.update(_LOGPROBS_RULE)


_WHOLE = ("max_tokens", "max_completion_tokens", "seed", "logprobs", "top_logprobs")


def _unsupported(name: str) -> PydanticCustomError:
    return PydanticCustomError("unsupported_parameter", "{name} is not supported here", {"name": name})


class RelayInput(BaseModel):
    """A segment that the prompt contains. role: for the client's own use."""

    model_config = _OPEN
    id: Annotated[str, Field(max_length=128)]
    role: str | None = None


class RelayOptions(BaseModel):
    """`extra_body={"relay": {...}}`.

    Attributes:
        enabled: False finds nothing and remembers nothing of this request.
        agent, pipeline: who asks; one agent's requests go to one worker. Default: told by the system message.
        reuse: a reuse method, or exact, rectify, anchor, dense.
        inputs: find only these segments; default: whatever is remembered.
        next: the request, or requests, that will contain this one's answer.
    """

    model_config = _OPEN
    enabled: bool = True
    agent: Annotated[str, Field(max_length=128)] | None = None
    pipeline: Annotated[str, Field(max_length=128)] | None = None
    reuse: Annotated[str, Field(max_length=128)] | None = None
    inputs: list[RelayInput] | None = None
    next: Next = None


class StreamOptions(BaseModel):
    model_config = _OPEN
    include_usage: bool = False


class TextPart(BaseModel):
    model_config = _OPEN
    type: Annotated[str, Field(json_schema_extra={"enum": ["text"]})]
    text: str = ""

    @field_validator("type")
    @classmethod
    def _text_only(cls, kind: str) -> str:
        if kind != "text":
            raise PydanticCustomError(
                "unsupported_content", "content of type {kind} is not supported; send text", {"kind": kind}
            )
        return kind


def _as_parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


_Content = str | list[TextPart] | None
_Stops = str | Annotated[list[str], Field(max_length=_MOST_STOPS)] | None
_Prompt = str | Annotated[list[str], Field(min_length=1, max_length=1)]


_CONTENT_RULE: dict[str, Any] = {
    "anyOf": [
        {"properties": {"role": {"const": "assistant"}}},
        {"properties": {"content": {"type": ["string", "array"]}}, "required": ["content"]},
    ]
}
"""What `ChatMessage._said` asks for, for the published schema; likewise the next one."""
_LOGPROBS_RULE: dict[str, Any] = {
    "anyOf": [
        {"properties": {"top_logprobs": {"type": "null"}}},
        {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
    ]
}


class ChatMessage(BaseModel):
    """One message. A developer's is a system message; a function's result is a tool's."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra=_CONTENT_RULE)
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[list[TextPart] | None, BeforeValidator(_as_parts, json_schema_input_type=_Content)] = (
        None
    )
    tool_calls: Annotated[list[Any], Field(json_schema_extra={"maxItems": 0})] | None = None
    function_call: Annotated[Any, Field(json_schema_extra={"type": "null"})] = None

    @model_validator(mode="after")
    def _said(self) -> ChatMessage:
        if self.tool_calls or self.function_call:
            raise _unsupported("tool_calls")
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("missing", "content is missing")
        return self

    def text(self) -> ChatText:
        role = ROLES.get(self.role, self.role)
        return ChatText(role, "".join(part.text for part in self.content or ()))


class _Sampled(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra=_publish_unsupported)
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_as_list, json_schema_input_type=_Stops)] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    relay: RelayOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name, harmless in _UNSUPPORTED.items():
            value = data.get(name) if isinstance(data, dict) else None
            # To Python False is 0; to JSON it is not.
            same = [isinstance(value, bool) is isinstance(one, bool) and value == one for one in harmless]
            if value is not None and not any(same):
                raise _unsupported(name)
        if isinstance(data, dict):  # 4.0 is a whole number to JSON
            whole = {k: int(v) for k in _WHOLE if type(v := data.get(k)) is float and v.is_integer()}
            return {**data, **whole}
        return data

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and len(value) > _MOST_STOPS:
            raise PydanticCustomError("too_long", "at most {most} stop texts", {"most": _MOST_STOPS})
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts; empty ones do not count."""
        return tuple(filter(None, self.stop or ()))


class ChatRequest(_Sampled):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=_MOST_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _asked_for(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("value", "top_logprobs needs logprobs: true")
        return self

    @property
    def scored(self) -> int | None:
        """How many most likely tokens to tell beside the one drawn; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Sampled):
    """Body of POST /v1/completions."""

    prompt: Annotated[
        list[str],
        Field(min_length=1, max_length=1),
        BeforeValidator(_as_list, json_schema_input_type=_Prompt),
    ]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def text(self) -> str:
        return self.prompt[0]

    @property
    def scored(self) -> int | None:
        """As ChatRequest.scored."""
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return self.max_tokens


def parse(body: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> Any:
    """A request's body, checked.

    Raises:
        ApiError: 400; names the first field that is wrong.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start}).", code="invalid_utf8") from None
    try:
        data = json.loads(text, parse_constant=_no_number)
        broken = _half_pair(text)
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        where = f" ({error})" if isinstance(error, (json.JSONDecodeError, _NoNumber)) else ""
        raise ApiError(400, f"the body is not JSON{where}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object.", code="invalid_json")
    if broken:
        raise ApiError(400, "a text holds half a surrogate pair.", code="invalid_utf8")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error) from None


class _NoNumber(ValueError):
    pass


def _no_number(name: str) -> float:
    raise _NoNumber(f"{name} is no number there")


def _half_pair(text: str) -> bool:
    """Whether JSON escapes spell a lone surrogate, which no tokenizer takes."""
    if "\\u" not in text:
        return False
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=True)[0]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in first["loc"]).lstrip(".")
    kind = first["type"]
    code = {"missing": "missing_required_parameter", "unsupported_parameter": kind}.get(kind, "invalid_value")
    if kind == "unsupported_parameter":
        param = first.get("ctx", {}).get("name", param)
    return ApiError(400, f"{param or 'body'}: {first['msg']}.", code=code, param=param or None)
