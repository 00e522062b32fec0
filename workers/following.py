"""Follows answers that are written on other workers: their blocks are pulled as they are published.

    follow()   a request will want that answer: watch the open segment, pull what comes, verified as any pull
    borrow()   the request is here, and has leased the whole segment: the leading blocks that have come
    leave()    the request is over, or will not come: what nobody wants any more is freed

What is borrowed are blocks of the very segment that was leased, by owner, life, block, generation and
checksum, and of the very tokens of the prompt; whatever else was pulled is thrown away, and pulled or
computed as if it had not been. It knows nothing of prompts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from transport.arena import Arena
from transport.auto import AutoTransport
from transport.base import KVDirectory
from transport.directory.opening import News
from transport.errors import ArenaFull, RelayError
from transport.types import BlockId, BlockRef, Lease, Located, Outcome, Owner, SegmentKey
from workers.holding import Holding
from workers.layout import KVLayout

log = logging.getLogger(__name__)

_WATCH_S: Final = 5.0
_LANDING_S: Final = 0.5
"""So long a request waits for the pull that runs when it comes."""
_MOST: Final = 32
"""Answers that are followed at once; further ones are pulled when their requests come."""
_SHARE: Final = 4
"""At most one part in so many of the arena holds what is pulled ahead."""
_MOST_OVER: Final = 1024


@dataclass(eq=False, slots=True)
class Followed:
    """An answer that is followed.

    Attributes:
        users: requests that will want it; borrowers: requests that use its blocks now.
        owner: who writes it, once something is known.
        refs: blocks of that life of the owner that have come; blocks: where they are here; token_ids: of full
            ones.
        landing: whether a pull runs; wanted: a request has come, so that no further pull begins; used: a
            request has borrowed them.
    """

    key: SegmentKey
    until: float
    users: set[str] = field(default_factory=set[str])
    borrowers: int = 0
    owner: Owner | None = None
    refs: list[BlockRef] = field(default_factory=list[BlockRef])
    blocks: list[BlockId] = field(default_factory=list[BlockId])
    token_ids: list[int] = field(default_factory=list[int])
    landing: bool = False
    wanted: bool = False
    used: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    changed: threading.Condition = field(default_factory=threading.Condition)


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Leading blocks of a leased segment that were pulled ahead; to be given back."""

    followed: Followed
    lease: Lease
    blocks: tuple[BlockId, ...]


