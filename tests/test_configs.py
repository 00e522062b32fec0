"""Every shipped file is valid, and checking it is cheap."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

from relay_cluster.config import ClusterConfig, PipelineConfig, check_file, kind_of, load_profile
from workers import profile as profiles
from workers.settings import DEFAULT_MODEL

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
PIPELINES = sorted((CONFIGS / "pipelines").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_file_is_valid(path: Path) -> None:
    kinds = {
        "clusters": "cluster",
        "pipelines": "pipeline",
        "profiles": "profile",
        "simulations": "simulation",
    }
    assert check_file(path) == kinds[path.parent.name]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kind_is_told_by_content_as_well(path: Path, tmp_path: Path) -> None:
    alone = tmp_path / path.name
    alone.write_text(path.read_text("utf-8"), "utf-8")
    assert kind_of(alone) == kind_of(path)


def test_everything_that_the_issue_names_is_there() -> None:
    assert {path.stem for path in PIPELINES} >= {"demo", "maths", "code", "five_agents"}
    assert (CONFIGS / "clusters" / "local_cpu.yaml").is_file()


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_pipeline_has_inputs_to_try_it_with(path: Path) -> None:
    config = PipelineConfig.load(path)
    graph = config.pipeline()
    rows = path.with_name(f"{path.stem}_input.jsonl")
    examples = config.examples
    if rows.exists():
        examples = [*examples, *map(json.loads, rows.read_text("utf-8").splitlines())]
    assert examples
    for example in examples:
        assert graph.check_inputs(example) == example


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_later_agents_read_what_was_written_before(path: Path) -> None:
    """What makes these pipelines worth relaying: each prompt holds the input and all earlier answers."""
    graph = PipelineConfig.load(path).pipeline()
    for index, name in enumerate(graph.order):
        assert graph[name].slots == (*graph.inputs, *graph.order[:index])


def test_five_agents_are_fully_connected() -> None:
    graph = PipelineConfig.load(CONFIGS / "pipelines" / "five_agents.yaml").pipeline()
    assert [len(upstream) for upstream in graph.upstreams.values()] == [0, 1, 2, 3, 4]


def test_local_cluster() -> None:
    config = ClusterConfig.load(CONFIGS / "clusters" / "local_cpu.yaml")
    assert config.worker_count(3) == 3
    assert config.worker_count(20) == 8
    assert config.transport.arena_bytes == 512 << 20
    assert config.ray.address is None


def test_default_model_has_a_profile() -> None:
    profile = load_profile(CONFIGS / "profiles" / f"{DEFAULT_MODEL}.yaml")
    assert (profile.model, profile.num_layers) == (DEFAULT_MODEL, 30)
    assert profiles.load_profile(DEFAULT_MODEL, 30) == profile, "the way by which a worker finds it"


def test_configs_are_package_data() -> None:
    """The way by which an installed wheel finds them."""
    names = {entry.name for entry in resources.files("configs").joinpath("profiles").iterdir()}
    assert f"{DEFAULT_MODEL}.yaml" in names


def test_check_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys\n"
        "from relay_cluster.cli import app\n"
        f"app(['check', {str(CONFIGS)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'transformers', 'nixl', 'nixl_cu12', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
