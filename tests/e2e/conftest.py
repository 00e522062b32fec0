"""Real clusters for the end-to-end tests: Ray, NIXL and the embedded model, as a user would start them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from relay_cluster import Agent, Cluster, ClusterConfig, Pipeline

QUESTION = (
    "A farmer has 17 sheep and buys 5 more every week. After six weeks he sells half of his flock to a "
    "neighbour, who already has 40 sheep. How many sheep does the neighbour have now? Explain every step."
)
PIPELINE = Pipeline(
    [
        Agent("solver", prompt="Solve this problem.\n{question}", system="You are a maths tutor."),
        Agent(
            "critic",
            prompt="Problem:\n{question}\nSolution:\n{solver}\nIs this right?",
            system="You check solutions.",
        ),
    ],
    name="pair",
)


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables for processes that Ray starts; Ray hands the driver's environment on."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def small_cluster(**changes: object) -> ClusterConfig:
    """Two workers on this machine."""
    base: dict[str, object] = {
        "name": "test",
        "workers": 2,
        # Whether something is prepared or relayed would depend on the machine; streaming has its own tests.
        "stream": "off",
        # Short spans on a busy machine: whether they are worth a pull would depend on the moment.
        "worker": {"device": "cpu", "cache_tokens": 4096, "break_even": False},
        "transport": {"arena_bytes": 128 << 20, "pull_timeout_s": 4.0},
        "ray": {"num_cpus": 2},
    }
    return ClusterConfig.model_validate({**base, **changes})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    worker = {"device": "cpu", "cache_tokens": 4096, "break_even": False, "stream_interval": 3}
    with Cluster(small_cluster(worker=worker), agents_hint=PIPELINE) as running:
        yield running
