"""Prefills over segments that arrive layer by layer: what is not there yet is never read, and the result is
that of segments that were there from the beginning."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from tests.workers import tiny
from transport.types import Located
from workers.attention import MassSpan
from workers.layout import KVLayout
from workers.methods import parse_method
from workers.pulled import Arrival, PulledSegment, SegmentLost

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = (
    "naive",
    "epic:k=6",
    "cacheblend:r=0.3",
    "relay_caching:start=2+det=3+end=5",
    "context_mass:ratio=0.3+first=4+start=2+end=5",
    "context_mass:ratio=0.3+first=4+start=2+end=5+probes=0.1+drift=1",
    "context_mass:ratio=0.3+first=1+start=2+end=5+probes=0.1+drift=1+look=6+look_layer=3+look_from=1",
    "context_mass:ratio=1+first=0+start=0+end=6",
)


@dataclass
class Incoming:
    """A segment whose layers hold NaN until `land`."""

    whole: PulledSegment
    seen: PulledSegment

    @classmethod
    def of(cls, layout: KVLayout, whole: PulledSegment) -> Incoming:
        empty = [layout.views(torch.zeros(layout.block_nbytes, dtype=torch.uint8)) for _ in whole.blocks]
        for ours, theirs in zip(empty, whole.blocks, strict=True):
            ours.kv.body.fill_(torch.nan)
            ours.checkpoint[:] = theirs.checkpoint
            ours.mass[:] = theirs.mass
        return cls(whole, replace(whole, blocks=tuple(empty), arrival=Arrival()))

    def land(self, layers: int) -> None:
        for ours, theirs in zip(self.seen.blocks, self.whole.blocks, strict=True):
            ours.kv.body[:layers] = theirs.kv.body[:layers]
        assert self.seen.arrival is not None
        self.seen.arrival.landed(layers)


@dataclass
class Late:
    """Pieces of a prompt whose segments come in random steps."""

    pieces: list[tuple[list[int], tuple[Located, PulledSegment] | None]]
    incoming: list[Incoming]
    layers: int
    random: random.Random

    @classmethod
    def of(cls, rig: tiny.Rig, seed: int) -> Late:
        pieces, incoming = [], []
        for ids, source in rig.two_spans():
            if source is not None:
                incoming.append(Incoming.of(rig.layout, source[1]))
                source = (source[0], incoming[-1].seen)
            pieces.append((ids, source))
        return cls(pieces, incoming, rig.num_layers, random.Random(seed))

    def more(self) -> None:
        """One of the segments, the one that is behind as likely as the others, gets some more layers."""
        late = [s for s in self.incoming if s.seen.landed_layers < self.layers]
        one = self.random.choice(late)
        one.land(self.random.randint(one.seen.landed_layers + 1, self.layers))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_rows", [1 << 20, 9])
def test_layer_by_layer_equals_all_at_once(method: str, max_rows: int) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    masses = (MassSpan(12, 52, sinks=1),)
    parsed = parse_method(method)
    expected, whole = rig.run(parsed, rig.two_spans(), max_rows=max_rows, masses=masses)
    n = whole.num_tokens
    fresh = torch.tensor([*range(12), *range(52, 57), *range(90, n)])
    for seed in range(4):
        late = Late.of(rig, seed)
        logits, prefill = rig.run(parsed, late.pieces, max_rows=max_rows, masses=masses, more=late.more)
        assert (logits - expected).abs().max() < 1e-4
        ours, theirs = prefill.cache, whole.cache
        assert (ours.kv[:, :, :, :n] - theirs.kv[:, :, :, :n]).abs().max() < 1e-4
        assert (ours.mass[:n] - theirs.mass[:n]).abs().max() < 1e-4
        assert (ours.checkpoint[fresh] - theirs.checkpoint[fresh]).abs().max() < 1e-4
        assert prefill.counts == whole.counts
        assert prefill.actual_flops == pytest.approx(whole.actual_flops, rel=1e-9)
        rig.pool.free(prefill.cache)


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_several_ropes_and_windows_arrive_too(family: str) -> None:
    rig = tiny.Rig(tiny.build(family))
    method = parse_method(METHODS[5])
    expected, _ = rig.run(method, rig.two_spans())
    late = Late.of(rig, 3)
    logits, _ = rig.run(method, late.pieces, more=late.more)
    assert (logits - expected).abs().max() < 1e-4


def test_all_is_computed_that_can_be_and_nothing_else() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    late = Late.of(rig, 0)
    before = rig.engine.counters.row_layers
    work: list[tuple[int, int]] = []

    def more() -> None:
        landed = min(s.seen.landed_layers for s in late.incoming)
        work.append((landed, rig.engine.counters.row_layers - before))
        late.more()

    _, prefill = rig.run(parse_method("naive"), late.pieces, more=more)
    assert len(work) > 3
    assert [done for _, done in work] == [27 * landed for landed, _ in work]
    assert rig.engine.counters.row_layers - before == 27 * rig.num_layers
    assert prefill.finished


def test_a_pull_that_breaks_off_stops_the_prefill() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    late = Late.of(rig, 0)
    calls = 0

    def more() -> None:
        nonlocal calls
        calls += 1
        for segment in late.incoming:
            segment.land(calls)
        if calls == 3:
            assert late.incoming[1].seen.arrival is not None
            late.incoming[1].seen.arrival.lost("peer_gone: w9 died")

    with pytest.raises(SegmentLost, match="w9 died"):
        rig.run(parse_method("naive"), late.pieces, more=more)
    assert calls == 3


def _layout(**changes: Any) -> KVLayout:
    values: dict[str, Any] = {
        "num_layers": 30,
        "num_kv_heads": 3,
        "head_dim": 64,
        "hidden_size": 576,
        "dtype": "float32",
        "block_tokens": 64,
        "checkpoint_layer": 4,
    }
    return KVLayout(**{**values, **changes})


@pytest.mark.parametrize("groups", [1, 4, 6, 30, 99])
@pytest.mark.parametrize("block_tokens", [1, 16, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_are_layers_in_order_behind_mass_and_checkpoint(
    groups: int, block_tokens: int, dtype: str
) -> None:
    layout = _layout(layer_groups=groups, block_tokens=block_tokens, dtype=dtype)
    assert sum(layout.parts) == layout.block_nbytes
    assert layout.part_layers[-1] == layout.num_layers
    assert len(layout.parts) == len(layout.part_layers) == min(groups, 30)
    payload = torch.zeros(layout.block_nbytes, dtype=torch.uint8)
    views = layout.views(payload)
    for tensor in (views.kv.body, views.checkpoint, views.mass):
        assert (tensor.data_ptr() - payload.data_ptr()) % 64 == 0
    # With the first i parts filled, the layers that they are said to hold are full, and no others.
    for i, layers in enumerate(layout.part_layers):
        payload[: sum(layout.parts[: i + 1])] = 0x3C
        full = (views.kv.body != 0).flatten(1)
        assert full[:layers].all()
        assert not full[layers:].any()
        assert (views.mass != 0).all()
        assert (views.checkpoint != 0).all()


def test_how_a_block_is_cut_is_part_of_the_layout() -> None:
    """Checksums are made by part: two workers must cut alike."""
    assert _layout(layer_groups=6).fingerprint != _layout(layer_groups=5).fingerprint
