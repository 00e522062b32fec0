"""Draws the next token of one request from its logits.

Every request has its own generator on the CPU, so what it draws does not depend on its batch mates or on the
device. This module does not know which tokens stop an answer, or about sequences.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from transport.errors import RelayError
from workers.settings import SamplingSettings


class Sampler:
    """Greedy at temperature 0, else temperature and top-p with the request's own seed.

    Args:
        settings: how to draw.
        withheld: ids that are not drawn before `min_new_tokens` tokens are there.
    """

    def __init__(self, settings: SamplingSettings, withheld: Collection[int] = ()) -> None:
        self._settings = settings
        self._withheld = sorted(withheld) if settings.min_new_tokens else []
        self._drawn = 0
        self._generator = torch.Generator(device="cpu").manual_seed(settings.seed)

    def sample(self, logits: torch.Tensor) -> int:
        """Draw a token id.

        Args:
            logits: [vocab], any float dtype and device; -inf forbids a token.

        Raises:
            RelayError: the logits are not a vector, or hold NaN, +inf, or nothing but -inf.
        """
        if logits.ndim != 1 or logits.numel() == 0:
            raise RelayError(
                f"logits of shape {tuple(logits.shape)} cannot be sampled: one vector [vocab] is needed"
            )
        if self._withheld and self._drawn < self._settings.min_new_tokens:
            logits = logits.clone()
            logits[self._withheld] = -torch.inf
        self._drawn += 1
        best, index = logits.max(dim=0)  # NaN wins a maximum, so one number tells the health of all
        if not bool(torch.isfinite(best)):
            raise RelayError(
                f"the model's logits are not numbers (largest: {float(best)}). The weights or the cache are "
                "damaged, or the dtype overflows: try dtype: float32."
            )
        if self._settings.temperature == 0:
            return int(index)
        return self._draw(logits)

    def scores(self, logits: torch.Tensor, token: int) -> tuple[float, tuple[tuple[int, float], ...]] | None:
        """Log-probability (natural, at temperature 1) of `token`, and (id, log-probability) of the most
        likely ones, best first; None unless they were asked for. logits: [vocab]."""
        if self._settings.logprobs is None:
            return None
        logs = torch.log_softmax(logits.float(), dim=0)
        best, ids = logs.topk(min(self._settings.logprobs, logs.numel()))
        return float(logs[token]), tuple(zip(ids.tolist(), best.tolist(), strict=True))

    def _draw(self, logits: torch.Tensor) -> int:
        # float64 on the CPU: the same tokens for the same seed, whatever the device and dtype of the model
        scaled = logits.detach().to("cpu", torch.float64)
        scaled = (scaled - scaled.max()) / self._settings.temperature
        ordered, order = torch.sort(torch.softmax(scaled, dim=0), descending=True, stable=True)
        reached = torch.cumsum(ordered, dim=0)
        # a token is kept while the mass before it is below top_p: never empty, and the one that crosses is in
        kept = max(int(((reached - ordered) < self._settings.top_p).sum()), 1)
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * reached[kept - 1]
        return int(order[min(int(torch.searchsorted(reached[:kept], point, right=True)), kept - 1)])
