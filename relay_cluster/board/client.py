"""Asks a running service for what its live page shows. Standard library only: it works where the service's
packages are not installed.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final, NamedTuple

from transport.errors import ConfigError, RelayError

KEY_VARIABLE: Final = "RELAY_API_KEY"
TIMEOUT_S: Final = 10.0
_MOST_BYTES: Final = 32 << 20


class Answer(NamedTuple):
    """What came back: HTTP status, media type, body."""

    status: int
    kind: str
    body: bytes


class ServiceAway(RelayError):
    """The service does not answer."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key elsewhere."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        return None


class BoardClient:
    """A service's address, and the key for it.

    Args:
        url: of the service, "http://127.0.0.1:8000"; a path in front of it is kept, "/v1" at its end is not.
        key: API key; None: the environment variable RELAY_API_KEY, if it is set.
        timeout_s: of every question.

    Raises:
        ConfigError: no such address.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ConfigError(f'--url "{url}" is not an address like http://127.0.0.1:8000')
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = os.environ.get(KEY_VARIABLE) if key is None else key
        self._timeout_s = timeout_s
        # No proxy of the environment: the service is reached as it was named.
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))

    def get(self, path: str, authorization: str | None = None) -> Answer:
        """One answer, whatever its status.

        Args:
            path: with its query.
            authorization: header to send in place of our own key.

        Raises:
            ServiceAway: nothing came back within the deadline.
        """
        header = authorization or (f"Bearer {self._key}" if self._key else None)
        headers = {"Accept": "application/json", **({"Authorization": header} if header else {})}
        request = urllib.request.Request(f"{self.url}{path}", headers=headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                kind = response.headers.get_content_type()
                return Answer(response.status, kind, response.read(_MOST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers.get_content_type(), error.read(_MOST_BYTES))
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", error)
            raise ServiceAway(
                f"no service answers at {self.url}: {why}. Start one with `relay serve`, or name another "
                "with --url."
            ) from error

    def board(self) -> dict[str, Any]:
        """What runs, the last requests, and sums over them.

        Raises:
            ServiceAway: nothing came back. ConfigError: the key is missing or not known. RelayError: whatever
                answers there has no live page.
        """
        status, kind, body = self.get("/relay/v1/board")
        if status == 401:
            raise ConfigError(f"{self.url} asks for an API key: set {KEY_VARIABLE} to one that it knows.")
        try:
            found = json.loads(body) if status == 200 and kind == "application/json" else None
        except ValueError:
            found = None
        if not isinstance(found, dict) or not str(found.get("schema", "")).startswith("relay.board/"):
            raise RelayError(
                f"what answers at {self.url} is no relay service, or an older one (status {status})."
            )
        return found
