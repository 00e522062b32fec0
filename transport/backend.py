"""What all single backends share: the guards around `register`, `address` and `pull`.

A backend starts itself for an arena (`_start`), names its address (`_address`), and moves bytes (`read`);
`pulling` makes a pull of that. This module does not know how bytes travel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from transport.arena import Arena
from transport.errors import TransportError
from transport.pulling import OnPart, ReadFailed, Reading, run_pull
from transport.types import BlockId, Lease, Outcome, Owner, Transfer


class Backend(ABC):
    """One way to move blocks, between one arena and those of peers. A `transport.base.Transport`."""

    name: str
    """Key in `Owner.addresses`, and value of `transport.backend`."""
    _arena: Arena | None = None

    def register(self, arena: Arena) -> None:
        """Make the arena readable by peers.

        Raises:
            TransportError: the backend does not come up here, or an arena is registered already.
        """
        if self._arena is not None:
            raise TransportError(f"{self.name}: register() was called twice; use one transport per arena.")
        self._start(arena)
        self._arena = arena

    def address(self) -> bytes:
        """What a peer's `pull` needs; opaque outside the backend.

        Raises:
            TransportError: no arena is registered.
        """
        if self._arena is None:
            raise TransportError(
                f"{self.name}: address() before register(). Register the worker's arena first."
            )
        return self._address()

    def pull(
        self,
        lease: Lease,
        into: Sequence[BlockId],
        *,
        timeout_s: float,
        lease_deadline: float | None = None,
        on_part: OnPart | None = None,
    ) -> Transfer:
        """See `transport.base.Transport.pull`.

        Raises:
            TransportError: no arena is registered.
        """
        if self._arena is None:
            raise TransportError(f"{self.name}: pull() before register(). Register the worker's arena first.")
        return run_pull(
            self.name,
            self._arena,
            lease,
            into,
            self.read,
            timeout_s=timeout_s,
            lease_deadline=lease_deadline,
            on_part=on_part,
        )

    def out_of_reach(self, owner: Owner) -> str:
        """Why this backend is not made for pulls from `owner`, though both ends have it; empty when it is.
        Told without asking the peer."""
        return ""

    def stats(self) -> dict[str, int]:
        """Counts since the start."""
        return {}

    @abstractmethod
    def read(self, lease: Lease, into: Sequence[BlockId], deadline: float) -> Reading:
        """Move bytes without verifying them: see `transport.pulling.Read`."""

    @abstractmethod
    def close(self) -> None:
        """Stop threads and sockets. Idempotent."""

    @abstractmethod
    def _start(self, arena: Arena) -> None:
        """Serve this arena. Raises TransportError: not here."""

    @abstractmethod
    def _address(self) -> bytes:
        """The address, once started."""

    def _ends(self, lease: Lease) -> tuple[Arena, bytes]:
        """Our arena and the owner's address.

        Raises:
            ReadFailed: NO_ROUTE: the owner has no address for this backend.
        """
        owner = lease.located.owner
        address = owner.addresses.get(self.name)
        if address is None or self._arena is None:
            raise ReadFailed(Outcome.NO_ROUTE, f"{owner.worker} has no {self.name} address.")
        return self._arena, address
