"""Directory calls that get lost or come late, for tests; see `transport/faults.py`.

It wraps the way to the shards (`Calls`), so the client under test is the real one. It does not know what a
call means.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from transport.directory.fleet import Calls, RayCalls, ShardFailed
from transport.faults import FaultKind, Faults


@dataclass(frozen=True, slots=True)
class _Pending:
    """A call under way. inner: None when the shard never hears of it."""

    inner: Any
    lost: bool = False
    delay_s: float = 0.0


class FaultyCalls:
    """`Calls` that meet DIRECTORY_DROP and DIRECTORY_DELAY."""

    def __init__(self, inner: Calls, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    def find(self, name: str) -> Any:
        """The shard of that name. Raises ShardFailed."""
        return self._inner.find(name)

    def send(self, shard: Any, method: str, request: bytes) -> Any:
        """Start a call; a lost one is not sent, unless only its reply is to be lost."""
        if drop := self._faults.take(FaultKind.DIRECTORY_DROP, method):
            return _Pending(self._inner.send(shard, method, request) if drop.reply else None, lost=True)
        delay = self._faults.take(FaultKind.DIRECTORY_DELAY, method)
        late_s = delay.delay_ms / 1e3 if delay else 0.0
        return _Pending(self._inner.send(shard, method, request), delay_s=late_s)

    def wait(self, pending: Any, timeout_s: float) -> bytes:
        """The call's reply.

        Raises:
            ShardFailed: it was lost, or came too late: as over a bad network, after the whole deadline.
        """
        begin = time.monotonic()
        if pending.lost or (pending.delay_s and pending.delay_s > timeout_s):
            time.sleep(max(0.0, timeout_s))
            raise ShardFailed("no reply within the deadline (injected)")
        if pending.delay_s:
            time.sleep(pending.delay_s)
        return self._inner.wait(pending.inner, timeout_s - (time.monotonic() - begin))


def worker_calls(faults: Faults | None) -> Calls:
    """A worker's way to the shards: plain Ray unless there are faults."""
    return RayCalls() if faults is None else FaultyCalls(RayCalls(), faults)
