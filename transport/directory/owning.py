"""An owner's side of the directory: announce, publish, evict, and keep shards informed.

With several replicas, or while keys move between shards, one copy is entered at more than one shard, and each
of them may lease it. A copy is evicted only when all of them have given it up:

    offered by the first live replica -> removed there -> retired at the others -> its blocks may be freed
                                                 '-> leased at one of them: entered again, it stays

Readers ask the replicas in the same order, so that a copy in use is nearly always leased at the first. A
shard that cannot be reached may have leased what it knows: nothing of that is evicted until it is dead for
certain (`Fleet.is_dead`). This module does not know what segments contain, nor who reads them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from transport.directory import wire
from transport.directory.fleet import Asked, Fleet
from transport.directory.local import refuse_fenced
from transport.directory.producing import OpenLogs
from transport.directory.table import Announced, Candidate, CopyId
from transport.errors import DirectoryUnavailable, RelayError
from transport.types import Owner, Segment, WorkerId

logger = logging.getLogger(__name__)

OnEvicted = Callable[[Sequence[Segment]], None]
"""Told what has left the directory at an operator's wish, so that its blocks can be freed."""

_JOIN_TIMEOUT_S: Final = 5.0
_EVICTED_MEMORY: Final = 65_536
_SEGMENTS_PER_CALL: Final = 512
_BLOCKS_PER_CALL: Final = 200_000
"""Bounds the message when an owner publishes everything again: a block's reference has about 25 bytes."""
_COPIES_PER_CALL: Final = 256
_WIDENINGS: Final = 20
_MOVES: Final = 3


