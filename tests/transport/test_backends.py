"""The conformance suite over every backend, with the owner in a process of its own and in this one."""

from __future__ import annotations

import pytest

from tests.transport.conformance import Conformance, RemoteConformance
from tests.transport.conformance_parts import PartsConformance, RemotePartsConformance
from transport import shm as shm_backend
from transport import ucx_binding
from transport.nixl import probe

HAS_NIXL, WHY = probe()
nixl = pytest.mark.skipif(not HAS_NIXL, reason=WHY)
HAS_UCX, WHY_NOT = ucx_binding.probe()
ucx = pytest.mark.skipif(not HAS_UCX, reason=WHY_NOT)
HAS_SHM, WHY_NO_SHM = shm_backend.probe()
shm = pytest.mark.skipif(not HAS_SHM, reason=WHY_NO_SHM)


class TestInProcess(Conformance):
    backend = "inprocess"
    remote = False


class TestInProcessParts(PartsConformance):
    backend = "inprocess"
    remote = False


class TestTcp(RemoteConformance):
    backend = "tcp"


class TestTcpParts(RemotePartsConformance):
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
class TestNixlTcpParts(RemotePartsConformance):
    backend = "nixl"
    env = {"UCX_TLS": "tcp"}  # noqa: RUF012 - ClassVar in the base

    @pytest.fixture(autouse=True)
    def _only_tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")


@ucx
@pytest.mark.ucx
class TestUcxSharedMemory(RemoteConformance):
    """Whatever UCX chooses between processes of one machine; the owner takes part in each read."""

    backend = "ucx"


@ucx
@pytest.mark.ucx
class TestUcxTcpParts(RemotePartsConformance):
    backend = "ucx"
    env = {"UCX_TLS": "tcp"}  # noqa: RUF012 - ClassVar in the base

    @pytest.fixture(autouse=True)
    def _only_tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")


@ucx
@pytest.mark.ucx
class TestUcxTcp(RemoteConformance):
    backend = "ucx"
    env = {"UCX_TLS": "tcp"}  # noqa: RUF012 - ClassVar in the base

    @pytest.fixture(autouse=True)
    def _only_tcp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")


class TestTcpInOneProcess(Conformance):
    backend = "tcp"
    remote = False


@nixl
@pytest.mark.nixl
class TestNixlInOneProcess(Conformance):
    backend = "nixl"
    remote = False


@ucx
@pytest.mark.ucx
class TestUcxInOneProcess(Conformance):
    backend = "ucx"
    remote = False


@shm
class TestShm(RemoteConformance):
    """A stopped owner stalls the first pull; see `test_shm` for those that have its memory already."""

    backend = "shm"


@shm
class TestShmParts(PartsConformance):
    backend = "shm"


@shm
class TestShmInOneProcess(Conformance):
    backend = "shm"
    remote = False


@shm
class TestShmPartsInOneProcess(PartsConformance):
    backend = "shm"
    remote = False
