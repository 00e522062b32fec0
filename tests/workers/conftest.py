"""Fixtures for the workers room: tiny random models of every tried family, and the real embedded one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.workers import tiny

if not torch.cuda.is_available():
    # Without a device Triton's kernels are interpreted. Triton decides that at its first import.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=sorted(tiny.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny operators on several threads cost more in barriers than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
