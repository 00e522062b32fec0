"""The main path on a real cluster: two worker processes, the real model, KV over NIXL."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from relay_cluster import Cluster
from relay_cluster.report import RunReport
from tests.e2e.conftest import PIPELINE, QUESTION
from workers.model import load_model
from workers.segment import PromptBuilder, SlotValue
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_full_prefill_through_the_cluster_gives_the_tokens_of_plain_transformers(cluster: Cluster) -> None:
    result = cluster.run(PIPELINE, question=QUESTION, method="full_prefill", max_new_tokens=24)
    loaded: Any = load_model(DEFAULT_MODEL, device="cpu")
    builder = PromptBuilder(loaded.tokenizer, "x", min_segment_tokens=16, max_context=8192)
    values = {"question": SlotValue(text=QUESTION)}
    for agent in PIPELINE.agents:
        slots = {slot: values[slot] for slot in agent.slots}
        prompt = builder.build(builder.template(agent.system, agent.prompt), slots)
        ids = torch.tensor([prompt.token_ids])
        expected = loaded.model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert list(result[agent.name].tokens) == expected[0, ids.shape[1] :].tolist()
        values[agent.name] = SlotValue(token_ids=result[agent.name].tokens)


@pytest.mark.nixl
def test_a_relay_run_moves_kv_over_nixl_between_processes_and_adds_up(cluster: Cluster) -> None:
    result = cluster.run(
        PIPELINE, question=QUESTION, method="auto", max_new_tokens=40, compare="full_prefill", repeats=2
    )
    solver, critic = result["solver"], result["critic"]
    pids = {info.worker: info.pid for info in cluster.workers.values()}
    assert len(set(pids.values())) == 2
    sizes = {info.block_nbytes for info in cluster.workers.values()}
    moved = [t for t in critic.transfers if t.bytes]
    assert moved
    for transfer in moved:
        assert (transfer.backend, transfer.outcome) == ("nixl", "pulled")
        assert pids[transfer.source] != pids[transfer.destination]
        assert transfer.bytes == transfer.blocks * sizes.copy().pop()
    for agent in (solver, critic):
        assert agent.fresh_tokens + agent.relayed_tokens == agent.prompt_tokens
        assert agent.total_entries == agent.relayed_tokens * 30
        assert agent.fallbacks == ()
    assert critic.reuse is not None
    assert critic.reuse > 0.8
    assert critic.reuse == pytest.approx(1 - critic.recomputed_entries / critic.total_entries)
    assert critic.compare is not None
    assert critic.compare.top1 is not None
    assert critic.compare.top1 > 0.8
    assert solver.compare is not None
    assert solver.compare.kl_mean == pytest.approx(0, abs=1e-6), "nothing was relayed to the first agent"
    assert cluster.directory_stats()["leases"] == 0


def test_the_report_survives_json(cluster: Cluster) -> None:
    report = cluster.run(PIPELINE, question=QUESTION, max_new_tokens=20).report
    data = json.loads(json.dumps(report.to_json()))
    assert data["schema"] == "relay.run/1"
    assert RunReport.from_json(data).to_json() == data
    stages = data["rows"][0]["agents"][1]["stages"]
    assert sum(stages.values()) == pytest.approx(data["rows"][0]["agents"][1]["ttft_s"], rel=0.1, abs=0.02)


def test_the_second_run_finds_the_prefix_in_the_cache(cluster: Cluster) -> None:
    first = cluster.run(PIPELINE, question=QUESTION + " Hurry.", method="exact_prefix", max_new_tokens=4)
    again = cluster.run(PIPELINE, question=QUESTION + " Hurry.", method="exact_prefix", max_new_tokens=4)
    assert first["solver"].prefix_tokens > 0, "the system prompt was prepared"
    assert again["solver"].prefix_tokens == again["solver"].prompt_tokens - 1
    assert again["critic"].tokens == first["critic"].tokens
