"""Follows requests and keeps their facts: an item that passes is only looked at, and what is raised is raised
on. Knows nothing of HTTP but the status that an error will have.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from relay_cluster.serving.errors import api_error
from relay_cluster.serving.recent import Entry, Recent, fill
from relay_cluster.serving.service import Ask, Finished
from transport.errors import CacheFull, DeadlineExceeded, WorkerLost
from workers.messages import Token

log = logging.getLogger(__name__)

_TOLD = (WorkerLost, DeadlineExceeded, CacheFull)
"""Errors whose words are ours alone; others may quote what a client sent."""


async def followed(
    recent: Recent, request_id: str, ask: Ask, source: AsyncGenerator[Token | Finished, None]
) -> AsyncGenerator[Token | Finished, None]:
    """The items of `source`, whose request is kept in `recent`. Close it when it is left early.

    Args:
        request_id: of the answer.
    """
    entry = recent.begin(request_id, ask)
    ended = False
    try:
        async with aclosing(source):
            async for item in source:
                if isinstance(item, Finished):
                    _finish(entry, item)
                    recent.end(request_id, entry, "ok")
                    ended = True
                elif entry.ttft_s is None:
                    entry.ttft_s = recent.clock() - entry.begun
                yield item
    except Exception as error:
        if not ended:
            _fail(entry, error)
            recent.end(request_id, entry, "error")
            ended = True
        raise
    finally:
        if not ended:  # the client went away, or the service stops
            recent.end(request_id, entry, "cancelled")


def _finish(entry: Entry, done: Finished) -> None:
    """A fault of the record is none of the answer."""
    try:
        fill(entry, done)
    except Exception:
        log.exception("the facts of a request could not be recorded", extra={"request": entry.id})


def _fail(entry: Entry, error: Exception) -> None:
    found = api_error(error)
    entry.status, entry.code = found.status, found.code or found.kind
    entry.detail = str(error) if isinstance(error, _TOLD) else ""
