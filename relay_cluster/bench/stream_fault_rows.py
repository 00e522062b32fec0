"""The row of `relay bench stream-faults`. Plain; the campaign is in `stream_faults.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFaultRow:
    """All trials of one kind; the last row, of kind "all", sums them up.

    Attributes:
        kind: see `stream_faults.KINDS`.
        trials: pipelines run; hits: of them, those in which the harm was done.
        wrong_outputs: answers that differ from full prefill's.
        hangs: pipelines that did not end within their deadline.
        leaked_blocks: cache blocks that nobody holds and that are not free when everything has ended.
        leaked_preparations: preparations that are still there then.
        errors: pipelines that ended in an error, by its type; those that the harm itself raises apart.
        retries: requests that were started again because their worker had died.
        prepared_tokens: of all answers' prompts, used; wasted_tokens: computed in vain, as far as the workers
            that counted them lived on.
    """

    kind: str
    trials: int
    hits: int
    wrong_outputs: int
    hangs: int
    leaked_blocks: int
    leaked_preparations: int
    errors: dict[str, int]
    retries: int
    prepared_tokens: int
    wasted_tokens: int


STREAM_FAULT_COLUMNS: tuple[tuple[str, Callable[[Any], str]], ...] = (
    ("trials", lambda r: str(r.trials)),
    ("hits", lambda r: str(r.hits)),
    ("wrong", lambda r: str(r.wrong_outputs)),
    ("hangs", lambda r: str(r.hangs)),
    ("blocks", lambda r: str(r.leaked_blocks)),
    ("preparations", lambda r: str(r.leaked_preparations)),
    ("retries", lambda r: str(r.retries)),
    ("prepared", lambda r: str(r.prepared_tokens)),
    ("in vain", lambda r: str(r.wasted_tokens)),
    ("errors", lambda r: ", ".join(f"{k} {n}" for k, n in r.errors.items()) or "-"),
)
