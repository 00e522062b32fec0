"""`relay profile`: a tiny model on disk goes in, a profile that workers load comes out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from relay_cluster import cli
from relay_cluster.config import check_file
from relay_cluster.config import load_profile as checked_profile
from workers.methods import parse_reuse
from workers.profile import load_profile

LAYERS = 6


def relay(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "140", "TERM": "dumb", "NO_COLOR": "1"})


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """The command attaches handlers to the process's loggers; take them off again."""
    yield
    for name in ("relay_cluster", "workers", "transport"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads bytes, as a Hugging Face folder."""
    where = tmp_path_factory.mktemp("byte-llama")
    torch.manual_seed(0)
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*characters, "</s>"])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>").save_pretrained(where)
    config = LlamaConfig(
        vocab_size=len(characters) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=len(characters),
    )
    LlamaForCausalLM(config).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, Any]:
    """Everything that one run of the command writes and shows."""
    out = tmp_path_factory.mktemp("made")
    data = out / "tasks.jsonl"
    data.write_text("".join(json.dumps({"question": f"What is {n} + {n}?"}) + "\n" for n in range(5)))
    result = relay(
        "profile", "--model", str(folder), "--data", str(data), "--samples", "3", "--composites", "1",
        "--candidate", "context_mass:ratio=0.5+start={start}+end={layers}", "--seed", "4", "--quick",
        "--out", str(out / "p.yaml"), "--plot", str(out / "p.png"), "--json", str(out / "p.json"),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return {
        "out": out,
        "shown": result.stdout,
        "said": result.stderr,
        "yaml": yaml.safe_load((out / "p.yaml").read_text("utf-8")),
        "json": json.loads((out / "p.json").read_text("utf-8")),
    }


@pytest.mark.slow
def test_the_profile_is_what_workers_load(made: dict[str, Any]) -> None:
    file = made["out"] / "p.yaml"
    profile = load_profile("any", LAYERS, str(file))
    assert profile == checked_profile(file)
    assert check_file(file) == "profile", "`relay check` accepts it, and knows what it is"
    assert profile.measured
    for preset in ("fast", "balanced", "strict"):
        parse_reuse(f"auto:{preset}", profile)


@pytest.mark.slow
def test_the_profile_says_how_it_was_found(made: dict[str, Any]) -> None:
    found = made["yaml"]["calibration"]
    assert found["data"] == {"source": "tasks.jsonl", "tasks": 3, "seed": 4, "quick": True}
    assert found["prompts"] == {"single": 3, "composite": 1}
    assert "--data tasks.jsonl" in found["made_with"], "the file without its folder"
    curves = found["curves"]
    assert {len(curves[k]) for k in ("value_deviation", "key_deviation", "hidden_deviation")} == {LAYERS}
    assert [len(row) for row in curves["rank_correlation"]] == [LAYERS] * LAYERS
    methods = [row["method"].partition(":")[0] for row in found["rows"]]
    assert {"naive", "epic", "context_mass", "relay_caching"} <= set(methods)
    presets = made["yaml"]["presets"]
    assert set(presets.values()) <= {row["method"] for row in found["rows"]}


@pytest.mark.slow
def test_nothing_of_the_machine_is_in_the_profile(made: dict[str, Any]) -> None:
    text = json.dumps(made["yaml"]["calibration"])
    assert str(made["out"]) not in text
    assert "seconds" not in text


@pytest.mark.slow
def test_numbers_are_short_and_settings_exact(made: dict[str, Any]) -> None:
    for value in made["yaml"]["calibration"]["curves"]["value_deviation"]:
        assert value == float(f"{value:.3e}")
    assert made["yaml"]["calibration"]["rule"]["target_single"] == 0.005


@pytest.mark.slow
def test_the_document_has_the_schema_of_the_benchmarks(made: dict[str, Any]) -> None:
    document = made["json"]
    assert document["schema"] == "relay.profile/1"
    assert document["machine"]["torch"] == torch.__version__
    assert document["settings"]["seed"] == 4
    assert set(document["seconds"]) == {"decode", "reference", "sweep", "grid"}
    for row in document["rows"]:
        assert len(row["single"]["kl_cases"]) == row["single"]["cases"] == 3
        assert row["single"]["kl_mean"] == pytest.approx(sum(row["single"]["kl_cases"]) / 3)
        assert 0 < row["flops_predicted_1024"]["one_span"] <= 1
    assert document["profile"]["presets"] == made["yaml"]["presets"]


@pytest.mark.slow
def test_the_picture_is_there_and_the_choices_are_shown(made: dict[str, Any]) -> None:
    assert (made["out"] / "p.png").read_bytes().startswith(b"\x89PNG")
    assert (made["out"] / "p.png").stat().st_size > 20_000
    for preset in ("fast", "balanced"):
        assert made["yaml"]["presets"][preset] in made["shown"]
    assert "saved" in made["said"]
    assert "100%" in made["said"] or "90%" in made["said"], "without a terminal, progress is lines"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--candidate", "contextmass:ratio=1"), "not one of the methods"),
        (("--candidate", "context_mass:start={begin}"), "placeholders"),
        (("--only-candidates",), "--only-candidates needs"),
        (("--target-kl", "0"), "must be above 0"),
        (("--data", "nowhere.jsonl"), "no such file (--data)"),
        (("--out", "profile.json"), "name it .yaml"),
        (("--model", "no such model"), "neither the embedded model"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    tmp_path: Path, arguments: tuple[str, ...], fault: str
) -> None:
    given = arguments if "--out" in arguments else (*arguments, "--out", str(tmp_path / "p.yaml"))
    result = relay("profile", "--quick", *given)
    assert result.exit_code == 2, result.output
    assert fault in result.stderr
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_help_has_examples() -> None:
    shown = relay("profile", "--help").stdout
    assert "relay profile --quick" in shown
