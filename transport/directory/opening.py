"""Open segments: what their producers have told so far, and who may read it. Pure: time is an argument.

    unknown --advance(open)--> open --advance(closed)--> closed --a while--> unknown
                                '--advance(aborted), silence, a newer life--> aborted --a while--> unknown

A producer numbers the blocks of an open segment from 0; that is their sequence number, whichever shard tells
it. It says with every update where its blocks begin, so a shard that has missed some (or has restarted) says
which one it expects. A reader says with every watch what it has seen, and of which life of the producer: it
gets what comes behind, or everything of the newer life. Nothing is queued for a reader: what it has missed
is still here, at most `BLOCKS_PER_NEWS` at a time, until the segment ends. After that it is found under its
final key, as any other.

The producer keeps the blocks of an open segment in its arena until it ends, whoever reads them; so a lease of
some of them pins nothing here, and only proves to the producer that its holder may read (see
`transport.tokens`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from transport.directory.granting import blocks_digest
from transport.directory.operating import OperatedTable
from transport.directory.table import _Copy
from transport.types import (
    BlockRef,
    Incarnation,
    Lease,
    LeaseId,
    Located,
    Owner,
    Segment,
    SegmentKey,
    WorkerId,
)

BLOCKS_PER_NEWS: Final = 64
"""Blocks of one reply to a watch; bounds it, and what one pull has to bring."""
_ENDED: Final = 4_096
"""Segments that are remembered as ended at most."""

_UNKNOWN: Final = Incarnation(0)

State = Literal["open", "closed", "aborted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What a producer tells of an open segment: its head, and what is new.

    Attributes:
        key: of the open segment, chosen by its producer; not that of the segment that it becomes.
        start: position of the first token; layout, producer: see Segment.
        block_tokens: tokens of every block that is told here: only full ones are.
        first: sequence number of the first of `blocks`.
        blocks: sealed, in token order; token_ids: of their tokens.
        state: "open"; "closed": `final` has been published, and begins with these blocks; "aborted": the
            blocks are being freed.
        final: key of what it has become; num_tokens: of that.
        reason: why it was aborted.
    """

    key: SegmentKey
    start: int
    layout: str
    producer: str
    block_tokens: int
    first: int = 0
    blocks: tuple[BlockRef, ...] = ()
    token_ids: tuple[int, ...] = ()
    state: State = "open"
    final: SegmentKey | None = None
    num_tokens: int = 0
    reason: str = ""


Verdict = Literal["taken", "gap", "taken_by_other", "too_many", "too_long", "malformed"]


