"""Answers that can be followed while they are written: their blocks are published as they fill.

    begin()   the answer is known to the directory, without blocks
    grew()    a token more: only says so; a thread of this answer copies, seals and tells full blocks
    stop()    no more blocks; those that the answer begins with are handed to whoever publishes it whole
    closed()  it has been published under this key         abort()  it will not be

Nothing here can fail or slow a request: what goes wrong ends the open segment, and the answer is published as
any other when it is whole. A block is copied once, on the engine's thread between two steps; the directory is
told of everything by the answer's own thread, in order, and nobody waits for it. It knows nothing of readers.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from transport.arena import Arena
from transport.base import KVDirectory
from transport.directory.opening import Opened, State
from transport.errors import ArenaFull, RelayError
from transport.types import BlockId, BlockRef, Owner, Segment, SegmentKey
from workers.layout import BlockViews, KVLayout

log = logging.getLogger(__name__)

_STOP_S: Final = 10.0
"""So long the copy of one block is waited for."""
_WAKE_S: Final = 60.0
_PUBLISH_S: Final = 120.0
"""Whoever has stopped an answer says within so long how it ended."""


class Room(Protocol):
    """Where blocks come from; see Holding."""

    def allocate(self, blocks: int) -> list[BlockId]: ...
    def free(self, blocks: Sequence[BlockId]) -> int: ...
    def count_open(self, blocks: int) -> None: ...


@dataclass(eq=False, slots=True)
class OpenAnswer:
    """One answer that is written.

    Attributes:
        key: of the open segment; start: position of the answer's first token; producer: for reports.
        tokens: the answer's, which grow while this reads them.
        copy: writes KV, checkpoint and mass of answer tokens [first, first + count) into a block's views.
        full: blocks of the answer whose KV is there.
        blocks, token_ids: what has been sealed.
        copying: whether a block is copied now; stopped: no further one will be.
        failed: why nobody can follow it any more; ending: how readers are told of its end.
    """

    key: SegmentKey
    start: int
    producer: str
    tokens: Sequence[int]
    copy: Callable[[int, int, Sequence[BlockViews]], None]
    full: int = 0
    blocks: list[BlockRef] = field(default_factory=list[BlockRef])
    token_ids: list[int] = field(default_factory=list[int])
    copying: bool = False
    stopped: bool = False
    failed: str = ""
    ending: Opened | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)


class Opening:
    """The open answers of one worker. Thread-safe."""

    def __init__(
        self, owner: Owner, layout: KVLayout, arena: Arena, directory: KVDirectory, room: Room
    ) -> None:
        self._owner = owner
        self._layout = layout
        self._arena = arena
        self._directory = directory
        self._room = room
        self._blocks = 0
        self._ended: Counter[str] = Counter()
        self._live: set[OpenAnswer] = set()
        self._lock = threading.Lock()

    def stats(self) -> dict[str, Any]:
        """live: answers that are open now; blocks: that were published ahead of their answer; ended: answers,
        by how ("closed", or why they were aborted)."""
        with self._lock:
            return {"live": len(self._live), "blocks": self._blocks, "ended": dict(self._ended)}

    def begin(self, answer: OpenAnswer) -> OpenAnswer:
        """Let readers follow `answer`."""
        with self._lock:
            self._live.add(answer)
        threading.Thread(target=self._run, args=[answer], name="open-answer", daemon=True).start()
        return answer

    def grew(self, answer: OpenAnswer, tokens: int) -> None:
        """The answer has so many tokens; the last one has no KV yet. Cheap."""
        full = (tokens - 1) // self._layout.block_tokens
        if full > answer.full:
            with answer.changed:
                answer.full = full
                answer.changed.notify_all()

    def stop(self, answer: OpenAnswer, token_ids: Sequence[int]) -> tuple[BlockRef, ...]:
        """No more blocks. Those that hold the first of `token_ids` are the caller's to publish, who says then
        how that ended (`closed`, `abort`); the others are freed."""
        with answer.changed:
            answer.stopped = True
            answer.changed.notify_all()
            if not answer.changed.wait_for(lambda: not answer.copying, _STOP_S):
                log.warning("the engine did not copy a block within %.0f s", _STOP_S)
            blocks, answer.blocks = answer.blocks, []
        size, count = self._layout.block_tokens, 0
        while count < min(len(blocks), len(token_ids) // size):
            at = slice(count * size, (count + 1) * size)
            if answer.token_ids[at] != list(token_ids[at]):
                break
            count += 1
        self._free(blocks[count:])
        self._room.count_open(-count)
        return tuple(blocks[:count])

    def closed(self, answer: OpenAnswer, segment: Segment) -> None:
        """The answer is published as `segment`."""
        self._finish(answer, self._told(answer, "closed", final=segment.key, num_tokens=segment.num_tokens))

    def abort(self, answer: OpenAnswer, reason: str) -> None:
        """It will not be published. Nothing after `closed`; idempotent."""
        if answer.ending is None:
            self.stop(answer, ())
            self._finish(answer, self._told(answer, "aborted", reason=reason))

    @staticmethod
    def _finish(answer: OpenAnswer, ending: Opened) -> None:
        with answer.changed:
            answer.stopped = True
            if answer.ending is None:
                answer.ending = ending
            answer.changed.notify_all()

    # -- the answer's own thread ---------------------------------------------------------------------------

    def _run(self, answer: OpenAnswer) -> None:
        """Tell of it, block by block, until it ends."""
        try:
            self._tell(answer, self._told(answer, "open"))
            while self._next(answer):
                self._block(answer)
            with answer.changed:
                answer.changed.wait_for(lambda: answer.ending is not None or answer.failed, _PUBLISH_S)
                ending = answer.ending
            if ending is None or answer.failed:
                ending = self._told(answer, "aborted", reason=answer.failed or "unpublished")
            self._tell(answer, ending)
            with self._lock:
                self._ended[ending.reason or ending.state] += 1
        finally:
            with self._lock:
                self._live.discard(answer)

    def _next(self, answer: OpenAnswer) -> bool:
        """Wait until a block is full; False when there will be none."""
        with answer.changed:
            while not answer.stopped and answer.full <= len(answer.blocks):
                answer.changed.wait(_WAKE_S)  # woken by the next full block, or the end
            answer.copying = not answer.stopped
            return answer.copying

    def _block(self, answer: OpenAnswer) -> None:
        """Copy the next block, seal it and tell of it; what goes wrong ends it all."""
        try:
            update = self._copy(answer)
        except ArenaFull:
            self._give_up(answer, "arena_full")
        except RelayError as error:
            log.warning("an answer cannot be followed any more: %s", error)
            self._give_up(answer, type(error).__name__)
        except Exception:
            log.exception("an answer cannot be followed any more")
            self._give_up(answer, "fault")
        else:
            if update is not None:
                self._tell(answer, update)
        finally:
            with answer.changed:
                answer.copying = False
                answer.changed.notify_all()

    def _copy(self, answer: OpenAnswer) -> Opened | None:
        """The next block, sealed; None when it is not wanted any more."""
        size, at = self._layout.block_tokens, len(answer.blocks)
        (block,) = self._room.allocate(1)
        try:
            payload = self._arena.payload(block)
            self._layout.clear_gaps(payload)
            answer.copy(at * size, size, [self._layout.views(payload)])
            ref = self._arena.seal(block)
        except BaseException:
            self._room.free([block])
            raise
        ids = tuple(answer.tokens[at * size : (at + 1) * size])
        with answer.changed:
            answer.copying = False
            answer.changed.notify_all()
            wanted = not answer.stopped  # else its cache may have been another request's
            if wanted:
                answer.blocks.append(ref)
                answer.token_ids.extend(ids)
                self._room.count_open(1)
        if not wanted:
            self._room.free([block])
            return None
        with self._lock:
            self._blocks += 1
        return replace(self._told(answer, "open"), first=at, blocks=(ref,), token_ids=ids)

    def _told(
        self,
        answer: OpenAnswer,
        state: State,
        *,
        final: SegmentKey | None = None,
        num_tokens: int = 0,
        reason: str = "",
    ) -> Opened:
        """An update without blocks."""
        size = self._layout.block_tokens
        return Opened(
            key=answer.key,
            start=answer.start,
            layout=self._layout.fingerprint,
            producer=answer.producer,
            block_tokens=size,
            first=len(answer.token_ids) // size,
            state=state,
            final=final,
            num_tokens=num_tokens,
            reason=reason,
        )

    def _tell(self, answer: OpenAnswer, update: Opened) -> None:
        try:
            refused = self._directory.advance(self._owner, update)
        except RelayError as error:
            refused = type(error).__name__
            log.warning("readers do not hear of an answer: %s", error)
        # A shard that does not answer now is told everything with a later heartbeat.
        if refused and refused != "unreachable" and update.state == "open":
            self._give_up(answer, refused)

    def _give_up(self, answer: OpenAnswer, why: str) -> None:
        """Free what was published: it would only take room until the answer ends."""
        with answer.changed:
            if answer.stopped:
                return
            answer.failed, answer.stopped = why, True
            blocks, answer.blocks = answer.blocks, []
            answer.changed.notify_all()
        self._free(blocks)

    def _free(self, blocks: Sequence[BlockRef]) -> None:
        self._room.free([b.block for b in blocks])
        self._room.count_open(-len(blocks))
