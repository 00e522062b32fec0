"""`heal` (methods.md section 5): after the first token, make a relayed cache exactly full prefill's.

Staleness begins where the first relayed span starts. Every later entry is stale too, rectified or fresh,
separators and decoded tokens included, because it was computed over stale keys and values. So `Heal` walks
the positions strictly left to right, every layer, from the embeddings, in chunks between decode steps:

    exact | exact | relayed   fresh   relayed   fresh | decoded decoded | next
          ^ first_stale -> frontier ->                                  ^ healed when it gets here

A row sees only earlier positions, so everything behind the frontier is exact. The last chunk shares its part
with the decode row that follows it, and that row is the first whose logits are full prefill's for the same
tokens. Tokens that are already out do not change. This module knows nothing of steps, threads or requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from workers.attention import MassSpan
from workers.engine import Part
from workers.kv_cache import SequenceCache
from workers.methods.base import HealMode, RectifyPlan
from workers.segment import digest_tokens

MIN_ROWS = 2
"""Every decode step adds one stale entry: a chunk of one row would never catch up."""


class Heal:
    """Heals one sequence's cache.

    Attributes:
        mode: when chunks run; read by the scheduler.
        rows: of a chunk.
        finish_rows: when the answer ends with at most so many stale entries left, they are healed before
            the sequence ends, so that its KV can be published as exact.
        frontier: every position before it holds what full prefill would have put there.
        entries: (token, layer) entries recomputed so far; steps: chunks that ran.
        finished_at: index of the first answer token that was drawn from exact logits (the length of the
            answer where only its KV became exact); None until then.
    """

    def __init__(
        self,
        cache: SequenceCache,
        prompt_ids: Sequence[int],
        start: int | None,
        *,
        mode: HealMode,
        rows: int,
        num_layers: int,
        finish_rows: int = 0,
        checkpoint_layer: int | None = None,
        masses: tuple[MassSpan, ...] = (),
    ) -> None:
        """
        Args:
            cache: where the prompt's prefill is finished.
            prompt_ids: of the whole prompt.
            start: from `first_stale`; None when the cache is exact as it is.
            checkpoint_layer, masses: recorded for healed rows as prefill and decode record them, because
                what is published later must be of one piece.
        """
        self.mode = mode
        self.rows = max(MIN_ROWS, rows)
        self.finish_rows = finish_rows
        self.frontier = len(prompt_ids) if start is None else start
        self.entries = 0
        self.steps = 0
        self.finished_at: int | None = 0 if start is None else None
        self._cache = cache
        self._ids = torch.tensor(prompt_ids, dtype=torch.long)
        self._num_layers = num_layers
        self._checkpoint_layer = checkpoint_layer
        self._masses = masses

    @property
    def finished(self) -> bool:
        return self.finished_at is not None

    def stale(self, fed: int) -> int:
        """Positions that are still to be recomputed when `fed` answer tokens have entered the cache."""
        return 0 if self.finished else self._ids.shape[0] + fed - self.frontier

    def next_part(self, rows: int, fed: Sequence[int], following: Sequence[int] = ()) -> Part:
        """The next chunk. Call `done` with it after the step, before asking again.

        Args:
            rows: most positions to heal.
            fed: answer tokens whose entries are in the cache.
            following: tokens that are fed in the same step. If the chunk reaches the last stale entry, they
                ride in its part, as rows with logits: whatever the order in which parts attend, they then
                see only healed entries. If it does not, they are left out (`logits_rows` is empty).
        """
        end = self._ids.shape[0] + len(fed)
        stop = min(end, self.frontier + rows)
        last = stop == end
        ids = torch.cat([self._ids, torch.tensor([*fed, *(following if last else ())], dtype=torch.long)])
        upto = ids.shape[0] if last else stop
        if self._masses:
            # Attention adds to the mass: without this the stale row's share would stay in it.
            self._cache.mass[self.frontier : stop] = 0
        return Part(
            cache=self._cache,
            positions=torch.arange(self.frontier, upto),
            token_ids=ids[self.frontier : upto],
            logits_rows=tuple(range(stop - self.frontier, upto - self.frontier)),
            checkpoint_layer=self._checkpoint_layer,
            masses=self._masses,
        )

    def done(self, part: Part, fed: int) -> int:
        """Move the frontier behind a part of `next_part` that was computed.

        Args:
            fed: as many tokens as were given to `next_part`.

        Returns:
            (token, layer) entries that were healed.
        """
        end = self._ids.shape[0] + fed
        stop = min(end, int(part.positions[-1]) + 1)
        healed = (stop - self.frontier) * self._num_layers
        self.frontier = stop
        self.entries += healed
        self.steps += 1
        if stop == end:
            self.finished_at = fed + 1
        return healed


def first_stale(plan: RectifyPlan, token_ids: Sequence[int]) -> int | None:
    """Position of the first entry that may differ from full prefill's once the plan has run; None when all
    are exact.

    A relayed span is exact where its segment was made under the very context that it has here, at the same
    position (its variant is the plain digest of that context: `publishing.py` marks any other).
    """
    for span_plan in plan.spans:
        if span_plan.source is None:
            continue
        start, segment = span_plan.span.start, span_plan.source.segment
        moved = segment.start != start or span_plan.correction is not None
        if moved or segment.variant != digest_tokens(token_ids[:start]).hex():
            return start
    return None


def chunk_rows(rows: int, steps: int, stale: int) -> int:
    """Rows of a chunk: `rows`, or as many more as it takes to heal `stale` entries, and those decoded
    meanwhile, in `steps` decode steps (0: in any number)."""
    return rows if steps == 0 else max(rows, math.ceil((stale + steps) / steps))
