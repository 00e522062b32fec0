"""Frames of the backends that speak themselves (tcp, ucx): a reader asks, an owner answers.

A frame is a fixed binary header, then a msgpack body of bounded size; there is no pickle. The bytes of blocks
follow a DATA frame as they are. Everything here is pure: no sockets, no clock.

    reader                                    owner
      READ token, what is leased, range ---->   may it be read? (`admit`)
                                      <----   DATA, then the range of every block; or REFUSED and why

Every request carries the whole lease, so that the owner need not remember who has shown which token: a kept
connection has no rights of its own. An empty byte range only asks whether the blocks still are the leased
ones.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgpack

from transport.arena import Arena
from transport.pulling import ReadFailed
from transport.tokens import (
    BLOCK_BYTES,
    Claim,
    TokenRefused,
    check_token,
    digest_of,
    pack_blocks,
    unpack_blocks,
)
from transport.types import BlockId, Lease, Outcome

T = TypeVar("T")

SCHEMA: Final = 3
MAX_LEASED: Final = 32_768
"""Blocks of one lease."""
MAX_BODY: Final = MAX_LEASED * BLOCK_BYTES + 8 * 1024
"""Bytes of a msgpack body; both sides refuse a frame that announces more, before reading it."""
MAX_BLOCKS: Final = 1024
"""Blocks of one request; a larger pull is several requests on one connection."""
FRAME: Final = struct.Struct("<4sBBHI")
"""magic, schema, kind, reserved (0), body bytes."""
MAGIC: Final = b"RLYT"
_MOST_SAID: Final = 200  # characters of a peer's words that reach our log
KIND_READ, KIND_DATA, KIND_REFUSED = 1, 2, 3

_REFUSALS: Final = {
    "stale": Outcome.STALE,
    "incarnation": Outcome.STALE,
    "layout": Outcome.LAYOUT_MISMATCH,
    "token": Outcome.REFUSED,
    "expired": Outcome.LEASE_EXPIRED,
    "busy": Outcome.PEER_GONE,
    "malformed": Outcome.PEER_GONE,
}


class FrameError(Exception):
    """Bytes that are not one of our frames. `code` goes into the refusal."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What a reader asks for.

    Attributes:
        token: of its lease; claim: what it says that the lease is of.
        stride: bytes of a block with its header, as the reader expects them.
        start, stop: bytes [start, stop) of each block, counted from its header on.
        blocks: those that are asked for, as (index, generation); some of the leased ones, in their order.
    """

    token: bytes
    claim: Claim
    stride: int
    start: int
    stop: int
    blocks: tuple[tuple[int, int], ...]


def encode(kind: int, body: dict[str, Any]) -> bytes:
    """A frame of `kind` with a msgpack body."""
    packed = bytes(msgpack.packb(body, use_bin_type=True) or b"")
    return FRAME.pack(MAGIC, SCHEMA, kind, 0, len(packed)) + packed


def decode_header(data: bytes) -> tuple[int, int]:
    """(kind, body bytes) of a frame header.

    Raises:
        FrameError: wrong magic, schema or kind, or a body over MAX_BODY.
    """
    magic, schema, kind, reserved, nbytes = FRAME.unpack(data)
    if magic != MAGIC or reserved != 0:
        raise FrameError("malformed", "this is not a relay_cluster peer")
    if schema != SCHEMA:
        raise FrameError("malformed", f"frame schema {schema}, ours is {SCHEMA}: upgrade the older worker")
    if kind not in (KIND_READ, KIND_DATA, KIND_REFUSED):
        raise FrameError("malformed", f"unknown frame kind {kind}")
    if nbytes > MAX_BODY:
        raise FrameError("malformed", f"a body of {nbytes} bytes exceeds the limit of {MAX_BODY}")
    return kind, nbytes


def decode_body(data: bytes) -> dict[str, Any]:
    """The msgpack map of a frame.

    Raises:
        FrameError: not msgpack, not a map with string keys, or too large in any dimension.
    """
    try:
        body = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=16,
            max_map_len=16,
            max_str_len=1024,
            max_bin_len=MAX_LEASED * BLOCK_BYTES,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as fault:
        raise FrameError("malformed", f"the frame's body is not valid msgpack: {fault}") from fault
    if not isinstance(body, dict) or not all(isinstance(k, str) for k in body):
        raise FrameError("malformed", "the frame's body is not a map with text keys")
    return body


class Asking:
    """READ frames for one lease, into an arena of the same layout.

    Raises:
        ReadFailed: NO_ROUTE: a lease of more blocks than a frame can name.
    """

    def __init__(self, lease: Lease, arena: Arena) -> None:
        segment, owner = lease.located.segment, lease.located.owner
        self._first = lease.first
        if len(lease.leased) > MAX_LEASED:
            raise ReadFailed(
                Outcome.NO_ROUTE,
                f"{len(lease.leased)} blocks are too many for one request, which names {MAX_LEASED} at "
                "most. Raise transport.block_tokens.",
            )
        try:
            leased = pack_blocks(lease.leased)
        except ValueError as fault:
            raise ReadFailed(Outcome.STALE, f"{owner.worker} has no such block: {fault}.") from fault
        self._of_lease: dict[str, Any] = {
            "token": lease.token,
            "space": segment.key.space,
            "digest": segment.key.digest,
            "holder": lease.holder,
            "incarnation": owner.incarnation,
            "stride": arena.stride,
            "leased": leased,
        }

    def encode(self, blocks: tuple[int, int], start: int, stop: int, **more: int) -> bytes:
        """A READ frame for bytes [start, stop) of blocks [blocks[0], blocks[1]) that the lease shows.

        `more`: fields that a backend needs besides.
        """
        first, last = (self._first + at for at in blocks)
        body = {**self._of_lease, "first": first, "last": last, "start": start, "stop": stop, **more}
        return encode(KIND_READ, body)


def parse_request(body: dict[str, Any]) -> ReadRequest:
    """Check every field of a read request.

    Raises:
        FrameError: a field is missing or of another type, or the range is not of what is leased.
    """
    token, digest, leased = (_field(body, name, bytes) for name in ("token", "digest", "leased"))
    space, holder = (_field(body, name, str) for name in ("space", "holder"))
    incarnation, stride, start, stop, first, last = (
        _count(body, name) for name in ("incarnation", "stride", "start", "stop", "first", "last")
    )
    if not start <= stop <= stride:
        raise FrameError("malformed", f"bytes {start} to {stop} are no range within {stride}")
    if len(leased) % BLOCK_BYTES or not first < last <= len(leased) // BLOCK_BYTES:
        raise FrameError(
            "malformed", f"blocks {first} to {last} are no range of a lease of {len(leased)} bytes"
        )
    if last - first > MAX_BLOCKS:
        raise FrameError("malformed", f"{last - first} blocks of one request; the limit is {MAX_BLOCKS}")
    blocks = tuple(unpack_blocks(leased[first * BLOCK_BYTES : last * BLOCK_BYTES]))
    claim = Claim(incarnation, space, digest, holder, digest_of(leased))
    return ReadRequest(token, claim, stride, start, stop, blocks)


def _field(body: dict[str, Any], name: str, kind: type[T]) -> T:
    value = body.get(name)
    if not isinstance(value, kind):
        raise FrameError("malformed", f"a read request needs {name}, as {kind.__name__}")
    return value


def _count(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if not is_count(value):
        raise FrameError("malformed", f"a read request needs {name}, a number of 0 or more")
    return int(value or 0)


def admit(request: ReadRequest, arena: Arena, now_ms: int) -> None:
    """Decide whether a request may be served.

    Args:
        now_ms: this process's monotonic clock.

    Raises:
        FrameError: another incarnation, a token that is not good for this, another stride or generation.
    """
    if request.claim.incarnation != arena.incarnation:
        raise FrameError(
            "incarnation", f"this is incarnation {arena.incarnation}, not {request.claim.incarnation}"
        )
    try:
        check_token(arena.pull_key, request.claim, request.token, now_ms)
    except TokenRefused as fault:
        raise FrameError("expired" if fault.expired else "token", str(fault)) from fault
    if request.stride != arena.stride:
        raise FrameError("layout", f"blocks here are {arena.stride} bytes with header, not {request.stride}")
    for index, generation in request.blocks:
        if index >= arena.num_blocks:
            raise FrameError("stale", f"no block {index} in an arena of {arena.num_blocks}")
        current = arena.generation(BlockId(index))
        if current != generation:
            raise FrameError("stale", f"block {index} has generation {current}, not {generation}")


def encode_refusal(fault: FrameError, **more: int) -> bytes:
    """The REFUSED frame that tells a reader why."""
    return encode(KIND_REFUSED, {"code": fault.code, "detail": str(fault), **more})


def expect_data(kind: int, body: dict[str, Any], blocks: int) -> None:
    """Judge the owner's answer to a request for `blocks` blocks.

    Raises:
        ReadFailed: the owner refused.
        FrameError: this is no answer to that request.
    """
    if kind == KIND_REFUSED:
        code = _said(body.get("code"))
        outcome = _REFUSALS.get(code, Outcome.PEER_GONE)
        raise ReadFailed(outcome, f"refused by the owner ({code}): {_said(body.get('detail'))}.")
    if kind != KIND_DATA or body.get("blocks") != blocks:
        told = _said(body.get("blocks"))
        raise FrameError("malformed", f"expected {blocks} blocks, got a frame of kind {kind} with {told}")


def _said(value: object) -> str:
    """What a peer says, for a log: one line of bounded length, whatever it sent."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= _MOST_SAID else f"{text[:_MOST_SAID]}..."


def is_count(value: object) -> bool:
    """Whether a field is an unsigned 64-bit number."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64
