"""Small runs of the real benchmarks: real worker, real model; what they say must add up. No seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay_cluster.bench.common import Document, FidelityRow, TimingRow, check_document, method_list
from relay_cluster.bench.texts import load_tasks
from transport.errors import ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXACT = "context_mass:ratio=1+start=0+end=30"
"""Recomputes everything, so it is full prefill."""


def rows(document: Document) -> dict[str, TimingRow]:
    check_document(document.to_json())
    return {row.method: row for row in document.rows if isinstance(row, TimingRow)}


@pytest.mark.bench
@pytest.mark.parametrize("spans", [1, 4])
def test_ttft_measures_every_method_on_the_same_prompts(spans: int) -> None:
    from relay_cluster.bench.ttft import TtftSettings, run_ttft

    settings = TtftSettings(
        methods=method_list(f"naive,{EXACT}"),
        span_tokens=(96,),
        spans=(spans,),
        fresh_tokens=40,
        repeats=1,
        prompts=1,
    )
    found = rows(run_ttft(settings, load_tasks([])))
    assert set(found) == {"full_prefill", "naive", "context_mass", "transformers"}
    for row in found.values():
        assert (row.span_tokens, row.spans, row.fresh_tokens, row.samples) == (96, spans, 40, 1)
        assert row.prompt_tokens == row.span_tokens + row.fresh_tokens + row.prefix_tokens
        assert row.quoted_against in ("full_prefill", "transformers")
    # Distances are from full prefill: nothing for itself, for its twins next to nothing, for naive more.
    assert found["full_prefill"].kl32_mean == 0
    for twin in ("transformers", "context_mass"):
        kl = found[twin].kl32_mean
        assert kl is not None
        assert kl < 1e-6
    naive = found["naive"]
    assert naive.kl32_mean is not None
    assert naive.kl32_mean > 1e-4
    assert naive.reuse == 1
    assert found["context_mass"].reuse == 0
    assert naive.flop_ratio is not None
    # The fresh tokens alone, since the prefix is cached.
    assert 0 < naive.flop_ratio < 1.2 * 40 / naive.prompt_tokens


def test_too_few_fresh_tokens_for_the_template_are_refused() -> None:
    from relay_cluster.bench.ttft import TtftSettings, run_ttft

    settings = TtftSettings(methods=method_list("naive"), span_tokens=(64,), spans=(4,), fresh_tokens=3)
    with pytest.raises(ConfigError, match="--fresh-tokens"):
        run_ttft(settings, load_tasks([]))


@pytest.mark.bench
def test_fidelity_is_the_same_again_with_kept_answers_or_new_ones(tmp_path: Path) -> None:
    from relay_cluster.bench.fidelity import FidelitySettings, run_fidelity

    tasks = load_tasks([])
    settings = FidelitySettings(
        methods=method_list(f"naive,{EXACT}"), samples=3, span_tokens=24, batch=4, cases_cache=tmp_path
    )
    first = run_fidelity(settings, tasks)
    kept = run_fidelity(settings, tasks)
    for file in tmp_path.iterdir():
        file.unlink()
    anew = run_fidelity(settings, tasks)
    assert first.rows == kept.rows == anew.rows
    found = {(r.method, r.spans): r for r in first.rows if isinstance(r, FidelityRow)}
    assert {spans for _, spans in found} == {"single", "composite", "all"}
    assert found["naive", "single"].samples + found["naive", "composite"].samples == 3
    assert found["full_prefill", "all"].kl64_worst == 0
    assert found["full_prefill", "all"].greedy_prefix_median == 64
    assert found["context_mass", "all"].kl64_worst < 1e-6
    assert found["context_mass", "all"].greedy_prefix_median == 64
    assert found["naive", "all"].kl_first_worst > 1e-4
    assert found["naive", "all"].reuse == 1


@pytest.mark.bench
def test_healing_brings_the_tail_to_full_prefill() -> None:
    from relay_cluster.bench.fidelity import FidelitySettings, run_fidelity

    settings = FidelitySettings(
        methods=method_list("naive"), samples=1, span_tokens=48, heal=True, greedy=False
    )
    row = run_fidelity(settings, load_tasks([])).rows[1]
    assert isinstance(row, FidelityRow)
    assert (row.method, row.heal) == ("naive", "always")
    assert row.greedy_prefix_median is None
    assert row.kl_first_mean > 1e-4
    assert row.kl64_tail_mean is None or row.kl64_tail_mean < 1e-6


@pytest.mark.bench
def test_decay_evicts_and_still_relays() -> None:
    from relay_cluster.bench.decay import DecaySettings, run_decay

    settings = DecaySettings(
        method="naive", queries=8, span_tokens=64, window=4, arena_spans=3, warm_queries=1, fresh_tokens=8
    )
    document = run_decay(settings, load_tasks([]))
    check_document(document.to_json())
    assert [r.queries for r in document.rows] == [4, 8]  # type: ignore[union-attr]
    last = document.rows[-1]
    assert last.relayed_share == 1  # type: ignore[union-attr]
    assert last.segments == 3  # type: ignore[union-attr]
    assert last.evicted == 9 - 3  # type: ignore[union-attr]
    assert last.warm_peak >= last.speedup > 0  # type: ignore[union-attr]


def test_decay_without_eviction_is_refused() -> None:
    from relay_cluster.bench.decay import DecaySettings, run_decay

    with pytest.raises(ConfigError, match="evicted"):
        run_decay(DecaySettings(method="naive", queries=4, arena_spans=4), load_tasks([]))


@pytest.mark.bench
@pytest.mark.ray
def test_chain_has_the_transfer_of_every_span_inside_the_time() -> None:
    from relay_cluster.bench.chain import ChainSettings, run_chain
    from relay_cluster.config import ClusterConfig

    settings = ChainSettings(
        methods=method_list("exact_prefix,naive"),
        agents=3,
        prefix_tokens=64,
        input_tokens=80,
        output_tokens=24,
        repeats=1,
    )
    config = ClusterConfig.model_validate(
        {"workers": 2, "worker": {"cache_tokens": 2048}, "transport": {"arena_bytes": 128 << 20}}
    )
    document = run_chain(settings, load_tasks([]), config)
    check_document(document.to_json())
    assert document.settings["notes"] == []
    found = {(r.agent, r.method): r for r in document.rows if isinstance(r, TimingRow)}
    assert set(found) == {(a, m) for a in (1, 2, 3) for m in settings.methods}
    for (agent, method), row in found.items():
        assert row.prefix_tokens == 64
        assert row.spans == (0 if agent == 1 else agent)
        assert row.span_tokens == (0 if agent == 1 else 80 + 23 * (agent - 1))
        assert row.stages is not None
        pulled = method == "naive" and agent > 1
        assert (row.stages["pull_s"] > 0) is pulled
        assert row.reuse == (1 if pulled else None)
        assert row.kl32_mean is not None
    assert found[3, "exact_prefix"].kl32_mean == pytest.approx(0, abs=1e-6)
    assert found[3, "naive"].kl32_mean > 1e-5  # type: ignore[operator]
