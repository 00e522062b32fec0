"""An answer on its way to its caller: tokens as they are drawn, several at a time, and at last the reply.

Every item of a Ray stream costs about a millisecond at either end, whatever is in it. Knows neither Ray nor
the engine.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator

from workers.messages import Reply, Token


class Outbox:
    """Between the thread that decodes and the one that sends.

    Args:
        interval: so many tokens go together. The first one goes at once, for it is waited for; what lies here
            when the sender comes goes together in any case.
        timeout_s: longest wait for the next item.

    Attributes:
        ended: the reply or an error has been taken.
    """

    def __init__(self, interval: int, *, timeout_s: float) -> None:
        self._interval = interval
        self._timeout_s = timeout_s
        self._items: queue.SimpleQueue[Token | Reply | Exception] = queue.SimpleQueue()
        self.ended = False

    def put(self, token: Token) -> None:
        """From the thread that decodes."""
        self._items.put(token)

    def end(self, last: Reply | Exception) -> None:
        """From the same thread; nothing comes after it."""
        self._items.put(last)

    def take(self) -> Iterator[tuple[Token, ...] | Reply]:
        """What has come, for the thread that sends.

        Raises:
            queue.Empty: nothing came in time.
            Exception: what ended the answer, behind the tokens that were drawn before.
        """
        held: list[Token] = []
        enough = 1
        while True:
            item = self._items.get(timeout=self._timeout_s)
            last = not isinstance(item, Token)
            if not last:
                held.append(item)
            if held and (last or (len(held) >= enough and self._items.empty())):
                yield tuple(held)
                held.clear()
                enough = self._interval
            if isinstance(item, Reply):
                self.ended = True
                yield item
                return
            if isinstance(item, Exception):
                self.ended = True
                raise item
