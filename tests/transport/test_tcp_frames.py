"""Hostile bytes at the tcp backend: typed refusals, bounded memory, and the server lives on."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.rigs import LocalOwner, make_lease, wait_for
from transport import frames, tcp, tcp_server
from transport.arena import Arena
from transport.types import Lease, Outcome

NUMBERS = st.integers(-1, 5) | st.integers(-(2**63), 2**64 - 1) | st.none() | st.booleans()
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


@given(st.binary(min_size=frames.FRAME.size, max_size=frames.FRAME.size))
def test_any_header_is_refused_or_bounded(data: bytes) -> None:
    try:
        kind, nbytes = frames.decode_header(data)
    except frames.FrameError:
        return
    assert kind in (1, 2, 3)
    assert nbytes <= frames.MAX_BODY


@given(st.binary(max_size=300) | VALUES.map(lambda v: msgpack.packb(v)))
def test_any_body_is_a_map_or_refused(data: bytes) -> None:
    try:
        body = frames.decode_body(data)
    except frames.FrameError:
        return
    assert all(isinstance(k, str) for k in body)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "token": SCALARS | st.binary(),
            "space": SCALARS | st.text(),
            "digest": SCALARS | st.binary(),
            "holder": SCALARS | st.text(),
            "incarnation": NUMBERS,
            "stride": NUMBERS,
            "start": NUMBERS,
            "stop": NUMBERS,
            "first": NUMBERS,
            "last": NUMBERS,
            "leased": VALUES | st.integers(0, 5).map(lambda n: bytes(16 * n)),
        },
    )
)
def test_any_request_is_parsed_or_refused(body: dict[str, Any]) -> None:
    try:
        request = frames.parse_request(body)
    except frames.FrameError:
        return
    assert 0 < len(request.blocks) <= frames.MAX_BLOCKS
    assert 0 <= request.start <= request.stop <= request.stride
    assert all(0 <= x < 2**64 for pair in request.blocks for x in pair)


REQUEST = {
    "token": b"",
    "space": "s",
    "digest": b"d",
    "holder": "w",
    "incarnation": 7,
    "stride": 64,
    "start": 0,
    "stop": 64,
    "first": 1,
    "last": 3,
    "leased": bytes(16 * 4),
}


def test_a_request_is_parsed() -> None:
    request = frames.parse_request(REQUEST)
    assert (request.blocks, request.claim.space, request.claim.holder) == (((0, 0), (0, 0)), "s", "w")
    assert frames.decode_body(frames.encode(frames.KIND_READ, REQUEST)[frames.FRAME.size :]) == REQUEST


@pytest.mark.parametrize("missing", list(REQUEST))
def test_every_field_of_a_request_is_needed(missing: str) -> None:
    for other in ({}, {missing: None}, {missing: True}, {missing: [1]}):
        body = {k: v for k, v in REQUEST.items() if k != missing} | other
        with pytest.raises(frames.FrameError):
            frames.parse_request(body)


@pytest.mark.parametrize(
    "other",
    [
        {"first": 3},  # empty
        {"first": 4, "last": 3},
        {"last": 5},  # behind what is leased
        {"leased": bytes(63)},  # not whole blocks
        {"leased": b""},
        {"start": 65, "stop": 65},
        {"start": 2, "stop": 1},
        {"incarnation": -1},
        {"leased": bytes(16 * 2000), "first": 0, "last": 1025},  # more than one request may name
    ],
)
def test_only_leased_blocks_can_be_named(other: dict[str, Any]) -> None:
    with pytest.raises(frames.FrameError) as refused:
        frames.parse_request({**REQUEST, **other})
    assert refused.value.code == "malformed"


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (struct.pack("<4sBBHI", b"HTTP", frames.SCHEMA, 1, 0, 0), "not a relay_cluster peer"),
        (struct.pack("<4sBBHI", frames.MAGIC, 9, 1, 0, 0), f"schema 9, ours is {frames.SCHEMA}"),
        (struct.pack("<4sBBHI", frames.MAGIC, frames.SCHEMA, 7, 0, 0), "unknown frame kind 7"),
        (struct.pack("<4sBBHI", frames.MAGIC, frames.SCHEMA, 1, 0, 2**31), "exceeds the limit"),
    ],
)
def test_refusals_say_what_is_wrong(header: bytes, why: str) -> None:
    with pytest.raises(frames.FrameError, match=why):
        frames.decode_header(header)


def test_msgpack_bombs_are_refused() -> None:
    for bomb in (
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ):
        with pytest.raises(frames.FrameError, match="msgpack"):
            frames.decode_body(bomb)


@pytest.fixture
def server() -> Iterator[LocalOwner]:
    side = LocalOwner("tcp", 64 * 4096, 1000)
    yield side
    side.close()


def connect(server: LocalOwner) -> socket.socket:
    address = frames.decode_body(server.owner.addresses["tcp"])
    return socket.create_connection((address["host"], address["port"]), timeout=5)


def still_serves(server: LocalOwner) -> bool:
    arena = Arena(64 * 4096, 1000)
    reader = tcp.TcpTransport()
    reader.register(arena)
    refs = server.publish(1, seed=1)
    outcome = reader.pull(make_lease(server.owner, refs), arena.allocate(1), timeout_s=5).outcome
    reader.close()
    server.free(refs)
    return outcome is Outcome.PULLED


@given(data=st.binary(min_size=1, max_size=64))
@settings(max_examples=25, deadline=None)
def test_server_answers_garbage_with_a_refusal_and_lives(shared_server: LocalOwner, data: bytes) -> None:
    sock = connect(shared_server)
    with sock:
        sock.sendall(data)
        with contextlib.suppress(OSError):  # refused and closed already
            sock.shutdown(socket.SHUT_WR)
        try:
            kind, body = tcp_server.recv_frame(sock, time.monotonic() + 5)
        except ConnectionError:
            return  # less than a header, or a reset: closed without a word
        assert (kind, body["code"]) == (frames.KIND_REFUSED, "malformed")


@pytest.fixture(scope="module")
def shared_server() -> Iterator[LocalOwner]:
    side = LocalOwner("tcp", 64 * 4096, 1000)
    yield side
    assert still_serves(side)
    side.close()


def ask_for(server: LocalOwner, lease: Lease) -> bytes:
    """A READ frame for all that is leased."""
    asking = frames.Asking(lease, server.arena)
    return asking.encode((0, len(lease.located.segment.blocks)), 0, server.arena.stride)


def test_wrong_token_is_refused_and_disconnected(server: LocalOwner) -> None:
    sock = connect(server)
    lease = make_lease(server.owner, server.publish(1, seed=1))
    with sock:
        sock.sendall(ask_for(server, replace(lease, token=b"guess")))
        kind, body = tcp_server.recv_frame(sock, time.monotonic() + 5)
        assert (kind, body["code"]) == (frames.KIND_REFUSED, "token")
        assert sock.recv(1) == b""
    assert still_serves(server)


def test_owner_refuses_stale_generations_before_sending_a_byte(server: LocalOwner) -> None:
    sock = connect(server)
    refs = server.publish(1, seed=1)
    lease = make_lease(server.owner, [replace(refs[0], generation=refs[0].generation + 1)])
    with sock:
        for _ in range(2):  # the connection stays good for the next request
            sock.sendall(ask_for(server, lease))
            kind, body = tcp_server.recv_frame(sock, time.monotonic() + 5)
            assert (kind, body["code"]) == (frames.KIND_REFUSED, "stale")


def test_connections_are_bounded(server: LocalOwner) -> None:
    lease = make_lease(server.owner, server.publish(1, seed=1))
    socks = [connect(server) for _ in range(tcp_server.MAX_CONNECTIONS)]
    try:
        for sock in socks:
            sock.sendall(ask_for(server, lease))
            assert tcp_server.recv_frame(sock, time.monotonic() + 5)[0] == frames.KIND_DATA
        extra = connect(server)
        with extra:
            kind, body = tcp_server.recv_frame(extra, time.monotonic() + 5)
            assert (kind, body["code"]) == (frames.KIND_REFUSED, "busy")
    finally:
        for sock in socks:
            sock.close()
    wait_for(lambda: still_serves(server), "the slots are free again")


def test_strangers_do_not_keep_readers_out(server: LocalOwner) -> None:
    """All places are taken by connections that say nothing: the one that came first makes room."""
    strangers = [connect(server) for _ in range(tcp_server.MAX_CONNECTIONS)]
    try:
        assert still_serves(server)
        strangers[0].settimeout(5)
        assert strangers[0].recv(1) == b"", "hung up on"
        strangers[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            strangers[-1].recv(1)
    finally:
        for sock in strangers:
            sock.close()


def test_a_stranger_that_says_nothing_is_hung_up_on(
    server: LocalOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "_STRANGER_TIMEOUT_S", 0.2)
    lease = make_lease(server.owner, server.publish(1, seed=1))
    with connect(server) as silent, connect(server) as reader:
        reader.sendall(ask_for(server, lease))
        assert tcp_server.recv_frame(reader, time.monotonic() + 5)[0] == frames.KIND_DATA
        tcp_server.recv_exact(reader, memoryview(bytearray(server.arena.stride)), time.monotonic() + 5)
        silent.settimeout(5)
        assert silent.recv(1) == b""
        reader.sendall(ask_for(server, lease))  # who has shown a token may stay silent for longer
        assert tcp_server.recv_frame(reader, time.monotonic() + 5)[0] == frames.KIND_DATA


def test_a_half_sent_request_is_dropped_after_its_deadline(
    server: LocalOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "_FRAME_TIMEOUT_S", 0.2)
    sock = connect(server)
    with sock:
        sock.sendall(frames.MAGIC)
        sock.settimeout(5)
        assert sock.recv(1) == b""


def test_kept_connections_survive_a_server_that_hung_up(
    server: LocalOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "_IDLE_TIMEOUT_S", 0.05)
    arena = Arena(64 * 4096, 1000)
    reader = tcp.TcpTransport()
    reader.register(arena)
    refs = server.publish(1, seed=1)
    into = arena.allocate(1)
    for _ in range(3):
        assert reader.pull(make_lease(server.owner, refs), into, timeout_s=5).outcome is Outcome.PULLED
        (backend,) = server.transport._backends.values()
        assert isinstance(backend, tcp.TcpTransport)
        inner = backend._server
        assert inner is not None
        wait_for(lambda inner=inner: not inner._connections, "the server hangs up")
    reader.close()
