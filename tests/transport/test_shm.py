"""What only the shm backend promises: who may read, that nobody may write, what an owner's death leaves."""

from __future__ import annotations

import gc
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transport.conformance import BLOCK, BUDGET, Reader
from tests.transport.rigs import LocalOwner, RemoteOwner, content, make_lease, wait_for
from transport import shm, shm_server
from transport.arena import Arena
from transport.auto import make_transport
from transport.errors import TransportError
from transport.faults import Faults
from transport.host import Host, this_host
from transport.pulling import ReadFailed
from transport.settings import TransportSettings
from transport.shm_server import ANSWER, HELLO, MAGIC, SCHEMA, abstract
from transport.types import Outcome, Owner

USABLE, WHY = shm.probe()
pytestmark = pytest.mark.skipif(not USABLE, reason=WHY)
PARTS = (BLOCK // 4,) * 4


@pytest.fixture
def side() -> Iterator[LocalOwner]:
    owner = LocalOwner("shm", BUDGET, BLOCK)
    yield owner
    owner.close()


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader("shm")
    yield reader
    reader.transport.close()


def descriptors() -> set[str]:
    """Files and sockets open in this process."""
    return {f"{fd.name} {os.readlink(fd)}" for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


def elsewhere(owner: Owner, **changes: Any) -> Owner:
    """The same owner, said to be on another host, namespace or user."""
    address = shm.Address.unpack(owner.addresses["shm"])
    moved = replace(address, host=replace(address.host, **changes))
    return replace(owner, addresses={**owner.addresses, "shm": moved.pack()})


# -- who may read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"boot": "00000000-0000-0000-0000-000000000000"}, "another host"),
        ({"network": "net:[1]"}, "another network namespace"),
        ({"uid": 4_000_000}, "another user"),
    ],
)
def test_auto_takes_the_next_backend_for_a_peer_elsewhere(
    change: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    side, arena = LocalOwner("auto", BUDGET, BLOCK), Arena(BUDGET, BLOCK)
    transport = make_transport(TransportSettings(), worker="reader")
    transport.register(arena)
    try:
        assert transport.chosen(side.owner) == ("shm", "both on this host")
        far, refs = elsewhere(side.owner, **change), side.publish(1, seed=1)
        name, reason = transport.chosen(far)
        assert name in ("nixl", "tcp")
        assert reason == f"best backend of both ends; shm: {why}"
        with caplog.at_level(logging.WARNING):
            transfer = transport.pull(make_lease(far, refs), arena.allocate(1), timeout_s=10)
        assert (transfer.outcome, transfer.backend) == (Outcome.PULLED, name)
        assert (transport.stats()["downgrades"], transport.stats()["fallbacks"]) == (0, 0)
        assert not caplog.records, "nothing is amiss"
    finally:
        transport.close()
        side.close()


def test_alone_it_says_that_the_peer_is_elsewhere(side: LocalOwner, reader: Reader) -> None:
    refs = side.publish(1, seed=1)
    far = elsewhere(side.owner, boot="b")
    transfer = reader.transport.pull(make_lease(far, refs), reader.arena.allocate(1), timeout_s=5)
    assert transfer.outcome is Outcome.NO_ROUTE
    assert "shm: another host" in transfer.detail


def test_wrong_token_gets_nothing(side: LocalOwner, reader: Reader) -> None:
    address = shm.Address.unpack(side.owner.addresses["shm"])
    forged = replace(address, token=b"\0" * 16).pack()
    refs = side.publish(1, seed=1)
    owner = replace(side.owner, addresses={"shm": forged})
    transfer = reader.transport.pull(make_lease(owner, refs), reader.arena.allocate(1), timeout_s=5)
    assert transfer.outcome is Outcome.PEER_GONE
    assert "wrong token" in transfer.detail
    assert reader.transport.stats()["shm.peers"] == 0


@pytest.mark.parametrize("said", [b"", b"x", b"x" * 500, HELLO.pack(b"RLYT", SCHEMA, 7, b"\0" * 16)])
def test_strangers_get_no_descriptor(side: LocalOwner, said: bytes) -> None:
    address = shm.Address.unpack(side.owner.addresses["shm"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(10)
        stranger.connect(abstract(address.name))
        stranger.send(said)
        answer, fds, _, _ = socket.recv_fds(stranger, 100, 4)
        assert fds == []
        assert len(answer) in (0, ANSWER.size)
        assert not stranger.recv(100), "and is shown out"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be someone else")
def test_another_user_is_refused_though_it_knows_the_token(side: LocalOwner) -> None:
    address = shm.Address.unpack(side.owner.addresses["shm"])
    child = os.fork()
    if child == 0:  # no more than system calls in here
        status = 1
        try:
            os.setuid(65534)
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stranger.settimeout(10)
            stranger.connect(abstract(address.name))
            try:
                stranger.send(HELLO.pack(MAGIC, SCHEMA, side.owner.incarnation, address.token))
                answer, fds, _, _ = socket.recv_fds(stranger, 100, 4)
            except (BrokenPipeError, ConnectionResetError):
                answer, fds = b"", []
            status = 0 if not fds and not answer else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@given(st.binary(max_size=200))
def test_any_address_is_read_or_refused(data: bytes) -> None:
    with pytest.raises(ReadFailed) as failed:
        shm.Address.unpack(data)
    assert failed.value.outcome is Outcome.NO_ROUTE


def test_address_survives_packing() -> None:
    address = shm.Address(this_host(), "relay-abc", b"t" * 16, 1088, 10)
    assert shm.Address.unpack(address.pack()) == address
    assert Host("b", "n", 1).apart(Host("b", "n", 1)) == ""


# -- what a reader can do ----------------------------------------------------------------------------------


def test_a_reader_cannot_write_into_the_arena_of_its_owner(side: LocalOwner) -> None:
    (ref,) = side.publish(1, seed=3)
    before = bytes(side.arena.outgoing(ref.block))
    fd = side.arena.shared_fd()
    assert fd is not None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    # Not even by opening it anew, which the file's mode would allow; nor can it be cut off.
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(again, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        for size in (0, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(again, size)
    finally:
        os.close(again)
    assert bytes(side.arena.outgoing(ref.block)) == before
    side.arena.payload(ref.block)[0] ^= 1  # the owner still can


# -- life of the memory ------------------------------------------------------------------------------------


def test_no_descriptor_is_left_behind(side: LocalOwner, reader: Reader) -> None:
    """Neither by readers, nor by owners that come and go, nor by refusals."""
    refs = side.publish(1, seed=1)
    assert reader.outcome(side, refs) is Outcome.PULLED
    before = descriptors()
    for _ in range(5):
        other = LocalOwner("shm", BUDGET, BLOCK)
        assert reader.outcome(other, other.publish(1, seed=2)) is Outcome.PULLED
        other.close()
        one_more = Reader("shm")
        assert one_more.outcome(side, refs) is Outcome.PULLED
        one_more.transport.close()
        del other, one_more
    wait_for(lambda: reader.transport.stats()["shm.peers"] == 1, "dead owners are let go")
    wait_for(lambda: descriptors() <= before, f"{descriptors() - before} is left")


def test_whoever_watches_a_server_that_closes_is_let_go(
    side: LocalOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked while its thread was busy, and closed before that had looked: only a cycle would be left, and
    with it the arena, until somebody collects garbage."""
    busy, done = threading.Event(), threading.Event()
    judge = shm_server.ShmServer._judge

    def slow(server: shm_server.ShmServer, said: bytes) -> int:
        busy.set()
        assert done.wait(10)
        return judge(server, said)

    def release(server: shm_server.ShmServer) -> None:
        wait_for(lambda: server._closing, "it closes")
        done.set()

    gc.disable()
    one_more = Reader("shm")
    try:
        monkeypatch.setattr(shm_server.ShmServer, "_judge", slow)
        fd = one_more.arena.shared_fd()
        assert fd is not None
        server = shm_server.ShmServer(one_more.arena, fd)
        kept = weakref.ref(server)
        here, there = socket.socketpair()
        with here, there, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
            guest.connect(abstract(server.name))
            guest.sendall(b"?")
            assert busy.wait(10)
            server.watch(here, partial(server.watch, here, print))  # as `Peers` does: it holds the server
            (releaser := threading.Thread(target=release, args=(server,))).start()
            server.close()
            releaser.join(10)
        del server, releaser
        assert kept() is None
    finally:
        gc.enable()
        one_more.transport.close()


def test_only_so_many_owners_are_kept(monkeypatch: pytest.MonkeyPatch, reader: Reader) -> None:
    monkeypatch.setattr(shm, "MAX_PEERS", 2)
    sides = [LocalOwner("shm", 1 << 20, BLOCK) for _ in range(4)]
    try:
        refs = [side.publish(1, seed=i) for i, side in enumerate(sides)]
        for at in (0, 1, 2, 3, 0, 0):
            assert reader.outcome(sides[at], refs[at]) is Outcome.PULLED
            wait_for(lambda: reader.transport.stats()["shm.peers"] <= 2, "the oldest is let go")
    finally:
        for side in sides:
            side.close()


def test_a_stopped_owner_is_read_all_the_same(reader: Reader) -> None:
    side = RemoteOwner("shm", BUDGET, BLOCK, {})
    try:
        refs = side.publish(2, seed=1)
        assert reader.outcome(side, refs) is Outcome.PULLED, "attached"
        side.signal(signal.SIGSTOP)
        assert reader.outcome(side, refs) is Outcome.PULLED
    finally:
        side.close()


def test_a_pull_outlives_its_owner_and_the_next_one_is_told() -> None:
    """The owner is killed after the first part: the rest is what it had sealed, and nothing else."""
    side, reader = RemoteOwner("shm", BUDGET, BLOCK, {}, PARTS), Reader("shm", parts=PARTS)
    try:
        refs = side.publish(3, seed=40)
        handed: list[int] = []

        def kill_at_the_first(part: int, _: Any) -> None:
            handed.append(part)
            if part == 0:
                side.kill()

        transfer, into = reader.pull(side, refs, on_part=kill_at_the_first)
        assert (transfer.outcome, handed) == (Outcome.PULLED, [0, 1, 2, 3])
        for at, block in enumerate(into):
            assert np.array_equal(reader.arena.payload(block).numpy(), content(BLOCK, 40 + at))
        reader.arena.free(into)
        wait_for(lambda: reader.transport.stats()["shm.peers"] == 0, "its memory is given back")
        assert reader.outcome(side, refs) is Outcome.PEER_GONE
    finally:
        reader.transport.close()
        side.close()


def test_closed_in_the_middle_of_a_pull() -> None:
    side, reader = LocalOwner("shm", BUDGET, BLOCK, PARTS), Reader("shm", parts=PARTS)
    refs = side.publish(1, seed=1)
    try:
        transfer, _ = reader.pull(side, refs, on_part=lambda *_: reader.transport.close())
        assert transfer.outcome is Outcome.PULLED
        assert reader.transport.stats()["shm.peers"] == 0
        assert reader.outcome(side, refs) is Outcome.NO_ROUTE
    finally:
        side.close()


# -- where it is not to be had -----------------------------------------------------------------------------


def test_without_shared_memory_the_others_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(BUDGET, BLOCK, shared=False)
    assert arena.shared_fd() is None
    transport = make_transport(TransportSettings(), worker="w")
    transport.register(arena)
    assert "shm" not in transport.addresses()
    transport.close()
    with pytest.raises(TransportError, match=r"transport\.shared_memory is false"):
        make_transport(TransportSettings(backend="shm", shared_memory=False))
    alone = make_transport(TransportSettings(backend="shm"))
    with pytest.raises(TransportError, match="cannot be shared"):
        alone.register(arena)


def test_a_system_without_memfd_has_ordinary_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    arena = Arena(BUDGET, BLOCK)
    assert arena.shared_fd() is None
    (block,) = arena.allocate(1)
    assert arena.verify(block, arena.seal(block), arena.incarnation) is Outcome.PULLED
    assert shm.probe() == (False, f"no sealed memfd: [Errno 38] {sys.platform} has no memfd")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(TransportError, match="darwin has no memfd"):
        shm.ShmTransport()


@pytest.mark.parametrize("injected", [False, True])
def test_a_copy_keeps_its_deadline(side: LocalOwner, monkeypatch: pytest.MonkeyPatch, injected: bool) -> None:
    """The deadline passes between two steps: the rest is not copied, and the blocks are free again."""
    reader = Reader("shm")
    if injected:  # faults come between the copy and its verification, and all copies are made in one thread
        reader.arena.faults = Faults()
    try:
        refs = side.publish(50, seed=1)
        fetch = shm._fetch

        def slow(*args: Any) -> None:
            time.sleep(0.15)  # two of four steps, in two threads, end before the deadline of 0.2 s
            fetch(*args)

        assert reader.outcome(side, refs) is Outcome.PULLED, "attached"
        monkeypatch.setattr(shm, "_fetch", slow)
        assert reader.outcome(side, refs, timeout_s=0.2) is Outcome.TIMED_OUT
        stats = reader.arena.stats()
        assert (stats.used, stats.quarantined) == (0, 0)
    finally:
        reader.transport.close()
