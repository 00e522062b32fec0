"""Workers of one machine share its cores: real processes, and what they tell each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from transport.helping import usable_cores
from workers.cores import CoreShare

_COMPUTES = """
import sys, time
from pathlib import Path
from workers.cores import CoreShare
share = CoreShare(8, Path(sys.argv[1]))
print("here", flush=True)
sys.stdin.readline()
share.tune()
print("computing", flush=True)
while True:
    with share.computing():
        share.tune()
        time.sleep(0.001)  # a layer
"""


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another worker's process, which computes once it is told to."""
    command = [sys.executable, "-c", _COMPUTES, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        yield process
        process.kill()


def _begin(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline()


def _tuned_to(share: CoreShare, threads: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if share.tune() == threads == torch.get_num_threads():
            return True
        time.sleep(0.02)  # the other one is another process: nothing here tells when it has done it
    return False


def test_alone_a_worker_has_all_cores(tmp_path: Path) -> None:
    share = CoreShare(8, tmp_path)
    with share.computing():
        assert share.tune() == 8
    assert share.beside_others() is None
    assert CoreShare(None, tmp_path).cores == usable_cores() == len(os.sched_getaffinity(0))


def test_one_that_only_waits_takes_none(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    share = CoreShare(8, tmp_path)
    assert share.tune() == 8
    _begin(other)
    assert _tuned_to(share, 4)


def test_an_odd_one_out_still_has_a_core(tmp_path: Path) -> None:
    shares = [CoreShare(2, tmp_path) for _ in range(3)]
    for share in shares:
        share.tune()
    newest = CoreShare(2, tmp_path)
    assert newest.tune() == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_is_killed_or_stopped_gives_its_cores_back(
    tmp_path: Path, other: subprocess.Popen[str], how: signal.Signals
) -> None:
    share = CoreShare(8, tmp_path)
    _begin(other)
    assert _tuned_to(share, 4)
    other.send_signal(how)
    assert _tuned_to(share, 8)
    if how is signal.SIGKILL:
        other.wait(10)
        share._refresh()
        assert len(list(tmp_path.iterdir())) == 1, "its file is left behind"


def test_between_two_steps_a_worker_keeps_its_cores_and_later_does_not(tmp_path: Path) -> None:
    first, second = CoreShare(8, tmp_path), CoreShare(8, tmp_path)
    with first.computing():
        first.tune()
        assert second.tune() == 4
        assert second.beside_others() == 4
    time.sleep(0.05)  # ten times as long as a worker lingers
    assert second.beside_others() == 4, "it may be about to go on"
    assert second.tune() == 8


def test_whoever_leaves_takes_the_file_along(tmp_path: Path) -> None:
    share = CoreShare(8, tmp_path)
    share.close()
    share.close()
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_another_folder_is_refused_and_nothing_there_removed(tmp_path: Path) -> None:
    other, link = tmp_path / "other", tmp_path / "link"
    other.mkdir()
    (other / "precious").write_text("kept")
    link.symlink_to(other)
    with pytest.raises(NotADirectoryError, match="not a folder"):
        CoreShare(8, link)
    CoreShare(8, other).tune()
    assert (other / "precious").read_text() == "kept"
    other.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        CoreShare(8, other)


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests run as one user, who may not be root and then cannot give a folder away.
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        CoreShare(8, tmp_path)
