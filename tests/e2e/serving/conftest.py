"""One service for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import environment
from tests.e2e.otlp import receiver
from tests.e2e.serving.live import Live, serving


@pytest.fixture(scope="package")
def live() -> Iterator[Live]:
    with environment(OTEL_BSP_SCHEDULE_DELAY="200"), receiver() as traces, serving(traces) as running:
        yield running
