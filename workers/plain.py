"""Plain transformers on the same weights: the baseline that is not ours.

A second copy of the model as `from_pretrained` gives it, with its own attention and cache; nothing of the
engine's preparation touches it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from workers.model import load_model
from workers.settings import Device, DType


class PlainModel:
    """A causal LM driven by transformers alone.

    Args:
        name_or_path: see `workers.model.load_model`; device, dtype: as the worker it is compared with.
    """

    def __init__(self, name_or_path: str, *, device: Device = "auto", dtype: DType = "auto") -> None:
        self._model: Any = load_model(name_or_path, device=device, dtype=dtype).model
        self._model.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def first_logits(self, token_ids: Sequence[int]) -> tuple[float, torch.Tensor]:
        """`model(ids, logits_to_keep=1)`.

        Returns:
            (seconds, [vocab] float32 logits of the last position).
        """
        device = self._model.device
        ids = torch.tensor([list(token_ids)], device=device)
        _synchronise(device)
        begin = time.perf_counter()
        logits = self._model(ids, logits_to_keep=1).logits
        _synchronise(device)
        return time.perf_counter() - begin, logits[0, -1].float()

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds that `model.generate` takes for `new_tokens` greedy tokens of each prompt, with prefill.

        prompts: token ids, all of one length, so that nothing is padded.
        """
        device = self._model.device
        ids = torch.tensor([list(prompt) for prompt in prompts], device=device)
        _synchronise(device)
        begin = time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        _synchronise(device)
        return time.perf_counter() - begin

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Logits before every token of `continuation` and after: [1 + continuation, vocab] float32."""
        ids = torch.tensor([[*token_ids, *continuation]], device=self._model.device)
        return self._model(ids, logits_to_keep=len(continuation) + 1).logits[0].float()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
