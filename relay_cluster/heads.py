"""What `relay up` leaves behind on this machine: a record of every standing cluster, and the Ray heads that
it has started itself.

A head is `ray start --head --block` in a session of its own, in a fresh folder that only its user can read.
It is ended by its process id, after its start time has been compared, so that nothing else is ever hit.
Records are JSON files in the user's cache folder. Knows nothing of workers.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from relay_cluster.access import DASHBOARD_HOST, MODE_ENV, Mode, decide, ensure_token, users_home
from relay_cluster.config import ClusterConfig, RaySettings
from transport.errors import ConfigError, DeadlineExceeded, RelayError
from workers.embedded import cache_root

log = logging.getLogger(__name__)

SCHEMA: Final = "relay.cluster/1"
_POLL_S: Final = 0.1
_DRAIN_S: Final = 45.0
"""How long a head may take to end: Ray gives its actors up to 30 s."""
_KILL_S: Final = 5.0
_SAME_START_S: Final = 0.5
_LOG_LINES: Final = 12
_FOLDER_PREFIX: Final = "relay-head-"


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head of ours.

    Attributes:
        pid, started: process id of `ray start --block`, and its start (Unix seconds), which tells it from a
            later process of the same id.
        folder: Ray's sessions. log: what it printed.
        dashboard: URL of Ray's dashboard, which takes jobs; "" without one.
    """

    pid: int
    started: float
    folder: str
    log: str
    dashboard: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """A standing cluster as an `up` has left it, with nothing missing or different; see unchanged.py.

    Attributes:
        digest: of the cluster file's settings.
        workers: facts of each: worker, node, device, pid, incarnation.
        shards: names of the directory's, sorted.
    """

    digest: str
    workers: tuple[dict[str, Any], ...]
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """A standing cluster, as this user has started it.

    Attributes:
        name: of the cluster file. address: of Ray. namespace: Ray's.
        file: cluster file that it was started from; "" for the defaults.
        auth: of Ray; where we have started it, what we have chosen then.
        head: None where somebody else has started Ray.
        made: None where nobody knows, or something is not as the file says.
    """

    name: str
    address: str
    namespace: str
    file: str = ""
    auth: Literal["auto", "disabled", "token"] = "auto"
    head: Head | None = None
    made: Made | None = None


