"""Chooses a backend per peer: the best that both ends have, and says which and why.

`make_transport(settings)` gives a worker its transport; `available_backends()` serves the doctor. This module
does not know how a backend moves bytes.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from transport.arena import Arena
from transport.backend import Backend
from transport.errors import ArenaFull, TransportError
from transport.inprocess import InProcessTransport
from transport.loopback import is_loopback
from transport.nixl import INSTALL_HINT, NixlTransport
from transport.nixl import probe as probe_nixl
from transport.pulling import OnPart
from transport.settings import TransportSettings
from transport.sharing import SharedPull, sources
from transport.shm import ShmTransport
from transport.shm import probe as probe_shm
from transport.tcp import TcpTransport
from transport.types import BlockId, Lease, Outcome, Owner, Transfer
from transport.ucx import UcxTransport
from transport.ucx_binding import INSTALL_HINT as UCX_INSTALL_HINT
from transport.ucx_binding import probe as probe_ucx

logger = logging.getLogger(__name__)

DISABLE_ENV: Final = "RELAY_DISABLE_BACKENDS"
"""Test-only: comma-separated backends to hide, as if they were not installed. Not a way to configure."""
PREFERENCE: Final = ("inprocess", "shm", "nixl", "ucx", "tcp")
AVOID_S: Final = 30.0
"""How long a backend that failed to reach a peer is passed over for that peer."""
_FAILED_TO_REACH: Final = (Outcome.PEER_GONE, Outcome.NO_ROUTE)


def _hidden() -> set[str]:
    return {name.strip() for name in os.environ.get(DISABLE_ENV, "").split(",") if name.strip()}


def available_backends() -> dict[str, tuple[bool, str]]:
    """Backend name -> (can it be used here, why or why not)."""
    hidden = (False, f"hidden by {DISABLE_ENV}")
    out = {
        "shm": hidden if "shm" in _hidden() else probe_shm(),
        "nixl": hidden if "nixl" in _hidden() else probe_nixl(),
        "ucx": hidden if "ucx" in _hidden() else probe_ucx(),
        "tcp": (True, "plain sockets, always there"),
        "inprocess": (True, "within one process only; for tests"),
    }
    return {n: hidden if n in _hidden() else v for n, v in out.items()}


def _make_shm(s: TransportSettings, worker: str, host: str) -> Backend:
    if not s.shared_memory:
        raise TransportError("shm: transport.shared_memory is false.")
    return ShmTransport(s.connect_timeout_s)


def _make_nixl(s: TransportSettings, worker: str, host: str) -> Backend:
    return NixlTransport(worker, host)


def _make_ucx(s: TransportSettings, worker: str, host: str) -> Backend:
    return UcxTransport(host)


def _make_tcp(s: TransportSettings, worker: str, host: str) -> Backend:
    bind = host if s.bind_host == "auto" else s.bind_host
    # A wildcard is no address to connect to: peers are told the node's own.
    advertise = host if bind in ("0.0.0.0", "::", "") else bind
    return TcpTransport(bind, advertise, s.connect_timeout_s)


def _make_inprocess(s: TransportSettings, worker: str, host: str) -> Backend:
    return InProcessTransport()


_BACKENDS: Final[Mapping[str, Callable[[TransportSettings, str, str], Backend]]] = {
    "shm": _make_shm,
    "nixl": _make_nixl,
    "ucx": _make_ucx,
    "tcp": _make_tcp,
    "inprocess": _make_inprocess,
}


def make_backend(name: str, s: TransportSettings, *, worker: str, host: str) -> Backend:
    """One backend by name.

    Raises:
        TransportError: the name is unknown, or the backend cannot be had here.
    """
    factory = _BACKENDS.get(name)
    if factory is None:
        raise TransportError(
            f"unknown transport backend {name!r}; known: auto, {', '.join(sorted(_BACKENDS))}."
        )
    if name in _hidden():
        hint = {"nixl": f"; {INSTALL_HINT}", "ucx": f"; {UCX_INSTALL_HINT}"}.get(name, "")
        raise TransportError(f"transport backend {name!r} is hidden by {DISABLE_ENV}{hint}.")
    return factory(s, worker, host)


def make_transport(s: TransportSettings, *, worker: str = "worker", host: str = "127.0.0.1") -> AutoTransport:
    """A worker's transport. Backends start at `register`.

    Args:
        worker: this worker's name.
        host: this node's address as peers see it, which is what bind_host "auto" means.

    Raises:
        TransportError: settings.backend is unknown, or names one that cannot be had here.
    """
    if s.backend != "auto":
        return AutoTransport([make_backend(s.backend, s, worker=worker, host=host)], {})
    backends: list[Backend] = []
    missing: dict[str, str] = {}
    for name in ("shm", "nixl", "ucx", "tcp"):
        if name == "ucx" and is_loopback(host):
            missing[name] = "its port would be open beyond this machine; only taken when it is asked for"
            continue
        try:
            backends.append(make_backend(name, s, worker=worker, host=host))
        except TransportError as fault:
            missing[name] = str(fault)
            logger.info("transport backend %s is not available: %s", name, fault)
    return AutoTransport(backends, missing)


@dataclass(frozen=True, slots=True)
class _Ranking:
    """The backends for one peer.

    Attributes:
        usable: best first.
        lost: why a better one cannot be had, for which somebody should do something.
        aside: why a better one is not for this peer.
    """

    usable: list[str]
    lost: list[str]
    aside: list[str]

    def reason(self) -> str:
        """Why the first one."""
        best = "both on this host" if self.usable[0] == "shm" else "best backend of both ends"
        return "; ".join(self.lost) or "; ".join((best, *self.aside))


@dataclass(frozen=True, slots=True)
class _Avoid:
    until: float
    reason: str


class AutoTransport:
    """All backends of one worker; pulls over the best that both ends have.

    Use `addresses()` for `Owner.addresses`. Counts of `stats()`: "pulls.<backend>", "downgrades" (a better
    backend was passed over), "fallbacks" (a pull that failed to reach its peer and was tried over the next),
    "shared" (pulls of segments that several owners hold), "moved" (runs of blocks that such a pull took from
    another owner than it had asked first), "unshared" (such pulls that had no room for it).
    """

    name = "auto"

    def __init__(self, backends: Sequence[Backend], missing: Mapping[str, str]) -> None:
        self._backends = {b.name: b for b in backends}
        self._missing = dict(missing)
        self._lock = threading.Lock()
        self._stats: dict[str, int] = {"downgrades": 0, "fallbacks": 0}
        self._avoid: dict[tuple[str, str], _Avoid] = {}
        self._told: dict[str, tuple[str, str]] = {}
        self._arena: Arena | None = None

    def register(self, arena: Arena) -> None:
        """Start every backend. One of several that does not come up is left out, and says so.

        Raises:
            TransportError: none comes up.
        """
        for name, backend in list(self._backends.items()):
            try:
                backend.register(arena)
            except TransportError as fault:
                self._missing[name] = str(fault)
                del self._backends[name]
                backend.close()
                level = logging.INFO if name == "shm" else logging.WARNING  # a CUDA device has no use for it
                logger.log(level, "transport backend %s is left out: %s", name, fault)
        if not self._backends:
            raise TransportError(f"no transport backend came up: {self._missing}")
        self._arena = arena

    def addresses(self) -> dict[str, bytes]:
        """Backend name -> address, for `Owner.addresses`."""
        return {name: b.address() for name, b in self._backends.items()}

    def address(self) -> bytes:
        """A composite has one address per backend: see `addresses`.

        Raises:
            TransportError: always.
        """
        raise TransportError("auto has no single address; put addresses() into Owner.addresses.")

    def chosen(self, owner: Owner) -> tuple[str | None, str]:
        """(backend, reason) for pulls from `owner`; backend is None when there is no common one."""
        ranking = self._rank(owner)
        if not ranking.usable:
            passed_over = "; ".join((*ranking.aside, *ranking.lost)) or "nothing was passed over"
            return None, (
                f"no common backend: {owner.worker} has {sorted(owner.addresses)}, we have "
                f"{sorted(self._backends)}; {passed_over}"
            )
        return ranking.usable[0], ranking.reason()

    def pull(
        self,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        timeout_s: float,
        lease_deadline: float | None = None,
        on_part: OnPart | None = None,
    ) -> Transfer:
        """See `transport.base.Transport.pull`. When the best backend does not reach the peer, the next one
        is tried within the same deadlines, unless a part was handed over already: its bytes may be in use.
        A segment that several owners hold comes from all of them (`transport/sharing.py`)."""
        leases = sources(lease)
        if len(leases) > 1 and self._arena is not None:
            start = time.monotonic()
            ends = start + lease.ttl_s if lease_deadline is None else lease_deadline
            try:
                shared = SharedPull(
                    self._arena,
                    self._pull_one,
                    lambda owner: self.chosen(owner)[0] or "none",
                    leases,
                    into,
                    deadline=start + timeout_s,
                    ends=ends,
                    on_part=on_part,
                )
            except ArenaFull:
                self._count("unshared")
            else:
                transfer = shared.run()
                self._count("shared")
                self._count("moved", shared.moved)
                return transfer
        return self._pull_one(
            lease, into, timeout_s=timeout_s, lease_deadline=lease_deadline, on_part=on_part
        )

    def _pull_one(
        self,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        timeout_s: float,
        lease_deadline: float | None,
        on_part: OnPart | None,
    ) -> Transfer:
        """A pull from one owner."""
        owner = lease.located.owner
        start = time.monotonic()
        ends = start + lease.ttl_s if lease_deadline is None else lease_deadline
        ranking = self._rank(owner)
        usable = ranking.usable
        if not usable:
            return self._no_route(lease, len(into), start)
        self._tell(owner, ranking)
        handed_over: list[int] = []

        def hand_over(part: int) -> None:
            handed_over.append(part)
            if on_part is not None:
                on_part(part)

        transfer = self._backends[usable[0]].pull(
            lease, into, timeout_s=timeout_s, lease_deadline=ends, on_part=hand_over
        )
        for tried, name in itertools.pairwise(usable):
            left = start + timeout_s - time.monotonic()
            if transfer.outcome not in _FAILED_TO_REACH or handed_over or left <= 0:
                break
            self._pass_over(owner, tried, transfer)
            transfer = self._backends[name].pull(
                lease, into, timeout_s=left, lease_deadline=ends, on_part=hand_over
            )
        self._count(f"pulls.{transfer.backend}")
        return replace(transfer, seconds=time.monotonic() - start)

    def stats(self) -> dict[str, int]:
        """Counts since the start; see the class."""
        with self._lock:
            out = dict(self._stats)
        for name, backend in self._backends.items():
            out.update({f"{name}.{k}": v for k, v in backend.stats().items()})
        return out

    def close(self) -> None:
        """Close every backend."""
        for backend in self._backends.values():
            backend.close()

    # -- inside ----------------------------------------------------------------------------------------

    def _rank(self, owner: Owner) -> _Ranking:
        now = time.monotonic()
        ranking = _Ranking([], [], [])
        avoided: list[str] = []
        lost_before = 0
        for name in PREFERENCE:
            ours, theirs = name in self._backends, name in owner.addresses
            # Not every worker has shm, nor is it for every peer: without it nothing is lost.
            missed = ranking.aside if name == "shm" else ranking.lost
            said = ""
            if ours and theirs:
                apart = self._backends[name].out_of_reach(owner)
                avoid = self._avoid.get((self._life(owner), name))
                if apart:
                    said = f"{name}: {apart}"
                elif avoid is None or avoid.until <= now:
                    ranking.usable.append(name)
                else:
                    lost_before = lost_before if avoided else len(ranking.lost)
                    avoided.append(name)
                    missed, said = ranking.lost, f"{name} passed over: {avoid.reason}"
            elif theirs:
                said = f"{name} missing here: {self._missing.get(name, 'not configured')}"
            elif ours:
                said = f"{name} missing at {owner.worker}"
            if said and not ranking.usable:
                missed.append(said)
        if not ranking.usable:  # everything is being avoided: better to try again than not at all
            ranking.usable.extend(avoided)
            del ranking.lost[lost_before if avoided else len(ranking.lost) :]
        return ranking

    @staticmethod
    def _life(owner: Owner) -> str:
        return f"{owner.worker}.{owner.incarnation}"

    def _tell(self, owner: Owner, ranking: _Ranking) -> None:
        """Log each peer's choice once, and again when it changes; count downgrades per pull."""
        name, reason = ranking.usable[0], ranking.reason()
        if ranking.lost:
            self._count("downgrades")
        with self._lock:
            if self._told.get(owner.worker) == (name, reason):
                return
            self._told[owner.worker] = (name, reason)
        log = logger.warning if ranking.lost else logger.info
        log("pulls from %s go over %s: %s", owner.worker, name, reason)

    def _pass_over(self, owner: Owner, name: str, transfer: Transfer) -> None:
        reason = f"{transfer.outcome.value}: {transfer.detail}"
        with self._lock:
            self._avoid[(self._life(owner), name)] = _Avoid(time.monotonic() + AVOID_S, reason)
            self._stats["fallbacks"] += 1
        logger.warning("%s did not reach %s (%s); trying the next backend", name, owner.worker, reason)

    def _no_route(self, lease: Lease, blocks: int, start: float) -> Transfer:
        owner = lease.located.owner
        self._count("no_route")
        _, reason = self.chosen(owner)
        logger.warning("pull from %s: %s", owner.worker, reason)
        return Transfer(
            source=owner.worker,
            destination=lease.holder,
            backend="none",
            nbytes=0,
            blocks=blocks,
            seconds=time.monotonic() - start,
            outcome=Outcome.NO_ROUTE,
            detail=reason,
        )

    def _count(self, name: str, more: int = 1) -> None:
        with self._lock:
            self._stats[name] = self._stats.get(name, 0) + more
