"""The live page over a real cluster: three agents whose answers are relayed, two worker processes, the
embedded model, real Chromium. (Workers that stand still or die: tests/e2e/test_overview.py.)"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.browser import chromium, needs_chromium, visit
from tests.e2e.conftest import QUESTION
from tests.e2e.serving.live import Live
from transport.types import WorkerId
from workers.settings import DEFAULT_MODEL

# long: needs Chromium.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

TOKENS = 14
DEADLINE_S = 60.0
SECRET = "Whose sheep are they?"


@pytest.fixture(scope="module")
def url(live: Live) -> str:
    """The address of a service whose last requests are those of a planner, a solver who reads it, and a judge
    who reads both."""
    client = live.client("sk-red")
    live.service.forget()
    # Where earlier tests have left their agents decides where new ones go: these are to pull from each other.
    for agent, worker in (("planner", "w0"), ("solver", "w1"), ("judge", "w0")):
        live.service._answering._placed[f"page/{agent}", DEFAULT_MODEL] = WorkerId(worker)

    def ask(agent: str, system: str, user: str) -> str:
        answer = client.chat.completions.create(
            model=DEFAULT_MODEL,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"relay": {"agent": agent, "pipeline": "page"}},
        )
        return answer.choices[0].message.content or ""

    question = f"{QUESTION} {SECRET}"
    plan = ask("planner", "You make plans.", question)
    solved = ask("solver", "You solve problems.", f"{question}\n\nA plan:\n\n{plan}\n\nSolve the problem.")
    ask("judge", "You judge solutions.", f"Plan:\n\n{plan}\n\nSolution:\n\n{solved}\n\nIs it right?")
    return live.url


def look(url: str, path: str = "board", key: str = "sk-red") -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/relay/v1/{path}", headers=headers, timeout=DEADLINE_S).json()


def test_every_request_is_on_the_board_with_where_its_time_went(url: str) -> None:
    found = look(url)
    rows = found["requests"][:3]
    assert [row["agent"] for row in rows] == ["page/judge", "page/solver", "page/planner"]
    judge, _, planner = (look(url, f"requests/{row['id']}") for row in rows)
    for one in (judge, planner):
        assert sum(bar["seconds"] for bar in one["bars"]) == pytest.approx(one["ttft_s"], rel=0.01)
        assert one["why"]
    assert judge["relayed_tokens"] > 2 * (TOKENS - 4)
    parts = [judge[f"{part}_tokens"] for part in ("relayed", "prefix", "computed")]
    assert judge["prompt_tokens"] == sum(parts)
    assert [span["how"] for span in judge["spans"]] == ["relayed", "relayed"]
    pulls = [p for p in judge["pulls"] if p["source"] != p["destination"]]
    assert {p["outcome"] for p in pulls} == {"pulled"}
    assert all(p["bytes"] > 0 and p["seconds"] > 0 and p["destination"] == judge["worker"] for p in pulls)
    known = {(link["source"], link["destination"]) for link in found["links"]}
    assert {(p["source"], p["destination"]) for p in pulls} <= known
    assert SECRET not in str([found, judge, planner])


def test_another_tenant_sees_none_of_it_and_the_same_workers(url: str) -> None:
    red, blue = look(url), look(url, key="sk-blue")
    assert {r["id"] for r in red["requests"]} & {r["id"] for r in blue["requests"]} == set()
    for board in (red, blue):
        cluster = board["cluster"]
        assert [(w["worker"], w["state"]) for w in cluster["workers"]] == [("w0", "up"), ("w1", "up")]
        assert {s["state"] for s in cluster["shards"]} == {"up"}
    assert sum(w["segments"] for w in red["cluster"]["workers"]) >= 3, "an answer of each agent"
    arenas = [w["tiers"]["arena"] for w in red["cluster"]["workers"]]
    assert all(0 < arena["bytes"] <= arena["budget_bytes"] for arena in arenas)


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (360, "dark")])
def test_why_a_request_was_slow_is_two_clicks_away(url: str, width: int, scheme: str) -> None:
    with chromium() as browser, visit(browser, f"{url}/dashboard/", width=width, scheme=scheme) as tab:
        page = tab.page
        page.fill("#key", "sk-red")  # it asks for a key
        tab.problems.clear()  # the browser's own line about the 401 before
        page.click("#key-form button")
        page.wait_for_selector("#request-table tbody tr:nth-child(3)")
        assert "judge" in page.locator("#request-table tbody tr").first.inner_text()
        page.locator("#request-table tbody tr button").first.click()
        page.wait_for_selector(".waterfall")
        ttft_s = look(url)["requests"][0]["ttft_s"]
        bars = page.eval_on_selector_all(
            ".waterfall tbody td[data-seconds]", "all => all.map(x => +x.dataset.seconds)"
        )
        assert sum(bars) == pytest.approx(ttft_s, rel=0.01)
        assert float(page.get_attribute("#bars-sum", "data-seconds")) == pytest.approx(ttft_s, rel=0.01)
        inside = """all => all.every(bar => {
            const [b, lane] = [bar, bar.parentElement].map(x => x.getBoundingClientRect());
            return b.left >= lane.left - 1 && b.right <= lane.right + 3;  // the least width of a bar
        })"""
        assert page.eval_on_selector_all(".waterfall .bar", inside)
        assert "largest part" in page.inner_text("#detail-body .why")
        assert "\u2192" in page.inner_text(".spans"), "from whom it was pulled"
        assert page.locator("#map .worker").count() == 2
        assert page.locator("#map .flow path").count() >= 1
        assert page.locator("#ttft canvas").count() == 1
        assert tab.wide() <= 0
        assert tab.problems == []
        assert tab.hosts == {urlsplit(url).netloc}
        assert SECRET not in page.content()
