"""A small OTLP/HTTP receiver, as a collector would be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Receiver:
    """Spans that have come, as OTLP's messages."""

    def __init__(self) -> None:
        self._spans: list[Any] = []
        self._lock = threading.Lock()
        self.url = ""
        self.paths: set[str] = set()

    def take(self, path: str, body: bytes) -> None:
        message = ExportTraceServiceRequest.FromString(body)
        with self._lock:
            self.paths.add(path)
            for resource in message.resource_spans:
                for scope in resource.scope_spans:
                    self._spans += scope.spans

    def of_trace(self, trace_id: str) -> list[Any]:
        """The spans of one trace."""
        with self._lock:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]


@contextmanager
def receiver() -> Iterator[Receiver]:
    """Listens on loopback while the block runs."""
    found = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.take(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10.0)


def attributes(span: Any) -> dict[str, Any]:
    """Of a span, its events' included under "EVENT.NAME"."""

    def plain(value: Any) -> Any:
        return getattr(value, value.WhichOneof("value"))

    out = {a.key: plain(a.value) for a in span.attributes}
    for event in span.events:
        out |= {f"{event.name}.{a.key}": plain(a.value) for a in event.attributes}
    return out
