"""The simulator: the same for a seed, true to what is known, and honest about its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from relay_cluster.cli import app
from relay_cluster.simulation.facts import Mode
from relay_cluster.simulation.results import document, quantile, row_of
from relay_cluster.simulation.run import Simulation
from relay_cluster.simulation.settings import SimulatedCluster, Workload
from relay_cluster.simulation.sweep import parse_modes, parse_workers, sweep
from transport.errors import ConfigError
from workers.costs import full_prefill_flops

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "simulations"
HERE = SimulatedCluster.load(CONFIGS / "this_machine.yaml")
DEBATE = Workload.load(CONFIGS / "debate.yaml")
SMALL = DEBATE.model_copy(update={"least_runs": 4, "runs_per_worker": 1, "inputs": {"question": 300}})


def changed(cluster: SimulatedCluster, **parts: dict[str, Any]) -> SimulatedCluster:
    """The same cluster with some settings otherwise."""
    data = cluster.model_dump()
    return SimulatedCluster.model_validate(data | {k: data[k] | v for k, v in parts.items()})


def ran(cluster: SimulatedCluster, workload: Workload, mode: str, workers: int, seed: int = 0) -> Simulation:
    simulation = Simulation(cluster, workload, Mode(mode), workers=workers, seed=seed)
    simulation.run()
    return simulation


@settings(max_examples=12, deadline=None)
@given(
    mode=st.sampled_from(["full_prefill", "exact_prefix", "auto", "auto+stream", "exact+stream", "naive"]),
    workers=st.integers(1, 5),
    slots=st.integers(1, 3),
    cache_tokens=st.sampled_from([4096, 16384]),
    seed=st.integers(0, 9),
)
def test_every_run_ends_and_nothing_is_held_or_lost(
    mode: str, workers: int, slots: int, cache_tokens: int, seed: int
) -> None:
    cluster = changed(HERE, worker={"max_sequences": slots, "cache_tokens": cache_tokens})
    simulation = ran(cluster, SMALL, mode, workers, seed)
    assert len(simulation.finished) == SMALL.runs(workers)
    assert len(simulation.answers) == SMALL.runs(workers) * len(SMALL.agents)
    for worker in simulation.workers.values():
        assert worker.slots.count == 0
        assert worker.memory.level == cache_tokens
    for answer in simulation.answers:
        assert answer.ttft_s > 0
        assert answer.relayed_tokens + answer.prefix_tokens < answer.prompt_tokens
        assert not (answer.relayed_tokens and mode in ("full_prefill", "exact_prefix", "exact+stream"))
        assert not (answer.prepared_tokens and not mode.endswith("+stream"))


def test_the_same_seed_gives_the_same_rows_and_another_one_others() -> None:
    rows = [
        document(HERE, SMALL, sweep(HERE, SMALL, parse_modes("auto,auto+stream"), [2], seed=s), s)["rows"]
        for s in (1, 1, 2)
    ]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_one_prompt_alone_takes_what_its_flops_say() -> None:
    """The time to first token of a single agent, worked out by hand."""
    device = HERE.device
    workload = Workload.model_validate(
        {
            "simulation": "workload",
            "name": "one",
            "inputs": {"text": 900},
            "agents": {"a": {"reads": ["text"], "fresh_tokens": 24, "answer_tokens": 11}},
            "least_runs": 1,
            "runs_per_worker": 0.1,
        }
    )
    simulation = ran(HERE, workload, "full_prefill", 1)
    answer = simulation.answers[0]
    flops = full_prefill_flops(simulation._costs, 924)
    step_s = device.step_fixed_s + device.sequence_s + flops / device.flops_per_s
    assert answer.ttft_s == pytest.approx(device.dispatch_s + step_s, rel=1e-6)
    decode_s = device.step_fixed_s + device.sequence_s
    assert answer.decode_s > 10 * decode_s
    assert answer.decode_s == pytest.approx(10 * decode_s, rel=0.2), "and the FLOPs of ten tokens"


def test_relay_saves_prefill_and_preparing_saves_more() -> None:
    full, relay, stream = (row_of(ran(HERE, DEBATE, m, 2)) for m in ("full_prefill", "auto", "exact+stream"))
    assert relay.last_ttft_s_p50 < full.last_ttft_s_p50 / 2
    assert stream.last_ttft_s_p50 < relay.last_ttft_s_p50 / 2
    assert full.relayed_tokens == full.prepared_tokens == 0
    assert relay.wire_bytes["same_node"] > 0
    assert sum(full.wire_bytes.values()) == 0
    assert stream.prepared_tokens > 0.5 * stream.prompt_tokens


def test_bytes_go_over_the_link_that_lies_between() -> None:
    apart = changed(HERE, worker={}).model_copy(update={"workers_per_node": 1})
    near, far = ran(HERE, SMALL, "auto", 2), ran(apart, SMALL, "auto", 2)
    assert near.fabric.nbytes["remote"] == far.fabric.nbytes["same_node"] == 0
    assert far.fabric.nbytes["remote"] > 0
    slow = apart.links.remote
    assert quantile([a.pull_s for a in far.answers], 0.9) >= slow.latency_s


def test_pulls_that_take_too_long_are_given_up_and_computed() -> None:
    apart = changed(HERE, links={"remote": {**HERE.model_dump()["links"]["remote"], "bytes_per_s": 1e5}})
    apart = apart.model_copy(update={"workers_per_node": 1})
    row = row_of(ran(apart, SMALL, "auto", 2))
    assert row.timed_out > 0
    assert row.wire_bytes["remote"] < 1e5 * row.seconds * 4
    limit_s = apart.transport.pull_timeout_s
    assert row.pull_s_p95 == pytest.approx(limit_s)


def test_a_small_arena_evicts_and_a_tiny_one_refuses() -> None:
    roomy = row_of(ran(changed(HERE, transport={"arena_bytes": 8 << 30}), SMALL, "auto", 2))
    small = row_of(ran(changed(HERE, transport={"arena_bytes": 32 << 20}), SMALL, "auto", 2))
    assert roomy.evictions == roomy.unpublished == 0
    assert small.evictions > 0
    assert small.arena_bytes_highest <= 32 << 20
    tiny = row_of(ran(changed(HERE, transport={"arena_bytes": 1 << 20}), SMALL, "auto", 2))
    assert tiny.unpublished > 0
    assert tiny.relayed_tokens == 0, "nothing was published, so everything was computed"


def test_heartbeats_take_their_share_of_every_shard() -> None:
    few, many = (Simulation(HERE, SMALL, Mode("auto"), workers=n, seed=0).directory for n in (100, 500))
    assert few.heartbeat_load == pytest.approx(100 * HERE.directory_costs.announce_s)
    assert few.heartbeats_per_s == 100 * HERE.directory.shards
    most_per_s = HERE.directory.max_heartbeats_per_s
    assert many.heartbeat_load == pytest.approx(most_per_s * HERE.directory_costs.announce_s)
    assert many.heartbeats_per_s == pytest.approx(most_per_s * HERE.directory.shards)


def test_a_prompt_that_fits_no_worker_is_an_error_with_advice() -> None:
    cluster = changed(HERE, worker={"cache_tokens": 1024})
    with pytest.raises(ConfigError, match=r"proposer.*Raise worker.cache_tokens"):
        Simulation(cluster, DEBATE, Mode("auto"), workers=1, seed=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "simulation: workload\nname: x\nagents: {a: {answer_tokens: 0}}\n",
            "x.yaml:3 agents.a.answer_tokens",
        ),
        (
            "simulation: workload\nname: x\nagents: {a: {answer_tokens: 9, reads: [b]}}\n",
            "neither an agent nor",
        ),
        ("simulation: workload\nname: x\nagents: {a: {answer_tokenz: 9}}\n", 'Did you mean "answer_tokens"'),
        (
            "simulation: workload\nname: x\n"
            "agents: {a: {answer_tokens: 9, reads: [b]}, b: {answer_tokens: 9, reads: [a]}}\n",
            "cycle",
        ),
    ],
)
def test_a_wrong_file_says_where_and_what(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError) as found:
        Workload.load(path)
    assert said in str(found.value)


def test_modes_and_numbers_of_workers_are_checked() -> None:
    assert [(m.method, m.stream) for m in parse_modes("full_prefill, auto+stream,exact+stream")] == [
        ("full_prefill", "off"),
        ("auto", "auto"),
        ("exact_prefix", "exact"),
    ]
    for wrong in ("", "quick", "kvcomm"):
        with pytest.raises(ConfigError):
            parse_modes(wrong)
    assert parse_workers("1,64", HERE) == (1, 64)
    assert parse_workers(None, HERE) == (2,)
    for wrong in ("two", "0", "9999"):
        with pytest.raises(ConfigError):
            parse_workers(wrong, HERE)


def test_the_command_writes_a_document_and_a_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / "sim.json", tmp_path / "sim.png"
    files = [str(CONFIGS / "this_machine.yaml"), str(CONFIGS / "debate.yaml")]
    args = [
        "simulate",
        *files,
        "--modes",
        "auto",
        "--workers",
        "1,2",
        "--json",
        str(out),
        "--plot",
        str(picture),
    ]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    assert "TTFT p50" in done.output
    assert out.read_text("utf-8").startswith('{\n "schema": "relay.simulate/1"')
    assert picture.read_bytes()[:4] == b"\x89PNG"