class Following:
    """What one worker follows. Thread-safe."""

    def __init__(
        self,
        owner: Owner,
        layout: KVLayout,
        arena: Arena,
        transport: AutoTransport,
        directory: KVDirectory,
        holding: Holding,
        *,
        lease_ttl_s: float,
        pull_timeout_s: float,
    ) -> None:
        self._owner = owner
        self._layout = layout
        self._arena = arena
        self._transport = transport
        self._directory = directory
        self._holding = holding
        self._lease_ttl_s = lease_ttl_s
        self._pull_timeout_s = pull_timeout_s
        self._by_key: dict[SegmentKey, Followed] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._held = 0
        self._lock = threading.Lock()

    def stats(self) -> dict[str, Any]:
        """live: answers that are followed now; blocks: pulled ahead that are here; pulled_blocks,
        pulled_bytes: so far; used_blocks, wasted_blocks: what became of them; ended: how often following
        ended before the answer did, by reason."""
        names = ("pulled_blocks", "pulled_bytes", "used_blocks", "wasted_blocks")
        with self._lock:
            facts = {name: self._counts[name] for name in names}
            return {"live": len(self._by_key), "blocks": self._held, **facts, "ended": dict(self._ended)}

    # -- a request's side ----------------------------------------------------------------------------------

    def follow(self, request_id: str, keys: Sequence[SegmentKey], within_s: float) -> None:
        """Follow these open segments for a request that is expected within so many seconds. Idempotent."""
        for key in keys:
            with self._lock:
                if request_id in self._over:
                    return
                found = self._by_key.get(key)
                if found is None:
                    if len(self._by_key) >= _MOST:
                        self._ended["too_many"] += 1
                        return
                    found = self._by_key[key] = Followed(key, 0.0)
                    threading.Thread(target=self._run, args=[found], name="follow", daemon=True).start()
                found.users.add(request_id)
                found.until = time.monotonic() + within_s

    def leave(self, request_id: str) -> None:
        """The request is over. Never raises."""
        ended: list[Followed] = []
        with self._lock:
            self._over[request_id] = None
            while len(self._over) > _MOST_OVER:
                self._over.popitem(last=False)
            for key, found in list(self._by_key.items()):
                if request_id in found.users:
                    found.users.discard(request_id)
                    if not found.users:
                        del self._by_key[key]
                        ended.append(found)
        for found in ended:
            self._end(found)

    def close(self) -> None:
        """Follow nothing any more. Idempotent."""
        with self._lock:
            ended = list(self._by_key.values())
            self._by_key.clear()
        for found in ended:
            self._end(found)

    def has(self, located: Located) -> bool:
        """Whether some of that segment has come ahead."""
        return any(self._matches(f, located) for f in self._all())

    def borrow(self, lease: Lease, token_ids: Sequence[int]) -> Borrowed | None:
        """The leading blocks of a leased segment that have come, if there are any; `give_back` ends it.

        Args:
            lease: of the whole segment; one of its `others` may be the copy that was followed.
            token_ids: that it must hold, as far as they go.
        """
        for each in (lease, *lease.others):
            for found in self._all():
                if not self._may_match(found, each.located):
                    continue
                with found.changed:
                    found.wanted = True
                    found.changed.wait_for(lambda f=found: not f.landing, _LANDING_S)
                    count = self._matches(found, each.located)
                    n = min(len(found.token_ids), len(token_ids))
                    if not count or found.token_ids[:n] != list(token_ids[:n]):
                        found.wanted = False
                        continue
                    found.borrowers += 1
                    found.used = True
                    blocks = tuple(found.blocks[:count])
                with self._lock:
                    self._counts["used_blocks"] += count
                return Borrowed(found, each, blocks)
        return None

    def give_back(self, borrowed: Borrowed) -> None:
        """The blocks are not read any more."""
        found = borrowed.followed
        with found.changed:
            found.borrowers -= 1
        if found.stop.is_set():
            self._free(found)

    def _all(self) -> list[Followed]:
        with self._lock:
            return list(self._by_key.values())

    def _may_match(self, found: Followed, located: Located) -> bool:
        """Whether it is that segment, or its first blocks are on their way from that owner."""
        if found.owner is None or not _same_life(found.owner, located.owner):
            return False
        return bool(self._matches(found, located)) or (found.landing and not found.refs)

    def _matches(self, found: Followed, located: Located) -> int:
        """How many leading blocks of a located segment have come."""
        if found.owner is None or not _same_life(found.owner, located.owner):
            return 0
        refs, blocks = found.refs, located.segment.blocks
        if not refs or len(refs) > len(blocks) or located.segment.layout != self._layout.fingerprint:
            return 0
        return len(refs) if tuple(refs) == tuple(blocks[: len(refs)]) else 0

    def _end(self, found: Followed) -> None:
        found.stop.set()
        try:
            self._directory.unwatch(found.key, holder=self._owner.worker)
        except RelayError as error:
            log.debug("a watch is left to end by itself: %s", error)
        self._free(found)

    def _free(self, found: Followed) -> None:
        """Free what has come, unless it is read, or more is coming: who ends that frees."""
        with found.changed:
            if found.borrowers or found.landing:
                return
            blocks, found.blocks = found.blocks, []
            found.refs = []
        self._drop(blocks, wasted=not found.used)

    def _count_held(self, blocks: int) -> None:
        with self._lock:
            self._held += blocks
        self._holding.count_open(blocks)

    # -- the follower's side -------------------------------------------------------------------------------

    def _run(self, found: Followed) -> None:
        why = ""
        try:
            while not why and not found.stop.is_set():
                why = "overdue" if time.monotonic() > found.until > 0 else self._step(found)
        except RelayError as error:
            why = type(error).__name__
            log.warning("an answer is not followed any more: %s", error)
        except Exception:
            why = "fault"
            log.exception("an answer is not followed any more")
        if why and why not in ("closed", "wanted"):
            with self._lock:
                self._ended[why] += 1
        if why == "overdue":
            for user in tuple(found.users):
                self.leave(user)

    def _step(self, found: Followed) -> str:
        """Wait for news and pull it; why it was the last one."""
        wait_s = min(_WATCH_S, self._lease_ttl_s / 2)
        asked_at = time.monotonic()
        life = 0 if found.owner is None else int(found.owner.incarnation)
        try:
            news = self._directory.watch(
                found.key,
                life=life,
                after=len(found.refs),
                holder=self._owner.worker,
                ttl_s=self._lease_ttl_s,
                wait_s=wait_s,
            )
        except RelayError:
            found.stop.wait(1.0)  # a shard restarts in seconds
            return ""
        if found.stop.is_set():
            return ""
        if news is None:
            if time.monotonic() - asked_at < wait_s / 2:  # never spin, whatever a shard replies
                found.stop.wait(wait_s / 2)
            return ""
        return self._take(found, news, asked_at)

    def _take(self, found: Followed, news: News, asked_at: float) -> str:
        if news.state in ("refused", "aborted"):
            self._discard(found)
            return news.state
        if news.state == "closed":
            assert news.final is not None  # the wire has checked it
            return self._finish(found, news.final)
        lease = news.lease
        if lease is None:
            return ""
        owner, segment = lease.located.owner, lease.located.segment
        if owner.worker == self._owner.worker:
            return "local"  # it is here already
        if segment.layout != self._layout.fingerprint:
            return "layout"
        if found.owner is None or not _same_life(found.owner, owner) or news.first != len(found.refs):
            if not self._discard(found):
                return "aborted"  # a request reads what the older life wrote, to its end
            found.owner = owner
            if news.first:
                return ""  # the next watch asks for the beginning
        return self._pull(found, lease, asked_at, news.token_ids)

    def _pull(self, found: Followed, lease: Lease, asked_at: float, token_ids: Sequence[int]) -> str:
        """Bring a lease's blocks behind those that are here."""
        refs = lease.located.segment.blocks
        with found.changed:
            if found.wanted or found.stop.is_set():
                return "wanted"
            found.landing = True
        blocks: list[BlockId] = []
        try:
            if self._held + len(refs) > self._arena.num_blocks // _SHARE:
                return "room"
            blocks = self._holding.allocate(len(refs))
            transfer = self._transport.pull(
                lease, blocks, timeout_s=self._pull_timeout_s, lease_deadline=asked_at + lease.ttl_s
            )
            if transfer.outcome is Outcome.PULLED:
                with found.changed:
                    found.refs.extend(refs)
                    found.blocks.extend(blocks)
                    found.token_ids.extend(token_ids)
                self._count_held(len(blocks))
                blocks = []
                with self._lock:
                    self._counts["pulled_bytes"] += transfer.nbytes
                    self._counts["pulled_blocks"] += len(refs)
                return ""
            if transfer.outcome is Outcome.TIMED_OUT:
                blocks = []  # the backend has quarantined them: late writes are real
            log.info("%d blocks were not pulled ahead: %s", len(refs), transfer.outcome)
            return str(transfer.outcome)
        except ArenaFull:
            return "arena_full"
        finally:
            self._holding.free(blocks)
            with found.changed:
                found.landing = False
                found.changed.notify_all()
            if found.stop.is_set():
                self._free(found)

    def _finish(self, found: Followed, final: SegmentKey) -> str:
        """The answer is whole: bring what is left of it, for a request that waits for others as well."""
        asked_at = time.monotonic()
        leases = self._directory.lease([final], holder=self._owner.worker, ttl_s=self._lease_ttl_s)
        lease = leases.get(final)
        if lease is None:
            return "closed"
        try:
            segment = lease.located.segment
            if lease.located.owner.worker == self._owner.worker:
                return "local"
            if found.owner is None and segment.layout == self._layout.fingerprint:
                found.owner = lease.located.owner  # too short for a full block, or it was over already
            count, total = self._matches(found, lease.located), len(segment.blocks)
            if count < total and (count or not found.refs):
                return self._pull(found, lease.part(count, total), asked_at, ()) or "closed"
            return "closed"
        finally:
            self._directory.release([lease])

    def _discard(self, found: Followed) -> bool:
        """What has come is of a life that is over; False while it is read."""
        with found.changed:
            if found.borrowers:
                return False
            blocks, found.blocks = found.blocks, []
            found.refs, found.token_ids = [], []
        self._drop(blocks, wasted=True)
        return True

    def _drop(self, blocks: Sequence[BlockId], *, wasted: bool) -> None:
        if not blocks:
            return
        self._holding.free(blocks)
        self._count_held(-len(blocks))
        if wasted:
            with self._lock:
                self._counts["wasted_blocks"] += len(blocks)


def _same_life(a: Owner, b: Owner) -> bool:
    return (a.worker, a.incarnation) == (b.worker, b.incarnation)
