"""HTTP: routes, keys, bodies and who went away. The same ASGI app runs under uvicorn and under Ray Serve."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from relay_cluster.serving.board import Board, Picture, no_picture
from relay_cluster.serving.errors import ApiError, api_error
from relay_cluster.serving.expecting import Hint
from relay_cluster.serving.following import followed
from relay_cluster.serving.hints import NextRequest
from relay_cluster.serving.openapi import describe
from relay_cluster.serving.recent import Recent
from relay_cluster.serving.replies import DONE, ChatForm, Form, TextForm, broken, event
from relay_cluster.serving.schemas import REUSE, ChatRequest, CompletionRequest, parse
from relay_cluster.serving.service import Ask, Finished, Service, opening_name, random_seed, raw_text
from relay_cluster.serving.tenants import Tenants
from relay_cluster.tracing import Trace, Tracing
from transport.errors import RelayError
from workers.messages import Token
from workers.settings import SamplingSettings

log = logging.getLogger(__name__)

T = TypeVar("T")
Body = ChatRequest | CompletionRequest
Source = AsyncGenerator[Token | Finished, None]
Healthy = Callable[[], Awaitable[dict[str, Any]]]

_CLIENT_GONE = 499
_LEAST_TOP_P = 1e-9


def build_app(
    service: Service,
    tenants: Tenants,
    healthy: Healthy,
    on_close: Callable[[], None] | None = None,
    *,
    picture: Picture = no_picture,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI app.

    Args:
        service: answers.
        tenants: whose keys are taken.
        healthy: facts for /healthz; its "status" is "ok" where requests can be answered.
        on_close: called in a thread at the very end.
        picture: of the cluster, for the live page.
        tracing: makes the requests' traces; None: none. Closed at the end.
    """
    tracing = tracing or Tracing()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await service.drain()
            await asyncio.to_thread(service.close)
            await asyncio.to_thread(tracing.close)
            if on_close is not None:
                await asyncio.to_thread(on_close)

    app = FastAPI(title="relay_cluster", version="1", lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    routes = _Routes(service, tenants, healthy, tracing, picture)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", routes.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", routes.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model:path}", routes.model, methods=["GET"], response_model=None)
    app.add_api_route("/healthz", routes.healthz, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", routes.metrics, methods=["GET"], response_model=None)
    routes.board.add_to(app)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.openapi = functools.cache(lambda: describe(keys=not tenants.open))
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    found = api_error(error)
    return JSONResponse(found.body(), found.status, headers=found.headers())


async def _http_error(_: Request, error: Exception) -> Response:
    """Unknown paths and methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{error.detail}.")
    return JSONResponse(found.body(), error.status_code, headers=error.headers)


class _Routes:
    def __init__(
        self, service: Service, tenants: Tenants, healthy: Healthy, tracing: Tracing, picture: Picture
    ) -> None:
        self._tracing = tracing
        self._service = service
        self._tenants = tenants
        self._healthy = healthy
        self._scraping = asyncio.Lock()
        self._recent = Recent(service.settings.recent_requests, service.models)
        self.board = Board(self._recent, service, picture, self._tenant)

    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        return await self._post(request, ChatRequest, ChatForm, "chat")

    async def complete(self, request: Request) -> Response:
        """Continue a text."""
        return await self._post(request, CompletionRequest, TextForm, "completions")

    async def models(self, request: Request) -> Response:
        """The models that are served."""
        self._tenant(request)
        return JSONResponse({"object": "list", "data": [self._model(m) for m in self._service.models]})

    async def model(self, request: Request, model: str) -> Response:
        """One of them."""
        self._tenant(request)
        if model not in self._service.models:
            raise ApiError(404, f'model "{model}" is not served.', code="model_not_found", param="model")
        return JSONResponse(self._model(model))

    async def healthz(self) -> Response:
        """200 while requests can be answered, else 503."""
        facts = await self._healthy()
        if self._service.places.draining:
            facts = {**facts, "status": "draining"}
        return JSONResponse(facts, 200 if facts["status"] == "ok" else 503)

    async def metrics(self) -> Response:
        """For Prometheus."""
        async with self._scraping:  # it asks the workers: one thread at a time is enough for that
            self._service.observe()
            text = await asyncio.to_thread(self._service.metrics.text)
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._service.started, "owned_by": "relay_cluster"}

    def _tenant(self, request: Request) -> str:
        tenant = self._tenants.of(request.headers.get("authorization"))
        if tenant is None:
            raise ApiError(
                401,
                'the API key is missing or not known. Send "Authorization: Bearer KEY".',
                code="invalid_api_key",
            )
        return tenant

    async def _post(
        self, request: Request, kind: type[Body], form: type[ChatForm] | type[TextForm], name: str
    ) -> Response:
        trace = self._start_trace(request)
        try:
            tenant = self._tenant(request)
            self._service.metrics.admitted(tenant)
            _check_json(request)
            body: Any = parse(await self._read(request), kind)
            response = await self._respond(request, body, self._ask(body, tenant, trace), form)
        except ClientDisconnect:
            self._service.metrics.counter("relay_cancelled_requests_total").inc()
            response = Response(status_code=_CLIENT_GONE)
        except (ApiError, RelayError) as error:
            response = await self._failed(request, error, trace)
        except Exception as error:
            log.exception("a request failed")
            response = await self._failed(request, error, trace)
        status = response.status_code
        self._service.metrics.counter("relay_requests_total", name, str(status)).inc()
        if trace.live:
            response.headers["traceparent"] = trace.traceparent
        if not isinstance(response, _EventStream):  # which ends it itself
            trace.end(status)
        return response

    def _start_trace(self, request: Request) -> Trace:
        path = request.url.path
        facts = {"http.request.method": request.method, "http.route": path}
        return self._tracing.start(f"{request.method} {path}", request.headers, facts)

    async def _failed(self, request: Request, error: Exception, trace: Trace) -> Response:
        told = api_error(error)
        self._service.failed(told)
        trace.failed(told.code or "error")
        return await _api_error(request, told)

    async def _read(self, request: Request) -> bytes:
        """The body, if it comes whole, in time, and is not too large."""
        limit = self._service.settings.max_body_bytes
        too_large = ApiError(
            413, f"the body is larger than {limit} bytes (serve.max_body_bytes).", code="body_too_large"
        )
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._service.settings.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise ApiError(
                408, "the body did not come in time (serve.body_timeout_s).", code="timeout"
            ) from None
        return b"".join(parts)

    def _ask(self, body: Body, tenant: str, trace: Trace) -> Ask:
        raw = isinstance(body, CompletionRequest)
        relay = body.relay
        agent = None if relay is None else _named(relay.pipeline, relay.agent)
        only = None if relay is None or relay.inputs is None else frozenset(i.id for i in relay.inputs)
        return Ask(
            tenant=tenant,
            model=body.model,
            texts=raw_text(body.text) if raw else tuple(m.text() for m in body.messages),
            raw=raw,
            sampling=self._sampling(body),
            relay=relay is None or relay.enabled,
            reuse=None if relay is None or relay.reuse is None else REUSE.get(relay.reuse, relay.reuse),
            agent=agent,
            only=only,
            told=("", "") if relay is None else (relay.pipeline or "", relay.agent or ""),
            next=()
            if relay is None
            else tuple(self._hint(n, relay.pipeline, tenant) for n in relay.next or ()),
            trace=trace,
        )

    def _hint(self, next_one: NextRequest, pipeline: str | None, tenant: str) -> Hint:
        head, tail = next_one.split()
        named = _named(next_one.pipeline or (pipeline if next_one.agent else None), next_one.agent)
        return Hint(
            agent=named or opening_name(tenant, head[0]),
            head=head,
            tail=tail,
            max_new_tokens=next_one.max_tokens or self._service.settings.default_max_tokens,
        )

    def _sampling(self, body: Body) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=body.limit or self._service.settings.default_max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
            seed=random_seed() if body.seed is None else body.seed % (1 << 63),
            stop=body.stops,
            logprobs=body.scored,
        )

    async def _respond(
        self, request: Request, body: Body, ask: Ask, form: type[ChatForm] | type[TextForm]
    ) -> Response:
        request_id = uuid.uuid4().hex
        writer = form(request_id, body.model)
        source = followed(self._recent, request_id, ask, self._service.answer(ask))
        if not body.stream:
            async with aclosing(source):
                whole = await _unless_gone(request, _whole(source, writer))
            return JSONResponse(whole)
        # The first token decides on the status: until then an error can have one of its own.
        try:
            first = await _unless_gone(request, anext(source))
        except BaseException:
            await source.aclose()
            raise
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = _events(first, source, writer, usage=usage, failed=partial(self._broke_off, ask.trace))
        return _EventStream(source, events, self._service, ask.trace)

    def _broke_off(self, trace: Trace, error: ApiError) -> None:
        """An error after the answer had begun."""
        self._service.failed(error)
        trace.failed(error.code or "error")


def _named(pipeline: str | None, agent: str | None) -> str | None:
    """Who asks, where it says so."""
    return "/".join(filter(None, (pipeline, agent))) or None


def _check_json(request: Request) -> None:
    """A body that says it is something else than JSON is not taken for it; one that says nothing is."""
    declared = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    kind, _, name = declared.partition("/")
    if declared and not (kind == "application" and (name == "json" or name.endswith("+json"))):
        what = f'the body is declared as "{declared[:64]}". Send "Content-Type: application/json".'
        raise ApiError(415, what, code="unsupported_media_type")


async def _whole(source: Source, writer: Form) -> dict[str, Any]:
    tokens: list[Token] = []
    async for item in source:
        if isinstance(item, Finished):
            return writer.whole(item.reply.text, tokens, item)
        tokens.append(item)
    raise AssertionError("unreachable: a source ends with how it finished, or raises")


async def _events(
    first: Token | Finished, source: Source, writer: Form, *, usage: bool, failed: Callable[[ApiError], None]
) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events. Tokens that add no text yet are kept for the next one's chunk.
    failed: told of an error, beside the client."""
    without: dict[str, Any] = {"usage": None} if usage else {}
    for chunk in writer.opening():
        yield event({**chunk, **without})
    held: list[Token] = []
    sent = 0
    try:
        item: Token | Finished | None = first
        while isinstance(item, Token):
            held.append(item)
            text = "".join(token.text for token in held)
            if text:
                yield event({**writer.piece(text, held), **without})
                sent += len(text)
                held = []
            item = await anext(source)
        assert isinstance(item, Finished)  # a source ends with how it finished, or raises
        rest = item.reply.text[sent:]
        if rest or held:
            yield event({**writer.piece(rest, held), **without})
        for chunk in writer.ending(item, usage=usage):
            yield event({**without, **chunk})
    except Exception as error:
        if not isinstance(error, RelayError):
            log.exception("a request failed after its answer had begun")
        told = api_error(error)
        failed(told)
        yield broken(told)
    yield DONE


class _EventStream(StreamingResponse):
    """Server-sent events whose source is closed however they end: leaving it early cancels the work."""

    def __init__(
        self, source: Source, events: AsyncGenerator[bytes, None], service: Service, trace: Trace
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._source = source
        self._events = events
        self._service = service
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        done = False

        async def watched(message: Any) -> None:
            nonlocal done
            await send(message)
            done = done or (message["type"] == "http.response.body" and not message.get("more_body"))

        try:
            await super().__call__(scope, receive, watched)
        except ClientDisconnect:
            pass  # counted below; nobody is left to tell
        finally:
            await self._events.aclose()
            await self._source.aclose()
            if not done:
                self._service.metrics.counter("relay_cancelled_requests_total").inc()
            self._trace.end(self.status_code)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises:
        ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    begin = time.monotonic()
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        log.info("a client went away after %.1f s", time.monotonic() - begin)
        raise ClientDisconnect
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
