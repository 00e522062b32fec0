"""One worker of a standing cluster, through its replacements: an actor of the same name takes its place when
it is restarted, while we hold a handle of the old one.

      here --leave()--> away --back()--> here
                         |
                         '-- nobody of that name for a while: gone (and back() may still find one)

Never blocks. Knows nothing of requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import ray
from ray.exceptions import RayError

from transport.errors import RelayError
from workers.actor import WorkerInfo

_ASK_AGAIN_S: Final = 0.3
_GONE_S: Final = 15.0
"""A name that nobody has for so long is not being taken over."""


def _answered(call: Any) -> bool:
    return bool(ray.wait([call], timeout=0, fetch_local=False)[0])


class Follower:
    """Follows one worker. Not thread-safe by itself: the worst of a race is one more question.

    Args:
        find: the actor of that name now. Raises ValueError when there is none.
    """

    def __init__(
        self,
        find: Callable[[], Any],
        *,
        answered: Callable[[Any], bool] = _answered,
        fetch: Callable[[Any], Any] = ray.get,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._find = find
        self._answered = answered
        self._fetch = fetch
        self._clock = clock
        self._asked: Any = None
        self._again_at = 0.0
        self._nobody_since: float | None = None
        self.handle: Any = None
        self.info: WorkerInfo | None = None
        self.away = True

    def leave(self) -> None:
        """It refuses requests, or its process has died."""
        if not self.away:
            self.away, self._again_at = True, 0.0

    @property
    def gone(self) -> bool:
        """Whether nobody has taken its place for a while."""
        since = self._nobody_since
        return self.away and since is not None and self._clock() - since > _GONE_S

    def back(self) -> bool:
        """Whether it takes requests; `handle` and `info` are then those of who does."""
        if not self.away:
            return True
        if self._asked is None:
            self._ask()
        asked = self._asked
        if asked is None or not self._answered(asked):
            return False
        self._asked, self._again_at = None, self._clock() + _ASK_AGAIN_S
        try:
            self.info = self._fetch(asked)
        except (RayError, RelayError):  # it died, or could not start
            self._nobody()
            return False
        self._nobody_since = None
        self.away = self.info is None
        return not self.away

    def _ask(self) -> None:
        now = self._clock()
        if now < self._again_at:
            return
        self._again_at = now + _ASK_AGAIN_S
        try:
            self.handle = self._find()
        except ValueError:
            self._nobody()
            return
        self._asked = self.handle.accepting.remote()

    def _nobody(self) -> None:
        if self._nobody_since is None:
            self._nobody_since = self._clock()
