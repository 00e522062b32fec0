"""A real Chromium for tests of pages: what it complains of, and which hosts it asks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import util
from typing import Any
from urllib.parse import urlsplit

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TIMEOUT_MS = 60_000
_FLAGS = [
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or util.find_spec("playwright") is None,
    reason="no Chromium (apt install chromium), or playwright is not installed",
)


@dataclass
class Visit:
    """A tab. problems: errors and warnings of its console, and exceptions. hosts: that it asked."""

    page: Any
    problems: list[str] = field(default_factory=list[str])
    hosts: set[str] = field(default_factory=set[str])

    def wide(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")

    def colour(self) -> str:
        """Of the page's background."""
        return self.page.evaluate("getComputedStyle(document.body).backgroundColor")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of its own, with an empty profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        yield browser
        browser.close()


@contextmanager
def visit(browser: Any, url: str, *, width: int = 1280, scheme: str = "light") -> Iterator[Visit]:
    """Open a page in a tab with no past."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(TIMEOUT_MS)
    page = context.new_page()
    found = Visit(page)
    page.on("console", lambda m: found.problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: found.problems.append(str(error)))
    page.on("request", lambda request: found.hosts.add(urlsplit(request.url).netloc))
    page.goto(url)
    yield found
    context.close()
