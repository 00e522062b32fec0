"""The choice of a backend: best of both ends, with a reason, and every downgrade counted."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.transport.rigs import LocalOwner, make_lease, own_address
from transport import auto, shm, ucx_binding
from transport.arena import Arena
from transport.errors import TransportError
from transport.inprocess import InProcessTransport
from transport.nixl import probe
from transport.pulling import ReadFailed
from transport.settings import TransportSettings
from transport.tcp import TcpTransport
from transport.types import Outcome

HAS_NIXL, WHY = probe()
needs_nixl = pytest.mark.skipif(not HAS_NIXL, reason=WHY)
HAS_UCX, WHY_NO_UCX = ucx_binding.probe()
HAS_SHM, WHY_NO_SHM = shm.probe()
needs_ucx = pytest.mark.skipif(not HAS_UCX, reason=WHY_NO_UCX)


@pytest.fixture
def arena() -> Arena:
    return Arena(1 << 20, 1000)


@pytest.fixture
def tcp_owner() -> Iterator[LocalOwner]:
    side = LocalOwner("tcp", 1 << 20, 1000)
    yield side
    side.close()


def test_available_backends_tell_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = auto.available_backends()
    assert set(found) == {"shm", "nixl", "ucx", "tcp", "inprocess"}
    assert found["shm"] == (HAS_SHM, WHY_NO_SHM)
    assert found["ucx"] == (HAS_UCX, WHY_NO_UCX)
    assert found["tcp"] == (True, "plain sockets, always there")
    assert found["nixl"] == (HAS_NIXL, WHY)
    monkeypatch.setenv(auto.DISABLE_ENV, "nixl")
    assert auto.available_backends()["nixl"] == (False, "hidden by RELAY_DISABLE_BACKENDS")


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(
        TransportError, match="unknown transport backend 'rdma'; known: auto, inprocess, nixl"
    ):
        auto.make_transport(TransportSettings(backend="rdma"))  # type: ignore[arg-type]


def test_required_nixl_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auto.DISABLE_ENV, "nixl")
    with pytest.raises(TransportError, match="pip install nixl-cu12"):
        auto.make_transport(TransportSettings(backend="nixl"))


def test_auto_without_nixl_is_tcp(
    monkeypatch: pytest.MonkeyPatch, arena: Arena, tcp_owner: LocalOwner
) -> None:
    monkeypatch.setenv(auto.DISABLE_ENV, "shm,nixl,ucx")
    t = auto.make_transport(TransportSettings())
    t.register(arena)
    assert set(t.addresses()) == {"tcp"}
    both = replace(tcp_owner.owner, addresses={**tcp_owner.owner.addresses, "nixl": b"?"})
    name, reason = t.chosen(both)
    assert name == "tcp"
    assert "nixl missing here" in reason
    assert "pip install nixl-cu12" in reason
    t.close()


@needs_nixl
@pytest.mark.nixl
def test_auto_takes_nixl_where_both_have_it(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auto.DISABLE_ENV, "shm")
    side = LocalOwner("auto", 1 << 20, 1000)
    t = auto.make_transport(TransportSettings(), worker="reader")
    t.register(arena)
    try:
        assert set(side.owner.addresses) == {"nixl", "tcp"}, "ucx cannot listen on loopback only"
        assert t.chosen(side.owner) == ("nixl", "best backend of both ends")
        refs = side.publish(2, seed=1)
        transfer = t.pull(make_lease(side.owner, refs), arena.allocate(2), timeout_s=10)
        assert (transfer.outcome, transfer.backend) == (Outcome.PULLED, "nixl")
        assert t.stats()["downgrades"] == 0
    finally:
        t.close()
        side.close()


@needs_nixl
@pytest.mark.nixl
def test_downgrade_is_counted_and_logged_once(
    arena: Arena, tcp_owner: LocalOwner, caplog: pytest.LogCaptureFixture
) -> None:
    t = auto.make_transport(TransportSettings(), worker="reader")
    t.register(arena)
    refs = tcp_owner.publish(1, seed=1)
    into = arena.allocate(1)
    with caplog.at_level(logging.INFO, "transport.auto"):
        for _ in range(3):
            transfer = t.pull(make_lease(tcp_owner.owner, refs), into, timeout_s=10)
            assert (transfer.outcome, transfer.backend) == (Outcome.PULLED, "tcp")
    t.close()
    said = [r.getMessage() for r in caplog.records if "go over" in r.getMessage()]
    assert said == ["pulls from owner go over tcp: nixl missing at owner"]
    assert (t.stats()["downgrades"], t.stats()["pulls.tcp"]) == (3, 3)


def test_required_ucx_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(auto.DISABLE_ENV, "ucx")
    with pytest.raises(TransportError, match=r"pip install 'relay-cluster\[ucx\]'"):
        auto.make_transport(TransportSettings(backend="ucx"))


@pytest.mark.skipif(HAS_UCX, reason="ucxx is installed")
def test_ucx_that_is_not_installed_says_what_to_install(arena: Arena) -> None:
    with pytest.raises(TransportError, match=r"ucxx cannot be imported .*pip install 'relay-cluster\[ucx\]'"):
        auto.make_transport(TransportSettings(backend="ucx"))


@needs_ucx
@pytest.mark.ucx
def test_auto_takes_ucx_before_tcp_where_nixl_is_missing(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = own_address()
    if host is None:
        pytest.skip("this machine has no address but loopback")
    side = LocalOwner("auto", 1 << 20, 1000, host=host)
    monkeypatch.setenv(auto.DISABLE_ENV, "shm,nixl")
    t = auto.make_transport(TransportSettings(), worker="reader", host=host)
    t.register(arena)
    try:
        name, reason = t.chosen(side.owner)
        assert name == "ucx"
        assert ("nixl missing here" in reason) == HAS_NIXL
        refs = side.publish(2, seed=1)
        transfer = t.pull(make_lease(side.owner, refs), arena.allocate(2), timeout_s=10)
        assert (transfer.outcome, transfer.backend) == (Outcome.PULLED, "ucx")
        assert t.stats()["downgrades"] == int(HAS_NIXL)
    finally:
        t.close()
        side.close()


@needs_ucx
@pytest.mark.ucx
def test_loading_ucxx_leaves_the_environment_of_nixl_alone() -> None:
    """In a fresh process: UCX_RNDV_THRESH, which ucxx sets, would slow NIXL's shared memory down."""
    code = (
        "import os; before = dict(os.environ); from transport.ucx_binding import load_binding; "
        "b = load_binding(); assert dict(os.environ) == before, set(os.environ) ^ set(before); "
        "assert 'RNDV_THRESH' in b.config"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


class Broken(InProcessTransport):
    """A better backend whose wire is cut."""

    calls = 0

    def read(self, *args: Any) -> Any:
        self.calls += 1
        raise ReadFailed(Outcome.PEER_GONE, "wire cut")


def test_a_backend_that_does_not_reach_its_peer_is_passed_over(arena: Arena, tcp_owner: LocalOwner) -> None:
    broken = Broken()
    t = auto.AutoTransport([broken, TcpTransport()], {})
    t.register(arena)
    owner = replace(tcp_owner.owner, addresses={**tcp_owner.owner.addresses, "inprocess": b"x"})
    refs = tcp_owner.publish(1, seed=1)
    into = arena.allocate(1)
    for _ in range(2):
        transfer = t.pull(make_lease(owner, refs), into, timeout_s=10)
        assert (transfer.outcome, transfer.backend) == (Outcome.PULLED, "tcp")
    assert broken.calls == 1, "not asked again for a while"
    assert (t.stats()["fallbacks"], t.stats()["downgrades"]) == (1, 1)
    assert t.chosen(owner) == ("tcp", "inprocess passed over: peer_gone: wire cut")
    t.close()


class Dies(InProcessTransport):
    """A better backend that hands part 0 over, then loses its peer."""

    def read(self, *args: Any) -> Any:
        yield next(super().read(*args))
        raise ReadFailed(Outcome.PEER_GONE, "wire cut")


def test_no_second_backend_after_a_part_was_handed_over() -> None:
    """The next backend would write over bytes that may be in use."""
    parts = (400, 600)
    inner, other = (LocalOwner(name, 1 << 20, 1000, parts) for name in ("inprocess", "tcp"))
    arena = Arena(1 << 20, 1000, parts=parts)
    t = auto.AutoTransport([Dies(), TcpTransport()], {})
    t.register(arena)
    owner = replace(inner.owner, addresses={**inner.owner.addresses, **other.owner.addresses})
    refs = inner.publish(1, seed=1)
    handed: list[int] = []
    try:
        transfer = t.pull(make_lease(owner, refs), arena.allocate(1), timeout_s=10, on_part=handed.append)
        assert (transfer.outcome, transfer.backend, handed) == (Outcome.PEER_GONE, "inprocess", [0])
        assert t.stats()["fallbacks"] == 0
    finally:
        for side in (t, inner, other):
            side.close()


def test_no_common_backend_is_no_route(arena: Arena, tcp_owner: LocalOwner) -> None:
    t = auto.make_transport(TransportSettings(backend="inprocess"))
    t.register(arena)
    refs = tcp_owner.publish(1, seed=1)
    transfer = t.pull(make_lease(tcp_owner.owner, refs), arena.allocate(1), timeout_s=1)
    assert transfer.outcome is Outcome.NO_ROUTE
    assert "no common backend: owner has ['tcp'], we have ['inprocess']" in transfer.detail
    assert t.stats()["no_route"] == 1
    t.close()


def test_a_backend_that_does_not_start_is_left_out(arena: Arena) -> None:
    t = auto.AutoTransport([TcpTransport("203.0.113.1"), InProcessTransport()], {})
    t.register(arena)
    assert set(t.addresses()) == {"inprocess"}
    t.close()
    alone = auto.AutoTransport([TcpTransport("203.0.113.1")], {})
    with pytest.raises(TransportError, match="no transport backend came up"):
        alone.register(arena)
