"""Frames of the backends that speak themselves (tcp, ucx): a reader asks, an owner answers.

A frame is a fixed binary header, then a msgpack body of bounded size; there is no pickle. The bytes of blocks
follow a DATA frame as they are. Everything here is pure: no sockets, no clock.

    reader                                    owner
      READ token, blocks, byte range  ---->     may it be read? (`admit`)
                                      <----   DATA, then the range of every block; or REFUSED and why

An empty byte range only asks whether the blocks still are the leased ones.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from transport.arena import Arena
from transport.pulling import ReadFailed
from transport.types import BlockId, BlockRef, Outcome

SCHEMA: Final = 2
MAX_BODY: Final = 128 * 1024
"""Bytes of a msgpack body; both sides refuse a frame that announces more, before reading it."""
MAX_BLOCKS: Final = 1024
"""Blocks of one request; a larger pull is several requests on one connection."""
FRAME: Final = struct.Struct("<4sBBHI")
"""magic, schema, kind, reserved (0), body bytes."""
MAGIC: Final = b"RLYT"
KIND_READ, KIND_DATA, KIND_REFUSED = 1, 2, 3

_REFUSALS: Final = {
    "stale": Outcome.STALE,
    "incarnation": Outcome.STALE,
    "layout": Outcome.LAYOUT_MISMATCH,
    "token": Outcome.PEER_GONE,
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
    """What a reader asks for: blocks as (index, generation), of one life of the owner, and of each the bytes
    [start, stop) counted from its header on."""

    token: bytes
    incarnation: int
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
            max_array_len=MAX_BLOCKS,
            max_map_len=16,
            max_str_len=1024,
            max_bin_len=1024,
            max_ext_len=0,
        )
    except (ValueError, RecursionError, msgpack.UnpackException) as fault:
        raise FrameError("malformed", f"the frame's body is not valid msgpack: {fault}") from fault
    if not isinstance(body, dict) or not all(isinstance(k, str) for k in body):
        raise FrameError("malformed", "the frame's body is not a map with text keys")
    return body


def encode_request(
    token: bytes, incarnation: int, arena: Arena, refs: Sequence[BlockRef], start: int, stop: int
) -> bytes:
    """A READ frame for bytes [start, stop) of blocks, into an arena of the same layout."""
    body = {
        "token": token,
        "incarnation": incarnation,
        "stride": arena.stride,
        "start": start,
        "stop": stop,
        "blocks": [[r.block, r.generation] for r in refs],
    }
    return encode(KIND_READ, body)


def parse_request(body: dict[str, Any]) -> ReadRequest:
    """Check every field of a read request.

    Raises:
        FrameError: a field is missing or of another type.
    """
    token, blocks = body.get("token"), body.get("blocks")
    numbers = [body.get(name) for name in ("incarnation", "stride", "start", "stop")]
    if not isinstance(token, bytes) or not all(_is_count(n) for n in numbers):
        raise FrameError("malformed", "a read request needs token, incarnation, stride, start and stop")
    incarnation, stride, start, stop = (int(n or 0) for n in numbers)
    if not start <= stop <= stride:
        raise FrameError("malformed", f"bytes {start} to {stop} are no range within {stride}")
    if not isinstance(blocks, list) or not blocks:
        raise FrameError("malformed", "a read request needs a list of blocks")
    pairs: list[tuple[int, int]] = []
    for pair in blocks:
        if not (isinstance(pair, list) and len(pair) == 2 and all(_is_count(x) for x in pair)):
            raise FrameError("malformed", "a block is a pair [index, generation]")
        pairs.append((pair[0], pair[1]))
    return ReadRequest(token, incarnation, stride, start, stop, tuple(pairs))


def admit(request: ReadRequest, arena: Arena, token: bytes) -> None:
    """Decide whether a request may be served.

    Raises:
        FrameError: wrong token, incarnation, stride or generation.
    """
    if not hmac.compare_digest(request.token, token):
        raise FrameError("token", "wrong token: the reader's directory entry is not of this worker")
    if request.incarnation != arena.incarnation:
        raise FrameError("incarnation", f"this is incarnation {arena.incarnation}, not {request.incarnation}")
    if request.stride != arena.stride:
        raise FrameError("layout", f"blocks here are {arena.stride} bytes with header, not {request.stride}")
    for index, generation in request.blocks:
        if index >= arena.num_blocks:
            raise FrameError("stale", f"no block {index} in an arena of {arena.num_blocks}")
        current = arena.generation(BlockId(index))
        if current != generation:
            raise FrameError("stale", f"block {index} has generation {current}, not {generation}")


def encode_refusal(fault: FrameError) -> bytes:
    """The REFUSED frame that tells a reader why."""
    return encode(KIND_REFUSED, {"code": fault.code, "detail": str(fault)})


def expect_data(kind: int, body: dict[str, Any], blocks: int) -> None:
    """Judge the owner's answer to a request for `blocks` blocks.

    Raises:
        ReadFailed: the owner refused.
        FrameError: this is no answer to that request.
    """
    if kind == KIND_REFUSED:
        code = str(body.get("code"))
        outcome = _REFUSALS.get(code, Outcome.PEER_GONE)
        raise ReadFailed(outcome, f"refused by the owner ({code}): {body.get('detail')}.")
    if kind != KIND_DATA or body.get("blocks") != blocks:
        raise FrameError("malformed", f"expected {blocks} blocks, got kind {kind} with {body}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64
