"""The live page in a real browser, over a service without workers: what it shows of requests that failed, of
nothing, and of a service that goes away and comes back. With workers: tests/e2e/serving/test_live_page.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.browser import chromium, needs_chromium, visit
from tests.services import ask, free_port, make, page_server, serving

pytestmark = [pytest.mark.slow, needs_chromium]

LIVE = "#state[data-kind=live]"
AWAY = "#state[data-kind=away]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with serving(make()) as url:
        yield url


def test_without_requests_the_page_says_what_to_do(browser: Any) -> None:
    with serving(make()) as url, visit(browser, f"{url}/dashboard") as tab:
        tab.page.wait_for_selector(LIVE)
        assert "/v1/chat/completions" in tab.page.inner_text("#ttft-empty")
        assert "No worker" in tab.page.inner_text("#map")
        assert "None" in tab.page.inner_text("#fallbacks")
        assert tab.page.locator("#request-table tr").count() == 0
        assert tab.problems == []
        ask(url)
        tab.page.wait_for_selector("#request-table tbody tr")  # without a reload


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark")])
def test_one_click_says_why_a_request_failed(browser: Any, service: str, width: int, scheme: str) -> None:
    ask(service, relay={"agent": "judge"})
    with visit(browser, f"{service}/dashboard/", width=width, scheme=scheme) as tab:
        tab.page.wait_for_selector(LIVE)
        row = tab.page.locator("#request-table tbody tr").first
        assert "503" in row.inner_text()
        row.locator("button").focus()
        tab.page.keyboard.press("Enter")
        tab.page.wait_for_selector("#detail-body .why li")
        assert "no worker" in tab.page.inner_text("#detail-body .why")
        assert tab.page.locator("tr.selected").count() == 1
        assert tab.page.evaluate("location.hash").startswith("#r=")
        tab.page.reload()
        tab.page.wait_for_selector("#detail-body .why li")  # a link to a request shows it
        assert tab.wide() <= 0
        assert tab.problems == []
        assert tab.hosts == {urlsplit(service).netloc}


def test_light_and_dark_follow_the_system_and_the_switch(browser: Any, service: str) -> None:
    colours: dict[str, str] = {}
    for scheme in ("light", "dark"):
        with visit(browser, f"{service}/dashboard/", scheme=scheme) as tab:
            tab.page.wait_for_selector(LIVE)
            colours[scheme] = tab.colour()
            tab.page.click("#theme")
            assert tab.page.inner_text("#theme-name") == "light"
            light = tab.colour()
            tab.page.click("#theme")
            assert tab.page.inner_text("#theme-name") == "dark"
            assert tab.colour() != light
            tab.page.reload()
            tab.page.wait_for_selector(LIVE)
            assert tab.page.inner_text("#theme-name") == "dark", "it is remembered"
            dark = tab.colour()
    assert colours == {"light": light, "dark": dark}
    assert light != dark


def test_the_page_says_that_the_service_is_away_and_goes_on_when_it_is_back(browser: Any) -> None:
    port = free_port()
    with page_server(f"http://127.0.0.1:{port}") as server, visit(browser, server.url) as tab:
        tab.page.wait_for_selector(AWAY)
        assert "relay serve" in tab.page.inner_text("#banner")
        with serving(make(), port) as url:
            tab.page.wait_for_selector(LIVE)
            assert tab.page.locator("#banner").is_hidden()
            ask(url, relay={"agent": "one"})
            ask(url, relay={"agent": "two"})
            tab.page.wait_for_selector("#request-table tbody tr:nth-child(2)")
        tab.page.wait_for_selector(AWAY)
        assert tab.page.locator("#request-table tbody tr").count() == 2, "what it said last stays"
        with serving(make(), port) as url:
            ask(url, relay={"agent": "three"})
            tab.page.wait_for_selector(LIVE)
            tab.page.wait_for_selector("#request-table >> text=three")
            assert tab.page.locator("#request-table tbody tr").count() == 1, "another service: begun anew"
