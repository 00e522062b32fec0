"""Requests that cannot be answered, whatever carries HTTP, and what they must get."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

from workers.settings import DEFAULT_MODEL

CHAT: dict[str, Any] = {
    "model": DEFAULT_MODEL,
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 1,
}
DEADLINE_S = 30.0
_POST = "/v1/chat/completions"


def _chat(**changes: Any) -> bytes:
    return json.dumps({**CHAT, **changes}).encode()


def _says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@dataclass(frozen=True)
class Bad:
    """A request, and the status and code that it must get."""

    status: int
    code: str | None
    content: bytes = b""
    method: str = "POST"
    path: str = _POST
    headers: dict[str, str] = field(default_factory=dict[str, str])


BAD = {
    "not JSON": Bad(400, "invalid_json", b'{"model": '),
    "nothing": Bad(400, "invalid_json"),
    "a list": Bad(400, "invalid_json", b"[]"),
    "deep": Bad(400, "invalid_json", b'{"a":' * 100_000),
    "deep list": Bad(400, "invalid_json", b"[" * 900_000),
    "not UTF-8": Bad(400, "invalid_utf8", b'{"model": "\xff\xfe"}'),
    "half a pair": Bad(400, "invalid_utf8", _chat(messages=_says("\ud800"))),
    "NaN": Bad(400, "invalid_json", _chat(temperature=float("nan"))),
    "infinite": Bad(400, "invalid_json", _chat(temperature=float("inf"))),
    "too large a number": Bad(
        400, "invalid_value", _chat().replace(b'"max_tokens": 1', b'"temperature": 1e999')
    ),
    "a number of 10,000 digits": Bad(400, "invalid_json", _chat().replace(b": 1", b": 1" + b"0" * 10_000)),
    "a number in quotes": Bad(400, "invalid_value", _chat(max_tokens="1")),
    "more tokens than there are": Bad(400, "context_length_exceeded", _chat(max_tokens=10**30)),
    "no tokens": Bad(400, "invalid_value", _chat(max_tokens=0)),
    "too long a prompt": Bad(400, "context_length_exceeded", _chat(messages=_says("sheep " * 9000))),
    "five stops": Bad(400, "invalid_value", _chat(stop=list("abcde"))),
    "a role that is none": Bad(400, "invalid_value", _chat(messages=[{"role": "wizard", "content": "x"}])),
    "no messages": Bad(400, "invalid_value", _chat(messages=[])),
    "two answers": Bad(400, "unsupported_parameter", _chat(n=2)),
    "tools": Bad(400, "unsupported_parameter", _chat(tools=[{"type": "function"}])),
    "echo": Bad(
        400,
        "unsupported_parameter",
        json.dumps({"model": DEFAULT_MODEL, "prompt": "a", "echo": True}).encode(),
        path="/v1/completions",
    ),
    "a suffix": Bad(
        400,
        "unsupported_parameter",
        json.dumps({"model": DEFAULT_MODEL, "prompt": "a", "suffix": "b"}).encode(),
        path="/v1/completions",
    ),
    "another model": Bad(404, "model_not_found", _chat(model="gpt-4")),
    "another model's name": Bad(404, "model_not_found", method="GET", path="/v1/models/gpt-4"),
    "huge": Bad(413, "body_too_large", b" " * (5 << 20)),
    "not said to be JSON": Bad(
        415, "unsupported_media_type", _chat(), headers={"Content-Type": "text/plain"}
    ),
    "nowhere": Bad(404, None, _chat(), path="/v1/embeddings"),
    "another method": Bad(405, None, method="DELETE"),
}


def check_bad_requests(url: str, key: str | None) -> None:
    """Send each of them; after each the service must be as it was.

    Args:
        key: of the service; None where it asks for none.
    """
    authorized = {"Authorization": f"Bearer {key}"} if key else {}
    wanted = dict(BAD)
    if key:
        wanted["another's key"] = Bad(401, "invalid_api_key", _chat(), headers={"Authorization": "Bearer x"})
        wanted["no key"] = Bad(401, "invalid_api_key", _chat(), headers={"Authorization": ""})
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
        for name, bad in wanted.items():
            headers = {"Content-Type": "application/json", **authorized, **bad.headers}
            response = client.request(bad.method, bad.path, content=bad.content, headers=headers)
            assert response.status_code == bad.status, (name, response.text)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, name
            assert (error["code"], bool(error["message"])) == (bad.code, True), (name, error)
        response = client.post(
            _POST, content=_chat(), headers={"Content-Type": "application/json", **authorized}
        )
        assert response.status_code == 200, response.text
        assert client.get("/healthz").json()["status"] == "ok"
