"""Exact local prefix cache: KV of token prefixes that this worker computed itself, in full.

A token whose whole left context is identical has identical KV, so the copy is exact. Entries are copies
outside the KV pool, with a byte budget and least-recently-used eviction. Knows nothing of segments or other
workers.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch

from workers.kv_cache import SequenceCache


class PrefixCache:
    """Longest-common-prefix look-up over a few recent prompts. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, bytes], torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes()

    def _nbytes(self) -> int:
        return sum(t.nbytes for t in self._entries.values())

    def load(self, token_ids: Sequence[int], cache: SequenceCache, *, limit: int, tenant: str = "") -> int:
        """Copy the longest prefix of `token_ids` that the tenant has left, at most `limit` tokens, into
        `cache`.

        Returns:
            Number of leading tokens whose KV is now in place.
        """
        with self._lock:
            best, entry = self._longest(token_ids, tenant)
            best = min(best, limit)
            if entry is None or best <= 0:
                return 0
            self._entries.move_to_end(entry)
            cache.kv[:, :, :, :best] = self._entries[entry][:, :, :, :best]
            return best

    def match(self, token_ids: Sequence[int], tenant: str = "") -> int:
        """How many leading tokens `load` would find."""
        with self._lock:
            return self._longest(token_ids, tenant)[0]

    def _longest(self, token_ids: Sequence[int], tenant: str) -> tuple[int, tuple[str, bytes] | None]:
        wanted = np.asarray(token_ids, dtype=np.int32)
        best, entry = 0, None
        for owner, key in self._entries:
            if owner != tenant:
                continue  # how long a stranger's prompt takes must not tell what others have asked
            n = _common_prefix(np.frombuffer(key, dtype=np.int32), wanted)
            if n > best:
                best, entry = n, (owner, key)
        return best, entry

    def store(self, token_ids: Sequence[int], cache: SequenceCache, tenant: str = "") -> None:
        """Keep the KV of `token_ids`, which stand at the start of `cache` and were computed in full."""
        count = len(token_ids)
        key = np.asarray(token_ids, dtype=np.int32).tobytes()
        size = cache.kv[:, :, :, :1].nbytes * count
        if count == 0 or size > self._max_bytes:
            return
        with self._lock:
            for known in list(self._entries):
                if known[0] == tenant and known[1].startswith(key):
                    self._entries.move_to_end(known)
                    return
            self._entries[tenant, key] = cache.kv[:, :, :, :count].clone()
            while self._nbytes() > self._max_bytes:
                self._entries.popitem(last=False)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(a.shape[0], b.shape[0])
    different = np.nonzero(a[:n] != b[:n])[0]
    return int(different[0]) if different.size else n
