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
        at: [probes] int64 the same from the span's start, where the cache is.
        band: layers [start, end) in which the probes are computed.
        factor: share of the probes' mean change that is added.
        kept: [tokens, 1]; 1 where an entry is not recomputed, else 0.
        cos, sin: [layers or 1, tokens, rotary_dim] float32; rotation from the span's start to a token, halves
            paired the Hugging Face way, the minus of the first half in `sin`.
    """

    start: int
    stop: int
    probes: torch.Tensor
    at: torch.Tensor
    band: tuple[int, int]
    factor: float
    kept: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def follow(self, cache: SequenceCache, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Move the span's entries of one layer, before the probes' new entries are written.

        Once these are written, doing it again moves nothing: the probes no longer differ from the cache.

        Args:
            key, value: [kv_heads, probes, head_dim]; the probes' new entries, keys rotated.
        """
        table = min(layer, self.cos.shape[0] - 1)
        cos, sin = self.cos[table], self.sin[table]
        width = cos.shape[-1]
        keys = cache.keys(layer)[:, self.start : self.stop]
        values = cache.values(layer)[:, self.start : self.stop]
        change = key.float() - keys[:, self.at].float()
        turning = change[..., :width]
        # Turned back by R(-(p - start)), so that changes at different positions can be averaged.
        back = turning * cos[self.at] - _swapped(turning) * sin[self.at]
        mean = back.mean(1, keepdim=True).mul_(self.factor)
        moved = (value.float() - values[:, self.at].float()).mean(1, keepdim=True).mul_(self.factor)
        rest = change[..., width:].mean(1, keepdim=True).mul_(self.factor)
        dtype = keys.dtype
        kept = self.kept.to(dtype)
        # Whole rows, not halves of them: on a CPU half the time, which is 5 % of a sparse step over 2,048
        # tokens.
        turned = keys[..., :width]
        turned.addcmul_((cos * self.kept).to(dtype), mean.to(dtype))
        turned.addcmul_((sin * self.kept).to(dtype), _swapped(mean).to(dtype))
        if rest.shape[-1]:
            keys[..., width:].addcmul_(kept, rest.to(dtype))
        values.addcmul_(kept, moved.to(dtype))


def _swapped(x: torch.Tensor) -> torch.Tensor:
    """The halves of the last dimension, exchanged."""
    half = x.shape[-1] // 2
    return torch.cat((x[..., half:], x[..., :half]), -1)


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
    cos, sin = angle.cos().float(), angle.sin().float()
    return Drift(
        start,
        start + tokens,
        probes + start,
        probes.to(device),
        band,
        factor,
        kept,
        torch.cat((cos, cos), -1),
        torch.cat((-sin, sin), -1),
    )
