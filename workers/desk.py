"""A worker without a cluster: model, engine, arena, directory table and store in this process, no network.

The parts are the real ones; only the directory is a table of its own instead of shards, and the transport
copies within the process. For benchmarks, the profiler and tests. Knows nothing of Ray.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from transport.arena import Arena
from transport.auto import make_transport
from transport.base import Transport
from transport.directory.local import LocalDirectory
from transport.settings import DirectorySettings, SpillSettings, TransportSettings
from transport.types import Incarnation, NodeId, Owner, WorkerId
from workers.agent import AgentWorker
from workers.methods.base import ModelProfile
from workers.model import LoadedModel, describe, load_model, resolve
from workers.profile import load_profile
from workers.settings import WorkerSettings
from workers.store import AskOwner, SegmentStore
from workers.wire import WireFormat

_HEADER_BYTES = 256
"""More than an arena adds to a block."""


@dataclass(frozen=True, slots=True)
class Desk:
    """A worker and the parts that it was made of. A context manager; leaving it stops the worker's thread."""

    agent: AgentWorker
    arena: Arena
    directory: LocalDirectory
    owner: Owner
    transport: Transport

    def clear(self) -> None:
        """Give up every segment that nobody reads."""
        self.agent.store.evict(blocks=self.arena.num_blocks)

    def close(self) -> None:
        """Stop the worker and let go of its memory. Idempotent."""
        self.agent.close()
        self.agent.store.close()
        # Or the backend, which finds arenas of this process by name, would keep this one for ever.
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_for_desk(
    model: str, settings: WorkerSettings | None = None, *, wire: WireFormat = "raw"
) -> tuple[LoadedModel, ModelProfile]:
    """The model, with segments that carry what its profile wants, in the format `wire`.

    Raises:
        ModelError: not found or not supported. ConfigError: the profile does not fit the model.
    """
    chosen = settings or WorkerSettings()
    resolve(model)
    profile = load_profile(model, int(describe(model)["layers"]), chosen.profile)
    loaded = load_model(
        model,
        dtype=chosen.dtype,
        device=chosen.device,
        checkpoint_layer=profile.checkpoint_layer,
        layer_groups=TransportSettings().layer_groups,
        wire=wire,
    )
    return loaded, profile


def open_desk(
    name: str,
    loaded: LoadedModel,
    profile: ModelProfile,
    *,
    arena_blocks: int,
    settings: WorkerSettings | None = None,
    directory: LocalDirectory | None = None,
    spill: SpillSettings | None = None,
    ask_owner: AskOwner | None = None,
) -> Desk:
    """A worker named `name`.

    Args:
        loaded: the model; may be shared by several workers of this process.
        profile: its profile.
        arena_blocks: blocks for published segments; a block holds layout.block_tokens tokens.
        settings: of the worker.
        directory: shared by the workers that find each other's segments; None: one of its own.
        spill: where evicted segments go; None: nowhere.
        ask_owner: reaches the others when what they have spilled is wanted.
    """
    incarnation = Incarnation(time.time_ns())
    nbytes = loaded.layout.block_nbytes
    arena = Arena(
        arena_blocks * (nbytes + _HEADER_BYTES),
        nbytes,
        device=str(loaded.device),
        incarnation=incarnation,
        parts=loaded.layout.parts,
        shared=False,
    )
    transport_settings = TransportSettings(backend="inprocess")
    transport = make_transport(transport_settings, worker=name)
    transport.register(arena)
    owner = Owner(WorkerId(name), incarnation, NodeId("node"), transport.addresses(), arena.pull_key)
    shared = directory or LocalDirectory()
    shared.announce(owner)
    store = SegmentStore(
        owner,
        loaded.layout,
        arena,
        transport,
        shared,
        lease_ttl_s=DirectorySettings().lease_ttl_s,
        pull_timeout_s=transport_settings.pull_timeout_s,
        spill=spill,
        ask_owner=ask_owner,
    )
    agent = AgentWorker(owner.worker, owner.node, loaded, profile, settings or WorkerSettings(), store)
    return Desk(agent, arena, shared, owner, transport)
