"""Workers share anchors through the directory, in blocks of the arena; how slots and anchors are named."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.workers import tiny
from tests.workers.anchor_bench import BIG, Bench
from transport.arena import Arena
from transport.auto import make_transport
from transport.directory.local import LocalDirectory
from transport.errors import DirectoryUnavailable
from transport.settings import TransportSettings
from transport.types import Incarnation, Located, NodeId, Owner, SegmentKey, WorkerId
from workers.anchoring import (
    Anchoring,
    anchor_keys,
    pack,
    packed_nbytes,
    slot_contexts,
    source_of,
    template_contexts,
    template_digest,
    unpack,
    write_packed,
)
from workers.anchors import Anchor, AnchorPool
from workers.methods.base import RectifyPlan, Span, SpanPlan
from workers.methods.kvcomm import KVComm
from workers.segment import Piece, PromptTemplate
from workers.store import SegmentStore

pytestmark = pytest.mark.usefixtures("one_thread")


# -- sharing --


class _Desk:
    """A worker without a model: its store, its anchors."""

    def __init__(self, name: str, rig: tiny.Rig, directory: Any, **settings: Any) -> None:
        incarnation = Incarnation(time.time_ns())
        nbytes = rig.layout.block_nbytes
        self.arena = Arena(60 * (nbytes + 256), nbytes, incarnation=incarnation)
        transport = make_transport(TransportSettings(backend="inprocess"), worker=name)
        transport.register(self.arena)
        owner = Owner(WorkerId(name), incarnation, NodeId("node"), transport.addresses(), self.arena.pull_key)
        directory.announce(owner)
        self.store = SegmentStore(
            owner, rig.layout, self.arena, transport, directory, lease_ttl_s=10.0, pull_timeout_s=5.0
        )
        self.rig = rig
        self.anchoring = Anchoring(
            self.store,
            rig.layout,
            "space",
            rig.shape.inv_freq,
            settings.get("max_bytes", BIG),
            lambda job: job(),
            producer=name,
        )

    def meet(self, seed: int, method: KVComm, tokens: int = 40) -> list[Anchor]:
        """Serve a prompt whose slot holds a known segment, computed in full; learn and share."""
        b = Bench(self.rig, self.anchoring.pool, tiny.tokens(17, 5), tiny.tokens(tokens, seed), [5, 6])
        plan = RectifyPlan((SpanPlan(Span(0, 17)), SpanPlan(b.span), SpanPlan(Span(b.span.stop, len(b.ids)))))
        assert b.span.key is not None  # it is relayed
        hits, pulled = {b.span.key: b.located}, {b.span.key: b.pulled}
        matches = self.anchoring.match(method, TEMPLATE, [s.span for s in plan.spans], hits, pulled)
        self.rig.model.set_attn_implementation("relay_cluster")
        new = self.anchoring.learn(method, plan, matches, self.rig.compute(b.ids))
        self.sync(method, new)
        return new

    def sync(self, method: KVComm, new: list[Anchor] | None = None) -> None:
        self.anchoring.sync(method, template_contexts(TEMPLATE), new or [])

    @property
    def sources(self) -> list[str]:
        return [a.source for a in self.anchoring.pool.anchors(template_contexts(TEMPLATE)[0])]


TEMPLATE = PromptTemplate((Piece((3, 4)), Piece(slot="solver"), Piece((5, 6))))


class _Directory(LocalDirectory):
    down = False

    def lookup(self, *args: Any, **kwargs: Any) -> Any:
        if self.down:
            raise DirectoryUnavailable("no shard answers")
        return super().lookup(*args, **kwargs)


@pytest.fixture
def directory() -> Iterator[_Directory]:
    made = _Directory()
    yield made
    assert made.stats()["leases"] == 0


@pytest.mark.parametrize("bits", [32, 8])
def test_workers_share_anchors(directory: _Directory, bits: int) -> None:
    rig = tiny.Rig(tiny.build("gemma3"))
    one, two = _Desk("w0", rig, directory), _Desk("w1", rig, directory)
    method = KVComm(bits=bits)
    first = one.meet(31, method) + one.meet(32, method, tokens=70)
    assert len(first) == 2
    two.sync(method)
    assert two.sources == one.sources
    for mine, theirs in zip(two.anchoring.pool.anchors(first[0].context), first, strict=True):
        assert torch.equal(pack(mine), pack(theirs))
        assert (mine.tokens, mine.exact) == (theirs.tokens, True)
    # The next one goes the other way, under the next number.
    third = two.meet(33, method)
    one.sync(method)
    assert one.sources == two.sources == [a.source for a in [*first, *third]]
    assert one.anchoring.pool.stats()["pulled"] == 1
    for one_desk in (one, two):
        held = sum(len(s.blocks) for s in one_desk.store.segments())
        assert one_desk.arena.stats().used == held, "landing blocks were not given back"


def test_what_is_given_up_is_withdrawn_and_not_fetched_again(directory: _Directory) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    one, two = _Desk("w0", rig, directory), _Desk("w1", rig, directory)
    method = KVComm(max_anchor_num=2)
    for seed in (41, 42):
        one.meet(seed, method)
    two.sync(method)
    assert two.sources == one.sources
    one.meet(43, method)
    assert len(one.store.segments()) == 2, "the evicted anchor has left the directory, the new one is in"
    two.sync(method)
    two.sync(method)
    assert two.sources == one.sources
    two.meet(44, method)
    before = two.sources
    two.sync(method)
    assert two.sources == before, "what it gave up does not come back"


def test_an_anchor_larger_than_the_budget_is_not_learned(directory: _Directory) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    small = _Desk("w0", rig, directory, max_bytes=1000)
    assert small.meet(51, KVComm()) == []
    assert small.store.segments() == []
    off = _Desk("w1", rig, directory, max_bytes=0)
    assert off.meet(52, KVComm()) == []


def test_a_directory_that_is_down_costs_nothing_but_sharing(directory: _Directory) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    one = _Desk("w0", rig, directory)
    directory.down = True
    assert len(one.meet(61, KVComm())) == 1
    directory.down = False
    assert len(one.sources) == 1
    assert one.store.segments() == []


def test_bytes_that_are_no_anchor_are_refused(directory: _Directory) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    one, two = _Desk("w0", rig, directory), _Desk("w1", rig, directory)
    context = template_contexts(TEMPLATE)[0]
    key = anchor_keys("space", context, 1)[0]
    noise = torch.arange(200, dtype=torch.uint8)
    one.store.publish(
        key, lambda blocks: write_packed(noise, blocks), start=0, num_tokens=16, producer="x", variant="x"
    )
    two.sync(KVComm())
    assert two.sources == []
    blocks = [rig.layout.views(torch.zeros(rig.layout.block_nbytes, dtype=torch.uint8))]
    write_packed(noise, blocks)
    with pytest.raises(ValueError, match="not b'RELAYKA1'"):
        unpack(blocks, context, rig.layout)
    # A true header whose tensors are missing.
    write_packed(
        torch.frombuffer(
            bytearray(struct.pack("<8sIIIB3x32s", b"RELAYKA1", 900, 32, 1, 1, b"a" * 32)), dtype=torch.uint8
        ),
        blocks,
    )
    with pytest.raises(ValueError, match="too few"):
        unpack(blocks, context, rig.layout)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_packed_anchor_comes_back_and_leaves_nothing_old_behind(bits: int) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pool = AnchorPool(BIG, rig.shape.inv_freq)
    b = Bench(rig, pool, tiny.tokens(17, 5), tiny.tokens(70, 1), [5])
    anchor = pool.learn(b.match(), b.dense(), 17, bits=bits, exact=False)
    packed = pack(anchor)
    assert packed.shape == (packed_nbytes(anchor),)
    window = rig.layout.window_nbytes
    raw = torch.full((-(-packed.shape[0] // window), rig.layout.block_nbytes), 255, dtype=torch.uint8)
    blocks = [rig.layout.views(r) for r in raw]
    write_packed(packed, blocks)
    back = unpack(blocks, anchor.context, rig.layout)
    assert (back.source, back.version, back.exact, back.tokens) == (anchor.source, 1, False, 70)
    assert torch.equal(pack(back), packed)
    assert back.nbytes == anchor.nbytes
    assert int((raw == 255).sum()) == int((packed == 255).sum())


# -- names --


def test_a_slot_used_twice_has_two_contexts() -> None:
    key = SegmentKey("space", b"k")
    spans = [
        Span(0, 4),
        Span(4, 30, "a", key),
        Span(30, 33, "a"),
        Span(33, 60, "b", key),
        Span(60, 80, "a", key),
    ]
    found = slot_contexts("t", spans)
    assert [(s.start, c.slot) for s, c in found.items()] == [(4, "a"), (33, "b"), (60, "a#1")]
    twice = PromptTemplate((Piece(slot="a"), Piece((1,)), Piece(slot="b"), Piece((2,)), Piece(slot="a")))
    assert [c.slot for c in template_contexts(twice)] == ["a", "b", "a#1"]


def test_a_template_is_named_by_its_text_and_its_slots() -> None:
    pieces = [Piece((1, 2)), Piece(slot="a"), Piece((3,))]
    others = [
        [Piece((1,)), Piece(slot="a"), Piece((2, 3))],
        [Piece((1, 2)), Piece(slot="b"), Piece((3,))],
        [Piece((1, 2)), Piece((3,)), Piece(slot="a")],
        [Piece((1, 2)), Piece(slot="a")],
    ]
    names = {template_digest(PromptTemplate(tuple(p))) for p in [pieces, *others]}
    assert len(names) == 5
    assert template_digest(PromptTemplate(tuple(pieces))) in names


def test_the_same_tokens_of_another_context_are_another_source() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    located, _ = rig.segment(tiny.tokens(5), tiny.tokens(20, 1))
    other = Located(replace(located.segment, variant="elsewhere"), located.owner)
    assert source_of(located) != source_of(other)
    assert len(source_of(located)) == 32
