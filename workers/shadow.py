"""Shadow checks (methods.md section 6): was this answer's beginning what full prefill would have begun with?

    Evidence     kept while a sampled request runs: its first logits, and the values of its relayed spans at
                 two layers as they were when the first token was drawn
    EvidenceBox  evidence of answered requests, a bounded number of them, until the check or its deadline
    judge()      compares evidence with a later full prefill of the same prompt, teacher-forced on the answer

No text and no prompt is kept. This module knows nothing of engines, threads or gates.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers import kernels
from workers.compare import agreement
from workers.kv_cache import SequenceCache
from workers.messages import ShadowCheck
from workers.methods.base import RectifyPlan


class Evidence:
    """What one request leaves behind for a check.

    Args:
        tokens: first answer tokens whose logits are kept.
        layers: whose values of relayed positions are kept.
        positions: [relayed] int64, ascending.
    """

    def __init__(self, tokens: int, layers: Sequence[int], positions: torch.Tensor) -> None:
        self.layers = tuple(layers)
        self.positions = positions
        self._tokens = tokens
        self._logits: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    @property
    def logits(self) -> torch.Tensor:
        """[tokens kept, vocab] float32"""
        return torch.cat(self._logits)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._logits, *self._values))

    def take_values(self, cache: SequenceCache) -> None:
        """Copy the values as they are now; healing will change them."""
        self._values = values_at(cache, self.layers, self.positions)

    def take_logits(self, logits: torch.Tensor) -> None:
        """logits: [rows, vocab] that predict the next tokens of the answer."""
        left = self._tokens - sum(t.shape[0] for t in self._logits)
        if left > 0:
            self._logits.append(logits[:left].clone())

    def value_errors(self, cache: SequenceCache) -> tuple[float, ...]:
        """Mean 1 - cos between the kept values and those of `cache`, for each layer."""
        now = values_at(cache, self.layers, self.positions)
        return tuple(
            float(kernels.value_deviation(kept, value).mean()) if kept.numel() else 0.0
            for kept, value in zip(self._values, now, strict=True)
        )


@dataclass(slots=True)
class _Kept:
    evidence: Evidence
    until: float


class EvidenceBox:
    """Evidence by request id. The oldest makes room; what is overdue is dropped. Thread-safe.

    Args:
        most: pieces of evidence kept at once.
        max_bytes: and their size together.
    """

    def __init__(self, most: int, max_bytes: int) -> None:
        self._most = most
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(k.evidence.nbytes for k in self._kept.values())

    def put(self, request_id: str, evidence: Evidence, *, now: float, keep_s: float) -> None:
        """now: any monotonic clock, in seconds, the same in `take`."""
        with self._lock:
            self._drop_overdue(now)
            self._kept[request_id] = _Kept(evidence, now + keep_s)
            while self._kept and (len(self._kept) > self._most or self._size() > self._max_bytes):
                self._kept.popitem(last=False)

    def take(self, request_id: str, *, now: float) -> Evidence | None:
        """The request's evidence, which is then no longer kept; None when it is gone."""
        with self._lock:
            self._drop_overdue(now)
            kept = self._kept.pop(request_id, None)
        return None if kept is None else kept.evidence

    def _size(self) -> int:
        return sum(k.evidence.nbytes for k in self._kept.values())

    def _drop_overdue(self, now: float) -> None:
        for request_id in [r for r, k in self._kept.items() if k.until <= now]:
            del self._kept[request_id]


def values_at(cache: SequenceCache, layers: Sequence[int], positions: torch.Tensor) -> list[torch.Tensor]:
    """Copies of the values of `positions`: one [kv_heads, positions, head_dim] for each of `layers`."""
    return [cache.values(layer)[:, positions] for layer in layers]


def relayed_positions(plan: RectifyPlan) -> torch.Tensor:
    """[relayed] int64: positions of all relayed spans of a plan, ascending."""
    runs = [torch.arange(s.span.start, s.span.stop) for s in plan.spans if s.source is not None]
    return torch.cat(runs) if runs else torch.empty(0, dtype=torch.long)


def judge(
    ours: torch.Tensor, reference: torch.Tensor, layers: Sequence[int], errors: Sequence[float], method: str
) -> ShadowCheck:
    """Compare answers' beginnings.

    Args:
        ours, reference: [tokens, vocab] logits; the reference is full prefill's.
        layers, errors: value errors, and the layers they are of.
        method: that was judged.
    """
    found = agreement(reference, ours)
    return ShadowCheck(
        method=method,
        tokens=ours.shape[0],
        kl_first=found.kl[0],
        kl_mean=found.kl_mean,
        top1=found.top1,
        value_errors=tuple(zip(layers, errors, strict=True)),
        logits_max_diff=float((ours.float() - reference.float()).abs().max()),
    )
