"""Anchors of `kvcomm` (arXiv 2510.12872): KV of segments once prefilled in full, and how it changed there.

Everything lives in a position-0 frame: keys are rotated as if the span's first token stood at position 0, so
an anchor learned at one position serves at any other (the published code keeps them where they were, and
drifts). With K, V the KV of a span's tokens in its new context and K', V' the stored ones,

    base    R(-q) K', V'              stored when the first token stood at position q
    offset  R(-p) K - R(-q) K', V - V'        learned in a prompt that had the span at position p
    use     R(p2) (base + sum over anchors of w_a offset_a)         at position p2

    weights w[a, t] = softmax over anchors of -(mean over layers, heads and channels of |base - base_a|) / T

one per anchor and token, for keys and values apart. Layer 0 does not depend on context and is left alone.
T is 1 in the published code. A mean over few anchors is mostly their own noise; `prior` shrinks it as that
many more anchors with offset zero would: times n / (n + prior), n = 1 / (sum over anchors of w^2). 0 as
published.

Anchors are immutable: a better one replaces another under the next version, and a prompt that is being
corrected keeps what it matched. Knows nothing of prompts, requests or the cluster.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from workers import kernels
from workers.methods.kvcomm import AnchorCandidate, KVComm
from workers.pulled import PulledSegment

KEY_GROUP = 64
"""Tokens that share a key channel's scale in 8 bits: one outlier token costs its neighbours only."""


@dataclass(frozen=True, slots=True)
class Context:
    """Where an offset holds: a slot of one agent's template. template: digest; slot: name, with "#n" for the
    n-th further use of the same slot."""

    template: str
    slot: str


