"""Workers with the real model in one process: real engine, arena, directory table and store, only no
network."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from transport.directory.local import LocalDirectory
from transport.settings import TransportSettings
from workers.desk import Desk, open_desk
from workers.messages import Request
from workers.model import LoadedModel, load_model
from workers.profile import load_profile
from workers.segment import SlotValue
from workers.settings import DEFAULT_MODEL, Device, SamplingSettings, WorkerSettings

__all__ = ["QUESTION", "Desk", "desk", "load", "request", "two_desks"]

QUESTION = (
    "A farmer has 17 sheep and buys 5 more every week. After six weeks he sells half of his flock to a "
    "neighbour, who already has 40 sheep. How many sheep does the neighbour have now? Explain every step."
)


DEVICE = cast("Device", os.environ.get("RELAY_TEST_DEVICE", "cpu"))
"""Where the real model of these tests computes; `make test-gpu` sets it to cuda."""


def load() -> LoadedModel:
    """The embedded model with its own profile's checkpoint layer."""
    profile = load_profile(DEFAULT_MODEL, 30)
    return load_model(
        DEFAULT_MODEL,
        checkpoint_layer=profile.checkpoint_layer,
        device=DEVICE,
        layer_groups=TransportSettings().layer_groups,
    )


def desk(
    name: str,
    loaded: LoadedModel,
    directory: LocalDirectory,
    *,
    arena_blocks: int = 40,
    **settings: Any,
) -> Desk:
    """A worker named `name`; the model may be shared by several, since every step is one call."""
    return open_desk(
        name,
        loaded,
        load_profile(DEFAULT_MODEL, 30),
        arena_blocks=arena_blocks,
        settings=WorkerSettings(**{"cache_tokens": 4096, **settings}),
        directory=directory,
    )


@contextmanager
def two_desks(loaded: LoadedModel, *, arena_blocks: int = 40) -> Iterator[tuple[Desk, Desk]]:
    """Two workers that share a directory. At the end nothing may be leased, and every block is accounted
    for."""
    directory = LocalDirectory()
    desks = tuple(desk(name, loaded, directory, arena_blocks=arena_blocks) for name in ("w0", "w1"))
    yield desks[0], desks[1]
    for one in desks:
        assert one.agent.pool.free_blocks == one.agent.pool.num_blocks, "a request kept its cache"
        held = sum(len(s.blocks) for s in one.agent.store.segments())
        stats = one.arena.stats()
        assert stats.used == held, "landing blocks were not given back"
        assert stats.quarantined == 0
        one.close()
    assert directory.stats()["leases"] == 0


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
