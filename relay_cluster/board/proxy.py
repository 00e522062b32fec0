"""`relay dashboard`: serves the live page on this machine and passes its questions on to a service elsewhere.

    browser -> /dashboard/*      our own files
            -> /relay/v1/*       the service's answer, or 502 and why

Only GET, only these paths, only for names of this machine in the Host header (so that no other site's page
can read it by way of a name of its own).
"""

from __future__ import annotations

import ipaddress
import json
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

from relay_cluster.board.client import BoardClient, ServiceAway
from relay_cluster.board.page import HEADERS, asset

log = logging.getLogger(__name__)

_CLIENT_TIMEOUT_S: Final = 30.0
_DATA: Final = "/relay/v1/"
_PAGE: Final = "/dashboard/"
_MOST_QUERY: Final = 512


class PageServer(ThreadingHTTPServer):
    """The server of one page.

    Args:
        port: to listen on, on the loopback address; 0 picks one. client: the service.

    Raises:
        OSError: the address is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, client: BoardClient) -> None:
        self.client = client
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server_address[1]}{_PAGE}"


def _is_here(host: str | None) -> bool:
    """Whether a Host header names this machine."""
    try:
        name = urlsplit(f"//{host or ''}").hostname or ""
    except ValueError:
        return False
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "relay"
    sys_version = ""
    timeout = _CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not _is_here(self.headers.get("Host")):
            self._error(403, "this page is only served under names of this machine.", "unknown_host")
        elif path in ("/", _PAGE.rstrip("/")):
            self._answer(307, b"", "text/plain", {"Location": _PAGE})
        elif path.startswith(_PAGE):
            self._file(path.removeprefix(_PAGE))
        elif path.startswith(_DATA) and len(self.path) <= _MOST_QUERY:
            self._data()
        else:
            self._error(404, "Not Found.", None)

    def _file(self, name: str) -> None:
        found = asset(name)
        if found is None:
            self._error(404, "the live page has no such part.", None)
        elif self.headers.get("If-None-Match") == found.etag:
            self._answer(304, b"", found.kind, {"ETag": found.etag})
        else:
            self._answer(200, found.body, found.kind, {"ETag": found.etag})

    def _data(self) -> None:
        try:
            assert isinstance(self.server, PageServer)  # nobody else makes handlers
            status, kind, body = self.server.client.get(self.path, self.headers.get("Authorization"))
        except ServiceAway as error:
            self._error(502, str(error), "service_away")
        else:
            self._answer(status, body, kind, {"Cache-Control": "no-store"})

    def _error(self, status: int, message: str, code: str | None) -> None:
        error = {"message": message, "type": "server_error", "param": None, "code": code}
        self._answer(status, json.dumps({"error": error}).encode(), "application/json", {})

    def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
