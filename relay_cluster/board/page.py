"""The files of the live page, as the service and `relay dashboard` serve them. They hold no data."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Final, NamedTuple

_KINDS: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
HEADERS: Final = {
    # Nothing but the page's own files, and data from where it came: no other host, no inline code.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class Asset(NamedTuple):
    """A file: its bytes, media type and entity tag."""

    body: bytes
    kind: str
    etag: str


@cache
def _assets() -> dict[str, Asset]:
    root = resources.files("relay_cluster.board").joinpath("static")
    found: dict[str, Asset] = {}
    for folder, prefix in ((root, ""), (root.joinpath("vendor"), "vendor/")):
        for file in folder.iterdir():
            kind = _KINDS.get("." + file.name.rpartition(".")[2])
            if file.is_file() and kind is not None:
                body = file.read_bytes()
                tag = hashlib.blake2b(body, digest_size=12).hexdigest()
                found[prefix + file.name] = Asset(body, kind, f'"{tag}"')
    return found


def asset(name: str) -> Asset | None:
    """One file of the page ("" is the page itself); None where there is none of that name."""
    return _assets().get(name or "index.html")
