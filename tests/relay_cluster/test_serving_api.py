"""What clients get for requests that cannot be answered: the right status, OpenAI's shape, a service that
goes on. No worker is started: these requests end before one is asked.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from relay_cluster import Cluster, ClusterConfig
from relay_cluster.serving.answering import Answering
from relay_cluster.serving.api import build_app
from relay_cluster.serving.app import make_app
from relay_cluster.serving.errors import api_error
from relay_cluster.serving.places import Places
from relay_cluster.serving.schemas import ChatRequest, CompletionRequest, parse
from relay_cluster.serving.service import Service
from relay_cluster.serving.settings import ServeSettings
from relay_cluster.serving.tenants import Tenants, load_tenants
from transport.errors import CacheFull, ConfigError, DeadlineExceeded, PromptTooLong, RelayError, WorkerLost

MODEL = ClusterConfig().model
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
KEY = "sk-test"
TENANTS = Tenants({hashlib.sha256(KEY.encode()).hexdigest(): "acme"})

pytestmark = pytest.mark.asyncio


async def _healthy() -> dict[str, Any]:
    return {"status": "ok"}


@pytest_asyncio.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    cluster = Cluster(ClusterConfig())  # never started: it has no workers
    settings = ServeSettings(max_body_bytes=200_000, body_timeout_s=0.2)
    places = Places(running=1, max_waiting=0, queue_timeout_s=1.0)
    answering = Answering(cluster, threads=1, max_agents=10, max_retries=0)
    service = Service(settings, [MODEL], answering, places)
    app = build_app(service, TENANTS, _healthy)
    transport = httpx.ASGITransport(app=app)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as made:
        yield made
    service.close()


def chat(**changes: Any) -> dict[str, Any]:
    return {**CHAT, **changes}


def message(**fields: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "Hello", **fields}])


def check_shape(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


BAD_BODIES: list[tuple[dict[str, Any], str, str]] = [
    ({"model": MODEL}, "messages", "missing_required_parameter"),
    ({"messages": CHAT["messages"]}, "model", "missing_required_parameter"),
    (chat(messages=[]), "messages", "invalid_value"),
    (chat(messages=[{"role": "user", "content": ""}] * 4097), "messages", "invalid_value"),
    (chat(messages="Hello"), "messages", "invalid_value"),
    (message(role="wizard"), "messages[0].role", "invalid_value"),
    (message(content=None), "messages[0]", "missing_required_parameter"),
    (message(content=[{"type": "image_url"}]), "messages[0].content[0].type", "invalid_value"),
    (message(role="assistant", tool_calls=[{"id": "1"}]), "tool_calls", "unsupported_parameter"),
    (chat(temperature=3), "temperature", "invalid_value"),
    (chat(temperature="hot"), "temperature", "invalid_value"),
    (chat(top_p=-1), "top_p", "invalid_value"),
    (chat(max_tokens=0), "max_tokens", "invalid_value"),
    (chat(n=2), "n", "unsupported_parameter"),
    (chat(tools=[{"type": "function"}]), "tools", "unsupported_parameter"),
    (chat(response_format={"type": "json_object"}), "response_format", "unsupported_parameter"),
    (chat(logit_bias={"50256": -100}), "logit_bias", "unsupported_parameter"),
    (chat(stop=["a"] * 5), "stop", "invalid_value"),
    (chat(top_logprobs=3), "body", "invalid_value"),
    (chat(max_tokens="5"), "max_tokens", "invalid_value"),
    (chat(max_tokens=5.5), "max_tokens", "invalid_value"),
    (chat(stream="true"), "stream", "invalid_value"),
    (chat(seed=True), "seed", "invalid_value"),
    (chat(n=True), "n", "unsupported_parameter"),
    (chat(echo=0.0), "echo", "unsupported_parameter"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "invalid_value"),
    (chat(relay={"reuse": "magic"}), "relay.reuse", "invalid_value"),
    (chat(relay={"reuse": "anchor"}), "relay.reuse", "invalid_value"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD_BODIES)
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, body: dict[str, Any], param: str, code: str
) -> None:
    response = await client.post("/v1/chat/completions", json=body)
    error = check_shape(response)
    assert response.status_code == 400, error
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    assert error["param"] == (None if param == "body" else param)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"[1, 2]", 400, "invalid_json"),
        (b"[" * 10_000, 400, "invalid_json"),
        (json.dumps(chat(temperature=float("nan"))).encode(), 400, "invalid_json"),
        (b'{"model": "\xff"}', 400, "invalid_utf8"),
        (json.dumps(message(content="half \ud800 pair")).encode(), 400, "invalid_utf8"),
        (b" " * 200_001, 413, "body_too_large"),
        (json.dumps(chat(model="gpt-4")).encode(), 404, "model_not_found"),
    ],
)
async def test_a_bad_body_gets_its_status(
    client: httpx.AsyncClient, content: bytes, status: int, code: str
) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        if code in ("model_not_found", "invalid_utf8") and path == "/v1/completions":
            continue
        response = await client.post(path, content=content)
        error = check_shape(response)
        assert (response.status_code, error["code"]) == (status, code)


@pytest.mark.parametrize(
    ("declared", "status"),
    [
        ("application/json; charset=utf-8", 400),
        ("application/vnd.api+json", 400),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("json", 415),
    ],
)
async def test_a_body_must_not_say_that_it_is_something_else(
    client: httpx.AsyncClient, declared: str, status: int
) -> None:
    headers = {"Content-Type": declared}
    response = await client.post("/v1/chat/completions", content=b"{", headers=headers)
    assert response.status_code == status
    check_shape(response)


async def test_a_body_of_unknown_length_is_cut_off_at_the_limit(client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 4096
            yield b" " * 4096

    response = await client.post("/v1/chat/completions", content=endless())
    assert response.status_code == 413
    assert sent <= 200_000 + 2 * 4096


async def test_a_client_that_sends_its_body_slowly_is_sent_away(client: httpx.AsyncClient) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    response = await client.post("/v1/chat/completions", content=slow())
    assert (response.status_code, check_shape(response)["code"]) == (408, "timeout")


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic c2stdGVzdA==", "Bearer", f"bearer  {KEY}x"])
async def test_without_a_known_key_nothing_is_told(client: httpx.AsyncClient, header: str | None) -> None:
    headers = {"Authorization": header} if header else {}
    client.headers.pop("Authorization")
    for method, path in (
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
    ):
        response = await client.request(method, path, headers=headers, content=b"{")
        error = check_shape(response)
        assert (response.status_code, error["type"]) == (401, "authentication_error")
        assert error["code"] == "invalid_api_key"


async def test_other_paths_and_methods_have_openais_shape(client: httpx.AsyncClient) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/gpt-4", 404),
    ):
        response = await client.request(method, path)
        assert response.status_code == status
        check_shape(response)


async def test_no_worker_is_told_and_the_service_goes_on(client: httpx.AsyncClient) -> None:
    for _ in range(3):  # places are given back: the queue has room for one
        response = await client.post("/v1/chat/completions", json=CHAT)
        assert response.status_code == 503
        assert response.headers["Retry-After"].isdigit()
        assert check_shape(response)["code"] == "worker_lost"
    models = (await client.get("/v1/models")).json()
    assert [m["id"] for m in models["data"]] == [MODEL]
    assert (await client.get("/healthz")).status_code == 200
    metrics = (await client.get("/metrics")).text
    assert 'relay_requests_total{endpoint="chat",status="503"} 3.0' in metrics
    assert "acme" not in metrics


async def test_unknown_fields_are_ignored_and_null_is_no_value() -> None:
    body = chat(magic=1, n=None, tools=[], temperature=None, stop="", store=True, user="u", metadata={})
    parsed = parse(json.dumps(body).encode(), ChatRequest)
    assert parsed.stops == ()
    assert parsed.scored is None


async def test_fields_mean_what_they_mean_to_openai() -> None:
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"role": "developer", "content": "x"}, {"role": "user", "content": texts}, {"role": "assistant"}]
    body = chat(messages=turns, max_tokens=5, max_completion_tokens=7, logprobs=True, stop=["\n", "END"])
    parsed = parse(json.dumps(body).encode(), ChatRequest)
    assert [m.text() for m in parsed.messages] == [("system", "x"), ("user", "ab"), ("assistant", "")]
    assert (parsed.limit, parsed.scored, parsed.stops) == (7, 0, ("\n", "END"))
    plain = parse(json.dumps({"model": MODEL, "prompt": ["once"], "logprobs": 2}).encode(), CompletionRequest)
    assert (plain.text, plain.limit, plain.scored) == ("once", None, 2)
    whole = parse(json.dumps(chat(max_tokens=4.0, seed=-1.0)).encode(), ChatRequest)
    assert (whole.limit, whole.seed) == (4, -1), "JSON knows no other whole numbers"


async def test_the_schema_of_the_api_is_published(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rsplit("/", 1)[-1]
    assert "messages" in schema["components"]["schemas"][name]["properties"]
    text = json.dumps(schema)
    for ref in {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}:
        assert ref in schema["components"]["schemas"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (PromptTooLong("long"), 400, "context_length_exceeded"),
        (ConfigError("bad"), 400, None),
        (CacheFull("full"), 503, "overloaded"),
        (DeadlineExceeded("late"), 504, "timeout"),
        (WorkerLost("gone"), 503, "worker_lost"),
        (RelayError("odd"), 500, "engine_error"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)
async def test_our_errors_have_a_status(error: Exception, status: int, code: str | None) -> None:
    found = api_error(error)
    assert (found.status, found.code) == (status, code)
    assert "secret" not in json.dumps(found.body())


async def test_keys_are_read_as_digests_only(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"one").hexdigest()
    file.write_text(f"keys:\n  - {{tenant: acme, sha256: {digest}}}\n")
    tenants = Tenants.load(file)
    assert (tenants.of("Bearer one"), tenants.of("Bearer two"), tenants.of(None)) == ("acme", None, None)
    for text in ("keys: []", "keys:\n  - {tenant: a, key: one}", "keys:\n  - {tenant: a, sha256: one}", "["):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"keys|sha256|cannot be read"):
            Tenants.load(file)


async def test_others_than_this_machine_are_served_with_keys_only() -> None:
    with pytest.raises(ConfigError, match="api_keys_file"):
        load_tenants(ServeSettings(), "0.0.0.0")
    assert load_tenants(ServeSettings(), "127.0.0.1").of(None) == ""
    assert load_tenants(ServeSettings(), "::1").open


async def test_a_service_without_workers_is_not_healthy() -> None:
    app = make_app(Cluster(ClusterConfig()), Tenants({}))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        response = await client.get("/healthz")
    assert response.status_code == 503
