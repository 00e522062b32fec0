"""What the live service counts and traces, while requests run."""

from __future__ import annotations

import itertools
import os
import re
import signal
from typing import Any

import httpx
import pytest

from relay_cluster import Agent, Pipeline
from relay_cluster.gate import QualitySettings
from relay_cluster.metrics import STAGES, TABLE
from relay_cluster.recording import tenant_hash
from tests.e2e.otlp import attributes
from tests.e2e.serving.live import TENANTS, Live, eventually
from tests.e2e.serving.test_serving import QUESTION, relay, three_agents
from transport.types import WorkerId
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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
