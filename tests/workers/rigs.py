"""Workers with the real model in one process: real engine, arena, directory table and store, only no
network."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from transport.arena import Arena
from transport.auto import make_transport
from transport.directory.local import LocalDirectory
from transport.settings import TransportSettings
from transport.types import Incarnation, NodeId, Owner, WorkerId
from workers.agent import AgentWorker
from workers.messages import Request
from workers.model import LoadedModel, load_model
from workers.profile import load_profile
from workers.segment import SlotValue
from workers.settings import DEFAULT_MODEL, SamplingSettings, WorkerSettings
from workers.store import SegmentStore

QUESTION = (
    "A farmer has 17 sheep and buys 5 more every week. After six weeks he sells half of his flock to a "
    "neighbour, who already has 40 sheep. How many sheep does the neighbour have now? Explain every step."
)


@dataclass
class Desk:
    """One worker and the parts that tests look into."""

    agent: AgentWorker
    arena: Arena
    directory: LocalDirectory
    owner: Owner


def load() -> LoadedModel:
    """The embedded model with its own profile's checkpoint layer."""
    profile = load_profile(DEFAULT_MODEL, 30)
    return load_model(DEFAULT_MODEL, checkpoint_layer=profile.checkpoint_layer, device="cpu")


def desk(
    name: str,
    loaded: LoadedModel,
    directory: LocalDirectory,
    *,
    arena_blocks: int = 40,
    **settings: Any,
) -> Desk:
    """A worker named `name`; the model may be shared by several, since every step is one call."""
    incarnation = Incarnation(time.time_ns())
    nbytes = loaded.layout.block_nbytes
    arena = Arena(arena_blocks * (nbytes + 256), nbytes, incarnation=incarnation)
    transport = make_transport(TransportSettings(backend="inprocess"), worker=name)
    transport.register(arena)
    owner = Owner(WorkerId(name), incarnation, NodeId("node"), transport.addresses())
    directory.announce(owner)
    store = SegmentStore(
        owner, loaded.layout, arena, transport, directory, lease_ttl_s=10.0, pull_timeout_s=5.0
    )
    agent = AgentWorker(
        WorkerId(name),
        NodeId("node"),
        loaded,
        load_profile(DEFAULT_MODEL, 30),
        WorkerSettings(**{"cache_tokens": 4096, **settings}),
        store,
    )
    return Desk(agent, arena, directory, owner)


def request(
    name: str, prompt: str, method: str = "full_prefill", *, max_new_tokens: int = 12, **values: Any
) -> Request:
    """A request whose slots are given as text or as a SlotValue."""
    options: dict[str, Any] = {k: values.pop(k) for k in ("publish", "system", "sampling") if k in values}
    options.setdefault("sampling", SamplingSettings(max_new_tokens=max_new_tokens))
    return Request(
        id=f"{name}-{time.time_ns()}",
        agent=name,
        prompt=prompt,
        values={k: SlotValue(text=v) if isinstance(v, str) else v for k, v in values.items()},
        method=method,
        **options,
    )
