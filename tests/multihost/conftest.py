"""Hosts, made once for all tests here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multihost.rig import ENVIRONMENT, Lan, RayOnHosts, in_private_network

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of several hosts run where they may make some, and nowhere else."""
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.multihost)
            if not in_private_network():
                item.add_marker(pytest.mark.skip(reason="run by `make test-multihost`, as root"))


@pytest.fixture(scope="session")
def lan() -> Iterator[Lan]:
    """Three hosts; this process is on the first one."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    with Lan(3) as lan:
        yield lan
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _cables_are_in(lan: Lan) -> Iterator[None]:
    """Whatever a test did to the network, the next one finds it whole and fast."""
    yield
    lan.restore()


@pytest.fixture(scope="session")
def nodes(lan: Lan) -> Iterator[RayOnHosts]:
    """A Ray node on every host. A test that ends a host starts it again."""
    with RayOnHosts(lan) as nodes:
        yield nodes
