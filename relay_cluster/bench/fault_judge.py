"""What a trial of a fault campaign comes to: facts in, counts out.

Pure: replies, a reader's events and instants go in; it knows neither clusters nor how the harm was done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from relay_cluster.bench.common import median
from relay_cluster.bench.fault_kinds import HELD_MS, IN_PULL, Trial
from relay_cluster.bench.fault_rows import FaultRow
from transport.faults import ENDED, READ, FaultEvent, FaultKind
from transport.types import Outcome
from workers.messages import Fallback, Reply


@dataclass(slots=True)
class Seen:
    """What one trial showed; see FaultRow."""

    hit: bool = False
    wrong: list[str] = field(default_factory=list[str])
    hang: bool = False
    leases: int = 0
    blocks: int = 0
    crashes: int = 0
    uncounted: bool = False
    fallbacks: Counter[str] = field(default_factory=Counter[str])
    error: str = ""
    retries: int = 0
    detect_s: float | None = None
    pulls: Counter[str] = field(default_factory=Counter[str])
    relayed: int = 0

    @property
    def failed(self) -> bool:
        return bool(self.wrong or self.hang or self.leases or self.blocks or self.crashes or self.uncounted)


def fault_row(kind: str, found: Sequence[Seen]) -> FaultRow:
    """Sum trials up."""
    detected = [seen.detect_s for seen in found if seen.detect_s is not None]
    return FaultRow(
        kind=kind,
        trials=len(found),
        hits=sum(s.hit for s in found),
        wrong_outputs=sum(len(s.wrong) for s in found),
        hangs=sum(s.hang for s in found),
        leaked_leases=sum(s.leases for s in found),
        leaked_blocks=sum(s.blocks for s in found),
        crashes=sum(s.crashes for s in found),
        uncounted=sum(s.uncounted for s in found),
        fallbacks=dict(sum((s.fallbacks for s in found), Counter[str]())),
        errors=dict(Counter(s.error for s in found if s.error)),
        retries=sum(s.retries for s in found),
        detect_s_p50=median(detected) if detected else None,
        detect_s_max=max(detected) if detected else None,
    )


def judge(
    seen: Seen,
    trial: Trial,
    acted_at: float | None,
    replies: Sequence[Reply],
    events: Sequence[FaultEvent],
    losses: Sequence[float],
) -> Seen:
    """Enter what the replies and the reader's events say.

    Args:
        acted_at: time.monotonic() of the harm, None when it was not done; replies: of all agents;
            events: of the reader's worker.
        losses: time.monotonic() of every worker that was lost under its request.
    """
    fallbacks: list[Fallback] = [f for reply in replies for f in reply.fallbacks]
    seen.fallbacks = Counter(f.reason for f in fallbacks)
    seen.retries = len(losses)
    seen.relayed = sum(len(reply.relayed_keys) for reply in replies)
    for reply in replies:
        seen.pulls.update(t.transfer.backend for t in reply.transfers if t.transfer.outcome is Outcome.PULLED)
    failed = _failed_pulls(events)
    spec = trial.kind.spec
    if spec is None:
        # What a reader is to miss must have been there: an answer may be too short to be published.
        there = not trial.kind.pull_fails or any(
            p.slot is None for r in replies if r.agent == trial.upstream for p in r.published
        )
        seen.hit = acted_at is not None and there
    elif trial.kind.name == "reuse":
        seen.hit = bool(failed)
    else:
        seen.hit = any(event.what == spec.kind for event in events)
    must_fail = seen.hit and trial.kind.pull_fails and not (spec is None and _had_elsewhere(trial, replies))
    # A full arena may hit a publication instead of a pull, which is told in the notes.
    noted = trial.kind.name == FaultKind.ARENA_FULL and any(
        "ArenaFull" in n for r in replies for n in r.notes
    )
    told = fallbacks or seen.error or losses or noted
    seen.uncounted = bool(failed or must_fail) and not told
    seen.detect_s = _detection(trial, acted_at, replies, events, losses)
    return seen


def _had_elsewhere(trial: Trial, replies: Sequence[Reply]) -> bool:
    """Whether the reader has relayed all that its upstream agent has left: what an owner loses, another
    worker may have a copy of, or may have made as well."""
    left = {p.key for r in replies if r.agent == trial.upstream for p in r.published if p.slot is None}
    used = {key for r in replies if r.agent == trial.reader for key in r.relayed_keys}
    return bool(left) and left <= used


def _failed_pulls(events: Sequence[FaultEvent]) -> list[FaultEvent]:
    """Segments whose last try failed: a pull may fail over one backend and succeed over the next."""
    last = {event.subject: event for event in events if event.what == ENDED}
    return [event for event in last.values() if event.outcome != Outcome.PULLED]


def _detection(
    trial: Trial,
    acted_at: float | None,
    replies: Sequence[Reply],
    events: Sequence[FaultEvent],
    losses: Sequence[float],
) -> float | None:
    """Seconds from the fault to its being noticed; None when there was nothing to notice."""
    if acted_at is None:
        return None
    if trial.kind.loses:
        return losses[0] - acted_at if losses else None
    if trial.kind.name in ("shard_kill", "directory_drop"):
        waits = [
            reply.stages.lookup_s + reply.stages.lease_s
            for reply in replies
            if any(f.reason == "directory_down" for f in reply.fallbacks)
        ]
        return max(waits, default=None)
    failed = _failed_pulls(events)
    if not failed:
        return None
    first = min(failed, key=lambda event: event.at_s)
    begun = [e.at_s for e in events if e.what == READ and e.subject == first.subject]
    hits = [e.at_s for e in events if trial.kind.spec and e.what == trial.kind.spec.kind]
    since = max(acted_at, *(begun[:1] or [acted_at]), *(hits[:1] or [acted_at]))
    if trial.stage == IN_PULL:
        since = max(since, begun[0] + HELD_MS / 1e3) if begun else since  # our own delay is not its
    return max(0.0, first.at_s - since)