def slug(name: str) -> str:
    """The cluster's name as it can stand in names of actors and files."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "cluster"


# --- records ------------------------------------------------------------------------------------------------


def records_folder() -> Path:
    """Folder of the records; not created here."""
    return cache_root() / "clusters"


def _record_path(name: str) -> Path:
    return records_folder() / f"{slug(name)}.json"


def save(record: Record) -> None:
    """Write a record; whoever reads it meanwhile sees the old one or the new one."""
    path = _record_path(record.name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.tmp")
    new.write_text(json.dumps({"schema": SCHEMA, **asdict(record)}, indent=2) + "\n", "utf-8")
    new.replace(path)


def load(name: str) -> Record | None:
    """The record of a cluster; None where there is none, or it cannot be read (which is logged)."""
    return _read(_record_path(name))


def forget(name: str) -> None:
    """Remove a record. Idempotent."""
    _record_path(name).unlink(missing_ok=True)


def records() -> list[Record]:
    """All records, by name."""
    found = (_read(path) for path in sorted(records_folder().glob("*.json")))
    return [record for record in found if record is not None]


def _read(path: Path) -> Record | None:
    try:
        return _record(json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s is no record of a cluster: %s", path, error)
        return None


def _record(data: dict[str, Any]) -> Record:
    if data.pop("schema") != SCHEMA:
        raise ValueError("of another version")
    head, made = data.pop("head"), data.pop("made", None)
    if made is not None:
        made = Made(str(made["digest"]), tuple(made["workers"]), tuple(made["shards"]))
    return Record(**data, head=None if head is None else Head(**head), made=made)


def settled(config: ClusterConfig) -> RaySettings:
    """How to reach the cluster of a file: where it names no address, that of the standing head of its name,
    if one runs on this machine."""
    if config.ray.address is not None:
        return config.ray
    record = load(config.name)
    if record is None or record.head is None or not is_alive(record.head):
        return config.ray
    return replace(config.ray, address=record.address, namespace=record.namespace, auth=record.auth)


# --- heads --------------------------------------------------------------------------------------------------


def start_head(
    settings: RaySettings, *, timeout_s: float, environment: Mapping[str, str]
) -> tuple[Head, str, Mode]:
    """Start a Ray head on this machine that outlives this process.

    Returns:
        (the head, its address, how it is entered).

    Raises:
        ConfigError: the dashboard's port is taken. RelayError: it ended. DeadlineExceeded: it did not come up
            within `timeout_s`. Nothing of it is left then.
    """
    access = decide(settings, environment, users_home())
    if access.mode == "token":
        ensure_token(environment, users_home())
    if settings.dashboard and not _is_free(settings.dashboard_port):
        raise ConfigError(
            f"port {settings.dashboard_port} of {DASHBOARD_HOST} is taken, so Ray's dashboard cannot listen "
            "there. Set ray.dashboard_port to a free one."
        )
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))  # short: Ray puts Unix sockets below it
    log_file = folder / "head.log"
    with log_file.open("wb") as out:
        process = subprocess.Popen(
            _command(settings, folder),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env=_environment(environment, access.mode),
        )
    dashboard = f"http://{DASHBOARD_HOST}:{settings.dashboard_port}" if settings.dashboard else ""
    head = Head(process.pid, _started(process.pid), str(folder), str(log_file), dashboard)
    try:
        return head, _await_address(process, folder, log_file, timeout_s), access.mode
    except BaseException:
        end_head(head)
        raise


def _command(settings: RaySettings, folder: Path) -> list[str]:
    options: dict[str, Any] = {
        "port": 0,
        "temp-dir": folder,
        "object-store-memory": settings.object_store_bytes,
        "include-dashboard": "true" if settings.dashboard else "false",
        "dashboard-host": DASHBOARD_HOST,
        "dashboard-port": settings.dashboard_port,
        # Fixed ports by default, on which a second head of this machine would fail.
        "dashboard-agent-listen-port": _free_port(),
        "ray-client-server-port": _free_port(),
        "num-cpus": settings.num_cpus,
    }
    named = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *named]


def _environment(environment: Mapping[str, str], mode: str) -> dict[str, str]:
    """For the head, and with it for every worker process: nothing in it is relative to a folder."""
    out = {**environment, MODE_ENV: mode, "RAY_USAGE_STATS_ENABLED": "0"}
    out.pop("RAY_ADDRESS", None)
    # Jobs are started as `python ...`, which is to be this one.
    out["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), out.get("PATH", os.defpath)])
    if path := out.get("PYTHONPATH"):
        out["PYTHONPATH"] = os.pathsep.join(os.path.abspath(part) for part in path.split(os.pathsep) if part)
    return out


def _await_address(process: subprocess.Popen[bytes], folder: Path, log_file: Path, timeout_s: float) -> str:
    """Ray writes its address once all its processes run."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if address := (folder / "ray_current_cluster").read_text("utf-8").strip():
                return address
        except FileNotFoundError:
            pass  # not yet
        if process.poll() is not None:
            raise RelayError(
                f"Ray's head ended with status {process.returncode} while it started:\n{_tail(log_file)}"
            )
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"Ray's head did not start within {timeout_s:.0f} s (runtime.start_timeout_s):\n"
                f"{_tail(log_file)}"
            )
        time.sleep(_POLL_S)


def _tail(path: Path) -> str:
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"({path}: {error.strerror})"
    return "\n".join(lines[-_LOG_LINES:]) or "(it printed nothing)"


def is_alive(head: Head) -> bool:
    """Whether the process of that head, and no later one of its id, runs."""
    return _process(head) is not None


def _process(head: Head) -> psutil.Process | None:
    try:
        process = psutil.Process(head.pid)
        same = abs(process.create_time() - head.started) < _SAME_START_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _started(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def end_head(head: Head, tell: Callable[[str], None] = log.info) -> None:
    """End a head and all that it has started, and remove its folder. Idempotent."""
    process = _process(head)
    if process is not None:
        family = _children(process)
        tell(f"ending Ray's head (pid {head.pid})")
        _signal(process, signal.SIGTERM)
        gone, _ = psutil.wait_procs([process], timeout=_DRAIN_S)
        if not gone:
            log.warning("Ray's head (pid %d) did not end within %.0f s and is killed", head.pid, _DRAIN_S)
            family += _children(process)
            _signal(process, signal.SIGKILL)
        # Those that it should have taken along; psutil compares start times before it sends anything.
        _, left = psutil.wait_procs(family, timeout=_KILL_S)
        for child in left:
            _signal(child, signal.SIGKILL)
        psutil.wait_procs([process, *left], timeout=_KILL_S)
    folder = Path(head.folder)
    if folder.name.startswith(_FOLDER_PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        log.debug("process %d is gone already", process.pid)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((DASHBOARD_HOST, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((DASHBOARD_HOST, port))
        except OSError:
            return False
    return True
