"""Hostile bytes at every parser of what a network or a disk brings: typed errors, bounded memory and time.

`test_tcp_frames.py` has more on frames, `test_tokens.py` on tokens, `test_hostile_calls.py` on the directory.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transport.directory_rigs import segment
from tests.transport.hostile import SCALARS, VALUES
from tests.transport.rigs import LocalOwner, make_lease, wait_for
from transport import frames, tcp, tcp_server, ucx, ucx_binding, ucx_server
from transport.arena import HEADER_NBYTES, Arena
from transport.nixl_puller import Address
from transport.pulling import ReadFailed
from transport.spill_files import SpillDamaged, SpillFolder
from transport.types import BlockId, BlockRef, Incarnation, Lease, Outcome, WorkerId
from transport.ucx_binding import load_binding

HAS_UCX, WHY_NOT = ucx_binding.probe()

BYTES = st.binary(max_size=300) | VALUES.map(lambda v: bytes(msgpack.packb(v) or b""))


def tried(expected: Any, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """(what it returns, None), or (None, the expected error). Any other error is the test's."""
    try:
        return call(*arguments), None
    except expected as error:
        return None, error


# -- addresses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parse", [tcp._parse_address, ucx._parse_address], ids=["tcp", "ucx"])
@given(
    data=BYTES
    | st.fixed_dictionaries({"host": SCALARS, "port": SCALARS}).map(lambda v: bytes(msgpack.packb(v) or b""))
)
def test_any_address_is_one_or_no_route(parse: Callable[[bytes], Any], data: bytes) -> None:
    peer, failed = tried(ReadFailed, parse, data)
    if failed is not None:
        assert failed.outcome is Outcome.NO_ROUTE
        return
    assert isinstance(peer.host, str)
    assert 0 < peer.port < 1 << 16


GOOD = Address("w0.7.owner", b"metadata", 1 << 40, 4096, 64, "cpu", 0)


def test_a_nixl_address_survives() -> None:
    assert Address.unpack(GOOD.pack()) == GOOD


@given(
    BYTES
    | st.lists(SCALARS, max_size=9).map(lambda v: bytes(msgpack.packb(v) or b""))
    | st.tuples(st.integers(0, 7), SCALARS).map(
        lambda change: bytes(
            msgpack.packb([*msgpack.unpackb(GOOD.pack())[: change[0]], change[1],
                           *msgpack.unpackb(GOOD.pack())[change[0] + 1 :]]) or b""
        )
    )
)  # fmt: skip
def test_any_nixl_address_is_sound_or_no_route(data: bytes) -> None:
    """Descriptors are computed from it with numpy, which would raise where a number does not fit."""
    address, failed = tried(ReadFailed, Address.unpack, data)
    if failed is not None:
        assert failed.outcome is Outcome.NO_ROUTE
        return
    at = np.asarray([address.blocks], np.uint64) * np.uint64(address.stride) + np.uint64(address.base)
    assert int(at[0]) == address.base + address.stride * address.blocks


# -- frames ------------------------------------------------------------------------------------------------


@given(st.binary(max_size=100) | st.tuples(st.integers(0, 9), BYTES).map(
    lambda x: frames.FRAME.pack(frames.MAGIC, frames.SCHEMA, x[0] % 4, 0, len(x[1])) + x[1]
))  # fmt: skip
def test_any_ucx_message_is_a_frame_or_refused(data: bytes) -> None:
    frame, refused = tried(frames.FrameError, ucx_server.frame_of, bytearray(data))
    if refused is not None:
        assert refused.code == "malformed"
        return
    kind, body = frame
    assert kind in (frames.KIND_READ, frames.KIND_DATA, frames.KIND_REFUSED)
    assert all(isinstance(name, str) for name in body)


@given(st.integers(0, 9), st.dictionaries(st.sampled_from(["blocks", "code", "detail"]), VALUES))
def test_any_answer_is_the_wanted_one_or_an_error(kind: int, body: dict[str, Any]) -> None:
    """And what a hostile owner says reaches the log as one line of bounded length."""
    _, refused = tried((ReadFailed, frames.FrameError), frames.expect_data, kind, body, 3)
    if refused is not None:
        assert str(refused).isprintable()
        assert len(str(refused)) < 600
        return
    assert (kind, body["blocks"]) == (frames.KIND_DATA, 3)


