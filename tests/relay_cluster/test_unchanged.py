"""Whether a cluster is as `relay up` left it, told without Ray: every doubt is a no. Workers are played by
real sockets. (Real workers: tests/e2e/test_up.py.)"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from relay_cluster import heads
from relay_cluster.config import ClusterConfig
from relay_cluster.heads import Head, Record
from relay_cluster.unchanged import made, unchanged
from workers.pulse import Pulse, ask_pulse, pulse_path, start_pulse

CONFIG = ClusterConfig.model_validate({"name": "still", "workers": 2})
SHARDS = ("s-1", "s-0")


@dataclass(frozen=True)
class Info:
    worker: str
    incarnation: int
    node: str = "n"
    device: str = "cpu"
    pid: int = 1


@dataclass
class Standing:
    """A record, Ray's port, and two workers that tell what `told` says."""

    folder: str
    record: Record
    port: socket.socket
    told: dict[str, dict[str, Any]]
    pulses: list[Pulse] = field(default_factory=list[Pulse])


def facts(incarnation: int) -> dict[str, Any]:
    return {"incarnation": incarnation, "accepting": True, "shards": sorted(SHARDS), "shards_up": 2}


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standing]:
    with tempfile.TemporaryDirectory(prefix="p") as folder, socket.create_server(("127.0.0.1", 0)) as port:
        monkeypatch.setenv("RELAY_CACHE_DIR", folder)
        head = Head(os.getpid(), psutil.Process().create_time(), folder, f"{folder}/log")
        done = made(CONFIG, [Info("w0", 11), Info("w1", 12)], SHARDS)
        record = Record("still", f"127.0.0.1:{port.getsockname()[1]}", "relay", head=head, made=done)
        heads.save(record)
        found = Standing(folder, record, port, {"w0": facts(11), "w1": facts(12)})
        for name in found.told:
            pulse = start_pulse(folder, name, lambda name=name: found.told[name])
            assert pulse is not None
            found.pulses.append(pulse)
        yield found
        for pulse in found.pulses:
            pulse.close()


def test_what_is_as_it_was_is_told_without_ray(standing: Standing) -> None:
    assert unchanged(CONFIG) == standing.record == heads.load("still"), "written and read alike"


@pytest.mark.parametrize(
    "news",
    [
        {"incarnation": 99},  # Ray has restarted it
        {"accepting": False},  # it is being replaced
        {"shards_up": 1},  # a shard is down
        {"shards": ["s-0", "s-1", "s-2"], "shards_up": 3},  # `relay directory resize`
    ],
)
def test_a_worker_that_is_not_what_it_was_is_a_doubt(standing: Standing, news: dict[str, Any]) -> None:
    standing.told["w1"].update(news)
    assert unchanged(CONFIG) is None


def test_a_worker_that_is_gone_is_a_doubt(standing: Standing) -> None:
    standing.pulses[0].close()
    assert unchanged(CONFIG) is None


def test_a_dead_process_s_socket_is_silent_and_replaced(standing: Standing) -> None:
    path = pulse_path(standing.folder, "w7")
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert path.exists()
    assert ask_pulse(path, timeout_s=5.0) is None
    pulse = start_pulse(standing.folder, "w7", lambda: {"a": 1})
    assert pulse is not None
    standing.pulses.append(pulse)
    assert ask_pulse(path, timeout_s=20.0) == {"a": 1}


def test_a_worker_that_cannot_tell_is_a_doubt_and_goes_on(standing: Standing) -> None:
    held = standing.told.pop("w0")
    assert ask_pulse(pulse_path(standing.folder, "w0"), timeout_s=20.0) is None
    standing.told["w0"] = held
    assert unchanged(CONFIG) is not None


def test_a_worker_that_stands_still_is_a_doubt_within_a_deadline(standing: Standing) -> None:
    path = pulse_path(standing.folder, "w9")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen(1)
        assert ask_pulse(path, timeout_s=0.05) is None


def test_another_file_another_head_or_nobody_listening_is_a_doubt(
    standing: Standing, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unchanged(ClusterConfig.model_validate({"name": "still", "workers": 3})) is None
    assert unchanged(ClusterConfig.model_validate({"name": "other"})) is None
    record = standing.record
    assert record.head is not None
    for wrong in (
        replace(record, head=None),
        replace(record, made=None),
        replace(record, head=replace(record.head, started=1.0)),
    ):
        heads.save(wrong)
        assert unchanged(CONFIG) is None
    heads.save(record)
    with monkeypatch.context() as inside:
        inside.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
        assert unchanged(CONFIG) is None
    standing.port.close()
    assert unchanged(CONFIG) is None


def test_no_socket_where_its_path_would_be_too_long(tmp_path: Path) -> None:
    assert start_pulse(str(tmp_path / ("x" * 120)), "w0", dict) is None
    assert start_pulse("", "w0", dict) is None


def test_it_needs_neither_ray_nor_torch() -> None:
    code = "import sys, relay_cluster.cli_up; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
