"""What a worker makes of a pull that the owner refuses: a counted miss, and no grudge against the owner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from tests.workers.stores import Cluster, key, reasons
from transport.base import Answers
from transport.directory.local import LocalDirectory
from transport.types import Lease, SegmentKey, WorkerId


class Spoiling(LocalDirectory):
    """Real leases; the tokens of some segments are another's."""

    spoilt: frozenset[str] = frozenset()

    def lease(
        self, keys: Sequence[SegmentKey], *, holder: WorkerId, ttl_s: float, copies: int = 1
    ) -> Answers[Lease]:
        granted = super().lease(keys, holder=holder, ttl_s=ttl_s, copies=copies)
        return Answers(
            {
                k: replace(x, token=bytes(41)) if k.digest.decode() in self.spoilt else x
                for k, x in granted.items()
            }
        )


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(backend="tcp")
    cluster.directory = Spoiling()
    yield cluster
    cluster.check()
    cluster.close()


def test_a_refused_pull_is_a_counted_miss(cluster: Cluster) -> None:
    """The reason is the outcome's, the leases go back, and the same owner is read on."""
    assert isinstance(cluster.directory, Spoiling)
    owner, reader = cluster.desk("w0"), cluster.desk("w1")
    owner.put("a", value=1.0)
    owner.put("b", value=2.0)
    cluster.directory.spoilt = frozenset("a")
    got = reader.get("a", "b")
    assert reasons(got) == {"a": "refused"}
    assert "refused by the owner (token)" in got.misses[key("a")].detail
    assert set(got.pulled) == {key("b")}
    assert got.lost == {}, "the owner lives"
    reader.store.release(got)
    cluster.directory.spoilt = frozenset()
    assert reader.read("a", "b") == {"a": {1.0}, "b": {2.0}}


def test_a_worker_reads_over_tcp_with_the_tokens_of_its_directory(cluster: Cluster) -> None:
    owner, reader = cluster.desk("w0"), cluster.desk("w1")
    owner.put("a", blocks=3, value=4.0)
    assert reader.read("a") == {"a": {4.0}}
    assert owner.read("a") == {"a": {4.0}}, "its own, without a pull"