def test_an_announced_body_is_not_allocated_before_it_is_judged() -> None:
    """The header announces 4 GiB: refused with a few kilobytes."""
    header = frames.FRAME.pack(frames.MAGIC, frames.SCHEMA, frames.KIND_READ, 0, 2**32 - 1)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(header)
        tracemalloc.start()
        try:
            with pytest.raises(frames.FrameError, match="exceeds the limit"):
                tcp_server.recv_frame(ours, time.monotonic() + 5)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_the_largest_request_is_parsed_in_bounded_memory_and_time() -> None:
    """Before anybody has shown a token. Time as processor time: the machine may be busy."""
    body = frames.encode(
        frames.KIND_READ,
        {
            "token": bytes(41), "space": "s" * 1024, "digest": b"", "holder": "", "incarnation": 1,
            "stride": 1, "leased": bytes(16 * frames.MAX_LEASED), "first": 0, "last": 1024, "start": 0,
            "stop": 1,
        },
    )[frames.FRAME.size :]  # fmt: skip
    assert len(body) <= frames.MAX_BODY
    tracemalloc.start()
    before = time.process_time()
    request = frames.parse_request(frames.decode_body(body))
    spent_s, peak = time.process_time() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(request.blocks) == 1024
    assert peak < 4 * frames.MAX_BODY
    assert spent_s < 1.0


# -- the header of a landed block --------------------------------------------------------------------------


@given(
    st.binary(min_size=HEADER_NBYTES, max_size=HEADER_NBYTES),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.lists(st.tuples(st.integers(0, HEADER_NBYTES - 1), st.integers(1, 255)), max_size=3),
    st.booleans(),
)
def test_any_header_is_judged_and_put_back(
    junk: bytes, number: int, generation: int, flips: list[tuple[int, int]], nearly: bool
) -> None:
    """Random ones, and right ones with a few bytes changed. Whatever landed, the block is ours after it."""
    arena = Arena(8 * 4096, 1000, incarnation=7)
    mine, theirs = arena.allocate(2)
    ref = arena.seal(theirs)
    header = bytearray(arena.outgoing(theirs, 0, HEADER_NBYTES) if nearly else junk)
    for at, flip in flips:
        header[at] ^= flip
    changed = bytes(header) != bytes(arena.outgoing(theirs, 0, HEADER_NBYTES))
    own = bytes(arena.outgoing(mine, 0, HEADER_NBYTES))
    arena.landing(mine, 0, HEADER_NBYTES)[:] = header
    verdict = arena.verify_header(mine, ref, 7)
    assert verdict in (Outcome.PULLED, Outcome.STALE, Outcome.CORRUPT, Outcome.LAYOUT_MISMATCH)
    if verdict is Outcome.PULLED:
        # The 16 bytes behind the fields mean nothing.
        assert bytes(header)[:48] == bytes(arena.outgoing(theirs, 0, 48)) or not changed
    assert bytes(arena.outgoing(mine, 0, HEADER_NBYTES)) == own
    hostile = BlockRef(BlockId(number), generation, 1000, (number,))
    assert arena.verify(mine, hostile, number) is not Outcome.PULLED or hostile.block == mine
    arena.free([mine, theirs])


# -- a hostile owner ---------------------------------------------------------------------------------------


class HostileOwner:
    """A server that answers each request with what it is told, whatever was asked."""

    def __init__(self, side: LocalOwner, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay-hostile", daemon=True)
        self._thread.start()
        port = self._listener.getsockname()[1]
        address = bytes(msgpack.packb({"host": "127.0.0.1", "port": port}) or b"")
        self.owner = replace(side.owner, addresses={"tcp": address})

    def _run(self) -> None:
        self._listener.settimeout(0.1)
        with ExitStack() as stack:
            while not self._stop.is_set():
                try:
                    sock, _ = self._listener.accept()
                except TimeoutError:
                    continue
                stack.enter_context(sock)
                sock.settimeout(2)
                try:
                    sock.recv(1 << 16)
                    self._answer(sock)
                except OSError:
                    continue

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)
        self._listener.close()


def _data(blocks: object) -> bytes:
    return frames.encode(frames.KIND_DATA, {"blocks": blocks})


def _garbage(seed: int) -> Callable[[socket.socket], None]:
    return lambda sock: sock.sendall(random.Random(seed).randbytes(5000))


def _trickle(sock: socket.socket) -> None:
    sock.sendall(_data(1))
    for _ in range(1000):
        sock.sendall(b"x")
        time.sleep(0.01)


def _one_frame(frame: bytes, *, hang_up: bool = True) -> Callable[[socket.socket], None]:
    def answer(sock: socket.socket) -> None:
        sock.sendall(frame)
        if hang_up:
            sock.shutdown(socket.SHUT_RDWR)

    return answer


