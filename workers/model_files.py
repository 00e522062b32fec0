"""A model's files: where they are, what a folder must have, and how what goes wrong with them is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from transport.errors import ModelError

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_HUB_SKIPPED = ("*/*", "consolidated*")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def weight_files(folder: Path) -> list[Path]:
    """All weights that loading may read, adapters too, but not Mistral's second copy, `consolidated*`."""
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith((".", "consolidated")))


def missing_files(folder: Path) -> list[str]:
    missing = [] if (folder / "config.json").is_file() else ["config.json"]
    if not weight_files(folder):
        missing.append("*.safetensors")
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        missing.append("tokenizer.json")
    return missing


def check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ModelError(
            f"model {path} is a file. Give the Hugging Face folder (config.json, *.safetensors) instead."
        )
    if missing := missing_files(path):
        raise ModelError(
            f"folder {path} is not a Hugging Face model: missing {', '.join(missing)}. Give the folder that "
            "save_pretrained wrote (weights as safetensors)."
        )


def fetch(found: Path | str, files: tuple[str, ...] = _HUB_FILES) -> tuple[Path, str | None]:
    """Local folder and revision; downloads `files` of a hub id into the hub's own cache."""
    if isinstance(found, Path):
        return found, None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = found.partition("@")
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(files),
                ignore_patterns=list(_HUB_SKIPPED),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"model {found!r} cannot be fetched from the hub: {_first_line(error)}. Check the name and the "
            "network, or give a local folder."
        ) from error
    return folder, folder.name


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_config(folder: Path, name: str) -> Any:
    with errors_of(name):
        return AutoConfig.from_pretrained(str(folder))


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Map what transformers and safetensors raise inside the block to ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, so no narrower class covers them
        raise ModelError(f"model {name} cannot be loaded: {_first_line(error)}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from transformers: entry points draw their own."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def count_parameters(path: Path) -> int:
    """Number of weights in a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for size in entry["shape"]:
                count *= size
            total += count
    return total
