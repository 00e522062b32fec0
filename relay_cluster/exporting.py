"""Metrics and traces of `relay run`: a port that Prometheus can scrape while the run lasts, a file in its
text format (for node_exporter's textfile collector), OpenTelemetry. All are off unless asked for.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from prometheus_client import CONTENT_TYPE_LATEST

from relay_cluster.cluster import Cluster
from relay_cluster.collecting import ClusterCollector
from relay_cluster.observing import RunObserver
from relay_cluster.recording import Recorder
from relay_cluster.telemetry import TelemetrySettings
from relay_cluster.tracing import make_tracing
from transport.errors import ConfigError

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
_JOIN_TIMEOUT_S: Final = 5.0
_SOCKET_TIMEOUT_S: Final = 10.0


class RunMetrics:
    """A context manager around a run.

    Args:
        models: that the run uses.
        telemetry: where traces go.
        port: serve /metrics there on loopback; 0: any free port; None: do not.
        file: write there after every row; None: do not.

    Raises:
        ConfigError: the port is taken, or traces cannot be made.
    """

    def __init__(
        self,
        models: Collection[str],
        telemetry: TelemetrySettings,
        *,
        port: int | None = None,
        file: Path | None = None,
    ) -> None:
        self.recorder = Recorder(models)
        # W3C's name for a context that comes by the environment.
        context = {"traceparent": os.environ.get("TRACEPARENT", "")}
        self.observer = RunObserver(self.recorder, make_tracing(telemetry), context)
        self._file = file
        self._server = None if port is None else _listen(port, self.recorder.text)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str | None:
        """Where Prometheus scrapes, if it can."""
        if self._server is None:
            return None
        return f"http://{HOST}:{self._server.server_address[1]}/metrics"

    def __enter__(self) -> Self:
        if self._server is not None:
            self._thread = threading.Thread(
                target=self._server.serve_forever, name="metrics-http", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join(_JOIN_TIMEOUT_S)
        if self._server is not None:
            self._server.server_close()
        self.observer.close()

    def attach(self, cluster: Cluster) -> None:
        """Also tell what the cluster's workers and shards know; it has started."""
        if self._server is None and self._file is None:
            return  # nobody reads it
        self.recorder.collect_also(ClusterCollector(cluster.poll()))

    def write(self) -> None:
        """Bring the file up to date, whole or not at all."""
        if self._file is None:
            return
        part = self._file.with_name(self._file.name + ".part")
        try:
            part.write_bytes(self.recorder.text())
            part.replace(self._file)
        except OSError as error:  # a full disk must not end the run
            log.warning("the metrics were not written to %s: %s", self._file, error)


def _listen(port: int, text: Callable[[], bytes]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        timeout = _SOCKET_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "there is only /metrics")
                return
            body = text()
            with suppress(ConnectionError):
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE_LATEST)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            log.debug(format, *args)

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"--metrics-port {port}: cannot listen on {HOST}: {error.strerror}. Name another port, or 0 for "
            "any that is free."
        ) from error
    server.daemon_threads = True
    return server