ANSWERS: dict[str, tuple[Callable[[socket.socket], None], set[Outcome]]] = {
    **{f"garbage {n}": (_garbage(n), {Outcome.PEER_GONE}) for n in range(4)},
    "nothing": (lambda sock: sock.shutdown(socket.SHUT_RDWR), {Outcome.PEER_GONE}),
    "silence": (lambda sock: None, {Outcome.TIMED_OUT}),
    "slow": (_trickle, {Outcome.TIMED_OUT}),
    "bytes of the wrong block": (_one_frame(_data(1) + bytes(4096)), {Outcome.CORRUPT}),
    "too few bytes": (_one_frame(_data(1) + bytes(100)), {Outcome.PEER_GONE}),
    "another count": (_one_frame(_data(7)), {Outcome.PEER_GONE}),
    "no count": (_one_frame(_data([1, "x"])), {Outcome.PEER_GONE}),
    "a huge body": (
        _one_frame(frames.FRAME.pack(frames.MAGIC, frames.SCHEMA, frames.KIND_DATA, 0, 2**32 - 1)),
        {Outcome.PEER_GONE},
    ),
    "a strange refusal": (
        _one_frame(frames.encode(frames.KIND_REFUSED, {"code": ["x"] * 16, "detail": "a\nfake log line"})),
        {Outcome.PEER_GONE},
    ),
    "a request": (_one_frame(frames.encode(frames.KIND_READ, {})), {Outcome.PEER_GONE}),
}


@pytest.fixture(scope="module")
def honest() -> Iterator[LocalOwner]:
    side = LocalOwner("tcp", 64 * 4096, 1000)
    yield side
    side.close()


