"""A producer's side of open segments: it tells shards what is new, and again what they have missed.

What has been told is kept here until the segment ends, so that a shard that has restarted, was not reached or
has become responsible gets all of it: with every heartbeat each shard is asked which block it expects next. A
shard that did not hear of the end takes the silence for one.
A shard that does not answer costs its readers time, never the producer more than a call's deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from transport.directory import wire, wire_open
from transport.directory.fleet import Fleet
from transport.directory.local import refuse_fenced
from transport.directory.opening import Advanced, Opened
from transport.directory.table import Announced
from transport.types import BlockRef, Owner, SegmentKey

log = logging.getLogger(__name__)

_ROUNDS: Final = 3
"""An update, what was missing before it, and once more where keys have moved meanwhile."""
_BLOCKS_PER_CALL: Final = 512


@dataclass(slots=True)
class _Log:
    """All that has been told of an open segment."""

    head: Opened
    blocks: list[BlockRef] = field(default_factory=list[BlockRef])
    token_ids: list[int] = field(default_factory=list[int])

    def since(self, first: int) -> Opened:
        """An update with what comes behind the first `first` blocks, or its beginning; it ends the segment
        only if that is all."""
        stop = min(len(self.blocks), first + _BLOCKS_PER_CALL)
        size = self.head.block_tokens
        part = replace(
            self.head,
            first=first,
            blocks=tuple(self.blocks[first:stop]),
            token_ids=tuple(self.token_ids[first * size : stop * size]),
        )
        whole = stop == len(self.blocks)
        return part if whole else replace(part, state="open", final=None, num_tokens=0, reason="")


class OpenLogs:
    """The open segments of one owner. Thread-safe."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._logs: dict[SegmentKey, _Log] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._logs)

    def advance(self, owner: Owner, update: Opened) -> str:
        """Tell the shards of the segment what is new.

        Returns:
            "" or why it cannot be followed: a verdict of `Advanced`, or "unreachable" (which the next
            heartbeat may mend).

        Raises:
            WorkerLost: a newer incarnation has taken this name. ValueError: a gap, of the caller's making.
        """
        with self._lock:
            found = self._logs.get(update.key)
            if found is None:
                if update.state == "aborted":
                    return ""  # nobody has heard of it
                found = self._logs[update.key] = _Log(update)
            found.head = replace(update, first=0, blocks=(), token_ids=())
            known = len(found.blocks)
            if update.first > known:
                raise ValueError(f"block {update.first} of an open segment comes before block {known}")
            found.blocks.extend(update.blocks[known - update.first :])
            found.token_ids.extend(update.token_ids[(known - update.first) * update.block_tokens :])
            if update.state != "open":
                del self._logs[update.key]
        return self._tell(owner, found, update.first)

    def refresh(self, owner: Owner) -> None:
        """Make up for what shards have missed. Raises WorkerLost."""
        with self._lock:
            logs = list(self._logs.values())
        parts: dict[str, list[_Log]] = {}
        for found in logs:
            for name in self._fleet.replicas(found.head.key):
                parts.setdefault(name, []).append(found)
        with self._lock:
            updates = {name: [x.since(len(x.blocks)) for x in held] for name, held in parts.items()}
        answers, moved = self._send(owner, updates)
        missed = [
            (found, answer.expects)
            for name, verdicts in answers.items()
            for found, answer in zip(parts[name], verdicts, strict=True)
            if answer.verdict == "gap"
        ]
        for found, first in [(x, len(x.blocks)) for x in logs] if moved else missed:
            self._tell(owner, found, first)

    def _tell(self, owner: Owner, found: _Log, first: int) -> str:
        """Until every shard that answers has all of it."""
        expects = dict.fromkeys(self._fleet.replicas(found.head.key), first)
        verdict = "unreachable"
        for _ in range(_ROUNDS + len(found.blocks) // _BLOCKS_PER_CALL):
            with self._lock:
                updates = {name: [found.since(at)] for name, at in expects.items()}
                total = len(found.blocks)
            sent, moved = self._send(owner, updates)
            answers = {name: verdicts[0] for name, verdicts in sent.items()}
            verdict = next((a.verdict for a in answers.values()), verdict)
            again = {n: a.expects for n, a in answers.items() if a.verdict == "gap" or 0 < a.expects < total}
            if moved:
                again.update(dict.fromkeys(self._fleet.replicas(found.head.key), first))
            expects = {n: at for n, at in again.items() if answers.get(n) is None or _can_go_on(answers[n])}
            if not expects:
                break
        return "" if verdict in ("taken", "gap") else verdict

    def _send(
        self, owner: Owner, updates: Mapping[str, Sequence[Opened]]
    ) -> tuple[dict[str, list[Advanced]], bool]:
        """(verdicts by shard, in the order of its updates, whether some shard knows a newer list of
        shards)."""
        about = wire.pack_announcing(owner, int(time.monotonic() * 1e3))
        messages: dict[str, Sequence[Any]] = {
            name: (about, wire_open.pack_opened(part)) for name, part in updates.items()
        }
        asked = self._fleet.ask(messages, "advance")
        out: dict[str, list[Advanced]] = {}
        for name, answer in asked.items():
            out[name] = wire_open.unpack_advanced(answer.result, len(updates[name]))
            for verdict in out[name]:
                refuse_fenced(owner, Announced(verdict.fenced_by, known=True))
        return out, bool(asked.moved)


def _can_go_on(answer: Advanced) -> bool:
    return answer.verdict in ("taken", "gap")
