"""What a block held before does not travel with what it holds now: it may have been another tenant's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.workers.stores import Cluster, key
from workers.kv_cache import CachePool, copy_out
from workers.layout import BlockViews, KVLayout
from workers.wire import WIRE_FORMATS


@pytest.mark.parametrize("wire", WIRE_FORMATS)
@pytest.mark.parametrize("block_tokens", [5, 16, 64])
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("hidden_size", [16, 40])
def test_nothing_of_what_a_block_held_before_is_left(
    wire: str, block_tokens: int, head_dim: int, hidden_size: int
) -> None:
    """Two workers publish the same segment, half a block short, over blocks that were full of zeros and of
    ones: every byte that a reader gets is the same. Odd sizes have gaps for alignment."""
    layout = KVLayout(
        num_layers=3,
        num_kv_heads=1,
        head_dim=head_dim,
        hidden_size=hidden_size,
        dtype="float32",
        block_tokens=block_tokens,
        checkpoint_layer=1,
        layer_groups=2,
        wire=wire,  # type: ignore[arg-type]
    )
    tokens = block_tokens * 2 - block_tokens // 2
    sequence = CachePool(layout, block_tokens * 4).allocate(tokens, timeout_s=1)
    for field in (sequence.kv, sequence.checkpoint, sequence.mass):
        field.normal_()

    def fill(views: Sequence[BlockViews]) -> None:
        copy_out(sequence, 0, tokens, views)

    cluster = Cluster(layout=layout)
    published: list[list[bytes]] = []
    try:
        for before in (0, 255):
            desk = cluster.desk(f"w{before}", blocks=2)
            blocks = desk.arena.allocate(2)
            for block in blocks:
                desk.arena.payload(block).fill_(before)
            desk.arena.free(blocks)
            segment = desk.store.publish(key(f"of {before}"), fill, start=0, num_tokens=tokens, producer="t")
            published.append([bytes(desk.arena.payload(ref.block).numpy()) for ref in segment.blocks])
        assert published[0] == published[1]
        assert any(any(block) for block in published[0])
    finally:
        cluster.close()


def test_gaps_are_all_that_views_do_not_reach() -> None:
    """Ones through every view, zeros in the gaps: no byte is neither."""
    layout = KVLayout(
        num_layers=2, num_kv_heads=1, head_dim=8, hidden_size=8, dtype="float32", block_tokens=5,
        checkpoint_layer=0, wire="int8",
    )  # fmt: skip
    payload = torch.full((layout.block_nbytes,), 7, dtype=torch.uint8)
    layout.clear_gaps(payload)
    views = layout.views(payload)
    for field in (views.kv.body, views.kv.key_scale, views.kv.value_scale, views.checkpoint, views.mass):
        assert field is not None
        field.zero_()
    assert not payload.any()
    assert layout.gaps
