"""Fixtures of the transport tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.transport.rigs import wait_for


@pytest.fixture(autouse=True, scope="module")
def _no_thread_is_left() -> Iterator[None]:
    """A transport or heartbeat that was not closed shows in the module that forgot it."""
    yield
    ours = lambda: [t.name for t in threading.enumerate() if t.name.startswith("relay-")]  # noqa: E731
    wait_for(lambda: not ours(), f"threads {ours()} end", 5)
