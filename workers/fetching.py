"""Brings leased segments into local memory, several at once, and gives everything back.

    begin()   own segments are pinned; a thread pulls each of the others
    wait()    until all have come, or until all have begun to come (pipelined)
    release   landing blocks, pins and leases go back; a pull that still runs gives its own back when it ends

A pull hands its segment over with its first part, and says with every later part how many layers there are
now (`workers/pulled.py`). When one breaks off after that, whoever used it starts again without it. Knows
nothing of prompts, plans or the engine.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Final

from transport.arena import Arena
from transport.auto import AutoTransport
from transport.base import KVDirectory
from transport.errors import ArenaFull
from transport.types import (
    BlockId,
    Incarnation,
    Lease,
    Located,
    Outcome,
    Owner,
    Segment,
    SegmentKey,
    Transfer,
    WorkerId,
)
from workers.following import Borrowed, Following
from workers.holding import Blocks, Holding
from workers.layout import KVLayout
from workers.pulled import Arrival, PulledSegment

log = logging.getLogger(__name__)

PATIENCE_S: Final = 0.02
"""So long a pipelined pull is waited for as a whole: computing layer by layer costs more than that saves."""
_PULLS_AT_ONCE: Final = 8
_SLACK_S: Final = 5.0  # what ending a pull may take beyond its own deadline
Life = tuple[WorkerId, Incarnation]
"""One life of a worker."""


@dataclass(frozen=True, slots=True)
class Granted:
    """A lease. asked_at: time.monotonic() instant before it was asked for, from which it is counted."""

    lease: Lease
    asked_at: float


@dataclass(frozen=True, slots=True)
class Miss:
    """Why a wanted segment is not there. reason: an Outcome value, "not_found", "arena_full",
    "directory_down", "transport_error" or "not_promoted"."""

    reason: str
    detail: str = ""


@dataclass(slots=True)
class Acquired:
    """Segments in local memory, until `SegmentStore.release_bytes`, and their leases, until
    `SegmentStore.release`.

    Attributes:
        hits: what was pulled, or has begun to come, by key. One that breaks off leaves it for `misses`.
        pulled: their bytes.
        transfers: every pull that was tried and told how it ended, in the order of their ends.
        misses: keys that were wanted and are not there.
        keep: copies of what was pulled may stay.
        token_ids: of what is wanted, as far as they are known; borrowed: leading blocks that had come ahead.
        lookup_s, lease_s: where the time went; pull_s: for how long the caller had to wait for bytes;
            moving_s: from the beginning of the first pull to the end of the last.
        ahead_blocks, ahead_bytes: how much of it was used.
        leases, landing, pins: what is to be given back; lost: owners that did not answer, and how the pull
            ended; running: pulls that have not ended; unsettled: keys of which nothing is known yet;
            given_up: keys that nobody waits for any more, because their pull overran its deadline; closed,
            unleased: whether bytes, or leases, go back as soon as the pulls end. The fetching's own business,
            guarded by `changed`.
    """

    hits: dict[SegmentKey, Located] = field(default_factory=dict[SegmentKey, Located])
    pulled: dict[SegmentKey, PulledSegment] = field(default_factory=dict[SegmentKey, PulledSegment])
    transfers: list[tuple[Located, Transfer]] = field(default_factory=list[tuple[Located, Transfer]])
    misses: dict[SegmentKey, Miss] = field(default_factory=dict[SegmentKey, Miss])
    keep: bool = True
    token_ids: Mapping[SegmentKey, Sequence[int]] = field(default_factory=dict[SegmentKey, Sequence[int]])
    borrowed: list[Borrowed] = field(default_factory=list[Borrowed])
    ahead_blocks: int = 0
    ahead_bytes: int = 0
    lookup_s: float = 0.0
    lease_s: float = 0.0
    pull_s: float = 0.0
    moving_s: float = 0.0
    leases: list[Lease] = field(default_factory=list[Lease])
    landing: list[BlockId] = field(default_factory=list[BlockId])
    pins: list[Blocks] = field(default_factory=list[Blocks])
    lost: dict[Life, Outcome] = field(default_factory=dict[Life, Outcome])
    running: int = 0
    unsettled: set[SegmentKey] = field(default_factory=set[SegmentKey])
    given_up: set[SegmentKey] = field(default_factory=set[SegmentKey])
    closed: bool = False
    unleased: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def snapshot(self) -> tuple[dict[SegmentKey, Located], dict[SegmentKey, PulledSegment]]:
        """(hits, pulled) at one instant."""
        with self.changed:
            return dict(self.hits), dict(self.pulled)

    def settle(self, timeout_s: float) -> bool:
        """Wait for all pulls to end; False when `timeout_s` was not enough."""
        with self.changed:
            return self.changed.wait_for(lambda: not self.running, timeout_s)


class Fetching:
    """Pulls for one worker. Thread-safe; `begin`, `wait` and `release*` of one `Acquired` are for one thread
    at a time."""

    def __init__(
        self,
        owner: Owner,
        layout: KVLayout,
        arena: Arena,
        transport: AutoTransport,
        directory: KVDirectory,
        holding: Holding,
        following: Following,
        *,
        pull_timeout_s: float,
        keep_pulled: bool = False,
    ) -> None:
        self._keep_pulled = keep_pulled
        self._owner = owner
        self._layout = layout
        self._arena = arena
        self._transport = transport
        self._directory = directory
        self._holding = holding
        self._following = following
        self._pull_timeout_s = pull_timeout_s
        self._leased = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_PULLS_AT_ONCE, thread_name_prefix="relay-pull")

    @property
    def leased(self) -> int:
        """Leases that this worker has now, as a reader."""
        with self._lock:
            return self._leased

    # -- bringing ------------------------------------------------------------------------------------------

    def keep(self, got: Acquired, leases: Iterable[Lease]) -> None:
        """Leases that `release_leases` is to give back, those of other copies included."""
        new = [each for lease in leases for each in (lease, *lease.others)]
        with got.changed:
            got.leases.extend(new)
        with self._lock:
            self._leased += len(new)

    def begin(
        self,
        got: Acquired,
        leases: Sequence[Granted],
        *,
        pipelined: bool,
        on_landed: Callable[[], None] | None,
    ) -> None:
        """Start bringing the leased segments.

        Args:
            leases: those of them that are wanted; `keep` has been told of all.
            pipelined: hand segments over with their first part.
            on_landed: called on a pulling thread whenever layers have come, or will not.
        """
        begin = time.monotonic()
        pulls: list[_Pull] = []
        for granted in leases:
            lease = granted.lease
            if self._life(lease) == (self._owner.worker, self._owner.incarnation):
                self._pin(lease, got)
            else:
                pulls.append(_Pull(lease, granted.asked_at, begin, pipelined, on_landed))
        got.running = len(pulls)
        got.unsettled = {pull.key for pull in pulls}
        if len(pulls) == 1 and not pipelined:
            self._run(pulls[0], got)
            return
        for pull in pulls:
            self._threads.submit(self._run, pull, got)

    def wait(self, got: Acquired, *, pipelined: bool) -> None:
        """Wait until every segment is there or known not to come; pipelined: or has begun to come."""
        limit_s = self._pull_timeout_s * (1 + len(got.unsettled) // _PULLS_AT_ONCE) + _SLACK_S
        with got.changed:
            if pipelined and got.changed.wait_for(lambda: not got.running, PATIENCE_S):
                return
            unfinished = (lambda: not got.unsettled) if pipelined else (lambda: not got.running)
            if not got.changed.wait_for(unfinished, limit_s):
                # A backend that does not keep its own deadline: the pull keeps its blocks until it ends.
                log.error("%d pulls have not ended within %.0f s", got.running, limit_s)
                for key in got.unsettled:
                    got.misses[key] = Miss(Outcome.TIMED_OUT, "the pull did not end by its deadline")
                got.given_up |= got.unsettled
                got.unsettled = set()

    def _life(self, lease: Lease) -> Life:
        return (lease.located.owner.worker, lease.located.owner.incarnation)

    def _pin(self, lease: Lease, got: Acquired) -> None:
        """Keep a segment of this worker where it is: its lease may end, and `evict` run, while it is read."""
        segment, worker = lease.located.segment, self._owner.worker
        outcome, detail = Outcome.PULLED, ""
        if self._holding.pin(segment):
            got.pins.append(segment.blocks)
            got.hits[segment.key] = lease.located
            got.pulled[segment.key] = self._bytes(lease, [b.block for b in segment.blocks], None)
        else:
            outcome, detail = Outcome.STALE, f"{worker} no longer holds the leased blocks itself"
            got.misses[segment.key] = Miss(outcome, detail)
        transfer = Transfer(worker, worker, "local", 0, len(segment.blocks), 0.0, outcome, detail)
        got.transfers.append((lease.located, transfer))

    def _bytes(self, lease: Lease, blocks: Sequence[BlockId], arrival: Arrival | None) -> PulledSegment:
        segment = lease.located.segment
        views = tuple(self._layout.views(self._arena.payload(b)) for b in blocks)
        return PulledSegment(views, segment.num_tokens, segment.start, arrival)

    def _run(self, pull: _Pull, got: Acquired) -> None:
        """One pull from beginning to end. Never raises: a fault of a backend costs this hit, not the
        request."""
        blocks: list[BlockId] = []
        ours = True
        try:
            with got.changed:
                pull.lease = self._of_the_living(pull.lease, got)
                before = got.lost.get(self._life(pull.lease))
                gone = "the request has ended" if got.closed else ""
            if gone or before is not None:
                worker = pull.lease.located.owner.worker
                detail = gone or f"not tried: {worker} did not answer just before"
                self._miss(pull, got, Miss(before or Outcome.PEER_GONE, detail))
                return
            lease = self._borrow(pull, got)
            blocks = self._holding.allocate(len(lease.located.segment.blocks))
            transfer = self._bring(lease, blocks, pull, got)
            # After a time-out the backend has quarantined them: late writes are real.
            ours = transfer.outcome is not Outcome.TIMED_OUT
            ours = self._ended(pull, got, blocks, transfer) and ours
        except ArenaFull as error:
            self._miss(pull, got, Miss("arena_full", str(error)))
        except Exception as error:  # noqa: BLE001 - see above
            owner = pull.lease.located.owner.worker
            log.warning("pull of %s from %s broke: %r", pull.key, owner, error)
            self._miss(pull, got, Miss("transport_error", repr(error)))
        except BaseException as error:
            self._miss(pull, got, Miss("transport_error", repr(error)))
            raise
        finally:
            if ours:
                self._holding.free(blocks)
            if pull.ahead is not None:  # and nobody is going to release it
                self._following.give_back(pull.ahead)
            self._count_down(pull, got)
        if pull.copy is not None:
            self._offer(pull.copy)

    def _borrow(self, pull: _Pull, got: Acquired) -> Lease:
        """What is left to bring of the leased segment, when some of it has come ahead."""
        pull.ahead = self._following.borrow(pull.lease, got.token_ids.get(pull.key, ()))
        if pull.ahead is None:
            return pull.lease
        pull.lease, pull.ahead_blocks = pull.ahead.lease, pull.ahead.blocks
        return pull.lease.part(len(pull.ahead_blocks), len(pull.lease.located.segment.blocks))

    def _bring(self, lease: Lease, blocks: Sequence[BlockId], pull: _Pull, got: Acquired) -> Transfer:
        def landed(part: int) -> None:
            self._landed(pull, got, blocks, part)

        if not blocks:  # all of it has come ahead
            for part in range(len(self._layout.part_layers)):
                landed(part)
            owner, here = lease.located.owner.worker, self._owner.worker
            return Transfer(owner, here, "ahead", 0, 0, 0.0, Outcome.PULLED)
        return self._transport.pull(
            lease,
            blocks,
            timeout_s=self._pull_timeout_s,
            lease_deadline=pull.asked_at + lease.ttl_s,
            on_part=landed,
        )

    def _of_the_living(self, lease: Lease, got: Acquired) -> Lease:
        """The lease without owners that did not answer just before; as it is when there is no other."""
        every = (replace(lease, others=()), *lease.others)
        live = [x for x in every if self._life(x) not in got.lost]
        return replace(live[0], others=tuple(live[1:])) if live else lease

    def _landed(self, pull: _Pull, got: Acquired, blocks: Sequence[BlockId], part: int) -> None:
        """A part has come and is verified."""
        pull.arrival.landed(self._layout.part_layers[part])
        if not pull.pipelined:
            return
        if part == 0:
            with got.changed:
                if not self._unwanted(pull, got):
                    self._enter(pull, got, blocks)
        if pull.on_landed is not None:
            pull.on_landed()

    def _enter(self, pull: _Pull, got: Acquired, blocks: Sequence[BlockId]) -> None:
        """The segment can be used. The caller holds `got.changed`."""
        got.hits[pull.key] = pull.lease.located
        got.pulled[pull.key] = self._bytes(pull.lease, [*pull.ahead_blocks, *blocks], pull.arrival)
        got.unsettled.discard(pull.key)
        got.changed.notify_all()

    @staticmethod
    def _unwanted(pull: _Pull, got: Acquired) -> bool:
        """Whether nobody waits for the segment any more. The caller holds `got.changed`."""
        return got.closed or pull.key in got.given_up

    def _ended(self, pull: _Pull, got: Acquired, blocks: list[BlockId], transfer: Transfer) -> bool:
        """Take the outcome; whether the blocks are to be freed now."""
        located = pull.lease.located
        # One that fails behind its last part has brought verified bytes, which may be in use by now.
        whole = pull.arrival.layers == self._layout.num_layers and transfer.outcome is not Outcome.TIMED_OUT
        if transfer.outcome is Outcome.PULLED or (pull.pipelined and whole):
            with got.changed:
                if pull.key in got.given_up:  # it was told as a miss, and must not be a hit as well
                    detail = f"came after {transfer.seconds:.1f} s, when it had been given up"
                    transfer = replace(transfer, outcome=Outcome.TIMED_OUT, nbytes=0, detail=detail)
                self._tell(pull, got, transfer)
                if self._unwanted(pull, got):
                    return True
                if pull.key not in got.pulled:
                    self._enter(pull, got, blocks)
                if pull.ahead is not None:
                    got.borrowed.append(pull.ahead)
                    got.ahead_blocks += len(pull.ahead_blocks)
                    got.ahead_bytes += len(pull.ahead_blocks) * self._layout.block_nbytes
                    pull.ahead = None
                else:
                    pull.copy = self._adopt(got, located.segment, blocks, transfer)
                if pull.copy is None:
                    got.landing.extend(blocks)
                else:
                    got.pins.append(pull.copy.blocks)
            return False
        # Not reported to the directory: one reader's broken link is no proof that the owner is dead, and a
        # dropped owner stays fenced. Its silence, or whoever saw its process die, ends it.
        owner = located.owner.worker
        log.warning("pull from %s failed: %s (%s)", owner, transfer.outcome, transfer.detail)
        with got.changed:
            self._tell(pull, got, transfer)
            if transfer.outcome in (Outcome.TIMED_OUT, Outcome.PEER_GONE):
                for lease in (pull.lease, *pull.lease.others):
                    got.lost[self._life(lease)] = transfer.outcome
        self._miss(pull, got, Miss(transfer.outcome, transfer.detail))
        return True

    @staticmethod
    def _tell(pull: _Pull, got: Acquired, transfer: Transfer) -> None:
        """Note how it ended; where several owners had a part in it, each of their parts. The caller holds
        `got.changed`."""
        owners = {x.located.owner.worker: x.located for x in (pull.lease, *pull.lease.others)}
        got.transfers.extend((owners[t.source], t) for t in transfer.shares or (transfer,))

    def _adopt(
        self, got: Acquired, segment: Segment, blocks: list[BlockId], transfer: Transfer
    ) -> Segment | None:
        """Keep a copy of what others are going to read as well."""
        wanted = self._keep_pulled and got.keep and segment.consumers > 1
        whole = transfer.outcome is Outcome.PULLED and segment.complete
        return self._holding.adopt(segment, blocks) if wanted and whole else None

    def _miss(self, pull: _Pull, got: Acquired, miss: Miss) -> None:
        """The segment will not come, or not all of it: told before its blocks are freed, so that nobody
        trusts what is read from them after."""
        pull.arrival.lost(f"{miss.reason}: {miss.detail}")
        with got.changed:
            got.hits.pop(pull.key, None)
            got.pulled.pop(pull.key, None)
            got.misses[pull.key] = miss

    def _count_down(self, pull: _Pull, got: Acquired) -> None:
        with got.changed:
            got.running -= 1
            got.unsettled.discard(pull.key)
            got.moving_s = time.monotonic() - pull.begun
            leases: list[Lease] = []
            if not got.running and got.unleased:
                leases, got.leases = got.leases, []
            got.changed.notify_all()
        self._unlease(got, leases)
        if pull.on_landed is not None:
            pull.on_landed()

    def _offer(self, copy: Segment) -> None:
        """Tell the directory of a copy. Nobody waits for it."""
        try:
            self._threads.submit(self._holding.enter_copy, copy)
        except RuntimeError:  # this worker closes
            self._holding.enter_copy(copy)

    def close(self) -> None:
        """Begin no more pulls; those that run end by themselves. Idempotent."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -- giving back ---------------------------------------------------------------------------------------

    def release_bytes(self, got: Acquired) -> None:
        """Give back landing blocks and pins: the bytes in `got.pulled` must not be used after it. Local and
        cheap. Idempotent; never raises."""
        with got.changed:
            got.closed = True
            got.pulled.clear()
            landing, got.landing = got.landing, []
            pins, got.pins = got.pins, []
            borrowed, got.borrowed = got.borrowed, []
        for each in borrowed:
            self._following.give_back(each)
        self._holding.free(landing)
        self._holding.unpin(pins)

    def release_leases(self, got: Acquired) -> None:
        """Give back the leases at the directory, as soon as no pull needs them. Idempotent; never raises."""
        with got.changed:
            got.unleased = True
            if got.running:
                return
            leases, got.leases = got.leases, []
        self._unlease(got, leases)

    def _unlease(self, got: Acquired, leases: list[Lease]) -> None:
        """Release leases, those of segments that have come as read: the directory counts readers."""
        if not leases:
            return
        with self._lock:
            self._leased -= len(leases)
        # One reader, however many copies it had leased.
        first = {x.located.segment.key: x.id for x in reversed(leases)}
        read = [x for x in leases if (k := x.located.segment.key) in got.hits and first[k] == x.id]
        counted = {x.id for x in read}
        rest = [x for x in leases if x.id not in counted]
        try:
            if read:
                self._directory.release(read, read=True)
            if rest:
                self._directory.release(rest)
        except Exception as error:  # noqa: BLE001 - leases expire by themselves; the request is done
            log.warning("%d leases are left to expire: %r", len(leases), error)


@dataclass(slots=True)
class _Pull:
    """One pull that runs. asked_at, begun: time.monotonic() before the lease request, and now; copy: what
    this worker holds of it afterwards; ahead: what had come of it, as long as this has to give it back;
    ahead_blocks: where."""

    lease: Lease
    asked_at: float
    begun: float
    pipelined: bool
    on_landed: Callable[[], None] | None
    arrival: Arrival = field(default_factory=Arrival)
    copy: Segment | None = None
    ahead: Borrowed | None = None
    ahead_blocks: tuple[BlockId, ...] = ()

    @property
    def key(self) -> SegmentKey:
        return self.lease.located.segment.key
