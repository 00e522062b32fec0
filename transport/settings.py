"""Knobs of the transport room. Defaults live here and nowhere else. Imports are cheap on purpose
(no torch, ray or nixl), so that `relay check` can validate a file on any laptop.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

MIB = 1 << 20

WireFormat = Literal["raw", "bf16", "int8"]
_BEATS_PER_TIMEOUT = 4
"""Owners announce themselves so often within the silence after which they are dropped: one may get lost."""
Backend = Literal["auto", "shm", "nixl", "ucx", "tcp", "inprocess"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpillSettings:
    """Where segments go that the arena has no room for. Off by default: evicted segments are then lost.

    Attributes:
        host_bytes: hard budget of ordinary memory; 0 = none.
        disk_bytes: hard budget of files; 0 = none.
        disk_dir: folder of those files; each worker makes one of its own in it. "": the system's folder for
            temporary files.
        queue_bytes: memory for segments on their way to the disk; what comes while it is full is lost.
        promote_timeout_s: how long a reader waits for an owner to bring segments back into its arena.
    """

    host_bytes: Annotated[int, Ge(0)] = 0
    disk_bytes: Annotated[int, Ge(0)] = 0
    disk_dir: str = ""
    queue_bytes: Annotated[int, Ge(1 * MIB)] = 64 * MIB
    promote_timeout_s: Annotated[float, Gt(0)] = 2.0


Probability = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSettings:
    """Faults on purpose, refused unless the environment has RELAY_TEST_MODE=1; see `transport/faults.py`.

    Attributes:
        drop, hang, delay, link_down, link_up, corrupt, truncate, stale, lease_expiry: probability that a pull
            meets it.
        arena_full: that an allocation of blocks fails.
        disk_full: that a write to disk fails.
        directory_drop, directory_delay: that a directory call is lost or late.
        delay_ms: how late, in milliseconds.
        seed: of the dice.
    """

    drop: Probability = 0.0
    hang: Probability = 0.0
    delay: Probability = 0.0
    link_down: Probability = 0.0
    link_up: Probability = 0.0
    corrupt: Probability = 0.0
    truncate: Probability = 0.0
    stale: Probability = 0.0
    lease_expiry: Probability = 0.0
    arena_full: Probability = 0.0
    disk_full: Probability = 0.0
    directory_drop: Probability = 0.0
    directory_delay: Probability = 0.0
    delay_ms: Annotated[float, Ge(0)] = 200.0
    seed: Annotated[int, Ge(0)] = 0

    def probability(self, kind: str) -> float:
        """Of the fault of that name; 0 for one that is only ever armed."""
        return 0.0 if kind in ("delay_ms", "seed") else float(getattr(self, kind, 0.0))

    @property
    def enabled(self) -> bool:
        """Whether anything can happen."""
        return any(self.probability(name) > 0 for name in self.__slots__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSettings:
    """How blocks are held and moved.

    Attributes:
        backend: "auto" takes shm between workers of one host, else nixl where both ends have it, else ucx,
            else tcp, and says why.
        arena_bytes: hard budget for published and landing blocks of one worker.
        block_tokens: tokens per block.
        shared_memory: the arena of a worker on the CPU lies in memory that workers of the same host and user
            may read (Linux). False: in memory of its own, and there is no shm backend.
        layer_groups: parts in which a block travels, each with some of the layers: computing starts when the
            first one is there. 1 = a block travels whole.
        pull_timeout_s: deadline of one pull, verification included.
        wire: format of keys and values in blocks: "raw" (exact), "bf16" (half of float32) or "int8" (about a
            quarter). "auto": raw on one node; over several, by the speed of the slowest link between them.
        connect_timeout_s: deadline for reaching a peer the first time.
        bind_host: address on which the tcp backend listens. "auto": loopback for a one-node cluster,
            otherwise the node's own address.
        keep_pulled: a worker that has pulled a segment of which more readers are expected offers its copy to
            them, as long as its arena has room to spare: a reader then takes parts from two owners at once,
            and can do without one of them. Off: only what a worker has made itself can be pulled from it.
        spill: where evicted segments go.
        faults: for tests only.
    """

    backend: Backend = "auto"
    arena_bytes: Annotated[int, Ge(1 * MIB)] = 512 * MIB
    shared_memory: bool = True
    block_tokens: Annotated[int, Ge(1)] = 64
    layer_groups: Annotated[int, Ge(1)] = 6
    wire: WireFormat | Literal["auto"] = "auto"
    pull_timeout_s: Annotated[float, Gt(0)] = 5.0
    connect_timeout_s: Annotated[float, Gt(0)] = 3.0
    bind_host: str = "auto"
    keep_pulled: bool = True
    spill: SpillSettings = field(default_factory=SpillSettings)
    faults: FaultSettings = field(default_factory=FaultSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectorySettings:
    """The distributed KV directory.

    Attributes:
        shards: number of shard actors.
        lease_ttl_s: how long a reader may read before it must renew.
        heartbeat_s: how often owners announce themselves.
        max_heartbeats_per_s: announcements that one shard takes from all owners together; more owners than
            that announce themselves less often, but four times within owner_timeout_s.
        owner_timeout_s: silence after which an owner's segments are dropped.
        call_timeout_s: deadline of one directory call; after it the request goes on without hits.
        replicas: shards that know each key; with 2 the death of one costs no hits.
        max_lease_s, max_pin_s: no lease of a reader, and no pin of an operator, is granted for longer.
        max_leases: live leases of one holder at one shard, and pins at one shard; more are refused.
        max_open, max_open_blocks: open segments of one owner at one shard, and blocks of one of them; what is
            more is not streamed.
        max_watches: readers that wait for news of open segments at one shard, each on a thread of it; more
            are refused, and pull what they need when their requests come.
    """

    shards: Annotated[int, Ge(1)] = 2
    replicas: Annotated[int, Ge(1), Le(2)] = 1
    lease_ttl_s: Annotated[float, Gt(0)] = 10.0
    heartbeat_s: Annotated[float, Gt(0)] = 1.0
    max_heartbeats_per_s: Annotated[float, Gt(0)] = 200.0
    owner_timeout_s: Annotated[float, Gt(0)] = 10.0
    call_timeout_s: Annotated[float, Gt(0)] = 2.0
    max_lease_s: Annotated[float, Gt(0)] = 60.0
    max_pin_s: Annotated[float, Gt(0)] = 86_400.0
    max_leases: Annotated[int, Ge(1)] = 16_384
    max_open: Annotated[int, Ge(1)] = 256
    max_open_blocks: Annotated[int, Ge(1)] = 4_096
    max_watches: Annotated[int, Ge(1), Le(1024)] = 128

    def beat_s(self, owners: int) -> float:
        """Seconds between an owner's announcements where `owners` announce themselves at each shard."""
        paced_s = min(owners / self.max_heartbeats_per_s, self.owner_timeout_s / _BEATS_PER_TIMEOUT)
        return max(self.heartbeat_s, paced_s)
