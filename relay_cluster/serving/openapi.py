"""The published description of the API: /openapi.json. Requests are described by the models that parse them
(`schemas.py`); answers by the models here, which tests hold what is sent to (`replies.py` writes it).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

from relay_cluster import __version__
from relay_cluster.serving.schemas import REUSE, ChatRequest, CompletionRequest
from workers.methods import method_names

_CLOSED = ConfigDict(extra="forbid")
_REF = "#/components/schemas/{model}"
_JSON = "application/json"
_POST_ERRORS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
_RETRY = frozenset({429, 503})
_MEANING = {
    400: "The body cannot be used; `param` names the field",
    401: "The API key is missing or not known",
    404: "The model is not served",
    408: "The body did not come in time",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    429: "Too many requests wait",
    500: "The service failed",
    503: "Nobody can answer now",
    504: "The answer took too long",
}


class Problem(BaseModel):
    """What is wrong and what to do. code: for programs; param: the field that it is about."""

    model_config = _CLOSED
    message: str
    type: Literal[
        "authentication_error", "not_found_error", "rate_limit_error", "server_error", "invalid_request_error"
    ]
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error, as OpenAI's API shapes it."""

    model_config = _CLOSED
    error: Problem


class PromptDetails(BaseModel):
    """cached_tokens: not computed, because relayed or in the prefix cache."""

    model_config = _CLOSED
    cached_tokens: int


class AnswerDetails(BaseModel):
    model_config = _CLOSED
    reasoning_tokens: Literal[0]


class Usage(BaseModel):
    model_config = _CLOSED
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: AnswerDetails


class FoundText(BaseModel):
    """A remembered text that the prompt contains. chars: its length; relayed: whether its KV was reused."""

    model_config = _CLOSED
    id: str
    kind: Literal["response", "input"]
    chars: int
    relayed: bool


class FallenBack(BaseModel):
    """A text that was computed although it should be reusable."""

    model_config = _CLOSED
    id: str | None
    reason: str
    tokens: int


class RelayReport(BaseModel):
    """What was found and reused, and where the time went. segment: the answer's own id, for later requests;
    null where it cannot be relayed. Times are in seconds."""

    model_config = _CLOSED
    segment: str | None
    agent: str
    worker: str
    method: str
    relayed_tokens: int
    prefix_tokens: int
    prepared_tokens: int
    computed_tokens: int
    reuse: float | None
    found: list[FoundText]
    fallbacks: list[FallenBack]
    ttft_s: float
    worker_ttft_s: float
    service_queue_s: float
    matching_s: float
    stages: dict[str, float]


class Score(BaseModel):
    model_config = _CLOSED
    token: str
    logprob: float
    bytes: list[int] | None


class TokenScores(Score):
    """A token of the answer, and the most likely ones in its place."""

    top_logprobs: list[Score]


class ChatLogprobs(BaseModel):
    model_config = _CLOSED
    content: list[TokenScores]
    refusal: None


class TextLogprobs(BaseModel):
    model_config = _CLOSED
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class AssistantMessage(BaseModel):
    model_config = _CLOSED
    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(BaseModel):
    """What a chunk adds. role: in the first one only."""

    model_config = _CLOSED
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    model_config = _CLOSED
    index: Literal[0]
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    model_config = _CLOSED
    index: Literal[0]
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class TextChoice(BaseModel):
    model_config = _CLOSED
    index: Literal[0]
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextChunkChoice(TextChoice):
    finish_reason: FinishReason | None  # pyright: ignore[reportIncompatibleVariableOverride]


class _Answer(BaseModel):
    model_config = _CLOSED
    id: str
    created: int
    model: str


class ChatCompletion(_Answer):
    """Answer of POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice] = Field(min_length=1, max_length=1)
    usage: Usage
    relay: RelayReport


class ChatCompletionChunk(_Answer):
    """One event of a streamed chat. relay: with the finish reason. usage: in a chunk of its own after that
    one, where `stream_options.include_usage` asks for it; null in the others then."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice] = Field(max_length=1)
    usage: Usage | None = None
    relay: RelayReport | None = None


