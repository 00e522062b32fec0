"""The service with real clients: the openai package against uvicorn, two worker processes, the real model."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from relay_cluster import Agent, Cluster, Pipeline
from relay_cluster.gate import QualitySettings
from relay_cluster.metrics import STAGES, TABLE
from relay_cluster.recording import tenant_hash
from relay_cluster.serving.app import make_app, start_workers
from relay_cluster.serving.tenants import Tenants
from tests.e2e.conftest import environment, small_cluster
from tests.e2e.otlp import Receiver, attributes, receiver
from transport.types import WorkerId
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

QUESTION = (
    "A farmer has 17 sheep and buys 5 more every week. After six weeks he sells half of his flock to a "
    "neighbour. How many sheep are left?"
)
TOKENS = 14
"""Of most answers: this model on this machine decodes about ten a second."""
KEYS = {"sk-red": "red", "sk-blue": "blue"}
DEADLINE_S = 30.0


@dataclass(frozen=True)
class Live:
    """A service that listens, and the cluster under it."""

    url: str
    cluster: Cluster
    traces: Receiver

    def client(self, key: str = "sk-red") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=240.0)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def samples(self, name: str | None = None, **labels: str) -> list[Sample]:
        """What a scrape gets: all of it, or one name's with these labels."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=60.0).text)
        samples = [sample for family in families for sample in family.samples]
        return [s for s in samples if name in (None, s.name) and labels.items() <= s.labels.items()]

    def total(self, name: str, **labels: str) -> float:
        return sum(sample.value for sample in self.samples(name, **labels))

    def settled(self) -> bool:
        """No request, no cache and no lease is left anywhere."""
        stats = self.cluster.stats().values()
        idle = all(s["running"] == 0 and s["free_cache_blocks"] == s["cache_blocks"] for s in stats)
        return idle and self.cluster.directory_stats()["leases"] == 0


