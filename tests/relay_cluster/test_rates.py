"""What placement learns from replies, and what it says of workers."""

from __future__ import annotations

from typing import Any

import pytest

from relay_cluster.rates import DECODE_SHARE, Rates
from relay_cluster.router import ASSUMED_PREFILL_S, Task, WorkerView
from tests.replies import make_reply
from transport.types import NodeId, Outcome, SegmentKey, Transfer, WorkerId
from workers.messages import Published, Reply, Request, SlotTransfer, StageTimes
from workers.segment import SlotValue, digest_tokens

W0, W1 = WorkerId("w0"), WorkerId("w1")
VIEWS = [WorkerView(W0, "m"), WorkerView(W1, "m")]
IDS = tuple(range(100, 180))


def reply(agent: str, worker: WorkerId = W0, **facts: Any) -> Reply:
    values: dict[str, Any] = {
        "prompt_tokens": 300,
        "prefix_tokens": 100,
        "relayed_tokens": 0,
        "stages": StageTimes(prefill_s=0.4),
        "token_ids": IDS[:41],
        "decode_s": 2.0,
    }
    return make_reply(worker, Request(id="r", agent=agent), model="m", text="x", **{**values, **facts})


def test_workers_are_as_fast_as_their_replies_say() -> None:
    rates = Rates()
    assert rates.views(VIEWS, 0.0)[0].prefill_s == ASSUMED_PREFILL_S
    rates.answered(reply("a"))
    first, second = rates.views(VIEWS, 0.0)
    assert first.prefill_s == pytest.approx(0.4 / 200)
    assert first.decode_s == pytest.approx(2.0 / 40)
    assert second.prefill_s == first.prefill_s, "nothing is known of it: as the others"
    rates.answered(reply("a", W1, stages=StageTimes(prefill_s=0.8)))
    first, second = rates.views(VIEWS, 0.0)
    assert second.prefill_s == pytest.approx(2 * first.prefill_s)


def test_a_request_is_in_the_way_until_it_ends_and_less_so_while_it_decodes() -> None:
    rates = Rates()
    task = Task(agent="a", model="m", fresh_tokens=999, answer_tokens=100)  # 1 s and 2 s, as assumed
    rates.began("r", W0, task, 10.0)
    decode_s = DECODE_SHARE * 2.0
    assert [v.busy_s for v in rates.views(VIEWS, 10.0)] == [pytest.approx(1.0 + decode_s), 0.0]
    assert rates.views(VIEWS, 10.5)[0].busy_s == pytest.approx(0.5 + decode_s)
    rates.first_token("r", 11.0)
    assert rates.views(VIEWS, 12.0)[0].busy_s == pytest.approx(decode_s / 2, abs=1e-5)
    assert rates.views(VIEWS, 99.0)[0].busy_s > 0, "late, and still there"
    rates.ended("r")
    rates.ended("r")
    assert rates.views(VIEWS, 99.0)[0].busy_s == 0


def test_an_agent_s_next_request_is_expected_to_be_like_its_last() -> None:
    rates = Rates()
    assert rates.task("a", "m", max_new_tokens=64).answer_tokens == 64
    rates.answered(reply("a"))
    rates.placed("a", "m", W1)
    task = rates.task("a", "m", max_new_tokens=64)
    assert (task.prefix_tokens, task.fresh_tokens, task.answer_tokens) == (100, 200, 41)
    assert task.homes == (W1,)
    assert rates.task("a", "other").homes == ()
    rates.placed("a", "m", W0)
    assert rates.task("a", "m").homes == (W0, W1), "the latest first"
    rates.placed("a", "m", W1)
    assert rates.task("a", "m").homes == (W1, W0)
    assert [v.agents for v in rates.views(VIEWS, 0.0)] == [1, 1]


def test_agents_that_were_not_heard_of_for_long_are_forgotten() -> None:
    rates = Rates(max_agents=2)
    for agent in "abcd":
        rates.placed(agent, "m", W0)
    assert rates.agents == 2
    assert rates.views(VIEWS, 0.0)[0].agents == 2
    assert rates.task("a", "m").homes == ()


def test_segments_are_where_they_were_published() -> None:
    rates = Rates()
    key = SegmentKey("space", digest_tokens(IDS[:64]))
    rates.answered(reply("a", published=(Published(None, key, 64, 1, 6400),)))
    held = rates.task("b", "m", values={"a": SlotValue(token_ids=IDS, kv_tokens=64)}).reads
    assert [(r.tokens, r.nbytes, r.holders) for r in held] == [(64, 6400, (W0,))]
    strange = rates.task("b", "m", values={"a": SlotValue(token_ids=IDS, kv_tokens=63)}).reads
    assert strange[0].holders == (), "another length is another segment"
    coming = rates.task("b", "m", after=("a",)).reads
    assert [(r.source, r.tokens, r.nbytes) for r in coming] == [("a", 41, 4100)]


def test_links_are_as_fast_as_pulls_were() -> None:
    rates = Rates()
    key = SegmentKey("space", b"k" * 16)
    for nbytes in (10**6, 2 * 10**6, 4 * 10**6):
        pulled = Transfer(
            source=W1,
            destination=W0,
            backend="tcp",
            blocks=1,
            nbytes=nbytes,
            seconds=0.01 + nbytes * 1e-8,
            outcome=Outcome.PULLED,
        )
        rates.answered(
            reply("a", node=NodeId("n0"), transfers=(SlotTransfer("s", key, NodeId("n1"), pulled),))
        )
    speed = rates.links().between["n1", "n0"]
    assert speed.byte_s == pytest.approx(1e-8, rel=0.01)
    assert speed.fixed_s == pytest.approx(0.01, rel=0.05)


def test_work_that_is_only_placed_counts_until_it_is_over() -> None:
    rates = Rates()
    task = Task(agent="a", model="m", fresh_tokens=999, answer_tokens=100)
    rates.planned("r", W0, task)
    waiting_s = rates.views(VIEWS, 5.0)[0].busy_s
    assert waiting_s == pytest.approx(1.0 + DECODE_SHARE * 2.0)
    assert rates.views(VIEWS, 500.0)[0].busy_s == waiting_s, "nothing of it is done yet"
    rates.began("r", W1, task, 500.0)
    assert [v.busy_s for v in rates.views(VIEWS, 500.0)] == [0.0, waiting_s], "it went elsewhere"
    rates.ended("r")
    assert not any(v.busy_s for v in rates.views(VIEWS, 500.0))
