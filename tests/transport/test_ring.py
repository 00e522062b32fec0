"""The ring spreads keys, is the same everywhere, and moves little when a shard is added."""

from __future__ import annotations

from collections import Counter

import pytest

from transport.directory.ring import Ring
from transport.errors import ConfigError
from transport.types import SegmentKey

KEYS = [SegmentKey(f"space{i % 3}", i.to_bytes(8, "big")) for i in range(6000)]


def test_keys_are_spread_evenly() -> None:
    ring = Ring(["a", "b", "c", "d"])
    counts = Counter(ring.shard(k) for k in KEYS)
    assert set(counts) == {"a", "b", "c", "d"}
    assert max(counts.values()) < 1.5 * min(counts.values())


def test_a_new_shard_takes_its_share_and_moves_nothing_else() -> None:
    before, after = Ring(["a", "b", "c"]), Ring(["a", "b", "c", "d"])
    moved = [k for k in KEYS if before.shard(k) != after.shard(k)]
    assert all(after.shard(k) == "d" for k in moved)
    assert 0.15 < len(moved) / len(KEYS) < 0.35


def test_order_of_names_does_not_matter_and_positions_are_fixed() -> None:
    assert [Ring(["a", "b"]).shard(k) for k in KEYS[:50]] == [Ring(["b", "a"]).shard(k) for k in KEYS[:50]]
    # Written down once: another value would mean that old and new workers disagree during an upgrade.
    assert "".join(Ring(["a", "b"]).shard(k) for k in KEYS[:24]) == EXPECTED


EXPECTED = "abaaaababaaaabbaabbaaabb"


def test_split_keeps_order() -> None:
    ring = Ring(["a", "b"])
    parts = ring.split(KEYS[:100])
    assert sum(map(len, parts.values())) == 100
    for name, part in parts.items():
        assert part == [k for k in KEYS[:100] if ring.shard(k) == name]


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_bad_names_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="distinct names"):
        Ring(names)
