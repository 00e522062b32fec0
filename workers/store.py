"""A worker's side of the relay: find and lease segments; pulls are made by `fetching.py`, and what the worker
publishes and holds is `holding.py`.

Sits between the engine's KV cache and the transport room. Segment bytes live in the worker's arena; a pulled
segment borrows landing blocks from the same arena until it has been scattered, and a segment that this worker
holds itself is pinned for that time. Knows nothing of prompts or methods.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from transport.arena import Arena
from transport.auto import AutoTransport
from transport.base import Answers, KVDirectory
from transport.errors import RelayError
from transport.settings import SpillSettings
from transport.types import BlockRef, Lease, Located, Outcome, Owner, Segment, SegmentKey
from workers.fetching import Acquired, Fetching, Granted, Life, Miss
from workers.following import Following
from workers.holding import Holding
from workers.layout import BlockViews, KVLayout
from workers.opening import Opening

log = logging.getLogger(__name__)

_NO_ANSWER: Final = "the directory shard of this key does not answer"
_COPIES: Final = 2
"""Owners of one segment that are asked for parts of it."""
AskOwner = Callable[[Owner, Sequence[SegmentKey]], Collection[SegmentKey]]
"""Have the owner promote segments; those that are in its arena then. Bounded in time; raises RelayError."""


class SegmentStore:
    """Publishes to and pulls from the cluster on behalf of one worker. Thread-safe.

    Args:
        spill: tiers behind the arena.
        ask_owner: reaches the owner of a spilled segment; None: only this worker's own ones are promoted.
        keep_pulled: offer what was pulled to others as well; see `TransportSettings`.
    """

    def __init__(
        self,
        owner: Owner,
        layout: KVLayout,
        arena: Arena,
        transport: AutoTransport,
        directory: KVDirectory,
        *,
        lease_ttl_s: float,
        pull_timeout_s: float,
        spill: SpillSettings | None = None,
        ask_owner: AskOwner | None = None,
        keep_pulled: bool = False,
    ) -> None:
        self.owner = owner
        self._layout = layout
        self._directory = directory
        self._lease_ttl_s = lease_ttl_s
        self._ask_owner = ask_owner
        self.holding = Holding(owner, layout, arena, directory, spill)
        self.opening = Opening(owner, layout, arena, directory, self.holding)
        self.following = Following(
            owner,
            layout,
            arena,
            transport,
            directory,
            self.holding,
            lease_ttl_s=lease_ttl_s,
            pull_timeout_s=pull_timeout_s,
        )
        self._fetching = Fetching(
            owner,
            layout,
            arena,
            transport,
            directory,
            self.holding,
            self.following,
            pull_timeout_s=pull_timeout_s,
            keep_pulled=keep_pulled,
        )

    @property
    def block_tokens(self) -> int:
        """Tokens of a full block."""
        return self._layout.block_tokens

    # -- reading -------------------------------------------------------------------------------------------

    def acquire(
        self,
        wanted: Mapping[SegmentKey, int],
        worth: Callable[[Mapping[SegmentKey, Located]], Collection[SegmentKey]] | None = None,
        *,
        pipelined: bool = False,
        on_landed: Callable[[], None] | None = None,
        keep: bool = True,
        token_ids: Mapping[SegmentKey, Sequence[int]] | None = None,
    ) -> Acquired:
        """Lease and pull segments. Never raises for a fault of the cluster: what could not be had is in
        `misses`, and the caller computes it.

        Args:
            wanted: key -> tokens needed.
            worth: given what was found, says which of it to lease and pull; what it leaves out is neither a
                hit nor a miss. None: all.
            pipelined: return when every segment has begun to come; `PulledSegment.arrival` tells the rest.
            on_landed: called, on another thread, whenever more layers have come, or will not.
            keep: leave copies behind for others, where this store does that.
            token_ids: of what is wanted: compared with those of what was pulled ahead.
        """
        got = Acquired(keep=keep, token_ids=token_ids or {})
        if not wanted:
            return got
        try:
            granted = {g.lease.located.segment.key: g for g in self._lease(list(wanted), got)}
            spilled = self._find_spilled(granted, got)
            found = {**{key: g.lease.located for key, g in granted.items()}, **spilled}
            usable = [k for k, located in found.items() if self._fits(k, located, wanted[k], got)]
            if worth is not None and usable:
                chosen = worth({k: found[k] for k in usable})
                # Leases of the others go back with the rest, unread.
                # What has come ahead costs nothing any more.
                usable = [k for k in usable if k in chosen or self.following.has(found[k])]
            leases = [granted[k] for k in usable if k not in spilled]
            leases += self._lease_spilled([spilled[k] for k in usable if k in spilled], got)
            begin = time.perf_counter()
            self._fetching.begin(got, leases, pipelined=pipelined, on_landed=on_landed)
            self._fetching.wait(got, pipelined=pipelined)
            got.pull_s = time.perf_counter() - begin
        except BaseException:
            self.release(got)
            raise
        return got

    def find(self, keys: Sequence[SegmentKey]) -> Answers[Located]:
        """Which of `keys` are held by anyone, and where; nothing is leased. Never raises for a fault of the
        cluster: what could not be asked for is in `unanswered`."""
        try:
            return self._directory.lookup(list(keys), near=self.owner.worker)
        except RelayError as error:
            log.warning("%d keys were not looked up: %s", len(keys), error)
            return Answers(unanswered=keys)

    def release_bytes(self, got: Acquired) -> None:
        """See `Fetching.release_bytes`."""
        self._fetching.release_bytes(got)

    def release_leases(self, got: Acquired) -> None:
        """See `Fetching.release_leases`."""
        self._fetching.release_leases(got)

    def release(self, got: Acquired) -> None:
        """Give back bytes and leases; of pulls that still run, when they end. Idempotent; never raises."""
        self._fetching.release_bytes(got)
        self._fetching.release_leases(got)

    def _find_spilled(
        self, granted: Mapping[SegmentKey, Granted], got: Acquired
    ) -> dict[SegmentKey, Located]:
        """Segments that their owner has to bring back first: of the keys that no lease was granted for (the
        others are held by nobody, as a rule), and exact copies where the leased one is not. Asked for only
        now: a hit takes one call, not two."""
        left = [key for key, miss in got.misses.items() if miss.reason != "directory_down"]
        left += [key for key, g in granted.items() if g.lease.located.segment.rectified]
        if not left:
            return {}
        begin = time.perf_counter()
        detail = _NO_ANSWER
        try:
            found = self._directory.lookup(left, near=self.owner.worker)
        except RelayError as error:
            found, detail = Answers[Located](unanswered=left), str(error)
        got.lookup_s = time.perf_counter() - begin
        for key in [key for key in left if key in got.misses]:
            if key in found.unanswered:
                got.misses[key] = Miss("directory_down", detail)
            elif key not in found:
                got.misses[key] = Miss("not_found", "no worker holds it")
            elif found[key].segment.spilled:
                del got.misses[key]
        return {key: located for key, located in found.items() if located.segment.spilled}

    def _fits(self, key: SegmentKey, located: Located, tokens: int, got: Acquired) -> bool:
        segment = located.segment
        if segment.layout == self._layout.fingerprint and segment.num_tokens >= tokens:
            return True
        detail = (
            f"layout {segment.layout or '?'} against {self._layout.fingerprint}, {segment.num_tokens} tokens"
        )
        got.misses[key] = Miss(Outcome.LAYOUT_MISMATCH, detail)
        return False

    def _lease(self, keys: list[SegmentKey], got: Acquired) -> list[Granted]:
        """Leases of those of `keys` that can be had."""
        # The clock starts before the request: the directory's own count can only end later.
        asked_at = time.monotonic()
        if not keys:
            return []
        begin = time.perf_counter()
        detail = _NO_ANSWER
        try:
            leases = self._directory.lease(
                keys, holder=self.owner.worker, ttl_s=self._lease_ttl_s, copies=_COPIES
            )
        except RelayError as error:
            leases, detail = Answers[Lease](unanswered=keys), str(error)
        got.lease_s += time.perf_counter() - begin
        self._fetching.keep(got, leases.values())
        for key in keys:
            if key in leases.unanswered:
                got.misses[key] = Miss("directory_down", detail)
            elif key not in leases:
                got.misses[key] = Miss(Outcome.LEASE_EXPIRED, "the directory granted no lease")
        return [Granted(leases[key], asked_at) for key in keys if key in leases]

    def _lease_spilled(self, spilled: Sequence[Located], got: Acquired) -> list[Granted]:
        """Have segments brought back by their owners and lease them, one at a time: bringing back the next
        one may evict what nobody has leased."""
        leases: list[Granted] = []
        silent: dict[Life, str] = {}
        for located in spilled:
            key = located.segment.key
            begin = time.perf_counter()
            why = self._promote(key, located.owner, silent)
            got.lease_s += time.perf_counter() - begin
            leases += self._lease([key], got)  # or of another copy, which was not the best one
            if why and key in got.misses:
                got.misses[key] = Miss("not_promoted", f"{located.owner.worker}: {why}")
        return leases

    def _promote(self, key: SegmentKey, owner: Owner, silent: dict[Life, str]) -> str:
        """Have a segment's owner bring it back; why that did not come about, "" when it did.

        Args:
            silent: owners that did not answer, and why; they are not asked again.
        """
        life = (owner.worker, owner.incarnation)
        if life in silent:
            return silent[life]
        if life == (self.owner.worker, self.owner.incarnation):
            back: Collection[SegmentKey] = self.holding.promote([key])
        elif self._ask_owner is None:
            return "this worker cannot ask others to promote"
        else:
            try:
                back = self._ask_owner(owner, [key])
            except RelayError as error:
                silent[life] = str(error)
                return str(error)
        return "" if key in back else "its owner had no room for it, or has lost it"

    # -- writing: see `Holding` ----------------------------------------------------------------------------

    def publish(
        self,
        key: SegmentKey,
        fill: Callable[[Sequence[BlockViews]], None],
        *,
        start: int,
        num_tokens: int,
        producer: str,
        variant: str = "",
        consumers: int = 0,
        first: tuple[BlockRef, ...] = (),
    ) -> Segment:
        """See `Holding.publish`."""
        return self.holding.publish(
            key,
            fill,
            start=start,
            num_tokens=num_tokens,
            producer=producer,
            variant=variant,
            consumers=consumers,
            first=first,
        )

    def withdraw(self, key: SegmentKey) -> None:
        """See `Holding.withdraw`."""
        self.holding.withdraw(key)

    def segments(self) -> list[Segment]:
        """See `Holding.segments`."""
        return self.holding.segments()

    def evict(self, blocks: int) -> None:
        """See `Holding.evict`."""
        self.holding.evict(blocks)

    def drop(self, segments: Sequence[Segment]) -> None:
        """Free what has left the directory at an operator's wish; what is being read here, afterwards."""
        self.holding.drop(segments, operator=True)

    def stats(self) -> dict[str, Any]:
        """See `Holding.stats`; and leases: those that this worker has now, as a reader."""
        return {
            **self.holding.stats(),
            "leases": self._fetching.leased,
            "opening": self.opening.stats(),
            "following": self.following.stats(),
        }

    def close(self) -> None:
        """Begin no more pulls, and forget what was spilled. Idempotent."""
        self.following.close()
        self._fetching.close()
        self.holding.close()