def eventually(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not (now := true()) and time.monotonic() < deadline:
        time.sleep(0.05)  # between two looks
    return now


TENANTS = Tenants({hashlib.sha256(key.encode()).hexdigest(): name for key, name in KEYS.items()})


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with environment(OTEL_BSP_SCHEDULE_DELAY="200"), receiver() as traces, serving(traces) as found:
        yield found


@contextmanager
def serving(traces: Receiver) -> Iterator[Live]:
    # One thread each: two teams on two busy cores wait for each other at every operator.
    worker = {
        "device": "cpu",
        "threads": 1,
        "cache_tokens": 4096,
        "break_even": False,
        "min_segment_tokens": 6,
    }
    transport = {"arena_bytes": 128 << 20, "pull_timeout_s": 20.0}  # a busy machine is no fault
    telemetry = {"otlp_endpoint": traces.url}
    with Cluster(small_cluster(worker=worker, transport=transport, telemetry=telemetry)) as cluster:
        start_workers(cluster)
        config = uvicorn.Config(make_app(cluster, TENANTS), host="127.0.0.1", port=0, log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Live(f"http://127.0.0.1:{port}", cluster, traces)
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def three_agents(client: openai.OpenAI, question: str, *, agents: int = 3, **options: Any) -> list[Any]:
    """A program as users have it: it knows nothing of relay. agents: only the first few of them."""

    def ask(system: str, user: str) -> Any:
        return client.chat.completions.create(
            model=DEFAULT_MODEL,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": user}],
            max_tokens=TOKENS,
            temperature=0,
            seed=7,
            **options,
        )

    plan = ask("You make plans.", question)
    said = plan.choices[0].message.content
    solution = ask("You solve problems.", f"{question}\n\nA plan:\n\n{said}\n\nSolve the problem.")
    solved = solution.choices[0].message.content
    if agents == 2:
        return [plan, solution]
    verdict = ask("You judge solutions.", f"Plan:\n\n{said}\n\nSolution:\n\n{solved}\n\nIs it right?")
    return [plan, solution, verdict]


def relay(answer: Any) -> dict[str, Any]:
    return answer.model_extra["relay"]


def test_an_unchanged_program_is_relayed(live: Live) -> None:
    plan, solution, verdict = three_agents(live.client(), QUESTION)
    assert relay(plan)["found"] == []
    ids = [relay(a)["segment"] for a in (plan, solution, verdict)]
    assert all(ids)
    found = [{f["id"]: f["relayed"] for f in relay(a)["found"]} for a in (solution, verdict)]
    assert found[0].get(ids[0]), "the plan, in the solver's prompt"
    assert len(found[0]) == 2, "and the question"
    assert found[1] == {ids[0]: True, ids[1]: True}
    for answer in (solution, verdict):
        details = answer.usage.prompt_tokens_details
        assert details.cached_tokens >= relay(answer)["relayed_tokens"] > 2 * (TOKENS - 4)
        assert relay(answer)["fallbacks"] == []
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert {relay(a)["worker"] for a in (plan, solution, verdict)} == {"w0", "w1"}
    assert live.settled()


def test_full_prefill_says_the_same_as_with_relay_off(live: Live) -> None:
    question = QUESTION + " Say it briefly."
    client = live.client()
    full = three_agents(client, question, agents=2, extra_body={"relay": {"reuse": "full_prefill"}})
    off = three_agents(client, question, agents=2, extra_body={"relay": {"enabled": False}})
    assert [a.choices[0].message.content for a in full] == [a.choices[0].message.content for a in off]
    assert len(relay(full[1])["found"]) == 2, "ids were spliced, nothing was reused"
    assert [relay(a)["relayed_tokens"] for a in (*full, *off)] == [0] * 4
    assert [relay(a)["segment"] for a in off] == [None, None]


def test_tenants_never_meet(live: Live) -> None:
    question = QUESTION + " Whose sheep are they?"
    red = three_agents(live.client("sk-red"), question, agents=2)
    blue = three_agents(live.client("sk-blue"), question, agents=2)
    assert len(relay(red[1])["found"]) == 2
    assert relay(blue[0])["found"] == []
    assert relay(blue[0])["relayed_tokens"] == relay(blue[0])["prefix_tokens"] == 0
    assert blue[0].usage.prompt_tokens_details.cached_tokens == 0, "not even a prefix is shared"
    assert relay(blue[1])["relayed_tokens"] > 0, "with itself a tenant shares"


def test_streams_and_async_clients_get_the_same_text(live: Live) -> None:
    import asyncio

    ask: dict[str, Any] = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": "Count from one to ten: one, two, "}],
        "max_tokens": TOKENS,
        "temperature": 0.8,
        "seed": 3,
    }
    whole = live.client().chat.completions.create(**ask).choices[0].message.content
    stream = live.client().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert len(reasons) == 1
    assert chunks[-1].usage is not None
    assert len(chunks) >= chunks[-1].usage.completion_tokens, "tokens come one by one"

    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="sk-blue", max_retries=0) as client:
            one = client.chat.completions.create(**ask)
            two = client.chat.completions.create(**ask, stream=True)
            answer, pieces = await asyncio.gather(one, two)
            streamed = [c.choices[0].delta.content or "" async for c in pieces if c.choices]
            return [answer.choices[0].message.content or "", "".join(streamed)]

    assert asyncio.run(both()) == [whole, whole]


def test_stop_texts_end_an_answer_and_what_is_left_is_relayed(live: Live) -> None:
    client = live.client()
    messages: Any = [{"role": "user", "content": "Write a long story about a dog and its owner."}]
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "messages": messages, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**ask, max_tokens=24).choices[0].message.content
    assert whole
    stop = whole[-18:-10]
    at = whole.find(stop)
    for stream in (False, True):
        if stream:
            chunks = list(client.chat.completions.create(**ask, max_tokens=24, stop=[stop], stream=True))
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            answer = client.chat.completions.create(**ask, max_tokens=24, stop=[stop])
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (whole[:at], "stop")
    follow = [*messages, {"role": "assistant", "content": whole[:at]}, {"role": "user", "content": "Go on."}]
    next_one = client.chat.completions.create(model=DEFAULT_MODEL, messages=follow, max_tokens=2)
    assert [f["kind"] for f in relay(next_one)["found"]] == ["response"]
    assert relay(next_one)["relayed_tokens"] > 5


