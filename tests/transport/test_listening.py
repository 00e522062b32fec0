"""What listens where: on loopback unless the worker was given another address."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from tests.transport.rigs import own_address
from transport import ucx_binding
from transport.arena import Arena
from transport.auto import AutoTransport, make_transport
from transport.loopback import is_loopback
from transport.nixl import probe
from transport.settings import TransportSettings

HAS_NIXL, WHY = probe()
HAS_UCX, WHY_NOT = ucx_binding.probe()
OWN = own_address()
needs_own = pytest.mark.skipif(OWN is None, reason="this machine has no address but loopback")
nixl = pytest.param("nixl", marks=[pytest.mark.nixl, pytest.mark.skipif(not HAS_NIXL, reason=WHY)])
ucx = pytest.param("ucx", marks=[pytest.mark.ucx, pytest.mark.skipif(not HAS_UCX, reason=WHY_NOT)])


def listening() -> set[tuple[str, int]]:
    """(address, port) of every TCP socket of this process that takes connections."""
    found = psutil.Process().net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN}


@contextmanager
def started(backend: str, host: str, bind_host: str = "auto") -> Iterator[tuple[AutoTransport, set[str]]]:
    """A transport, and the addresses on which it has begun to listen."""
    settings = TransportSettings(backend=backend, bind_host=bind_host)  # type: ignore[arg-type]
    before = listening()
    transport = make_transport(settings, worker="w", host=host)
    transport.register(Arena(1 << 20, 1000))
    try:
        yield transport, {address for address, _ in listening() - before}
    finally:
        transport.close()


@pytest.mark.parametrize("backend", ["tcp", nixl, "auto", "inprocess"])
def test_a_worker_on_loopback_listens_on_loopback(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX takes every device that it finds unless it is told: nixl and auto show whether it was."""
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with started(backend, "127.0.0.1") as (_, addresses):
        assert all(is_loopback(address) for address in addresses), addresses
        assert bool(addresses) == (backend != "inprocess")


@needs_own
@pytest.mark.parametrize("backend", ["tcp", nixl])
def test_it_listens_further_where_it_was_told_to(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other half of the proof: the test above would see an open port."""
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    with started(backend, str(OWN)) as (_, addresses):
        assert OWN in addresses
        assert "0.0.0.0" not in addresses
    if backend == "tcp":
        with started("tcp", str(OWN), bind_host="127.0.0.1") as (_, addresses):
            assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize("backend", [ucx])
def test_ucx_listens_everywhere_and_is_only_taken_when_asked_for(backend: str) -> None:
    """What its binding cannot do is known, and kept out of what is chosen by itself."""
    with started(backend, "127.0.0.1") as (_, addresses):
        assert "0.0.0.0" in addresses
    with started("auto", "127.0.0.1") as (transport, addresses):
        assert "ucx" not in transport.addresses()
        assert "0.0.0.0" not in addresses


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.77.0.1", False),
        ("127.0.0.1.example.org", False),
        ("", False),
    ],
)
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
