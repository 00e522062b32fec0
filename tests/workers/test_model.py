"""Which models load, which are refused and why, and what the space fingerprint depends on."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from transport.errors import ModelError
from workers.embedded import import_embedded
from workers.model import describe, kv_layout, list_models, load_model, resolve, space_of
from workers.relayable import check_structure, check_supported, inverse_frequencies
from workers.settings import DEFAULT_MODEL

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_HEAD_DIM = {k: v for k, v in TINY.items() if k != "head_dim"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**TINY),
    "llama-3 rope": lambda: tf.LlamaConfig(**TINY, rope_parameters=LLAMA_3),
    "llama linear rope": lambda: tf.LlamaConfig(
        **TINY, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ),
    "mistral": lambda: tf.MistralConfig(**TINY, sliding_window=8),
    "qwen2": lambda: tf.Qwen2Config(**NO_HEAD_DIM),
    "qwen2 yarn": lambda: tf.Qwen2Config(**NO_HEAD_DIM, rope_parameters=YARN),
    "qwen3": lambda: tf.Qwen3Config(**TINY),
    "gemma2": lambda: tf.Gemma2Config(**TINY, sliding_window=8),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **TINY, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: tf.Phi3Config(**NO_HEAD_DIM),
    "phi3 partial": lambda: tf.Phi3Config(**NO_HEAD_DIM, partial_rotary_factor=0.5),
}


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tf.LlamaConfig(**TINY), tmp_path_factory.mktemp("llama"))


# -- loading --


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_families_load(family: str, tmp_path: Path) -> None:
    loaded = load_model(save(FAMILIES[family](), tmp_path), device="cpu", checkpoint_layer=1, block_tokens=16)
    assert dataclasses.asdict(loaded.layout) == {
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 8,
        "hidden_size": 32,
        "dtype": "float32",
        "block_tokens": 16,
        "checkpoint_layer": 1,
        "layer_groups": 1,
        "wire": "raw",
    }
    assert (loaded.num_layers, loaded.max_context, loaded.dtype) == (2, 256, torch.float32)
    assert loaded.rotary_dim == (4 if family == "phi3 partial" else 8)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert len(loaded.space) == 32


@pytest.mark.slow
def test_the_embedded_model_loads() -> None:
    loaded = load_model(DEFAULT_MODEL, device="cpu", checkpoint_layer=9)
    assert (loaded.num_layers, loaded.layout.num_kv_heads, loaded.layout.head_dim) == (30, 3, 64)
    assert loaded.layout.hidden_size == 576
    assert loaded.max_context == 8192
    assert loaded.model.generation_config.eos_token_id == [0, 2]
    prompt = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        best = int(loaded.model(prompt).logits[0, -1].argmax())
    assert loaded.tokenizer.decode([best]) == " Paris"


def test_frequencies_are_float32_and_differ_by_layer_type(tmp_path: Path) -> None:
    config = FAMILIES["gemma3"]()
    loaded = load_model(save(config, tmp_path), device="cpu", dtype="bfloat16")
    assert loaded.layout.dtype == "bfloat16"
    local, wide = inverse_frequencies(loaded.model, 0), inverse_frequencies(loaded.model, 1)
    assert local.dtype == wide.dtype == torch.float32
    steps = torch.arange(0, 8, 2) / 8
    torch.testing.assert_close(local, 1e4**-steps)
    torch.testing.assert_close(wide, 1e6**-steps)
    torch.testing.assert_close(inverse_frequencies(loaded.model, "full_attention"), wide)


@pytest.mark.parametrize("layer", [-1, 2])
def test_the_checkpoint_layer_must_be_one_of_the_model(llama: Path, layer: int) -> None:
    with pytest.raises(ModelError, match=r"checkpoint layer -?\d is not in 0\.\.1"):
        load_model(llama, checkpoint_layer=layer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(llama: Path) -> None:
    with pytest.raises(ModelError, match="no GPU"):
        load_model(llama, device="cuda")


# -- names --


def test_names_resolve(llama: Path) -> None:
    assert resolve(DEFAULT_MODEL) == import_embedded()
    assert resolve(str(llama)) == llama
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve("Qwen/Qwen3-0.6B@main") == "Qwen/Qwen3-0.6B@main"


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "~/nowhere", "a/b/c", "smollm2", "", Path("owner/name")]
)
def test_what_is_neither_folder_nor_hub_id_is_refused_without_a_look_up(name: str | Path) -> None:
    with pytest.raises(ModelError, match="neither the embedded model"):
        resolve(name)


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["config.json"], "missing config.json"),
        (["model.safetensors"], r"missing \*\.safetensors"),
        (["tokenizer.json"], "missing tokenizer.json"),
        (["config.json", "model.safetensors"], r"missing config\.json, \*\.safetensors"),
    ],
)
def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path, gone: list[str], said: str) -> None:
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - set(gone):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=said):
        resolve(tmp_path)


def test_a_file_is_no_model(llama: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        resolve(llama / "config.json")


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.json", "{"), ("config.json", '{"model_type": "no"}'), ("tokenizer.json", '{"model": 1}')],
)
def test_a_broken_folder_is_a_model_error(tmp_path: Path, name: str, text: str) -> None:
    save(tf.LlamaConfig(**TINY), tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)


def test_broken_weights_are_a_model_error(tmp_path: Path) -> None:
    save(tf.LlamaConfig(**TINY), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(tmp_path)


def test_describe_tells_without_loading(llama: Path) -> None:
    facts = describe(llama)
    assert facts["refusal"] is None
    assert facts["layers"] == 2
    assert facts["kv_values_per_token"] == 2 * 2 * 2 * 8
    assert facts["parameters"] == sum(p.numel() for p in load_model(llama).model.parameters())
    assert facts["bytes"] == (llama / "model.safetensors").stat().st_size


def test_describe_of_the_embedded_model_does_not_import_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="relay model import"):
        describe(DEFAULT_MODEL, tmp_path)
    (row,) = list_models(tmp_path)
    assert (row["name"], row["ready"], row["embedded"]) == (DEFAULT_MODEL, False, True)


# -- refusals --


def with_fields(**fields: Any) -> Any:
    config = tf.LlamaConfig(**TINY)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def rope(kind: str, **more: Any) -> Any:
    return with_fields(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **more})


REFUSED: dict[str, tuple[Any, str]] = {
    "dynamic": (lambda: rope("dynamic", factor=2.0), "dynamic NTK"),
    "longrope": (lambda: rope("longrope"), "longrope"),
    "mrope": (lambda: rope("default", mrope_section=[2, 1, 1]), "several sections"),
    "unknown rope": (lambda: rope("spiral"), "spiral"),
    "one layer type dynamic": (
        lambda: with_fields(
            rope_parameters={
                "sliding_attention": {"rope_type": "default"},
                "full_attention": {"rope_type": "dynamic"},
            }
        ),
        "dynamic NTK",
    ),
    "alibi": (lambda: with_fields(alibi=True), "ALiBi"),
    "learned": (lambda: tf.GPT2Config(), "no rotary positions"),
    "no rope layers": (lambda: with_fields(no_rope_layers=[1, 0]), "have no rotary positions"),
    "mla": (lambda: tf.DeepseekV3Config(), "latent"),
    "mamba": (lambda: tf.MambaConfig(), "linear_attention|recurrent"),
    "jamba": (lambda: tf.JambaConfig(), "not a key and a value|recurrent"),
    "linear attention": (lambda: tf.Qwen3NextConfig(), "linear_attention"),
    "encoder-decoder": (lambda: tf.T5Config(), "cross attention"),
    "shared kv": (lambda: tf.Gemma3nTextConfig(), "share the KV"),
    "multimodal": (lambda: tf.Gemma3Config(), "multimodal"),
    "head sizes": (lambda: with_fields(global_head_dim=16), "size of its heads"),
    "bidirectional": (lambda: with_fields(use_bidirectional_attention=True), "not causal"),
    "chunked": (lambda: with_fields(layer_types=["chunked_attention"] * 2), "chunked_attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_relayed_is_refused_with_the_reason(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(ModelError, match=reason) as caught:
        check_supported(make())
    assert "Take a model of one of these types: llama" in str(caught.value)


def test_loading_refuses_before_it_reads_weights(tmp_path: Path) -> None:
    rope("dynamic", factor=2.0).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    (tmp_path / "tokenizer.json").write_text("not read")
    with pytest.raises(ModelError, match="dynamic NTK"):
        load_model(tmp_path)
    assert "dynamic NTK" in describe_refusal(tmp_path)


def describe_refusal(folder: Path) -> str:
    config = tf.AutoConfig.from_pretrained(folder)
    with pytest.raises(ModelError) as caught:
        check_supported(config)
    return str(caught.value)


def test_an_interleaved_rotation_is_refused() -> None:
    """Cohere rotates neighbouring pairs: our rotation by halves would spoil its keys."""
    model = AutoModelForCausalLM.from_config(tf.CohereConfig(**NO_HEAD_DIM))
    layout = kv_layout(model.config, dtype=torch.float32)
    with pytest.raises(ModelError, match="not one rotation of two halves"):
        check_structure(model, layout)


def test_layers_elsewhere_are_refused() -> None:
    config = tf.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelError, match=r"not at model\.model\.layers"):
        check_structure(model, kv_layout(config, dtype=torch.float32))


# -- space --

LAYOUT = kv_layout(tf.LlamaConfig(**TINY), dtype=torch.float32)
BASE: dict[str, Any] = {"weights": "w", "revision": None, "layout": LAYOUT, "tenant": "default"}


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"revision": "abc"},
        {"tenant": "other"},
        {"layout": dataclasses.replace(LAYOUT, dtype="bfloat16")},
        {"layout": dataclasses.replace(LAYOUT, block_tokens=32)},
        {"layout": dataclasses.replace(LAYOUT, checkpoint_layer=1)},
    ],
    ids=str,
)
def test_space_differs_with_everything_that_alters_kv(change: dict[str, Any]) -> None:
    config = tf.LlamaConfig(**TINY)
    assert space_of(config, **BASE) != space_of(config, **{**BASE, **change})


@pytest.mark.parametrize(
    "config",
    [
        tf.LlamaConfig(**TINY, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        tf.LlamaConfig(**TINY, rope_parameters=LLAMA_3),
        tf.LlamaConfig(**TINY, rms_norm_eps=1e-5),
        tf.MistralConfig(**TINY),
    ],
    ids=["theta", "scaling", "eps", "architecture"],
)
def test_space_differs_with_the_config(config: Any) -> None:
    assert space_of(config, **BASE) != space_of(tf.LlamaConfig(**TINY), **BASE)


def test_space_does_not_depend_on_where_the_model_lies_or_on_its_stored_dtype(llama: Path) -> None:
    there = tf.AutoConfig.from_pretrained(llama)
    assert there.name_or_path
    fresh = AutoModelForCausalLM.from_config(tf.LlamaConfig(**TINY)).config
    assert space_of(there, **BASE) == space_of(fresh, **BASE)


def test_space_differs_with_weights_tenant_and_dtype_of_a_loaded_model(llama: Path, tmp_path: Path) -> None:
    base = load_model(llama, device="cpu").space
    assert load_model(llama, device="cpu").space == base
    assert load_model(llama, device="cpu", tenant="b").space != base
    assert load_model(llama, device="cpu", dtype="bfloat16").space != base
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((llama / name).read_bytes())
    assert load_model(tmp_path, device="cpu").space != base


def test_weights_written_anew_change_the_space(tmp_path: Path) -> None:
    save(tf.LlamaConfig(**TINY), tmp_path)
    before = load_model(tmp_path, device="cpu").space
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    assert load_model(tmp_path, device="cpu").space != before


@pytest.mark.slow
@pytest.mark.long
def test_space_is_the_same_in_a_process_with_another_hash_seed(llama: Path) -> None:
    code = "import sys; from workers.model import load_model; sys.stdout.write(load_model(sys.argv[1]).space)"
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = subprocess.run(
        [sys.executable, "-c", code, str(llama)],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert there == load_model(llama).space
