"""uvicorn with deadlines for clients, and an end that drains.

    connection -> head, within head_timeout_s -> app (which has a deadline for the body)
    -> answer, whose client must go on reading -> next head, at the latest after _KEEP_ALIVE_S

    SIGTERM or SIGINT -> new requests get 503, those that run have drain_timeout_s -> the sockets are closed
    a second one      -> all is cancelled at once

h11 reads HTTP here, not httptools, which takes heads of any size. Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from relay_cluster.serving.errors import ApiError
from relay_cluster.serving.settings import ServeSettings

_KEEP_ALIVE_S = 75
_MOST_HEAD_BYTES = 64 << 10
_FLUSH_S = 2
"""For answers that are complete and still on their way when all requests have ended."""


class _Connection(H11Protocol):
    """A connection whose client must send heads, and read answers, in time."""

    head_timeout_s: float
    send_timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._clock = self.loop.call_later(self.head_timeout_s, self._late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(self.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = _cancelled(self._stalled)

    def connection_lost(self, exc: Exception | None) -> None:
        self._clock = _cancelled(self._clock)
        self._stalled = _cancelled(self._stalled)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP, in OpenAI's shape as every other error."""
        what = f"this is not HTTP, or its head is larger than {_MOST_HEAD_BYTES} bytes."
        self._refuse(ApiError(400, what, code="invalid_http"))

    def _watch(self) -> None:
        """A head that has begun to come must come whole in time; and what is left of a body that has been
        answered already, which is read so that its client gets to read the answer."""
        theirs = self.conn.their_state
        head = theirs is h11.IDLE and (self.conn.trailing_data[0] or self.timeout_keep_alive_task is None)
        rest = theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if not (head or rest):
            self._clock = _cancelled(self._clock)
        elif self._clock is None and not self.transport.is_closing():
            self._clock = self.loop.call_later(self.head_timeout_s, self._late)

    def _late(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.their_state is not h11.IDLE or not self.conn.trailing_data[0]:
            self.transport.close()  # answered, or nothing was asked: nobody waits
            return
        what = f"the request's head did not come within {self.head_timeout_s:g} s (serve.head_timeout_s)."
        self._refuse(ApiError(408, what, code="timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Answer in the app's place, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of an answer: nothing can be said any more
            return
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        for part in (
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


class Server(uvicorn.Server):
    """Ends in two steps: at a signal it drains, and only then closes its sockets.

    Args:
        config: of uvicorn.
        drain: lets nobody in any more, and returns when those that run have left, or their time is over.
    """

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Future[None] | None = None
        self._asked = False
        self.ended_by: int | None = None
        """The signal that ended it. It is for the caller to act on: raised in here, as uvicorn would, it
        would be Ray's handler that takes it, in the middle of the loop."""

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        await super()._serve(sockets)
        if self._captured_signals:
            self.ended_by = self._captured_signals[0]
            self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Of a signal. A second one does not wait any longer."""
        if self._asked:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self._captured_signals.append(sig)
        self._asked = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self._asked and self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        if self._draining is not None and self._draining.done():
            self.should_exit = True
        return await super().on_tick(counter)


def make_server(
    app: Any, settings: ServeSettings, drain: Callable[[], Awaitable[None]], *, host: str, port: int
) -> Server:
    """A server of an ASGI app. Its `run` returns after a signal, once it has drained."""
    deadlines = {"head_timeout_s": settings.head_timeout_s, "send_timeout_s": settings.send_timeout_s}
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("Connection", (_Connection,), deadlines),
        ws="none",
        h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
        log_level="error",  # a client that sends no HTTP is no news
        access_log=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_S,
        server_header=False,
    )
    server = Server(config, drain)
    logging.getLogger("uvicorn.error").addFilter(_no_cancellation)
    return server


def _no_cancellation(record: logging.LogRecord) -> bool:
    """Requests that were cancelled because their time at the end was over are no faults of the app."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