def test_logprobs_and_plain_completions(live: Live) -> None:
    client = live.client()
    ask: dict[str, Any] = {"model": DEFAULT_MODEL, "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(
        **ask, messages=[{"role": "user", "content": "Hello!"}], logprobs=True, top_logprobs=3
    )
    scored = answer.choices[0].logprobs
    assert scored is not None
    assert scored.content is not None
    assert len(scored.content) == answer.usage.completion_tokens  # type: ignore[union-attr]
    for row in scored.content:
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 3
        assert (row.top_logprobs[0].token, row.top_logprobs[0].logprob) == (row.token, row.logprob), "greedy"
    text = client.completions.create(**ask, prompt="The capital of France is", logprobs=2)
    assert "Paris" in text.choices[0].text
    assert text.choices[0].logprobs is not None
    assert "".join(text.choices[0].logprobs.tokens or []) == text.choices[0].text
    streamed = client.completions.create(**ask, prompt="The capital of France is", stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text.choices[0].text


def test_the_example_of_the_docs_works(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "service.md").read_text("utf-8")
    (example,) = re.findall(r"```python\n(from openai.*?)```", text, flags=re.DOTALL)
    changes = {
        "http://127.0.0.1:8000": live.url,
        '"none"': '"sk-blue"',
        "max_tokens=64": f"max_tokens={TOKENS}",
    }
    for written, ours in changes.items():
        assert written in example
        example = example.replace(written, ours)
    exec(compile(example, "service.md", "exec"), {})
    said = capsys.readouterr().out
    assert int(re.search(r"^(\d+) prompt tokens were not computed", said, re.MULTILINE)[1]) > 0  # type: ignore[index]
    assert "'kind': 'response'" in said


def test_bad_requests_get_the_clients_own_errors(live: Live) -> None:
    client = live.client()
    hello: Any = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.AuthenticationError):
        live.client("sk-wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=hello)
    with pytest.raises(openai.BadRequestError, match="context") as long:
        client.chat.completions.create(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "sheep " * 9000}], stream=True
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as role:
        client.chat.completions.create(model=DEFAULT_MODEL, messages=[{"role": "wizard", "content": ""}])  # type: ignore[list-item]
    assert role.value.param == "messages[0].role"
    with pytest.raises(openai.APIStatusError) as huge:
        client.chat.completions.create(
            model=DEFAULT_MODEL, messages=[{"role": "user", "content": "x" * (5 << 20)}]
        )
    assert huge.value.status_code == 413
    assert [m.id for m in client.models.list()] == [DEFAULT_MODEL]
    assert httpx.get(f"{live.url}/healthz").json() == {"status": "ok", "workers": {"w0": "up", "w1": "up"}}
    assert live.settled()


def walk_away(live: Live, *, stream: bool) -> None:
    """Ask for a long answer, and close the connection while it is made."""
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 1500,
        "temperature": 0,
        "stream": stream,
    }
    headers = {"Authorization": "Bearer sk-red"}
    timeout = httpx.Timeout(30.0, read=30.0 if stream else 1.5)
    url = f"{live.url}/v1/chat/completions"
    try:
        with httpx.stream("POST", url, json=body, headers=headers, timeout=timeout) as response:
            lines = response.iter_lines()
            for _ in range(8):
                next(lines)
    except httpx.ReadTimeout:
        assert not stream


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_leaves_nothing_behind(live: Live, stream: bool) -> None:
    before = live.metric("relay_cancelled_requests_total")
    walk_away(live, stream=stream)
    assert eventually(live.settled)
    assert eventually(lambda: live.metric("relay_cancelled_requests_total") == before + 1)
    assert live.metric("relay_requests_running") == 0


def test_metrics_say_what_requests_said(live: Live) -> None:
    client = live.client("sk-blue")
    for i in range(6):  # workers predict what full prefill takes once they have made some
        hello: Any = [{"role": "system", "content": f"You are agent {i}."}, {"role": "user", "content": "Hi"}]
        name = {"relay": {"agent": "shepherd"}} if i == 5 else None
        client.chat.completions.create(model=DEFAULT_MODEL, messages=hello, max_tokens=1, extra_body=name)
    before = counted(live)
    answers = three_agents(client, QUESTION + " Count them.", agents=2)
    told = {name: value - before[name] for name, value in counted(live).items()}
    for kind, field in TOKEN_KINDS.items():
        assert told[kind] == sum(getattr(a.usage, field) for a in answers)
    for source in ("relayed", "prefix", "computed"):
        assert told[source] == sum(relay(a)[f"{source}_tokens"] for a in answers)
    assert told["relayed"] > 0
    assert told["answers"] == told["prefills"] == told["status"] == 2
    check_the_whole_page(live)


TOKEN_KINDS = {"prompt": "prompt_tokens", "answer": "completion_tokens"}


