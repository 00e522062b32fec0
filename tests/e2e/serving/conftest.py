"""One service for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.serving.live import Live, serving


@pytest.fixture(scope="package")
def live() -> Iterator[Live]:
    with serving() as running:
        yield running
