"""Records of standing clusters, and heads: here other processes in Ray's place, real ones that are really
ended. (With Ray: tests/e2e/test_up.py.)"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from relay_cluster import heads
from relay_cluster.config import ClusterConfig, RaySettings
from relay_cluster.heads import Head, Record
from transport.errors import ConfigError, DeadlineExceeded, RelayError

# A head is left running by who has started it; that is what it is for.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

CHILD = [sys.executable, "-c", "import time; time.sleep(300)"]
STARTS = """
import pathlib, subprocess, sys, time
pathlib.Path({folder!r}, "child").write_text(str(subprocess.Popen({child!r}).pid))
pathlib.Path({folder!r}, "ray_current_cluster").write_text("10.0.0.1:1234")
time.sleep(300)
"""
SETTINGS = RaySettings(auth="disabled")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RELAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(heads.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(heads, "_KILL_S", 0.3)
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A Python script in Ray's place."""

    def command(settings: RaySettings, folder: Path) -> list[str]:
        return [sys.executable, "-c", script.format(folder=str(folder), child=CHILD)]

    monkeypatch.setattr(heads, "_command", command)


def start(timeout_s: float = 60.0) -> tuple[Head, str, str]:
    return heads.start_head(SETTINGS, timeout_s=timeout_s, environment=os.environ)


def test_records_come_back_and_are_forgotten() -> None:
    head = Head(1, 2.0, "/f", "/f/log", "http://127.0.0.1:8265")
    one = Record("a b/c", "10.0.0.1:6379", "relay", "/x.yaml", "token", head)
    two = Record("other", "10.0.0.2:6379", "relay")
    heads.save(one)
    heads.save(two)
    assert heads.load("a b/c") == one
    assert heads.records() == [one, two]
    heads.forget("a b/c")
    heads.forget("a b/c")
    assert heads.load("a b/c") is None


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"schema": "relay.cluster/0"}', '{"schema": 3, "head": 1}']
)
def test_a_record_that_is_none_is_logged_and_no_record(
    text: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("relay_cluster"), "propagate", True)
    heads.records_folder().mkdir(parents=True)
    (heads.records_folder() / "x.json").write_text(text, "utf-8")
    assert heads.load("x") is None
    assert "x.json is no record" in caplog.text


def test_a_head_is_started_known_and_ended_with_all_that_it_started(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    stand_in(monkeypatch, STARTS)
    head, address, auth = start()
    assert (address, auth) == ("10.0.0.1:1234", "disabled")
    assert Path(head.folder).parent == cache
    assert Path(head.folder).stat().st_mode & 0o077 == 0, "of its user only"
    assert heads.is_alive(head)
    child = psutil.Process(int(Path(head.folder, "child").read_text()))
    assert os.getsid(child.pid) == head.pid, "a Ctrl-C in this terminal does not reach it"
    told: list[str] = []
    heads.end_head(head, told.append)
    assert told == [f"ending Ray's head (pid {head.pid})"]
    assert not heads.is_alive(head)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not Path(head.folder).exists()
    heads.end_head(head, told.append)
    assert len(told) == 1, "idempotent"


def test_a_later_process_of_the_same_id_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(CHILD) as other:
        try:
            began = psutil.Process(other.pid).create_time()
            mine = Head(other.pid, began, str(tmp_path / "elsewhere"), "")
            assert heads.is_alive(mine)
            reused = dataclasses.replace(mine, started=began - 100)
            assert not heads.is_alive(reused)
            heads.end_head(reused)
            assert other.poll() is None
        finally:
            other.kill()


def test_a_head_that_ends_while_it_starts_is_an_error_with_what_it_said(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    stand_in(monkeypatch, "import sys; print('no room for {folder}'); sys.exit(3)")
    with pytest.raises(RelayError, match=r"status 3 while it started:\nno room for"):
        start()
    assert list(cache.glob("relay-head-*")) == []


def test_a_head_that_does_not_come_up_is_ended(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    stand_in(monkeypatch, "import time; time.sleep(300)")
    with pytest.raises(DeadlineExceeded, match=r"did not start within 1 s \(runtime.start_timeout_s\)"):
        start(timeout_s=1.0)
    left = [p for p in psutil.Process().children() if p not in before and p.status() != psutil.STATUS_ZOMBIE]
    assert left == []
    assert list(cache.glob("relay-head-*")) == []


def test_a_taken_dashboard_port_is_said_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = RaySettings(auth="disabled", dashboard=True, dashboard_port=port)
        with pytest.raises(ConfigError, match=rf"port {port} .* Set ray.dashboard_port"):
            heads.start_head(settings, timeout_s=5.0, environment=os.environ)
    assert list(cache.glob("relay-head-*")) == []


def test_the_command_and_its_environment() -> None:
    settings = RaySettings(num_cpus=3, dashboard=True, dashboard_port=9999)
    command = heads._command(settings, Path("/f"))
    assert command[3:6] == ["start", "--head", "--block"]
    assert {"--num-cpus=3", "--dashboard-port=9999", "--dashboard-host=127.0.0.1", "--temp-dir=/f"} <= {
        *command
    }
    out = heads._environment({"PYTHONPATH": "a:/b:", "PATH": "/bin", "RAY_ADDRESS": "x"}, "token")
    assert out["PYTHONPATH"] == f"{Path('a').absolute()}:/b"
    assert out["PATH"].startswith(str(Path(sys.executable).parent))
    assert "RAY_ADDRESS" not in out
    assert out["RAY_AUTH_MODE"] == "token"


def test_where_a_file_names_no_address_the_standing_cluster_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig.model_validate({"name": "mine"})
    assert heads.settled(config) == config.ray
    stand_in(monkeypatch, STARTS)
    head, address, _ = start()
    try:
        heads.save(Record("mine", address, "relay", auth="disabled", head=head))
        found = heads.settled(config)
        assert (found.address, found.auth) == (address, "disabled")
        elsewhere = ClusterConfig.model_validate({"name": "mine", "ray": {"address": "10.9.9.9:6379"}})
        assert heads.settled(elsewhere).address == "10.9.9.9:6379"
    finally:
        heads.end_head(head)
    assert heads.settled(config) == config.ray, "its head has ended"