@pytest.mark.parametrize("name", list(ANSWERS))
def test_a_hostile_owner_costs_a_hit_and_no_more(
    honest: LocalOwner, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Every answer ends in a typed outcome within the deadline, and the reader goes on with an honest one."""
    answer, expected = ANSWERS[name]
    arena = Arena(64 * 4096, 1000)
    reader = tcp.TcpTransport()
    reader.register(arena)
    hostile = HostileOwner(honest, answer)
    try:
        refs = honest.publish(1, seed=1)
        into = arena.allocate(1)
        begin = time.monotonic()
        transfer = reader.pull(make_lease(hostile.owner, refs), into, timeout_s=0.7)
        assert transfer.outcome in expected, transfer
        assert time.monotonic() - begin < 5.0
        assert all("\n" not in record.getMessage() for record in caplog.records)
        if transfer.outcome is Outcome.TIMED_OUT:
            into = arena.allocate(1)
        assert reader.pull(make_lease(honest.owner, refs), into, timeout_s=10).outcome is Outcome.PULLED
    finally:
        reader.close()
        hostile.close()


# -- strangers at a live server ----------------------------------------------------------------------------


def connect(side: LocalOwner) -> socket.socket:
    address = frames.decode_body(side.owner.addresses["tcp"])
    return socket.create_connection((address["host"], address["port"]), timeout=5)


def serve_lease(side: LocalOwner) -> Lease:
    return make_lease(side.owner, side.publish(1, seed=1))


def test_a_flood_of_strangers_leaves_the_server_whole(
    honest: LocalOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 of them at once: random bytes, headers of huge bodies, half frames byte by byte, or nothing at all.
    Readers are served meanwhile, and afterwards no connection and no thread is left."""
    monkeypatch.setattr(tcp_server, "_STRANGER_TIMEOUT_S", 0.5)
    monkeypatch.setattr(tcp_server, "_FRAME_TIMEOUT_S", 0.5)
    draw = random.Random(5)
    arena = Arena(64 * 4096, 1000)
    reader = tcp.TcpTransport()
    reader.register(arena)
    lease = serve_lease(honest)
    into = arena.allocate(1)
    huge = frames.FRAME.pack(frames.MAGIC, frames.SCHEMA, frames.KIND_READ, 0, 2**32 - 1)
    half = frames.FRAME.pack(frames.MAGIC, frames.SCHEMA, frames.KIND_READ, 0, frames.MAX_BODY) + b"\x81"
    with ExitStack() as stack:
        for n in range(200):
            sock = stack.enter_context(connect(honest))
            sock.sendall(
                [draw.randbytes(draw.randint(1, 200)), huge, half[: draw.randint(1, 12)], half][n % 4]
            )
            if n % 50 == 49:
                assert reader.pull(lease, into, timeout_s=10).outcome is Outcome.PULLED
        backend = next(iter(honest.transport._backends.values()))
        assert isinstance(backend, tcp.TcpTransport)
        server = backend._server
        assert server is not None
        assert len(server._connections) <= tcp_server.MAX_CONNECTIONS
        # The reader's kept connection is the one that may stay.
        wait_for(lambda: len(server._connections) <= 1, "all strangers are gone, though they hang on", 10)
    ours = f"relay-tcp-{server.port}-conn"
    wait_for(lambda: sum(t.name == ours for t in threading.enumerate()) <= 1, "their threads end", 10)
    assert reader.pull(lease, into, timeout_s=10).outcome is Outcome.PULLED
    reader.close()


def test_a_frame_that_comes_byte_by_byte_is_cut_off(
    honest: LocalOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow loris: each byte comes well within any timeout of one receive; the frame as a whole does not."""
    monkeypatch.setattr(tcp_server, "_FRAME_TIMEOUT_S", 0.4)
    frame = frames.Asking(serve_lease(honest), honest.arena).encode((0, 1), 0, honest.arena.stride)
    with connect(honest) as sock:
        begin, sent = time.monotonic(), 0
        sock.settimeout(0.02)
        closed = False
        while not closed and time.monotonic() - begin < 10:
            try:
                sock.sendall(frame[sent : sent + 1])
                sent += 1
                closed = sock.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                closed = True
        assert closed
        assert sent < len(frame)


@pytest.mark.ucx
@pytest.mark.skipif(not HAS_UCX, reason=WHY_NOT)
def test_any_active_message_is_refused_and_the_ucx_server_lives() -> None:
    """Random bytes, headers that lie, requests without a ticket, and a request with a token of nobody."""
    side = LocalOwner("ucx", 64 * 4096, 1000)
    arena = Arena(64 * 4096, 1000)
    reader = ucx.UcxTransport()
    reader.register(arena)
    draw = random.Random(7)
    lease = serve_lease(side)
    stranger = replace(lease, token=bytes(41))
    asking = frames.Asking(stranger, side.arena)
    binding, peer = load_binding(), ucx._parse_address(side.owner.addresses["ucx"])
    messages = [
        *(draw.randbytes(draw.randint(1, 300)) for _ in range(4)),
        frames.FRAME.pack(frames.MAGIC, frames.SCHEMA, frames.KIND_READ, 0, 2**32 - 1),
        frames.encode(frames.KIND_READ, {"ticket": 1}),
        asking.encode((0, 1), 0, 64),
        asking.encode((0, 1), 0, 64, ticket=5),
    ]
    try:
        for message in messages:
            connection = ucx._Connection(binding, peer.host, peer.port, loopback=True)
            try:
                connection.ask(message, 5, None, 1, 0)
                with pytest.raises((ReadFailed, ConnectionError, binding.api.UCXError)) as refused:
                    connection.finish(time.monotonic() + 10)
                if message is messages[-1]:
                    assert isinstance(refused.value, ReadFailed)
                    assert refused.value.outcome is Outcome.REFUSED
            finally:
                connection.close()
            into = arena.allocate(1)
            assert reader.pull(lease, into, timeout_s=10).outcome is Outcome.PULLED
            arena.free(into)
    finally:
        reader.close()
        side.close()


# -- spill files -------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 255)), min_size=1, max_size=4),
    st.integers(1, 300),
)
@settings(max_examples=60, deadline=None)
def test_any_spill_file_is_what_was_written_or_damaged(
    tmp_path_factory: pytest.TempPathFactory, how: int, flips: list[tuple[int, int]], cut: int
) -> None:
    """Bytes flipped, cut off or put behind: never other payloads."""
    folder = SpillFolder(str(tmp_path_factory.mktemp("spill")), WorkerId("w0"), Incarnation(7))
    try:
        held = replace(segment(1, nbytes=64), blocks=(segment(1, nbytes=64).blocks[0],) * 2)
        payloads = [np.frombuffer(struct.pack("<8Q", *range(n, n + 8)), np.uint8) for n in range(2)]
        path = folder.write(held, payloads)
        whole = path.read_bytes()
        data = bytearray(whole)
        if how == 0:
            for at, flip in flips:
                data[at % len(data)] ^= flip
        elif how == 1:
            data = data[: max(0, len(data) - cut)]
        else:
            data += bytes(cut)
        Path(path).write_bytes(data)
        if bytes(data) == whole:  # flipped to and fro
            assert [p.tobytes() for p in folder.read(path, held)] == [p.tobytes() for p in payloads]
            return
        with pytest.raises(SpillDamaged):
            folder.read(path, held)
        assert path.stat().st_mode & 0o077 == 0, "nobody else may read it"
    finally:
        folder.close()
