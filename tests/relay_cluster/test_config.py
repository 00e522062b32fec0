"""Faults of configuration files: where they are, what is wrong, what may have been meant, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from relay_cluster.config import ClusterConfig, PipelineConfig, check_file, kind_of, load_profile
from relay_cluster.gate import QualitySettings
from transport.errors import ConfigError
from transport.settings import DirectorySettings, TransportSettings
from workers.settings import WorkerSettings


def write(folder: Path, text: str, name: str = "file.yaml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


def faults(path: Path) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(ConfigError) as caught:
        check_file(path)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


def test_defaults_are_those_of_the_rooms() -> None:
    config = ClusterConfig()
    assert config.worker == WorkerSettings()
    assert config.transport == TransportSettings()
    assert config.directory == DirectorySettings()
    assert config.worker_count(3) == 3
    assert config.worker_count(50) == 8
    assert ClusterConfig(workers=2).worker_count(50) == 2


def test_all_faults_of_a_cluster_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
name: x
workers: 0
transport:
  backend: tpc
  arena_byte: 12
  arena_bytes: 12 parsecs
  pull_timeout_s: -1
backend: tcp
worker: 3
ray: {num_cpus: many}
direktory: {}
""",
    )
    assert faults(path) == [
        "file.yaml:2 workers: a cluster needs at least one worker, got 0. "
        'Write 1 or more, or "auto": one per agent',
        "file.yaml:4 transport.backend: must be 'auto', 'shm', 'nixl', 'ucx', 'tcp' or 'inprocess', "
        'got "tpc". '
        'Did you mean "tcp"?',
        'file.yaml:5 transport.arena_byte: is not a setting of "transport". Did you mean "arena_bytes"?',
        'file.yaml:6 transport.arena_bytes: "12 parsecs" is not a size; '
        "write a number of bytes, or 512MiB, 2GiB, 100MB",
        "file.yaml:7 transport.pull_timeout_s: must be more than 0, got -1",
        'file.yaml:8 backend: is not a setting of this file. Did you mean "transport.backend"?',
        "file.yaml:9 worker: must be a mapping (key: value), got 3",
        'file.yaml:10 ray.num_cpus: must be a whole number, got "many"',
        'file.yaml:11 direktory: is not a setting of this file. Did you mean "directory"?',
    ]


@pytest.mark.parametrize("value", ["three", "2.5", "true", "-1", "[]", "null"])
def test_wrong_number_of_workers(tmp_path: Path, value: str) -> None:
    (fault,) = faults(write(tmp_path, f"workers: {value}\n"))
    assert fault.startswith("file.yaml:1 workers: ")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("512MiB", 512 << 20),
        ("2GiB", 2 << 30),
        ("100MB", 100_000_000),
        ("1.5 GiB", 3 << 29),
        ("8388608", 8 << 20),
    ],
)
def test_sizes(tmp_path: Path, text: str, nbytes: int) -> None:
    config = ClusterConfig.load(write(tmp_path, f"transport: {{arena_bytes: {text}}}\n"))
    assert config.transport.arena_bytes == nbytes


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("workers: [1\n", "file.yaml:2 not YAML: "),
        ("- a\n- b\n", "file.yaml:1 must be a mapping of settings (key: value), but the file is a list"),
        ("", "file.yaml:1 must be a mapping of settings (key: value), but the file is empty"),
        ("just text\n", "file.yaml:1 must be a mapping of settings (key: value), but the file is a str"),
        ("workers: 1\nname: x\nworkers: 2\n", "file.yaml:3 workers: written twice (first on line 1)"),
        ("colour: red\n", "file.yaml: neither a cluster, a pipeline nor a profile"),
    ],
)
def test_files_that_are_not_ours(tmp_path: Path, text: str, fault: str) -> None:
    first, *_ = faults(write(tmp_path, text))
    assert first.startswith(fault)


