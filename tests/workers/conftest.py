"""Fixtures for the workers room: tiny random models of every tried family, and the real embedded one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.workers import tiny
from tests.workers.rigs import Desk, load, two_desks
from workers.model import LoadedModel


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


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The embedded model."""
    return load()


@pytest.fixture
def pair(loaded: LoadedModel) -> Iterator[tuple[Desk, Desk]]:
    """Two workers of the embedded model; see `two_desks`."""
    with two_desks(loaded) as desks:
        yield desks