def counted(live: Live) -> dict[str, float]:
    blue = tenant_hash("blue", TENANTS.label_key)
    out = {kind: live.total("relay_tenant_tokens_total", tenant=blue, kind=kind) for kind in TOKEN_KINDS}
    for source in ("relayed", "prefix", "computed"):
        out[source] = live.total("relay_prompt_tokens_total", source=source)
    out["answers"] = live.total("relay_time_to_first_token_seconds_count")
    out["prefills"] = live.total("relay_stage_seconds_count", stage="prefill")
    out["status"] = live.total("relay_requests_total", endpoint="chat", status="200")
    return out


def check_the_whole_page(live: Live) -> None:
    """After requests, and a pipeline with a quality gate: all of the table, and nothing else."""
    quality = QualitySettings(kl_budget=100, top1_budget=1, tokens=2, timeout_s=120)
    agents = [Agent("one", prompt="{q} Answer."), Agent("two", prompt="Judge: {one} Judged:")]
    live.cluster.run(Pipeline(agents, name="gated", quality=quality), q=QUESTION, max_new_tokens=8)
    samples = live.samples()
    there = {sample.name for sample in samples}
    assert {m.name for m in TABLE if not set(m.series) <= there} == set()
    assert there <= {name for m in TABLE for name in m.series}
    values = {value for sample in samples for value in sample.labels.values()}
    assert tenant_hash("blue", TENANTS.label_key) in values
    told = {v for v in values if re.search(r"\b(red|blue)\b|req-|seg-|shepherd|sheep|farmer|agent-", v)}
    assert told == set(), "no tenant, id, text, nor a name that may tell whose it is"
    nodes = {info.node for info in live.cluster.workers.values()}
    pulls = live.samples("relay_transfer_bytes_total")
    assert {s.labels["src_node"] for s in pulls if s.value > 0} == nodes
    checks = live.samples("relay_quality_checks_total", pipeline="gated", agent_edge="one -> two")
    assert [(s.labels["outcome"], s.value) for s in checks] == [("judged", 1.0)]
    assert live.total("relay_quality_rung", agent_edge="one -> two") == 0


def test_a_frozen_worker_does_not_hold_up_a_scrape(live: Live) -> None:
    frozen = live.cluster.workers[WorkerId("w0")]

    def up() -> dict[str, float]:
        return {s.labels["worker"]: s.value for s in live.samples("relay_worker_up")}

    assert eventually(lambda: up() == {"w0": 1, "w1": 1})
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        assert eventually(lambda: up() == {"w0": 0, "w1": 1})
        of = {s.labels["worker"] for s in live.samples("relay_worker_running_sequences")}
        assert of <= {"w1"}, "no number of the frozen one"
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    assert eventually(lambda: up() == {"w0": 1, "w1": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_a_trace_goes_on_through_the_service(live: Live, stream: bool) -> None:
    trace_id, parent_id = f"{'a' * 31}{int(stream)}", "b" * 16
    body = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": "Tell me a secret."}],
        "max_tokens": 4,
        "stream": stream,
        "relay": {"agent": "judge"},
    }
    headers = {"Authorization": "Bearer sk-red", "traceparent": f"00-{trace_id}-{parent_id}-01"}
    url = f"{live.url}/v1/chat/completions"
    response = httpx.post(url, json=body, headers=headers, timeout=120.0)
    assert response.status_code == 200
    stages = {f"relay.{s}" for s in STAGES} | {"relay.decode"}
    assert eventually(lambda: len(live.traces.of_trace(trace_id)) == 1 + len(stages))
    spans = {span.name: span for span in live.traces.of_trace(trace_id)}
    assert live.traces.paths == {"/v1/traces"}
    top = spans.pop("POST /v1/chat/completions")
    assert top.parent_span_id.hex() == parent_id
    assert response.headers["traceparent"] == f"00-{trace_id}-{top.span_id.hex()}-01"
    assert set(spans) == stages
    ordered = [spans[f"relay.{s}"] for s in (*STAGES, "decode")]
    for earlier, later in itertools.pairwise(ordered):
        assert earlier.parent_span_id == top.span_id
        assert earlier.start_time_unix_nano <= earlier.end_time_unix_nano <= later.start_time_unix_nano
    facts = attributes(top)
    assert facts["http.response.status_code"] == 200
    assert facts["gen_ai.usage.output_tokens"] == 4
    assert facts["relay.worker"] in ("w0", "w1")
    assert "secret" not in str(facts)
    assert "red" not in str(facts["relay.request"])