def test_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "workers: 1\n", "local.yaml")
    with pytest.raises(ConfigError, match=r'lokal\.yaml: no such file\. Did you mean ".*local\.yaml"'):
        ClusterConfig.load(tmp_path / "lokal.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        ClusterConfig.load(tmp_path)


def test_all_faults_of_a_graph_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
method: context_mas
inputs: [question]
agents:
  solver: {prompt: "{question}"}
  critic:
    method: nave
    prompt: |
      Problem: {question}
      Solution: {solvr}
      {critic}
  empty: {prompt: ""}
""",
    )
    lines = faults(path)
    assert lines[0].startswith(
        'file.yaml:1 method: method "context_mas" is not known. Did you mean "context_mass"?'
    )
    assert lines[1].startswith(
        'file.yaml:6 agents.critic.method: method "nave" is not known. Did you mean "naive"?'
    )
    assert lines[2:] == [
        "file.yaml:9 agents.critic.prompt: slot {solvr} names neither an agent nor a declared input. "
        'Did you mean "solver"?',
        "file.yaml:10 agents.critic.prompt: slot {critic} refers to the agent itself; "
        "an agent can only use the output of another",
        "file.yaml:11 agents.empty.prompt: the prompt is empty",
    ]


def test_cycle_has_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "agents:\n  a: {prompt: '{b}'}\n  b: {prompt: '{c}'}\n  c: {prompt: '{a}'}\n")
    (fault,) = faults(path)
    assert "in a cycle: " in fault
    assert fault.split(" ")[0] in {"file.yaml:2", "file.yaml:3", "file.yaml:4"}


def test_wrong_types_in_a_pipeline(tmp_path: Path) -> None:
    text = "agents:\n  a: {prompt: 3}\n  b: text\n  c: {prompts: x}\ninputs: q\nsampling: {top_p: 2}\n"
    assert faults(write(tmp_path, text)) == [
        "file.yaml:2 agents.a.prompt: must be text, got 3",
        'file.yaml:3 agents.b: must be a mapping (key: value), got "text"',
        "file.yaml:4 agents.c.prompt: is missing and has no default",
        'file.yaml:4 agents.c.prompts: is not a setting of "c". Did you mean "prompt"?',
        'file.yaml:5 inputs: must be a list, got "q"',
        "file.yaml:6 sampling.top_p: must be at most 1, got 2",
    ]


def test_inputs_and_examples_fit_the_prompts(tmp_path: Path) -> None:
    text = "inputs: [q, unused]\nagents:\n  a: {prompt: '{q}'}\nexamples:\n  - {qq: x}\n"
    assert faults(write(tmp_path, text)) == [
        'file.yaml:1 inputs: input "unused" is in no prompt; use {unused} or remove it',
        'file.yaml:5 examples.0: input "q" is missing',
        'file.yaml:5 examples.0.qq: is not an input of this pipeline. Did you mean "q"?',
    ]


def test_pipeline_becomes_agents(tmp_path: Path) -> None:
    text = """\
agents:
  a: {prompt: "{q}", temperature: 0.5}
  b: {prompt: "{a}", reuse: off, system: Be brief., max_new_tokens: 7}
sampling: {top_p: 0.9}
"""
    config = PipelineConfig.load(write(tmp_path, text, "my.yaml"))
    graph = config.pipeline()
    assert graph.name == "my"
    assert (graph["a"].temperature, graph["a"].top_p, graph["a"].reuse) == (0.5, 0.9, True)
    assert (graph["b"].temperature, graph["b"].reuse, graph["b"].max_new_tokens) == (0.0, False, 7)
    assert graph["b"].system == "Be brief."


def test_profile_bands_lie_in_the_model(tmp_path: Path) -> None:
    good = "model: m\nnum_layers: 4\ncheckpoint_layer: 1\ndetection_layer: 2\nend_layer: 4\n"
    good += "ratio: 0.1\nfirst_tokens: 2\n"
    assert load_profile(write(tmp_path, good)).end_layer == 4
    assert kind_of(tmp_path / "file.yaml") == "profile"
    bad = good.replace("end_layer: 4", "end_layer: 5").replace("0.1", "1.1").replace("model: m", "modle: m")
    lines = faults(write(tmp_path, bad))
    assert 'file.yaml:1 modle: is not a setting of this file. Did you mean "model"?' in lines
    lines = faults(write(tmp_path, bad.replace("modle", "model")))
    assert [line.split(" ")[0] for line in lines] == ["file.yaml:3", "file.yaml:6"]


def test_python_callers_are_checked_as_well() -> None:
    with pytest.raises(ValidationError, match="at least one worker"):
        ClusterConfig(workers=0)


def test_a_quality_budget_and_roles(tmp_path: Path) -> None:
    text = """\
quality: {kl_budget: 0.01, sample_rate: 0.5}
agents:
  solver: {prompt: "{q}"}
  judge: {prompt: "{solver}", role: judge}
"""
    pipeline = PipelineConfig.load(write(tmp_path, text)).pipeline()
    assert pipeline.quality == QualitySettings(kl_budget=0.01, sample_rate=0.5)
    assert [a.role for a in pipeline.agents] == [None, "judge"]
    watched = PipelineConfig.load(write(tmp_path, text.replace("{kl_budget: 0.01, sample_rate: 0.5}", "{}")))
    assert watched.quality == QualitySettings()
    text = """\
quality: {kl_budjet: 0.01, sample_rate: 2}
agents:
  judge: {prompt: "{q}", role: jugde}
"""
    assert faults(write(tmp_path, text, "pipeline.yaml")) == [
        "pipeline.yaml:1 quality.sample_rate: must be at most 1, got 2",
        'pipeline.yaml:1 quality.kl_budjet: is not a setting of "quality". Did you mean "kl_budget"?',
        "pipeline.yaml:3 agents.judge.role: must be 'judge' or 'aggregator', got \"jugde\". "
        'Did you mean "judge"?',
    ]


@pytest.mark.parametrize(("written", "read"), [("off", "off"), ("auto", "auto"), ("exact", "exact")])
def test_streaming_is_a_key_of_both_files(tmp_path: Path, written: str, read: str) -> None:
    """YAML takes a bare `off` for false."""
    cluster = ClusterConfig.load(write(tmp_path, f"stream: {written}\n"))
    agents = "agents:\n  a: {prompt: Hello}\n"
    pipeline = PipelineConfig.load(write(tmp_path, f"stream: {written}\n{agents}"))
    assert (cluster.stream, pipeline.stream, pipeline.pipeline().stream) == (read, read, read)
    unsaid = PipelineConfig.load(write(tmp_path, agents))
    assert (ClusterConfig().stream, unsaid.stream) == ("auto", None)


def test_a_wrong_word_for_streaming_is_told_with_the_right_ones(tmp_path: Path) -> None:
    (fault,) = faults(write(tmp_path, "workers: 2\nstream: exakt\n"))
    assert fault.startswith("file.yaml:2 stream: must be 'off', 'auto', 'exact' or 'relay'")
