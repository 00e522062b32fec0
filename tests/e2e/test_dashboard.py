"""The live page over a real cluster: three agents whose answers are relayed, two worker processes, the
embedded model, real Chromium."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from relay_cluster import Cluster
from relay_cluster.serving.app import make_app, start_workers
from relay_cluster.serving.tenants import Tenants
from tests.browser import chromium, needs_chromium, visit
from tests.e2e.conftest import QUESTION, small_cluster
from tests.services import digests, serving
from tests.transport.rigs import wait_for
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

TOKENS = 14
KEYS = {"sk-red": "red", "sk-blue": "blue"}
DEADLINE_S = 60.0
SECRET = "Whose sheep are they?"


@pytest.fixture(scope="module")
def live() -> Iterator[str]:
    """The address of a service of which two tenants have keys."""
    worker = {
        "device": "cpu",
        "threads": 1,
        "cache_tokens": 4096,
        "break_even": False,
        "min_segment_tokens": 6,
    }
    transport = {"arena_bytes": 128 << 20, "pull_timeout_s": 20.0}
    with Cluster(small_cluster(worker=worker, transport=transport)) as cluster:
        start_workers(cluster)
        with serving(make_app(cluster, Tenants(digests(KEYS)))) as url:
            three_agents(url)
            yield url


def three_agents(url: str) -> None:
    """A solver, a critic who reads it, and a judge who reads both."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-red", max_retries=0, timeout=240.0)

    def ask(agent: str, system: str, user: str) -> str:
        answer = client.chat.completions.create(
            model=DEFAULT_MODEL,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"relay": {"agent": agent, "pipeline": "maths"}},
        )
        return answer.choices[0].message.content or ""

    question = f"{QUESTION} {SECRET}"
    plan = ask("planner", "You make plans.", question)
    solved = ask("solver", "You solve problems.", f"{question}\n\nA plan:\n\n{plan}\n\nSolve the problem.")
    ask("judge", "You judge solutions.", f"Plan:\n\n{plan}\n\nSolution:\n\n{solved}\n\nIs it right?")


def look(url: str, path: str = "board", key: str = "sk-red") -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/relay/v1/{path}", headers=headers, timeout=DEADLINE_S).json()


def test_every_request_is_on_the_board_with_where_its_time_went(live: str) -> None:
    found = look(live)
    agents = [row["agent"] for row in found["requests"]]
    assert agents == ["maths/judge", "maths/solver", "maths/planner"]
    judge, _, planner = (look(live, f"requests/{row['id']}") for row in found["requests"])
    for one in (judge, planner):
        assert sum(bar["seconds"] for bar in one["bars"]) == pytest.approx(one["ttft_s"], rel=0.01)
        assert one["why"]
    assert (planner["basis"], planner["full_ttft_s"]) == ("measured", planner["ttft_s"])
    assert judge["relayed_tokens"] > 2 * (TOKENS - 4)
    assert judge["prompt_tokens"] == sum(
        judge[f"{part}_tokens"] for part in ("relayed", "prefix", "computed")
    )
    assert [span["how"] for span in judge["spans"]] == ["relayed", "relayed"]
    pulls = [p for p in judge["pulls"] if p["source"] != p["destination"]]
    assert {p["outcome"] for p in pulls} == {"pulled"}
    assert all(p["bytes"] > 0 and p["seconds"] > 0 and p["destination"] == judge["worker"] for p in pulls)
    moved = sum(link["bytes"] for link in found["links"])
    assert moved == sum(
        p["bytes"]
        for row in found["requests"]
        for p in look(live, f"requests/{row['id']}")["pulls"]
        if p["source"] != p["destination"]
    )
    assert SECRET not in str([found, judge, planner])


def test_workers_and_shards_are_on_the_board(live: str) -> None:
    cluster = look(live)["cluster"]
    assert [(w["worker"], w["state"]) for w in cluster["workers"]] == [("w0", "up"), ("w1", "up")]
    assert sum(w["segments"] for w in cluster["workers"]) >= 3, "an answer of each agent"
    assert all(
        0 < w["tiers"]["arena"]["bytes"] <= w["tiers"]["arena"]["budget_bytes"] for w in cluster["workers"]
    )
    assert {s["state"] for s in cluster["shards"]} == {"up"}
    blue = look(live, key="sk-blue")
    assert (blue["requests"], blue["links"], blue["totals"]["prompt_tokens"]) == ([], [], 0)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def worker(url: str, name: str) -> dict[str, Any]:
    """What the board says of a worker. It would not come within the deadline if it waited for that worker."""
    return next(w for w in look(url)["cluster"]["workers"] if w["worker"] == name)


def test_a_worker_that_stands_still_is_shown_and_keeps_nobody_waiting(live: str) -> None:
    with stopped(worker(live, "w1")["pid"]):
        wait_for(lambda: worker(live, "w1")["state"] == "silent", "it stands still", timeout_s=DEADLINE_S)
        assert worker(live, "w1")["segments"] >= 1, "what it said last"
    wait_for(lambda: worker(live, "w1")["state"] == "up", "it goes on", timeout_s=DEADLINE_S)


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (360, "dark")])
def test_why_a_request_was_slow_is_two_clicks_away(live: str, width: int, scheme: str) -> None:
    with chromium() as browser, visit(browser, f"{live}/dashboard/", width=width, scheme=scheme) as tab:
        page = tab.page
        page.fill("#key", "sk-red")  # it asks for a key
        tab.problems.clear()  # the browser's own line about the 401 before
        page.click("#key-form button")
        page.wait_for_selector("#request-table tbody tr:nth-child(3)")
        assert "judge" in page.locator("#request-table tbody tr").first.inner_text()
        page.locator("#request-table tbody tr button").first.click()
        page.wait_for_selector(".waterfall")
        ttft_s = look(live)["requests"][0]["ttft_s"]
        bars = page.eval_on_selector_all(
            ".waterfall tbody td[data-seconds]", "all => all.map(x => +x.dataset.seconds)"
        )
        assert sum(bars) == pytest.approx(ttft_s, rel=0.01)
        assert float(page.get_attribute("#bars-sum", "data-seconds")) == pytest.approx(ttft_s, rel=0.01)
        wide = page.eval_on_selector_all(
            ".waterfall .bar", "all => all.map(x => x.getBoundingClientRect().width)"
        )
        lane = page.evaluate("document.querySelector('.waterfall tbody .lane').clientWidth")
        assert max(wide) <= lane
        assert "largest part" in page.inner_text("#detail-body .why")
        assert "\u2192" in page.inner_text(".spans"), "from whom it was pulled"
        assert page.locator("#map .worker").count() == 2
        assert page.locator("#map .flow path").count() >= 1
        assert page.locator("#ttft canvas").count() == 1
        assert tab.wide() <= 0
        assert tab.problems == []
        assert tab.hosts == {urlsplit(live).netloc}
        assert SECRET not in page.content()


def test_a_worker_that_dies_is_shown_and_so_is_its_next_life(live: str) -> None:
    before = worker(live, "w1")
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: worker(live, "w1")["state"] != "up", "it is gone", timeout_s=DEADLINE_S)
    wait_for(lambda: worker(live, "w1")["state"] == "up", "Ray starts it again", timeout_s=3 * DEADLINE_S)
    after = worker(live, "w1")
    assert int(after["incarnation"]) > int(before["incarnation"])
    assert after["segments"] == 0, "its memory went with it"