@dataclass(frozen=True, eq=False)
class Stored:
    """A float32 tensor, kept as it is or in int8.

    Attributes:
        data: [layers, kv_heads, tokens, head_dim] float32 or int8.
        scale: None for float32; keys: [layers, kv_heads, ceil(tokens / KEY_GROUP), head_dim], values:
            [layers, kv_heads, tokens, 1], float32. The error is at most scale / 2.
    """

    data: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def read(self, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens: [layers, kv_heads, tokens, head_dim] float32."""
        data = self.data[:, :, :tokens]
        if self.scale is None:
            return data
        scale = self.scale
        if scale.shape[2] < self.data.shape[2]:
            scale = scale.repeat_interleave(KEY_GROUP, dim=2)
        return data.float().mul_(scale[:, :, :tokens])


def store_keys(keys: torch.Tensor, bits: int) -> Stored:
    """Keep `keys` [layers, kv_heads, tokens, head_dim]; in 8 bits with a scale per channel (their channels
    differ far more than their tokens) and group of tokens."""
    if bits == 32:
        return Stored(keys)
    layers, heads, tokens, dim = keys.shape
    groups = -(-tokens // KEY_GROUP)
    padded = keys.new_zeros((layers, heads, groups * KEY_GROUP, dim))
    padded[:, :, :tokens] = keys.abs()
    scale = padded.view(layers, heads, groups, KEY_GROUP, dim).amax(dim=3).div_(127)
    spread = scale.repeat_interleave(KEY_GROUP, dim=2)[:, :, :tokens]
    return Stored(_to_int8(keys, spread), scale)


def store_values(values: torch.Tensor, bits: int) -> Stored:
    """Keep `values` [layers, kv_heads, tokens, head_dim]; in 8 bits with a scale per token."""
    if bits == 32:
        return Stored(values)
    scale = values.abs().amax(dim=3, keepdim=True).div_(127)
    return Stored(_to_int8(values, scale), scale)


def _to_int8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(-127, 127).to(torch.int8)


@dataclass(frozen=True, eq=False)
class StoredKV:
    """Keys and values of the same tokens."""

    keys: Stored
    values: Stored

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True, eq=False)
class Anchor:
    """What one segment's KV became in one slot.

    Attributes:
        context: where.
        source: names the segment and the context that its KV was made in.
        version: grows when the same source is learned better.
        exact: whether all text before the span was computed, too, when the offset was learned.
        tokens: how many.
        base: all layers. offset: layers 1 .. L-1.
    """

    context: Context
    source: str
    version: int
    exact: bool
    tokens: int
    base: StoredKV
    offset: StoredKV

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.offset.nbytes


@dataclass(frozen=True, eq=False)
class Frame:
    """KV of a span in the position-0 frame: [layers, kv_heads, tokens, head_dim] float32 each."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]


def frame_of_segment(pulled: PulledSegment, tokens: int, inv_freq: torch.Tensor) -> Frame:
    """The first `tokens` tokens of a stored segment. inv_freq: [L or 1, rotary_dim / 2] float32."""
    cos, sin = kernels.rotation(inv_freq, -pulled.start)
    kv = pulled.blocks[0].kv.body
    shape = (kv.shape[0], kv.shape[2], tokens, kv.shape[4])
    keys = torch.empty(shape, dtype=torch.float32, device=kv.device)
    values = torch.empty_like(keys)
    at = 0
    for block in pulled.blocks:
        n = min(tokens - at, block.mass.shape[0])
        if n <= 0:
            break
        there = block.kv.take(n)
        kernels.rotate_keys(there[:, 0], cos, sin, keys[:, :, at : at + n])
        values[:, :, at : at + n] = there[:, 1]
        at += n
    return Frame(keys, values)


def frame_of_cache(kv: torch.Tensor, start: int, inv_freq: torch.Tensor) -> Frame:
    """KV of a span as it stands in a cache. kv: [layers, 2, kv_heads, tokens, head_dim], keys rotated at
    positions start .. start + tokens - 1."""
    cos, sin = kernels.rotation(inv_freq, -start)
    keys = torch.empty(kv[:, 0].shape, dtype=torch.float32, device=kv.device)
    kernels.rotate_keys(kv[:, 0], cos, sin, keys)
    return Frame(keys, kv[:, 1].float())


@dataclass(frozen=True, eq=False)
class Match:
    """A span beside the anchors that could correct it; a `Correction` of the executor.

    Attributes:
        context, source, frame: of the span.
        anchors: those that are long enough; candidates: the same, in the same order, for the planner.
        value_gaps: [anchors, tokens] mean absolute difference of the values.
        temperature: of the weights' softmax; prior: see the module.
        inv_freq: [L or 1, rotary_dim / 2] float32.
    """

    context: Context
    source: str
    frame: Frame
    anchors: tuple[Anchor, ...]
    candidates: tuple[AnchorCandidate, ...]
    value_gaps: torch.Tensor
    temperature: float
    prior: float
    inv_freq: torch.Tensor

    def apply(self, kv: torch.Tensor, start: int) -> None:
        """See `workers.prefill.Correction`."""
        tokens, inv_freq = self.frame.tokens, self.inv_freq
        key_gaps = torch.stack([_gap(self.frame.keys, a.base.keys.read(tokens)) for a in self.anchors])
        keys = self._mixed([a.offset.keys for a in self.anchors], self.weights(key_gaps))
        rotated = torch.empty_like(keys)
        cos, sin = kernels.rotation(inv_freq[1:] if inv_freq.shape[0] > 1 else inv_freq, start)
        kernels.rotate_keys(keys, cos, sin, rotated)
        kv[1:, 0] += rotated.to(kv.dtype)
        values = self._mixed([a.offset.values for a in self.anchors], self.weights(self.value_gaps))
        kv[1:, 1] += values.to(kv.dtype)

    def weights(self, gaps: torch.Tensor) -> torch.Tensor:
        """[anchors, tokens], adding up to 1 over the anchors, or to less with a prior. An anchor made of this
        very segment takes all: no average with others is nearer to it than its own offset."""
        own = [a.source == self.source for a in self.anchors]
        if any(own):
            return torch.tensor(own, dtype=torch.float32, device=gaps.device)[:, None].expand_as(gaps)
        weights = torch.softmax(-gaps / self.temperature, dim=0)
        count = 1 / weights.square().sum(0)
        return weights * (count / (count + self.prior))

    def _mixed(self, offsets: Sequence[Stored], weights: torch.Tensor) -> torch.Tensor:
        """[layers - 1, kv_heads, tokens, head_dim] float32: the weighted sum of the offsets."""
        layers, heads, tokens, dim = self.frame.keys.shape
        total = self.frame.keys.new_zeros((layers - 1, heads, tokens, dim))
        for offset, weight in zip(offsets, weights, strict=True):
            if bool(weight.any()):
                total.addcmul_(offset.read(tokens), weight[None, None, :, None])
        return total


def _gap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[tokens] mean absolute difference over layers, heads and channels."""
    return (a - b).abs_().mean(dim=(0, 1, 3))


@dataclass(slots=True)
class _Held:
    anchor: Anchor
    uses: int = 0


class AnchorPool:
    """A worker's anchors under one byte budget, oldest first. Thread-safe; tensor work is the caller's
    thread's.

    Args:
        max_bytes: of all anchors together; a base that several anchors share counts once.
        inv_freq: [L or 1, rotary_dim / 2] float32.
    """

    def __init__(self, max_bytes: int, inv_freq: torch.Tensor) -> None:
        self.max_bytes = max_bytes
        self._inv_freq = inv_freq
        self._held: OrderedDict[tuple[Context, str], _Held] = OrderedDict()
        self._bases: weakref.WeakValueDictionary[tuple[str, int, int], StoredKV] = (
            weakref.WeakValueDictionary()
        )
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    # -- reading -------------------------------------------------------------------------------------------

    def anchors(self, context: Context) -> tuple[Anchor, ...]:
        """The anchors of a slot, oldest first."""
        with self._lock:
            return tuple(h.anchor for (c, _), h in self._held.items() if c == context)

    def uses(self, anchor: Anchor) -> int:
        """How often the gate counted the anchor among the nearest; 0 when it is not held."""
        with self._lock:
            held = self._held.get((anchor.context, anchor.source))
            return 0 if held is None else held.uses

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes(h.anchor for h in self._held.values())

    def stats(self) -> dict[str, int]:
        """anchors, anchor_bytes, and since the start: learned, pulled, evicted, corrected, strangers."""
        with self._lock:
            held = [h.anchor for h in self._held.values()]
            counts = {k: self._counts[k] for k in ("learned", "pulled", "evicted", "corrected", "strangers")}
        return {"anchors": len(held), "anchor_bytes": self._nbytes(held), **counts}

    def match(
        self,
        context: Context,
        source: str,
        frame: Frame,
        *,
        temperature: float = 1.0,
        prior: float = 0.0,
    ) -> Match:
        """Measure a span against the slot's anchors that are at least as long."""
        anchors = tuple(a for a in self.anchors(context) if a.tokens >= frame.tokens)
        norm = float(torch.linalg.vector_norm(frame.values))
        gaps: list[torch.Tensor] = []
        candidates: list[AnchorCandidate] = []
        for anchor in anchors:
            difference = frame.values - anchor.base.values.read(frame.tokens)
            distance = float(torch.linalg.vector_norm(difference))
            candidates.append(AnchorCandidate(anchor.source, distance, distance / max(norm, 1e-30)))
            gaps.append(difference.abs_().mean(dim=(0, 1, 3)))
        stacked = torch.stack(gaps) if gaps else frame.values.new_zeros((0, frame.tokens))
        return Match(
            context, source, frame, anchors, tuple(candidates), stacked, temperature, prior, self._inv_freq
        )

    # -- writing -------------------------------------------------------------------------------------------

    def judged(self, match: Match, method: KVComm) -> None:
        """Count what the gate says of a match: uses of the anchors, and the worker's totals."""
        verdict = method.judge(match.candidates)
        with self._lock:
            self._counts["corrected" if verdict.sharable else "strangers"] += 1
            for source in verdict.head:
                held = self._held.get((match.context, source))
                if held is not None:
                    held.uses += 1

    def wants(self, context: Context, source: str, *, exact: bool) -> bool:
        """Whether an anchor learned so would tell more than what is held."""
        with self._lock:
            held = self._held.get((context, source))
            return held is None or (exact and not held.anchor.exact)

    def learn(self, match: Match, kv: torch.Tensor, start: int, *, bits: int, exact: bool) -> Anchor:
        """Make the anchor of a span that has been computed. kv: [layers, 2, kv_heads, tokens, head_dim], the
        span's true entries, keys rotated from position `start` on. Does not enter it; see `insert`."""
        true = frame_of_cache(kv, start, self._inv_freq)
        base = match.frame
        offset = StoredKV(
            store_keys(true.keys[1:] - base.keys[1:], bits),
            store_values(true.values[1:] - base.values[1:], bits),
        )
        return Anchor(
            match.context,
            match.source,
            1 + self._version(match.context, match.source),
            exact,
            base.tokens,
            self._base(match.source, base, bits),
            offset,
        )

    def insert(
        self, anchor: Anchor, *, max_anchors: int, window: int, pulled: bool = False
    ) -> tuple[Anchor, ...] | None:
        """Enter an anchor; a newer version takes the place and the count of the older one.

        Args:
            max_anchors: of its slot; window: among so many oldest, the least used is given up, the oldest of
                these first. First within the slot, then, for the bytes, within the whole pool.
            pulled: for the counts: whether another worker learned it.

        Returns:
            What was given up for it; None when it alone exceeds the budget and was not entered.
        """
        if anchor.nbytes > self.max_bytes:
            return None
        key = (anchor.context, anchor.source)
        with self._lock:
            self._counts["pulled" if pulled else "learned"] += 1
            gone: list[Anchor] = []
            old = self._held.get(key)
            if old is not None:
                gone.append(old.anchor)
                old.anchor = anchor
            else:
                same = [k for k in self._held if k[0] == anchor.context]
                while len(same) >= max_anchors:
                    gone.append(self._give_up(same, window))
                self._held[key] = _Held(anchor)
            others = [k for k in self._held if k != key]
            while others and self._nbytes(h.anchor for h in self._held.values()) > self.max_bytes:
                gone.append(self._give_up(others, window))
        return tuple(gone)

    def _give_up(self, keys: list[tuple[Context, str]], window: int) -> Anchor:
        """Drop the least used of the `window` oldest of `keys` (in order of age), there and in the pool."""
        key = min(keys[:window], key=lambda k: self._held[k].uses)
        keys.remove(key)
        self._counts["evicted"] += 1
        return self._held.pop(key).anchor

    def _version(self, context: Context, source: str) -> int:
        with self._lock:
            held = self._held.get((context, source))
            return 0 if held is None else held.anchor.version

    def _base(self, source: str, frame: Frame, bits: int) -> StoredKV:
        """The stored form of a base; one for all slots that the segment has stood in."""
        key = (source, frame.tokens, bits)
        with self._lock:
            known = self._bases.get(key)
        if known is None:
            known = StoredKV(store_keys(frame.keys, bits), store_values(frame.values, bits))
            with self._lock:
                self._bases[key] = known
        return known

    @staticmethod
    def _nbytes(anchors: Iterable[Anchor]) -> int:
        parts = {id(part): part.nbytes for a in anchors for part in (a.base, a.offset)}
        return sum(parts.values())