@dataclass(frozen=True, slots=True)
class Advanced:
    """Reply to an update.

    Attributes:
        fenced_by: see Announced.
        verdict: "taken"; "gap": nothing was taken, as blocks before these are missing; else why the segment
            cannot be followed here.
        expects: sequence number of the next block.
    """

    fenced_by: int | None
    verdict: Verdict = "taken"
    expects: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What a watcher had not seen.

    Attributes:
        state: "refused": too many watch this shard already.
        life: of the producer; sequence numbers of another one mean nothing any more.
        first: sequence number of the first block.
        token_ids: of the leased blocks.
        lease: of the blocks [first, ...), as a segment that is not complete; None when there are none.
        final, num_tokens, reason: see Opened.
    """

    state: Literal["open", "closed", "aborted", "refused"]
    life: Incarnation = _UNKNOWN
    first: int = 0
    token_ids: tuple[int, ...] = ()
    lease: Lease | None = None
    final: SegmentKey | None = None
    num_tokens: int = 0
    reason: str = ""


@dataclass(slots=True)
class _Open:
    """An open segment, or what is left of it."""

    head: Opened  # without blocks
    worker: WorkerId
    life: Incarnation
    blocks: list[BlockRef] = field(default_factory=list[BlockRef])
    token_ids: list[int] = field(default_factory=list[int])
    heard_at: float = 0.0
    ended_at: float | None = None


class OpenTable(OperatedTable):
    """A table that also knows open segments. They are listed as copies that are not complete, which nobody
    can look up, lease or evict.

    Args:
        max_open: open segments of one owner; further ones are refused.
        max_open_blocks: blocks of one of them.
        ended_s: for so long it is remembered how a segment ended.
    """

    def __init__(
        self, *, max_open: int = 256, max_open_blocks: int = 4_096, ended_s: float = 60.0, **more: Any
    ) -> None:
        super().__init__(**more)
        self._lease_name = f"{more.get('lease_prefix', '')}o"
        self._max_open = max_open
        self._max_open_blocks = max_open_blocks
        self._ended_s = ended_s
        self._open: dict[SegmentKey, _Open] = {}
        self._live: OrderedDict[SegmentKey, None] = OrderedDict()  # longest silent first
        self._ended: OrderedDict[SegmentKey, None] = OrderedDict()
        self._changed: dict[SegmentKey, None] = {}
        self._counts = dict.fromkeys(("opened", "closed", "aborted", "open_gaps", "open_refused"), 0)
        self._part_leases = 0

    def advance(
        self, owner: Owner, updates: Iterable[Opened], now: float, *, clock_ms: int | None = None
    ) -> list[Advanced]:
        """Take what an owner tells of its open segments; counts as a heartbeat. One verdict for each."""
        self.tick(now)
        out: list[Advanced] = []
        for update in updates:
            admitted = self._admit(owner, now, clock_ms)
            if admitted.fenced_by is not None:
                out.append(Advanced(admitted.fenced_by))
            else:
                out.append(self._advance(owner, update, now))
        return out

    def watch(
        self, key: SegmentKey, *, life: int, after: int, holder: WorkerId, now: float, ttl_s: float
    ) -> News | None:
        """What is known behind the first `after` blocks of that life of the producer; None when nothing is.
        ttl_s: of the lease of what is told."""
        self.tick(now)
        found = self._open.get(key)
        if found is None:
            return None
        head = found.head
        if head.state != "open":
            return News(
                state=head.state,
                life=found.life,
                first=len(found.blocks),
                final=head.final,
                num_tokens=head.num_tokens,
                reason=head.reason,
            )
        first = after if life == found.life else 0
        blocks = tuple(found.blocks[first : first + BLOCKS_PER_NEWS])
        if not blocks:
            return None
        size = head.block_tokens
        ids = tuple(found.token_ids[first * size : (first + len(blocks)) * size])
        lease = self._lease_part(found, first, blocks, holder, now, min(ttl_s, self._max_lease_s))
        return News(state="open", life=found.life, first=first, token_ids=ids, lease=lease)

    def take_changed(self) -> tuple[SegmentKey, ...]:
        """Open segments of which there is something new since the last call."""
        if not self._changed:
            return ()
        out = tuple(self._changed)
        self._changed.clear()
        return out

    def tick(self, now: float) -> None:
        """See Table; abort what its producer no longer tells of (it does with every heartbeat, to the shards
        that answer for the key), and forget how segments ended long ago."""
        super().tick(now)
        while self._live:
            found = self._open[next(iter(self._live))]
            if now - found.heard_at <= self._owner_timeout_s:
                break
            self._finish(found, replace(found.head, state="aborted", reason="its producer is silent"), now)
        while self._ended:
            key = next(iter(self._ended))
            found = self._open.get(key)
            if found is not None and found.head.state != "open":
                if found.ended_at is None:  # its owner was dropped meanwhile: the clock runs from now
                    found.ended_at = now
                if now - found.ended_at <= self._ended_s and len(self._ended) <= _ENDED:
                    break
                del self._open[key]
            del self._ended[key]

    def stats(self, now: float) -> dict[str, float]:
        """See Table; open_segments and open_blocks now, and how many were opened, closed, aborted, refused,
        and had gaps (opened_total and so on)."""
        live = [self._open[key] for key in self._live]
        return {
            **super().stats(now),
            "open_segments": len(live),
            "open_blocks": sum(len(x.blocks) for x in live),
            **{f"{name}_total": count for name, count in self._counts.items()},
        }

    # -- inside ----------------------------------------------------------------------------------------

    def _advance(self, owner: Owner, update: Opened, now: float) -> Advanced:
        found = self._open.get(update.key)
        if found is not None and (found.worker, found.life) != (owner.worker, owner.incarnation):
            if found.head.state == "open" and found.worker != owner.worker:
                return self._refuse("taken_by_other")
            self._forget(update.key)
            found = None
        if found is None:
            if update.state == "aborted":
                return Advanced(None)
            refusal = self._judge_new(owner, update)
            if refusal is not None:
                return refusal
            found = self._begin(owner, update, now)
        if found.head.state != "open":
            return Advanced(None, "taken", len(found.blocks))
        found.heard_at = now
        self._live.move_to_end(update.key)
        if update.state == "aborted":
            self._finish(found, update, now)
            return Advanced(None, "taken", len(found.blocks))
        return self._append(found, update, now)

    def _judge_new(self, owner: Owner, update: Opened) -> Advanced | None:
        if update.block_tokens < 1 or update.start < 0:
            return self._refuse("malformed")
        if update.first:
            self._counts["open_gaps"] += 1
            return Advanced(None, "gap", 0)
        state = self._owners[owner.worker]
        if sum(not c.segment.complete for c in state.copies.values()) >= self._max_open:
            return self._refuse("too_many")
        return None

    def _begin(self, owner: Owner, update: Opened, now: float) -> _Open:
        head = replace(update, first=0, blocks=(), token_ids=(), state="open", final=None, reason="")
        found = self._open[update.key] = _Open(head, owner.worker, owner.incarnation)
        self._live[update.key] = None
        self._counts["opened"] += 1
        shown = Segment(
            update.key, 0, update.start, (), layout=update.layout, producer=update.producer, complete=False
        )
        self._enter(self._owners[owner.worker], shown, now)
        return found

    def _append(self, found: _Open, update: Opened, now: float) -> Advanced:
        known, size = len(found.blocks), found.head.block_tokens
        if update.block_tokens != size or len(update.token_ids) != size * len(update.blocks):
            return self._refuse("malformed", known)
        if update.first > known:
            self._counts["open_gaps"] += 1
            return Advanced(None, "gap", known)
        new = update.blocks[known - update.first :]
        if known + len(new) > self._max_open_blocks:
            return self._refuse("too_long", known)
        found.blocks.extend(new)
        found.token_ids.extend(update.token_ids[(known - update.first) * size :])
        if new:
            self._grow(found, now)
            self._changed[update.key] = None
        if update.state == "closed":
            self._finish(found, update, now)
        return Advanced(None, "taken", len(found.blocks))

    def _grow(self, found: _Open, now: float) -> None:
        """Let the listing show what there is."""
        copy = self._listed_copy(found)
        if copy is None:
            return
        nbytes = sum(b.nbytes for b in found.blocks)
        self._nbytes += nbytes - copy.nbytes
        copy.nbytes = nbytes
        copy.segment = replace(copy.segment, num_tokens=len(found.token_ids))
        self._touch(copy, now)

    def _finish(self, found: _Open, update: Opened, now: float) -> None:
        found.head = replace(
            found.head,
            state=update.state,
            final=update.final,
            num_tokens=update.num_tokens,
            reason=update.reason[:200],
        )
        found.ended_at = now
        copy = self._listed_copy(found)
        if copy is not None:
            self._remove(copy)
        else:
            self._note_end(found)

    def _remove(self, copy: _Copy) -> None:
        """See Table. What goes while it is open, goes with its owner: nobody else may remove it."""
        super()._remove(copy)
        found = self._open.get(copy.segment.key) if not copy.segment.complete else None
        if found is None or found.worker != copy.worker:
            return
        if found.head.state == "open":
            found.head = replace(found.head, state="aborted", reason="its producer is gone")
        self._note_end(found)

    def _note_end(self, found: _Open) -> None:
        self._live.pop(found.head.key, None)
        found.token_ids.clear()  # the blocks only say how many there were
        self._counts["closed" if found.head.state == "closed" else "aborted"] += 1
        self._ended[found.head.key] = None
        self._changed[found.head.key] = None

    def _forget(self, key: SegmentKey) -> None:
        """Of an older life: it ends, and a newer one takes its place."""
        found = self._open[key]
        copy = self._listed_copy(found)
        if copy is not None:
            self._remove(copy)
        self._open.pop(key, None)
        self._ended.pop(key, None)

    def _listed_copy(self, found: _Open) -> _Copy | None:
        state = self._owners.get(found.worker)
        return None if state is None else state.copies.get((found.head.key, ""))

    def _refuse(self, verdict: Verdict, expects: int = 0) -> Advanced:
        self._counts["open_refused"] += 1
        return Advanced(None, verdict, expects)

    def _lease_part(
        self,
        found: _Open,
        first: int,
        blocks: Sequence[BlockRef],
        holder: WorkerId,
        now: float,
        ttl_s: float,
    ) -> Lease:
        head, state = found.head, self._owners[found.worker]
        part = Segment(
            head.key,
            len(blocks) * head.block_tokens,
            head.start + first * head.block_tokens,
            tuple(blocks),
            layout=head.layout,
            producer=head.producer,
            complete=False,
        )
        token = b""
        if state.granter is not None:
            token = state.granter.token(part, blocks_digest(part), holder, now, ttl_s)
        self._part_leases += 1
        lease_id = LeaseId(f"{self._lease_name}{self._part_leases}")
        return Lease(lease_id, Located(part, state.owner), holder, ttl_s, token=token)