class Completion(_Answer):
    """Answer of POST /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice] = Field(min_length=1, max_length=1)
    usage: Usage
    relay: RelayReport


class CompletionChunk(_Answer):
    """One event of a streamed completion; see ChatCompletionChunk."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice] = Field(max_length=1)
    usage: Usage | None = None
    relay: RelayReport | None = None


class Model(BaseModel):
    model_config = _CLOSED
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    model_config = _CLOSED
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Whether requests can be answered."""

    status: Literal["ok", "down", "draining"]
    workers: dict[str, Literal["up", "down"]] = {}


_REQUESTS = (ChatRequest, CompletionRequest)
_ANSWERS = (
    *(ErrorBody, ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk),
    *(Model, ModelList, Health),
)


def describe(*, keys: bool) -> dict[str, Any]:
    """The OpenAPI document.

    Args:
        keys: whether the service asks for API keys.
    """
    modes: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        (kind, "validation") for kind in (*_REQUESTS, *_ANSWERS)
    ]
    _, schemas = models_json_schema(modes, ref_template=_REF)
    reuse = schemas["$defs"]["RelayOptions"]["properties"]["reuse"]
    reuse["anyOf"][0] = {"type": "string", "enum": _methods(keys=keys)}
    reuse["description"] = "A reuse method. (Methods with parameters, NAME:key=value+..., are taken as well.)"
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "relay_cluster",
            "version": __version__,
            "description": "OpenAI's API over a cluster that relays the KV cache between agents.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _post("createChatCompletion", "Answer a chat", ChatRequest, ChatCompletion)
            },
            "/v1/completions": {
                "post": _post("createCompletion", "Continue a text", CompletionRequest, Completion)
            },
            "/v1/models": {"get": _get("listModels", "The models that are served", ModelList, (401,))},
            "/v1/models/{model}": {
                "parameters": [_path_parameter("model", "name of a model")],
                "get": _get("retrieveModel", "One of them", Model, (401, 404)),
            },
            "/healthz": {
                "get": {
                    **_get("health", "200 while requests can be answered", Health, ()),
                    "responses": {
                        "200": _response("Requests can be answered", Health),
                        "503": _response("They cannot", Health),
                    },
                    "security": [],
                }
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "summary": "For Prometheus",
                    "responses": {
                        "200": {
                            "description": "In Prometheus' text format",
                            "content": {"text/plain": {"schema": {"type": "string"}}},
                        }
                    },
                    "security": [],
                }
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key"}},
        },
        "security": [{"key": []}] if keys else [{}, {"key": []}],
    }


def _methods(*, keys: bool) -> list[str]:
    """Names that `relay.reuse` may have."""
    shared = {"kvcomm", "anchor"} if keys else set[str]()  # anchors are all tenants', so nobody's
    return [name for name in (*REUSE, *method_names()) if name not in shared]


def _post(
    name: str, summary: str, request: type[BaseModel], answer: type[ChatCompletion] | type[Completion]
) -> dict[str, Any]:
    chunk = ChatCompletionChunk if answer is ChatCompletion else CompletionChunk
    whole = _response("The answer; with `stream: true` as server-sent events", answer)
    encoded = {"contentMediaType": _JSON, "contentSchema": _ref(chunk)}
    data = {"type": "string", "anyOf": [{"const": "[DONE]"}, encoded]}
    # Of each event.
    whole["content"]["text/event-stream"] = {
        "schema": {"type": "object", "required": ["data"], "properties": {"data": data}}
    }
    return {
        "operationId": name,
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: {"schema": _ref(request)}}},
        "responses": {"200": whole, **_errors(_POST_ERRORS)},
    }


def _get(name: str, summary: str, answer: type[BaseModel], errors: tuple[int, ...]) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {"200": _response(summary, answer), **_errors(errors)},
    }


def _errors(statuses: tuple[int, ...]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for status in statuses:
        out[str(status)] = _response(_MEANING[status], ErrorBody)
        if status in _RETRY:
            seconds = {"type": "integer", "minimum": 1}
            header = {"description": "Seconds after which to try again", "schema": seconds}
            out[str(status)]["headers"] = {"Retry-After": header}
    return out


def _response(description: str, kind: type[BaseModel]) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": _ref(kind)}}}


def _path_parameter(name: str, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string"},
    }


def _ref(kind: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=kind.__name__)}
