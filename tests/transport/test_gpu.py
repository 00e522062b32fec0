"""The conformance suite with arenas on a CUDA device: owner and reader in two processes, on either side or on
both. On one device UCX moves such blocks over cuda_ipc; between a device and main memory, over its staging
copies. Run by `make test-gpu`."""

from __future__ import annotations

import pytest

from tests.transport.conformance import Conformance
from tests.transport.conformance_parts import PartsConformance
from transport.nixl import probe

HAS_NIXL, WHY = probe()
pytestmark = [pytest.mark.gpu, pytest.mark.slow]
nixl = pytest.mark.skipif(not HAS_NIXL, reason=WHY)


@nixl
@pytest.mark.nixl
class TestNixlCuda(Conformance):
    backend = "nixl"
    owner_device = reader_device = "cuda"


@nixl
@pytest.mark.nixl
class TestNixlCudaParts(PartsConformance):
    backend = "nixl"
    owner_device = reader_device = "cuda"


@nixl
@pytest.mark.nixl
class TestNixlCudaInOneProcess(Conformance):
    backend = "nixl"
    remote = False
    owner_device = reader_device = "cuda"


@nixl
@pytest.mark.nixl
class TestNixlCudaToMainMemory(Conformance):
    backend = "nixl"
    owner_device = "cuda"


@nixl
@pytest.mark.nixl
class TestNixlMainMemoryToCuda(Conformance):
    backend = "nixl"
    reader_device = "cuda"


class TestTcpCuda(Conformance):
    """Sockets read and write main memory: every block is copied on both sides."""

    backend = "tcp"
    owner_device = reader_device = "cuda"


class TestTcpCudaParts(PartsConformance):
    backend = "tcp"
    owner_device = reader_device = "cuda"


class TestInProcessCuda(Conformance):
    backend = "inprocess"
    remote = False
    owner_device = reader_device = "cuda"
