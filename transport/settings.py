"""Knobs of the transport room. Defaults live here and nowhere else. Imports are cheap on purpose
(no torch, ray or nixl), so that `relay check` can validate a file on any laptop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

MIB = 1 << 20

Backend = Literal["auto", "nixl", "ucx", "tcp", "inprocess"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How blocks are held and moved.

    Attributes:
        backend: "auto" takes nixl where both ends have it, else ucx, else tcp, and says why.
        arena_bytes: hard budget for published and landing blocks of one worker.
        block_tokens: tokens per block.
        pull_timeout_s: deadline of one pull, verification included.
        connect_timeout_s: deadline for reaching a peer the first time.
        bind_host: address on which the tcp backend listens. "auto": loopback for a one-node cluster,
            otherwise the node's own address.
    """

    backend: Backend = "auto"
    arena_bytes: Annotated[int, Ge(1 * MIB)] = 512 * MIB
    block_tokens: Annotated[int, Ge(1)] = 64
    pull_timeout_s: Annotated[float, Gt(0)] = 5.0
    connect_timeout_s: Annotated[float, Gt(0)] = 3.0
    bind_host: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySettings:
    """The distributed KV directory.

    Attributes:
        shards: number of shard actors.
        lease_ttl_s: how long a reader may read before it must renew.
        heartbeat_s: how often owners announce themselves.
        owner_timeout_s: silence after which an owner's segments are dropped.
        call_timeout_s: deadline of one directory call; after it the request goes on without hits.
    """

    shards: Annotated[int, Ge(1)] = 2
    lease_ttl_s: Annotated[float, Gt(0)] = 10.0
    heartbeat_s: Annotated[float, Gt(0)] = 1.0
    owner_timeout_s: Annotated[float, Gt(0)] = 10.0
    call_timeout_s: Annotated[float, Gt(0)] = 2.0
