"""The live page's HTTP parts over real sockets: the service's JSON and page, `relay dashboard`'s server,
`relay top`. No worker runs, so requests end with errors, which are recorded as any others are."""

from __future__ import annotations

import http.client
import json
import logging
import re
from collections.abc import Iterator
from importlib import resources
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from rich.console import Console
from typer.testing import CliRunner

from relay_cluster import cli
from relay_cluster.board.client import KEY_VARIABLE, BoardClient, ServiceAway
from relay_cluster.board.page import asset
from relay_cluster.board.top import show, watch
from relay_cluster.serving.hops import HOPS
from tests.services import DEADLINE_S, MODEL, SECRET, ask, free_port, make, page_server, serving
from transport.errors import ConfigError, RelayError

KEYS = {"sk-red": "red", "sk-blue": "blue"}


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """Commands attach handlers to the process's loggers; take them off again."""
    yield
    for name in ("relay_cluster", "workers", "transport"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    with serving(make()) as url:
        ask(url)
        yield url


@pytest.fixture(scope="module")
def keyed() -> Iterator[str]:
    with serving(make(KEYS)) as url:
        yield url


def board(url: str, key: str = "", query: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(f"{url}/relay/v1/board{query}", headers=headers, timeout=DEADLINE_S)


# -- the service ---------------------------------------------------------------------------------------------


def test_a_request_that_failed_is_on_the_board(service: str) -> None:
    assert ask(service, relay={"agent": "judge", "pipeline": "team"}).status_code == 503
    found = board(service).json()
    row = found["requests"][0]
    assert (row["outcome"], row["status"], row["code"]) == ("error", 503, "worker_lost")
    assert (row["agent"], row["pipeline"], row["model"]) == ("team/judge", "team", MODEL)
    assert found["totals"]["errors"] == len(found["requests"])
    assert found["running"] == []
    whole = httpx.get(f"{service}/relay/v1/requests/{row['id']}").json()
    assert "no worker" in whole["why"][0]
    assert SECRET not in json.dumps([found, whole])


def test_only_what_is_new_is_sent_again(service: str) -> None:
    ask(service)
    first = board(service).json()
    last = first["requests"][0]["seq"]
    assert board(service, query=f"?since={last}").json()["requests"] == []
    ask(service)
    again = board(service, query=f"?since={last}").json()
    assert [r["seq"] for r in again["requests"]] == [last + 1]
    assert again["boot"] == first["boot"]


@pytest.mark.parametrize("since", ["-1", "x", "1e3", "%F0%9D%9F%99", "9" * 40, ""])
def test_since_is_a_number(service: str, since: str) -> None:
    response = board(service, query=f"?since={since}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "since")


@pytest.mark.parametrize("request_id", ["x", "0" * 12, "..%2F..%2Fetc%2Fpasswd", "chatcmpl-" + "0" * 32])
def test_an_unknown_request_is_not_found(service: str, request_id: str) -> None:
    response = httpx.get(f"{service}/relay/v1/requests/{request_id}")
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_tenant_sees_its_own_requests_only(keyed: str) -> None:
    ask(keyed, "sk-red")
    assert board(keyed).status_code == board(keyed, "sk-wrong").status_code == 401
    (red,) = board(keyed, "sk-red").json()["requests"]
    blue = board(keyed, "sk-blue").json()
    assert blue["requests"] == []
    assert (blue["totals"]["requests"], blue["totals"]["errors"]) == (0, 0)
    path = f"{keyed}/relay/v1/requests/{red['id']}"
    got = [httpx.get(path, headers={"Authorization": f"Bearer {key}"}).status_code for key in KEYS]
    assert got == [200, 404]
    assert httpx.get(path).status_code == 401


def test_a_cluster_that_was_not_started_is_no_reason_to_fail(service: str) -> None:
    found = board(service).json()["cluster"]
    assert (found["workers"], found["shards"], found["gates"]) == ([], [], [])


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(keyed: str) -> None:
    page = httpx.get(f"{keyed}/dashboard", follow_redirects=True)
    assert str(page.url) == f"{keyed}/dashboard/"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "connect-src 'self'" in policy
    names = re.findall(r'(?:src|href)="([^"#][^"]*)"', page.text)
    assert {"app.js", "board.css", "vendor/uPlot.iife.min.js"} <= set(names)
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", page.text), "inline code"
    for name in names:
        part = httpx.get(f"{keyed}/dashboard/{name}")
        assert part.status_code == 200, name
        assert part.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(f"{keyed}/dashboard/{name}", headers={"If-None-Match": part.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_every_part_of_a_time_has_a_colour() -> None:
    style = asset("board.css")
    assert style is not None
    assert {name.decode() for name in re.findall(rb"--hop-(\w+):", style.body)} == {hop.name for hop in HOPS}


def test_modules_find_each_other_and_the_library_has_its_licence() -> None:
    folder = resources.files("relay_cluster.board").joinpath("static")
    scripts = [f for f in folder.iterdir() if f.name.endswith(".js")]
    assert len(scripts) > 5
    for script in scripts:
        for name in re.findall(r'from "\./([^"]+)"', script.read_text("utf-8")):
            assert asset(name) is not None, (script.name, name)
    licence, library = asset("vendor/uPlot.LICENSE.txt"), asset("vendor/uPlot.iife.min.js")
    assert licence is not None
    assert b"MIT License" in licence.body
    assert library is not None
    assert len(library.body) < 250_000


@pytest.mark.parametrize(
    "name", ["../board.py", "..%2fpage.py", "vendor", "nothing.js", "vendor/../../page.py"]
)
def test_nothing_else_is_served(service: str, name: str) -> None:
    assert httpx.get(f"{service}/dashboard/{name}").status_code == 404


# -- relay dashboard -----------------------------------------------------------------------------------------


def test_the_dashboard_passes_questions_on(service: str) -> None:
    with page_server(service) as server:
        root = server.url.removesuffix("/dashboard/")
        page = httpx.get(root, follow_redirects=True)
        assert str(page.url) == server.url
        assert "default-src 'none'" in page.headers["content-security-policy"]
        found = httpx.get(f"{root}/relay/v1/board?since=0").json()
        assert found["boot"] == board(service).json()["boot"]
        request_id = found["requests"][0]["id"]
        assert httpx.get(f"{root}/relay/v1/requests/{request_id}").json()["id"] == request_id
        assert httpx.get(f"{root}/relay/v1/board?since=x").status_code == 400, "statuses pass"
        for path in ("/v1/models", "/metrics", "/relay", "/dashboard/nothing.js"):
            assert httpx.get(root + path).status_code == 404, path
        assert httpx.post(f"{root}/relay/v1/board").status_code == 501


def test_the_dashboard_brings_the_key_or_takes_the_browsers(
    keyed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with page_server(keyed) as server:
        path = server.url.replace("/dashboard/", "/relay/v1/board")
        assert httpx.get(path).status_code == 401
        assert httpx.get(path, headers={"Authorization": "Bearer sk-red"}).status_code == 200
    monkeypatch.setenv(KEY_VARIABLE, "sk-blue")
    with page_server(keyed, key=None) as server:
        path = server.url.replace("/dashboard/", "/relay/v1/board")
        assert httpx.get(path).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("[::1]:8080", 200),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_other_sites_cannot_read_it_under_a_name_of_theirs(service: str, host: str, status: int) -> None:
    with page_server(service) as server:
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=DEADLINE_S)
        connection.request("GET", "/relay/v1/board", headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()


def test_a_service_that_is_away_is_told() -> None:
    with page_server(f"http://127.0.0.1:{free_port()}") as server:
        response = httpx.get(server.url.replace("/dashboard/", "/relay/v1/board"))
    assert (response.status_code, response.json()["error"]["code"]) == (502, "service_away")
    assert "relay serve" in response.json()["error"]["message"]


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://a@b", "http://x?y=1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        BoardClient(url)


def test_something_else_than_a_service_is_told(service: str) -> None:
    with pytest.raises(RelayError, match="no relay service"):
        BoardClient(f"{service}/elsewhere").board()
    assert BoardClient(f"{service}/v1/").url == service


def test_the_key_does_not_follow_redirects() -> None:
    other = FastAPI()
    seen: list[str] = []

    @other.get("/relay/v1/board")
    def _() -> Any:
        from fastapi.responses import RedirectResponse

        return RedirectResponse("/stolen")

    @other.get("/stolen")
    def _stolen() -> str:
        seen.append("here")
        return ""

    with serving(other) as url, pytest.raises(RelayError, match="status 307"):
        BoardClient(url, key="sk-red").board()
    assert seen == []


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, [*arguments], env={"COLUMNS": "150", "TERM": "dumb"})


def test_a_port_that_is_taken_is_told(service: str) -> None:
    port = service.rpartition(":")[2]
    done = run("dashboard", "--url", service, "--port", port)
    assert done.exit_code == 2
    assert "--port" in done.output


# -- relay top -----------------------------------------------------------------------------------------------


def test_top_once_shows_the_last_requests(service: str) -> None:
    ask(service, relay={"agent": "grader"})
    done = run("top", "--url", service, "--once")
    assert done.exit_code == 0, done.output
    for word in ("grader", "error 503 worker_lost", "TTFT p50", "worker", MODEL):
        assert word in done.stdout


def test_top_as_json(service: str) -> None:
    done = run("top", "--url", service, "--json", "-")
    assert json.loads(done.stdout)["schema"] == "relay.board/1"


def test_top_says_what_to_do(keyed: str) -> None:
    gone = run("top", "--url", f"http://127.0.0.1:{free_port()}", "--once")
    assert (gone.exit_code, "relay serve" in gone.output) == (2, True)
    locked = run("top", "--url", keyed, "--once")
    assert (locked.exit_code, KEY_VARIABLE in locked.output) == (2, True)


def test_top_goes_on_while_the_service_is_away() -> None:
    class Enough(Exception):
        pass

    port = free_port()
    client = BoardClient(f"http://127.0.0.1:{port}")
    console = Console(record=True, width=150, force_terminal=False)
    looks = 0
    running = serving(make(), port)

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 1:
            running.__enter__()
        elif looks == 2:
            running.__exit__(None, None, None)
        elif looks == 3:
            raise Enough

    with pytest.raises(Enough):
        watch(client, console, every_s=1.0, sleep=sleep)
    assert looks == 3
    with pytest.raises(ServiceAway):
        client.board()


def test_top_shows_what_it_knew_while_the_service_is_away(service: str) -> None:
    found = BoardClient(service).board()
    console = Console(record=True, width=150)
    console.print(show(found, "connection refused"))
    console.print(show(None, "connection refused"))
    said = console.export_text()
    assert said.count("the service is away: connection refused") == 2
    assert found["requests"][0]["id"] in said