class OwnerSide:
    """What one worker process does as an owner of segments. Thread-safe."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.opens = OpenLogs(fleet)
        # Guards publishing again against evicting: what was evicted meanwhile must not come back.
        self._lock = threading.RLock()
        self._epochs: dict[str, int] = {}  # shard -> its incarnation that holds all our segments
        self._evicted: OrderedDict[CopyId, None] = OrderedDict()
        # Copies that are still entered at shards which no longer answer for them: leases there must end.
        self._lingering: dict[str, dict[CopyId, None]] = {}
        self._source: Callable[[], Sequence[Segment]] = tuple
        self._on_evicted: OnEvicted | None = None
        self._heart: threading.Thread | None = None
        self._stop = threading.Event()
        self.fenced: RelayError | None = None
        self._beat_s = fleet.settings.heartbeat_s
        self.republished = 0

    # -- announcing and publishing -----------------------------------------------------------------------

    def announce(self, owner: Owner) -> None:
        """Raises DirectoryUnavailable when no shard answered, WorkerLost when `owner` was replaced."""
        if not self._announce(owner)[0]:
            raise self._unavailable("announce", self._fleet.shards)

    def publish(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """Raises DirectoryUnavailable when no shard took some segment, WorkerLost when `owner` was
        replaced."""
        with self._lock:
            for segment in segments:
                self._evicted.pop((segment.key, segment.variant), None)
        failed: set[str] = set()
        for part in _batches(segments):
            failed |= self._publish(owner, part)
        if failed:
            raise self._unavailable("publish", failed)

    def retract(self, owner: Owner, segments: Sequence[Segment]) -> None:
        """See KVDirectory."""
        with self._lock:
            self._remember_evicted(segments)
            packed = wire.OWNER.pack(owner)
            for name, part in self._by_replica(segments, lingering=True).items():
                self._fleet.send(name, "retract", (packed, wire.pack_segments(part)))

    def drop(self, worker: WorkerId, incarnation: int) -> None:
        """Raises DirectoryUnavailable when no shard answered."""
        parts = dict.fromkeys(self._fleet.shards, (worker, incarnation))
        if not self._fleet.ask(parts, "drop_owner", even_down=True):
            raise self._unavailable("drop_owner", self._fleet.shards)

    def _announce(self, owner: Owner) -> tuple[Asked, dict[str, Announced]]:
        # Also where copies linger: a shard that hears nothing drops the owner, and leases with it.
        names = dict.fromkeys([*self._fleet.shards, *self._lingering])
        asked = self._fleet.ask(dict.fromkeys(names, (_about(owner),)), "announce", even_down=True)
        verdicts = {name: wire.unpack_announced(answer.result) for name, answer in asked.items()}
        for verdict in verdicts.values():
            refuse_fenced(owner, verdict)
        return asked, verdicts

    def _publish(self, owner: Owner, segments: Sequence[Segment], only: set[str] | None = None) -> set[str]:
        """Enter segments at their replicas, or at those of them in `only`. The shards of segments that none
        of them took; a shard that missed something gets everything again with a later beat."""
        moved: set[str] = set()
        for _ in range(_MOVES):
            epoch = self._fleet.view.epoch
            parts = self._by_replica(segments, only=only)
            packed = _about(owner)
            names = self._worth_asking(parts, segments)
            messages = {n: (packed, wire.pack_segments(parts[n])) for n in names}
            asked = self._fleet.ask(messages, "publish", even_down=True)
            for name, answer in asked.items():
                verdict = wire.unpack_announced(answer.result)
                refuse_fenced(owner, verdict)
                if not verdict.known:
                    self._epochs.pop(name, None)  # it knew nothing of us: the next beat sends the rest
            moved = asked.moved
            for name in set(parts) - set(asked) - moved:
                self._epochs.pop(name, None)
            if self._fleet.view.epoch == epoch:
                return self._missing(segments, parts, asked)
            self._note_left({name: parts[name] for name in asked})
        return moved

    def _note_left(self, taken: Mapping[str, Sequence[Segment]]) -> None:
        """Remember what shards took just before they ceased to answer for it: `_settle` may have come first,
        and nobody would take it back."""
        with self._lock:
            for name, segments in taken.items():
                left = [s for s in segments if name not in self._fleet.replicas(s.key)]
                if left:
                    known = self._lingering.setdefault(name, {})
                    known.update(dict.fromkeys((s.key, s.variant) for s in left))

    def _missing(
        self, segments: Sequence[Segment], parts: Mapping[str, Sequence[Segment]], asked: Asked
    ) -> set[str]:
        out: set[str] = set()
        for segment in segments:
            names = [n for n in self._fleet.replicas(segment.key) if n in parts]
            if names and not any(n in asked for n in names):
                out.update(names)
        return out

    def _worth_asking(self, parts: Mapping[str, Any], segments: Sequence[Segment]) -> set[str]:
        """Shards that are down are left out where all their segments have another replica: a frozen shard
        must not cost every publish its deadline."""
        down = {n for n in parts if self._fleet.is_down(n)}
        if not down:
            return set(parts)
        needed: set[str] = set()
        for segment in segments:
            names = [n for n in self._fleet.replicas(segment.key) if n in parts]
            if all(n in down for n in names):
                needed.update(names)
        return (set(parts) - down) | needed

    def _by_replica(
        self, segments: Iterable[Segment], *, only: set[str] | None = None, lingering: bool = False
    ) -> dict[str, list[Segment]]:
        out: dict[str, list[Segment]] = {}
        for segment in segments:
            names = list(self._fleet.replicas(segment.key))
            if lingering:
                names += self._lingers_at((segment.key, segment.variant))
            for name in names:
                if only is None or name in only:
                    out.setdefault(name, []).append(segment)
        return out

    # -- evicting ----------------------------------------------------------------------------------------

    def evict(self, owner: Owner, nbytes: int) -> tuple[Segment, ...]:
        """Least recently used first over all shards, until `nbytes` are covered or none is left."""
        with self._lock:
            out: list[Segment] = []
            for _ in range(_MOVES):
                epoch = self._fleet.view.epoch
                self._settle(owner)
                out.extend(self._evict(owner, nbytes - sum(s.nbytes for s in out)))
                if self._fleet.view.epoch == epoch:
                    break
            return tuple(out)

    def _evict(self, owner: Owner, nbytes: int) -> list[Segment]:
        out: list[Segment] = []
        covered = 0
        ranked = self._offers(owner, nbytes)
        while covered < nbytes and ranked:
            parts, ranked = _take(ranked, nbytes - covered)
            removed = self._remove_everywhere(owner, parts)
            out.extend(removed)
            # A candidate may have been leased meanwhile: go on with the next ones.
            covered += sum(s.nbytes for s in removed)
        return out

    def _offers(self, owner: Owner, nbytes: int) -> list[tuple[Candidate, str]]:
        """Candidates of the first live replica of each, those that all their expected readers have read
        first, then the longest idle: readers lease there, so that it knows best what was used. A shard offers
        copies that it only stands by for as well, so it may have to be asked for more."""
        wanted = nbytes
        for _ in range(_WIDENINGS):
            parts = dict.fromkeys(self._fleet.shards, (wire.OWNER.pack(owner), wanted))
            asked = self._fleet.ask(parts, "candidates")
            offers = {s: wire.unpack_candidates(a.result) for s, a in asked.items()}
            ranked = [
                (c, s)
                for s, cs in offers.items()
                for c in cs
                if self._may_remove((c.key, c.variant), s, asked)
            ]
            exhausted = all(sum(c.nbytes for c in cs) < wanted for cs in offers.values())
            if exhausted or sum(c.nbytes for c, _ in ranked) >= nbytes:
                return sorted(ranked, key=lambda pair: (not pair[0].consumed, -pair[0].idle_s))
            wanted *= 2
        return []

    def _may_remove(self, copy: CopyId, first: str, live: Iterable[str]) -> bool:
        """Whether `first` is the first live replica, and every other shard that may have leased the copy
        either answers or is dead for certain."""
        names = self._fleet.replicas(copy[0])
        if next((n for n in names if n in live), None) != first:
            return False
        others = [n for n in names if n != first]
        if any(n not in live and not self._fleet.is_dead(n) for n in others):
            return False
        return all(not self._fleet.is_down(n) or self._fleet.is_dead(n) for n in self._lingers_at(copy))

    def _remove_everywhere(self, owner: Owner, parts: Mapping[str, list[CopyId]]) -> list[Segment]:
        """Remove copies at the shard that offered them, then at all others; what one of these has leased is
        entered again. What is returned is nowhere any more."""
        packed = wire.OWNER.pack(owner)
        messages = {s: (packed, wire.pack_copies(copies)) for s, copies in parts.items()}
        asked = self._fleet.ask(messages, "evict_copies")
        for name in set(parts) - set(asked) - asked.moved:
            # It may have evicted without our hearing of it: publish again, so that it knows what we hold.
            self._epochs.pop(name, None)
        removed = {
            (s.key, s.variant): (s, name)
            for name, answer in asked.items()
            for s in wire.unpack_segments(answer.result, packed=False)
        }
        kept = self._retire_others(owner, {copy: name for copy, (_, name) in removed.items()})
        back = [removed[copy][0] for copy in kept]
        for batch in _batches(back):
            self._publish(owner, batch)
        out = [segment for copy, (segment, _) in removed.items() if copy not in kept]
        self._remember_evicted(out)
        return out

    def _retire_others(self, owner: Owner, removed: Mapping[CopyId, str]) -> set[CopyId]:
        """Retire copies at every shard that may know them but the one in the mapping. Those that stay."""
        parts: dict[str, list[CopyId]] = {}
        for copy, first in removed.items():
            for name in dict.fromkeys([*self._fleet.replicas(copy[0]), *self._lingers_at(copy)]):
                if name != first and not self._fleet.is_dead(name):
                    parts.setdefault(name, []).append(copy)
        kept: set[CopyId] = set()
        for name, copies in parts.items():
            stay = self._retire(owner, name, copies)
            kept.update(copies if stay is None else stay)
            if stay is None:
                self._epochs.pop(name, None)
        return kept

    def _retire(self, owner: Owner, name: str, copies: Sequence[CopyId]) -> list[CopyId] | None:
        """Those of `copies` that the shard keeps because they are leased. None: it does not answer, and is
        not dead for certain."""
        stay: list[CopyId] = []
        for at in range(0, len(copies), _COPIES_PER_CALL):
            part = copies[at : at + _COPIES_PER_CALL]
            message = (wire.OWNER.pack(owner), wire.pack_copies(part))
            asked = self._fleet.ask({name: message}, "retire", even_down=True)
            if name not in asked:
                return stay if self._fleet.is_dead(name) else None
            stay.extend(part[wire.expect(i, int)] for i in wire.array(asked[name].result))
        lingering = self._lingering.get(name)
        if lingering is not None:
            for copy in set(copies) - set(stay):
                lingering.pop(copy, None)
        return stay

    def _remember_evicted(self, segments: Iterable[Segment]) -> None:
        for segment in segments:
            self._evicted[(segment.key, segment.variant)] = None
        while len(self._evicted) > _EVICTED_MEMORY:
            self._evicted.popitem(last=False)

    # -- heartbeat ---------------------------------------------------------------------------------------

    def start(
        self, owner: Owner, source: Callable[[], Sequence[Segment]], on_evicted: OnEvicted | None
    ) -> None:
        """See DirectoryClient.start_owner."""
        if self._heart is not None:
            raise RuntimeError("start_owner() was called twice; a client speaks for one owner")
        self._source, self._on_evicted = source, on_evicted
        if not self._beat(owner):
            raise self._unavailable("announce", self._fleet.shards)
        self._heart = threading.Thread(
            target=self._run, args=(owner,), name="relay-directory-heartbeat", daemon=True
        )
        self._heart.start()

    def close(self) -> None:
        """Stop the heartbeat. Idempotent."""
        self._stop.set()
        if self._heart is not None and self._heart is not threading.current_thread():
            self._heart.join(_JOIN_TIMEOUT_S + self._fleet.settings.call_timeout_s)

    def _run(self, owner: Owner) -> None:
        while not self._stop.wait(self._beat_s):
            try:
                self._beat(owner)
            except RelayError as fault:
                if isinstance(fault, DirectoryUnavailable):
                    continue
                self.fenced = fault
                logger.error("heartbeat of %s stops: %s", owner.worker, fault)  # noqa: TRY400 - no trace
                return
            except Exception:  # a fault of the source must not silence this worker for good
                logger.exception("heartbeat of %s failed; trying again", owner.worker)

    def _beat(self, owner: Owner) -> bool:
        asked, verdicts = self._announce(owner)
        # A shard that does not answer counts nobody: the others' word stands.
        self._beat_s = self._fleet.settings.beat_s(max((v.owners for v in verdicts.values()), default=1))
        with self._lock:
            self._settle(owner)
            stale = {
                name
                for name, verdict in verdicts.items()
                if name in self._fleet.shards
                and (not verdict.known or self._epochs.get(name) != asked[name].incarnation)
            }
            if stale:
                self._republish(owner, stale, asked)
            self._sweep(owner)
        self._grant_wishes(owner, verdicts)
        self.opens.refresh(owner)
        return bool(asked)

    def _republish(self, owner: Owner, stale: set[str], asked: Asked) -> None:
        held = [s for s in self._held() if not stale.isdisjoint(self._fleet.replicas(s.key))]
        # Before they are published: a publish that fails, here or in another thread, takes it back.
        for name in stale:
            self._epochs[name] = asked[name].incarnation
        try:
            for part in _batches(held):
                self._publish(owner, part, only=stale)
        except BaseException:
            for name in stale:
                self._epochs.pop(name, None)
            raise
        self.republished += len(held)
        if held:
            logger.info("published %d segments again to %s", len(held), ", ".join(sorted(stale)))

    def _held(self) -> list[Segment]:
        return [s for s in self._source() if (s.key, s.variant) not in self._evicted]

    # -- after a resize ----------------------------------------------------------------------------------

    def _settle(self, owner: Owner) -> None:
        """After a resize: note where copies were entered that others answer for now, and enter those at their
        new shards. (Shards that are new to us get everything as one that has restarted.)"""
        if not self._fleet.has_moved():
            return
        held = self._held()
        past = self._fleet.take_past()
        count = self._fleet.settings.replicas
        moved: list[Segment] = []
        for segment in held:
            now = set(self._fleet.replicas(segment.key))
            before = {name for ring in past for name in ring.replicas(segment.key, count)}
            for name in before - now:
                self._lingering.setdefault(name, {})[(segment.key, segment.variant)] = None
            for name in now:
                self._lingering.get(name, {}).pop((segment.key, segment.variant), None)
            if now - before:
                moved.append(segment)
        for part in _batches(moved):
            self._publish(owner, part, only=set(self._epochs))
        self.republished += len(moved)
        for name in set(self._epochs) - set(self._fleet.shards):
            del self._epochs[name]

    def _sweep(self, owner: Owner) -> None:
        """Take back what lingers at shards that no longer answer for it, once it is unleased there."""
        for name, copies in list(self._lingering.items()):
            stay = self._retire(owner, name, list(copies))
            if stay is not None:
                self._lingering[name] = dict.fromkeys(stay)
            if not self._lingering[name]:
                del self._lingering[name]

    def _lingers_at(self, copy: CopyId) -> list[str]:
        return [name for name, copies in self._lingering.items() if copy in copies]

    # -- operators ---------------------------------------------------------------------------------------

    def _grant_wishes(self, owner: Owner, verdicts: Mapping[str, Announced]) -> None:
        """Evict what operators wish, if it is unleased still, and have its blocks freed."""
        wishes = list(dict.fromkeys(copy for verdict in verdicts.values() for copy in verdict.wishes))
        if not wishes or self._on_evicted is None:
            return
        with self._lock:
            live = [n for n in self._fleet.shards if not self._fleet.is_down(n)]
            parts: dict[str, list[CopyId]] = {}
            for copy in wishes:
                first = next((n for n in self._fleet.replicas(copy[0]) if n in live), None)
                if first is not None and self._may_remove(copy, first, live):
                    parts.setdefault(first, []).append(copy)
            gone = self._remove_everywhere(owner, parts)
        self._on_evicted(gone)
        logger.info("evicted %d of %d segments at an operator's wish", len(gone), len(wishes))

    def _unavailable(self, method: str, shards: Iterable[str]) -> DirectoryUnavailable:
        return DirectoryUnavailable(
            f"{method}: no answer from directory shard(s) {', '.join(sorted(shards))} within "
            f"{self._fleet.settings.call_timeout_s:g} s. Requests go on without hits; see `relay doctor`."
        )


def _about(owner: Owner) -> list[Any]:
    """What a shard needs to admit an owner, and to make tokens for its blocks."""
    return wire.pack_announcing(owner, int(time.monotonic() * 1e3))


def _batches(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Parts of a bounded number of segments and of blocks."""
    batch: list[Segment] = []
    blocks = 0
    for segment in segments:
        if batch and (len(batch) >= _SEGMENTS_PER_CALL or blocks + len(segment.blocks) > _BLOCKS_PER_CALL):
            yield batch
            batch, blocks = [], 0
        batch.append(segment)
        blocks += len(segment.blocks)
    if batch:
        yield batch


def _take(
    ranked: Sequence[tuple[Candidate, str]], nbytes: int
) -> tuple[dict[str, list[CopyId]], list[tuple[Candidate, str]]]:
    """The first candidates that cover `nbytes`, by shard, at most one message of each, and the rest."""
    parts: dict[str, list[CopyId]] = {}
    covered = 0
    for at, (candidate, shard) in enumerate(ranked):
        part = parts.setdefault(shard, [])
        if covered >= nbytes or len(part) >= _COPIES_PER_CALL:
            return {s: p for s, p in parts.items() if p}, list(ranked[at:])
        part.append((candidate.key, candidate.variant))
        covered += candidate.nbytes
    return parts, []
