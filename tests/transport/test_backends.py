"""The conformance suite over every backend. Owners of tcp and nixl live in a process of their own."""

from __future__ import annotations

import pytest

from tests.transport.conformance import Conformance, PartsConformance, RemoteConformance
from transport.nixl import probe

HAS_NIXL, WHY = probe()
nixl = pytest.mark.skipif(not HAS_NIXL, reason=WHY)


class TestInProcess(Conformance):
    backend = "inprocess"
    remote = False


class TestInProcessParts(PartsConformance):
    backend = "inprocess"
    remote = False


class TestTcp(RemoteConformance):
    backend = "tcp"


class TestTcpParts(PartsConformance):
    backend = "tcp"


@nixl
@pytest.mark.nixl
class TestNixlSharedMemory(Conformance):
    """Whatever UCX chooses between processes of one machine."""

    backend = "nixl"


@nixl
@pytest.mark.nixl
class TestNixlTcp(RemoteConformance):
    """UCX over sockets, where the owner must take part in each read: a stopped one stalls it."""

    backend = "nixl"
    env = {"UCX_TLS": "tcp"}  # noqa: RUF012 - ClassVar in the base

    @pytest.fixture(autouse=True)
    def _only_tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")


@nixl
@pytest.mark.nixl
class TestNixlSharedMemoryParts(PartsConformance):
    backend = "nixl"


@nixl
@pytest.mark.nixl
class TestNixlTcpParts(PartsConformance):
    backend = "nixl"
    env = {"UCX_TLS": "tcp"}  # noqa: RUF012 - ClassVar in the base

    @pytest.fixture(autouse=True)
    def _only_tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")
