"""What a file says against what is up, who is meant by a name, and what a job is: all without Ray."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relay_cluster import joining, lifecycle, standing
from relay_cluster.config import ClusterConfig, RaySettings
from transport.directory.shard import _NAME
from transport.types import WorkerId
from workers.actor import WorkerSpec


def config(**changes: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"name": "mine", **changes})


def spec(of: ClusterConfig) -> WorkerSpec:
    return standing.worker_spec(of, WorkerId("w0"), of.model, replace(of.transport, wire="raw"), ("s-0",))


def test_what_is_up_is_what_the_file_says() -> None:
    assert standing.differences(config(), [spec(config())]) == []
    assert standing.notes(config(), [spec(config())]) == []


@pytest.mark.parametrize(
    ("changes", "key", "restart"),
    [
        ({"worker": {"cache_tokens": 128}}, "worker.cache_tokens", True),
        ({"transport": {"spill": {"host_bytes": 1 << 30}}}, "transport.spill.host_bytes", True),
        ({"transport": {"wire": "int8"}}, "transport.wire", True),
        ({"model": "other"}, "model", True),
        ({"directory": {"shards": 5}}, "directory.shards", False),
        ({"serve": {"max_waiting": 1}}, None, None),
    ],
)
def test_a_difference_is_named_and_says_what_settles_it(
    changes: dict[str, Any], key: str | None, restart: bool | None
) -> None:
    found = standing.differences(config(**changes), [spec(config()), spec(config())])
    if key is None:  # of who serves, not of what is up
        assert found == []
        return
    assert [(d.key, d.restart) for d in found] == [(key, restart)]
    assert str(found[0]).startswith(f"{key}: ")
    assert "the file says" in str(found[0])
    (note,) = standing.notes(config(**changes), [spec(config())])
    assert key in note


def test_names_are_of_one_cluster_only() -> None:
    assert standing.worker_name("my cluster/1", "w0") == "relay-up-my-cluster-1-w0"
    prefix = standing.directory_prefix("my cluster/1")
    match = _NAME.fullmatch(f"{prefix}-3")
    assert match is not None
    assert match.groups() == (prefix, "3"), "operators find its directory"
    assert standing.numbered(2) == ["w0", "w1"]


def test_peers_of_one_machine_are_reached_over_loopback() -> None:
    far = config(ray={"address": "10.0.0.1:6379"})
    assert spec(config()).host == "127.0.0.1"
    assert spec(far).host is None
    one = standing.worker_spec(config(), WorkerId("w0"), "m", config().transport, (), here=False)
    assert one.host is None


def test_in_a_job_the_jobs_own_cluster_is_meant() -> None:
    alone = RaySettings()
    assert joining.meant(alone, {}) == alone
    assert joining.meant(alone, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}).address == "auto"
    named = RaySettings(address="10.0.0.1:6379")
    assert joining.meant(named, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}) == named


def test_a_cluster_that_was_never_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELAY_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    told: list[str] = []
    assert lifecycle.status(config(), compare=True).health == "down"
    assert not lifecycle.down(config(), drain_timeout_s=1.0, tell=lambda _, text: told.append(text))
    assert told == []
    assert os.listdir(tmp_path / "clusters") == [".mine.lock"]


def test_workers_of_a_standing_cluster() -> None:
    assert lifecycle.worker_count(config(workers=3)) == 3
    assert lifecycle.worker_count(config(serve={"workers": 5})) == 5
