"""Drift: what a change of context does to all tokens of a span alike, taken from a few probes.

Keys that are not recomputed cause most of the error of reused KV, and a quarter to a third of what they lack
is the same vector for the whole span (measured on SmolLM2, `docs/method-study.md`): a common offset of keys,
seen from position 0, moves attention towards the span or away from it. A few tokens spread evenly over the
span are recomputed as probes. In every layer of the band, before anybody attends there, the mean change of
their keys (turned back to the span's start) and values, times a factor below 1 because the mean is noisy, is
added to the span's entries that are not recomputed. Knows nothing of plans, engines or schedules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers.kv_cache import SequenceCache


@dataclass(frozen=True, slots=True)
class Drift:
    """A relayed span whose entries follow its probes.

    Attributes:
        start, stop: positions of the span.
        probes: [probes] int64 positions, ascending, on the CPU.
        band: layers [start, end) in which the probes are computed.
        factor: share of the probes' mean change that is added.
        kept: [tokens, 1]; 1 where an entry is not recomputed, else 0.
        cos, sin: [layers or 1, tokens, rotary_dim / 2] float32; rotation from the span's start to a token.
    """

    start: int
    stop: int
    probes: torch.Tensor
    band: tuple[int, int]
    factor: float
    kept: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def follow(self, cache: SequenceCache, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Move the span's entries of one layer, before the probes' new entries are written.

        Args:
            key, value: [kv_heads, probes, head_dim]; the probes' new entries, keys rotated.
        """
        table = min(layer, self.cos.shape[0] - 1)
        cos, sin = self.cos[table], self.sin[table]
        half = cos.shape[-1]
        keys = cache.keys(layer)[:, self.start : self.stop]
        values = cache.values(layer)[:, self.start : self.stop]
        at = (self.probes - self.start).to(keys.device)
        change = key.float() - keys[:, at].float()
        first, second = change[..., :half], change[..., half : 2 * half]
        # Turned back by R(-(p - start)), so that changes at different positions can be averaged.
        mean_first = (first * cos[at] + second * sin[at]).mean(1, keepdim=True).mul_(self.factor)
        mean_second = (second * cos[at] - first * sin[at]).mean(1, keepdim=True).mul_(self.factor)
        kept = self.kept.to(keys.dtype)
        cos, sin = (cos * self.kept).to(keys.dtype), (sin * self.kept).to(keys.dtype)
        mean_first, mean_second = mean_first.to(keys.dtype), mean_second.to(keys.dtype)
        keys[..., :half].addcmul_(cos, mean_first).addcmul_(sin, mean_second, value=-1)
        keys[..., half : 2 * half].addcmul_(cos, mean_second).addcmul_(sin, mean_first)
        if change.shape[-1] > 2 * half:
            rest = change[..., 2 * half :].mean(1, keepdim=True).mul_(self.factor)
            keys[..., 2 * half :].addcmul_(kept, rest.to(keys.dtype))
        moved = (value.float() - values[:, at].float()).mean(1, keepdim=True).mul_(self.factor)
        values.addcmul_(kept, moved.to(values.dtype))


def span_drift(
    start: int,
    tokens: int,
    selected: torch.Tensor,
    probes: torch.Tensor,
    band: tuple[int, int],
    factor: float,
    inv_freq: torch.Tensor,
) -> Drift:
    """The drift of a span of `tokens` tokens at position `start`.

    Args:
        selected, probes: int64 offsets within the span, ascending; probes are among the selected.
        inv_freq: [layers or 1, rotary_dim / 2] float32, radians per position.
    """
    device = inv_freq.device
    kept = torch.ones((tokens, 1), device=device)
    kept[selected.to(device)] = 0
    angle = torch.arange(tokens, device=device).double()[:, None] * inv_freq.double()[:, None, :]
    return Drift(
        start,
        start + tokens,
        probes + start,
        band,
        factor,
        kept,
        angle.cos().float(),
        angle.sin().float(),
    )
