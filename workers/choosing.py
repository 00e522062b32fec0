"""Which rows go into the next ragged step. Pure; the thread that runs the steps is in `scheduler.py`."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, NamedTuple

from workers.budget import Urgency, deal
from workers.methods.base import HealMode

if TYPE_CHECKING:
    from workers.scheduler import Sequence

BACKGROUND_ROWS = 128
"""Cap on the rows of a step in which nobody waits for any of them: whoever comes next waits for its end."""


class Share(NamedTuple):
    """A sequence's rows of the next step: prefill or decode rows, and stale entries to heal."""

    sequence: Sequence
    rows: int
    heal_rows: int = 0


def choose(sequences: Seq[Sequence], max_rows: int, ride: int | None = None) -> list[Share]:
    """Rows of the next step: one for every decoding sequence, then healing chunks, then prefill rows in order
    of arrival, then prefill ahead.

    Decode rows are never held back. Healing takes at most half of what is left while somebody waits for a
    first token. Prefill fills the rest and gets at least 16 rows, so that it goes on even when many sequences
    decode. Prefill ahead rides along where nobody waits for a first token, and has whole steps where nobody
    waits for anything. What is idle gets rows only when there is nothing else.

    Args:
        sequences: those that can wait in the order of their turns.
        ride: most rows that others' decoding may be slowed down by: of prefill ahead first, then of healing
            that was asked for in idle room only. None: healing has no such limit, and prefill ahead waits.
    """
    active = [s for s in sequences if s.urgency is Urgency.NOW]
    ahead = [s for s in sequences if s.urgency is Urgency.AHEAD]
    if not active:
        active, ahead, ride = ahead or list(sequences), [], None
        # Small steps: whoever comes next waits for the one that runs.
        max_rows = min(max_rows, BACKGROUND_ROWS)
    decoding = [s for s in active if s.decoding]
    prefilling = [s for s in active if not s.decoding]
    rows = [len(s.following) for s in decoding]
    room = max_rows - sum(rows)
    riding = _dealt(ahead, min(ride or 0, room)) if not prefilling else []
    room -= sum(share.rows for share in riding)
    polite = None if ride is None else ride - sum(share.rows for share in riding)
    healing = _healing_rows(decoding, room // 2 if prefilling else room, polite, quiet=not prefilling)
    chosen = [Share(s, n, h) for s, n, h in zip(decoding, rows, healing, strict=True) if n or h]
    return chosen + _dealt(prefilling, max(16, room - sum(healing))) + riding


def _dealt(prefilling: Seq[Sequence], room: int) -> list[Share]:
    """Prefill rows, in order, as far as there is room."""
    dealt = deal([s.prefill.rows_left for s in prefilling], room)
    return [Share(s, rows) for s, rows in zip(prefilling, dealt, strict=True) if rows]


def _healing_rows(decoding: Seq[Sequence], room: int, ride: int | None, *, quiet: bool) -> list[int]:
    """Stale entries to heal of each sequence, the oldest first.

    Args:
        ride: most of those that hold others up and were asked for in idle room only; None: no limit.
        quiet: nobody waits for a first token.
    """
    out: list[int] = []
    alone = len(decoding) == 1
    for sequence in decoding:
        heal, rows = sequence.heal, 0
        if heal is not None and (quiet or heal.mode is HealMode.ALWAYS):
            # Nobody's token is held up by the last chunks of an answer that is out.
            wanted = room if sequence.ending and alone else heal.rows
            rows = max(0, min(wanted, sequence.stale, room))
            if ride is not None and heal.mode is HealMode.IDLE and not alone:
                rows = min(rows, ride)
                ride -= rows
            room -= rows
        out.append(rows)
    return out
