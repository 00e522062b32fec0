"""Lease tokens: how an owner knows that the directory lets a reader have these very blocks now.

    owner  --pull key, its clock-->  shards      with its announcements; nobody else is ever told
    shard  --token-->                reader      with each lease
    reader --token, what is leased-> owner       with each request of a pull: recomputed and compared

A token is an expiry in the *owner's* clock and a MAC (BLAKE2b) over all that was leased and that expiry.
Clocks of different nodes are never compared: the announcement carries the owner's clock, and a shard adds
what has passed since on its own; so a token ends early by the announcement's way at most, never late. Whoever
sees a token can use it until it ends (it is not bound to a connection),
for the blocks that it names and no others.

Pure: time is an argument. This module does not know what a directory or a socket is.
"""

from __future__ import annotations

import hmac
import itertools
import secrets
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:  # which imports this module
    from transport.types import BlockRef

VERSION: Final = 1
KEY_BYTES: Final = 32
MAC_BYTES: Final = 32
BLOCK_BYTES: Final = 16
"""Of one block in `pack_blocks`."""
_TOKEN: Final = struct.Struct(f"<BQ{MAC_BYTES}s")
"""version, expiry in ms of the owner's clock, MAC."""
TOKEN_BYTES: Final = _TOKEN.size
_BLOCK: Final = struct.Struct("<QQ")
_LENGTH: Final = struct.Struct("<Q")
_PURPOSE: Final = b"relay lease"
_LATEST_MS: Final = (1 << 63) - 1


class TokenRefused(Exception):
    """A token that does not open what was asked for.

    Attributes:
        expired: it was good until a moment ago; otherwise it is no token of this owner for these blocks.
    """

    def __init__(self, detail: str, *, expired: bool = False) -> None:
        super().__init__(detail)
        self.expired = expired


class PullKey:
    """The secret of one life of an owner, with which its shards make tokens. It shows itself nowhere, and
    refuses to be pickled or copied, so that it cannot leave in a report or a call by accident.

    Raises:
        ValueError: not KEY_BYTES bytes.
    """

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ValueError(f"a pull key has {KEY_BYTES} bytes, not {len(secret)}")
        self._secret = bytes(secret)

    @classmethod
    def random(cls) -> PullKey:
        """A new one."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def reveal(self) -> bytes:
        """Its bytes: for the announcement to a shard, and for MACs."""
        return self._secret

    def __repr__(self) -> str:
        return "PullKey(hidden)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a pull key is told to directory shards only; it is never pickled")


@dataclass(frozen=True, slots=True)
class Claim:
    """What a token is for.

    Attributes:
        incarnation: of the owner.
        space, digest: of the segment's key.
        holder: the reader that has the lease.
        blocks: `digest_of` what was leased: every (block, generation), in order.
    """

    incarnation: int
    space: str
    digest: bytes
    holder: str
    blocks: bytes


def pack_blocks(refs: Iterable[BlockRef]) -> bytes:
    """Every (block, generation), in order.

    Raises:
        ValueError: a number that is no unsigned 64-bit one.
    """
    pairs = [(r.block, r.generation) for r in refs]
    try:
        return struct.pack(f"<{2 * len(pairs)}Q", *itertools.chain.from_iterable(pairs))
    except struct.error as fault:
        raise ValueError(f"a block's index or generation is out of range: {fault}") from fault


def unpack_blocks(packed: bytes) -> Iterator[tuple[int, int]]:
    """What `pack_blocks` has packed; its length is a multiple of BLOCK_BYTES."""
    return _BLOCK.iter_unpack(packed)


def digest_of(packed: bytes) -> bytes:
    """Stands for a packed list of blocks in a `Claim`."""
    return blake2b(packed, digest_size=32).digest()


def make_token(key: PullKey, claim: Claim, expires_ms: int) -> bytes:
    """A token that ends when the owner's clock shows `expires_ms`, which is cut to what a token can say."""
    ends = max(0, min(expires_ms, _LATEST_MS))
    return _TOKEN.pack(VERSION, ends, _mac(key, claim, ends))


def check_token(key: PullKey, claim: Claim, token: bytes, now_ms: int) -> None:
    """Judge a token at the owner, whose clock shows `now_ms`.

    Raises:
        TokenRefused: not of this owner's key, not for this claim, or over.
    """
    if not token:
        raise TokenRefused("no token: the directory had not heard of this owner's key when it leased")
    if len(token) != TOKEN_BYTES:
        raise TokenRefused(f"a token has {TOKEN_BYTES} bytes, not {len(token)}")
    version, ends, mac = _TOKEN.unpack(token)
    # Whether it is ours is settled before anything in it is believed, the expiry included.
    if version != VERSION or not hmac.compare_digest(mac, _mac(key, claim, ends)):
        raise TokenRefused("the token is not of this worker's life, or not for these blocks")
    if now_ms >= ends:
        raise TokenRefused(f"the lease ended {(now_ms - ends) / 1e3:.3f} s ago", expired=True)


def _mac(key: PullKey, claim: Claim, ends: int) -> bytes:
    mac = blake2b(key=key.reveal(), digest_size=MAC_BYTES, person=_PURPOSE)
    mac.update(bytes((VERSION,)))
    numbers = struct.pack("<QQ", claim.incarnation % (1 << 64), ends)
    # Each with its length in front: no two claims have the same bytes.
    for field in (numbers, claim.space.encode(), claim.digest, claim.holder.encode(), claim.blocks):
        mac.update(_LENGTH.pack(len(field)))
        mac.update(field)
    return mac.digest()
