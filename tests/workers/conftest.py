"""Fixtures for the workers room: tiny random models of every tried family, and the real embedded one."""

from __future__ import annotations

import pytest
import torch

from tests.workers import tiny


@pytest.fixture(params=sorted(tiny.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
