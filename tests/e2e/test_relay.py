"""The main path on a real cluster: two worker processes, the real model, KV over NIXL."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from relay_cluster import Cluster
from relay_cluster.gate import QualitySettings
from relay_cluster.report import AgentReport, RunReport
from tests.e2e.conftest import PIPELINE, QUESTION
from workers.model import load_model
from workers.segment import PromptBuilder, SlotValue
from workers.settings import DEFAULT_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_full_prefill_through_the_cluster_gives_the_tokens_of_plain_transformers(cluster: Cluster) -> None:
    told: Counter[str] = Counter()

    def count(event: str, agent: str, *_: object) -> None:
        told[agent] += event == "token"

    result = cluster.run(
        PIPELINE, question=QUESTION, method="full_prefill", max_new_tokens=24, on_event=count
    )
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
        assert told[agent.name] == len(result[agent.name].tokens), "sent three at a time, told one by one"


def test_a_relay_run_moves_kv_over_shm_between_processes_and_adds_up(cluster: Cluster) -> None:
    # A question of its own: another test's would be relayed to the first agent, if it is on another worker.
    question = f"{QUESTION} How do you know?"
    result = cluster.run(
        PIPELINE, question=question, method="auto", max_new_tokens=28, compare="full_prefill", repeats=2
    )
    solver, critic = result["solver"], result["critic"]
    pids = {info.worker: info.pid for info in cluster.workers.values()}
    assert len(set(pids.values())) == 2
    sizes = {info.block_nbytes for info in cluster.workers.values()}
    moved = [t for t in critic.transfers if t.bytes]
    assert moved
    for transfer in moved:
        assert (transfer.backend, transfer.outcome) == ("shm", "pulled")
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


def test_a_worker_finds_what_it_has_computed_before_in_its_prefix_cache(cluster: Cluster) -> None:
    """The router may take the other worker: of three runs two are on the same one."""
    seen: dict[str, AgentReport] = {}
    for _ in range(3):
        again = cluster.run(PIPELINE, question=QUESTION + " Hurry.", method="exact_prefix", max_new_tokens=4)
        solver = again["solver"]
        assert solver.prefix_tokens > 0, "the system prompt was prepared"
        first = seen.setdefault(solver.worker, again["critic"])
        assert again["critic"].tokens == first.tokens
        if first is not again["critic"]:
            assert solver.prefix_tokens == solver.prompt_tokens - 1
            return
    raise AssertionError("two workers, three runs")


def test_the_quality_gate_demotes_an_edge_that_exceeds_its_budget(cluster: Cluster) -> None:
    """Under a budget that only exact answers keep: two checks, two rungs, and then full prefill."""
    budget = QualitySettings(kl_budget=1e-9, warmup=1, sample_rate=1.0, tokens=8, recover_after=50)
    watched = replace(PIPELINE, name="watched", quality=budget)
    seen, found, report = [], [], None
    for run in range(3):
        question = f"{QUESTION} Think of case {run}."
        result = cluster.run(watched, question=question, method="naive", max_new_tokens=24)
        gate, solver = result["critic"].gate, result["solver"].gate
        assert gate is not None
        assert solver is not None
        assert (solver.next_rung, solver.kl_mean) == (0, None), "nothing was relayed to it"
        seen.append(result["critic"].method)
        report = result.report
        found.append(gate)
    assert seen == ["naive", "auto:strict", "full_prefill"]
    assert [g.next_rung for g in found] == [1, 2, 2]
    assert [g.judged for g in found] == ["naive", "auto:strict", "auto:strict"], "the last one is a probe"
    for gate in found:
        assert gate.kl_mean is not None
        assert 1e-9 < gate.kl_mean < 1
    assert found[0].value_error is not None
    assert 1e-4 < found[0].value_error < 0.5
    assert report is not None
    assert RunReport.from_json(report.to_json()).rows[0]["critic"].gate == found[-1]
    for stats in cluster.stats().values():
        assert stats["evidence_bytes"] < 8 << 20, "evidence goes when it has been judged"


def test_strict_answers_end_exact_and_are_published_so(cluster: Cluster) -> None:
    # A question of its own: nothing that an earlier test left behind is relayed to the solver.
    question = f"{QUESTION} Be strict."
    result = cluster.run(PIPELINE, question=question, method="auto:strict", max_new_tokens=32, stream="off")
    critic = result["critic"]
    assert critic.relayed_tokens > 0
    assert critic.healed_at_token is not None
    assert critic.healed_at_token <= 24
    assert critic.healed_entries >= critic.total_entries
    assert result["solver"].healed_at_token == 0, "nothing was relayed: it was exact from the start"
