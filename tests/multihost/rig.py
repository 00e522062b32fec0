"""Several hosts on one machine, and a Ray cluster over them.

    host 1 (this process) --- port1 \\
    host 2 ------------------ port2  > switch, a bridge in a namespace of its own
    host 3 ------------------ port3 /

Every host has its own network, processes, shared memory and name; only the file system is common. A host ends
with its first process, and that one when this process ends. Host 1 is where this process is: it must have
been started in namespaces of its own (`python -m tests.multihost`). Knows nothing of models or transports.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from relay_cluster.access import Access, use

ROOT = Path(__file__).parents[2]
TOOLS = ("unshare", "nsenter", "ip", "tc", "mount")
WORLD_ENV = "RELAY_TEST_PRIVATE_NETWORK"
"""Set for what runs in namespaces of its own, and may therefore make devices and routes."""
SUBNET = "10.77.0"
RAY_PORT = 6379
COMMAND_S = 20.0
JOIN_S = 150.0

ENVIRONMENT = {
    # One token for all hosts, as the cluster file asks for; children find it in their environment.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without it shared memory or process-to-process copies might cross what is meant to be a network.
    "UCX_TLS": "tcp",
    # Readers of the transport tests say no address of their own, which alone would keep UCX on loopback.
    "UCX_NET_DEVICES": "all",
    # Else Ray lets everything else on the machine go before its workers.
    "RAY_worker_niceness": "0",
    # A node may take its time on a busy machine.
    "RAY_raylet_start_wait_time_s": "120",
    # A dead host is noticed after about 20 s: later than the tests put a cable back in, or Ray would end a
    # node that was only out of reach.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "10",
    "PYTHONPATH": str(ROOT),
}

_UNSHARE = (
    "unshare",
    "--net",
    "--ipc",
    "--uts",
    "--pid",
    "--mount",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
_SETTLE = (
    # /sys shows the network of whoever mounted it, and UCX looks for its devices there.
    "mount -t sysfs sysfs /sys && mount -t tmpfs -o size=4g tmpfs /dev/shm && ip link set lo up"
    # Names are looked up here or not at all: no name server can be reached, and questions would time out.
    " && {{ echo 127.0.0.1 localhost; for i in 1 2 3; do echo {subnet}.$i host$i; done; }} > /dev/shm/.hosts"
    " && mount --bind /dev/shm/.hosts /etc/hosts && mount --bind /dev/null /etc/resolv.conf"
    " && hostname {name}"
)


def _settle(name: str) -> str:
    return _SETTLE.format(name=name, subnet=SUBNET)


def world_command(command: Sequence[str]) -> list[str]:
    """`command` on host 1, in namespaces of its own that end with it."""
    # The shell stays: it is the first process there, and has to reap whatever is orphaned.
    return [*_UNSHARE, "sh", "-c", f'{_settle("host1")} && "$@"; exit $?', "sh", *command]


def in_private_network() -> bool:
    """Whether this process may lay out hosts: it was started by `python -m tests.multihost`."""
    return os.environ.get(WORLD_ENV) == "1"


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Poll; fail with `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.05)


class Host:
    """One host.

    Attributes:
        number: from 1; address: on the common network.
        init: its first process as seen from here; None: the host on which we are ourselves.
    """

    def __init__(self, number: int, *, here: bool = False) -> None:
        self.number = number
        self.address = f"{SUBNET}.{number}"
        self._first: subprocess.Popen[str] | None = None
        self.init: int | None = None
        if not here:
            self._first = _first_process(f"host{number}")
            self.init = _child_of(self._first)

    @property
    def enter(self) -> list[str]:
        """What stands before a command to run it there."""
        if self.init is None:
            return []
        return ["nsenter", "--target", str(self.init), "--net", "--ipc", "--uts", "--pid", "--mount"]

    @property
    def alive(self) -> bool:
        return self._first is None or self._first.poll() is None

    def run(self, *command: str, timeout_s: float = COMMAND_S) -> str:
        """Run a short command there; its output. Raises CalledProcessError, TimeoutExpired."""
        done = subprocess.run(
            [*self.enter, *command], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} on host {self.number}: {done.stderr.strip()}")
        return done.stdout

    def start(self, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a process there that stays."""
        return subprocess.Popen([*self.enter, *command], **options)

    def kill(self) -> None:
        """End every process of the host at once, and with them its network. Idempotent."""
        if self._first is None:
            raise ValueError("this process is on host 1 itself")
        _end(self._first)


def _first_process(name: str) -> subprocess.Popen[str]:
    """Namespaces with one process, which lives until it is killed or we are gone."""
    script = f"{_settle(name)} && echo ready && exec cat"
    first = subprocess.Popen(
        [*_UNSHARE, "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None  # it is a pipe
    if first.stdout.readline().strip() != "ready":
        first.kill()
        raise RuntimeError(f"{name} did not come up; see above")
    return first


def _end(first: subprocess.Popen[str]) -> None:
    first.kill()  # takes its child along, the first process there, which takes all others along
    first.wait(COMMAND_S)
    for pipe in (first.stdin, first.stdout):
        if pipe is not None:
            pipe.close()


def _child_of(process: subprocess.Popen[str]) -> int:
    (child,) = psutil.Process(process.pid).children()
    return child.pid


class Lan:
    """Hosts on a switch. A context manager; host 1 is this process.

    Args:
        hosts: how many, with host 1.
    """

    def __init__(self, hosts: int = 2) -> None:
        self._stack = ExitStack()
        self.hosts: dict[int, Host] = {}
        self._switch = _first_process("switch")
        self._stack.callback(_end, self._switch)
        self._switch_pid = _child_of(self._switch)
        self._on_switch("ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        self._on_switch("ip", "link", "set", "br0", "up")
        for number in range(1, hosts + 1):
            self.add(number)

    def add(self, number: int) -> Host:
        """Plug a new host in; again after it was killed."""
        host = Host(number, here=number == 1)
        if host.init is not None:
            self._stack.callback(host.kill)
        port, inside = f"port{number}", str(host.init or os.getpid())
        if f"{port}@" in self._on_switch("ip", "-br", "link"):
            self._on_switch("ip", "link", "del", port)  # of the dead host, whose end goes a little later
        self._on_switch("ip", "link", "add", port, "type", "veth", "peer", "name", f"eth{number}")
        # Its end of the cable is made on the switch, and handed over by the number of a process there.
        self._on_switch("ip", "link", "set", f"eth{number}", "netns", inside)
        self._on_switch("ip", "link", "set", port, "master", "br0", "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", f"eth{number}")
        host.run("ip", "link", "set", f"eth{number}", "up")
        # Leads nowhere, but tells programs which address is their own.
        host.run("ip", "route", "add", "default", "dev", f"eth{number}")
        self.hosts[number] = host
        return host

    def cut(self, number: int) -> None:
        """Pull the cable of a host: nothing gets through, nobody is told."""
        self._on_switch("ip", "link", "set", f"port{number}", "down")

    def mend(self, number: int) -> None:
        """Plug it in again."""
        self._on_switch("ip", "link", "set", f"port{number}", "up")

    def _alive(self) -> list[int]:
        return [number for number, host in self.hosts.items() if host.alive]

    def restore(self) -> None:
        """All cables in, all of them fast."""
        for number in self._alive():
            self.mend(number)
            if "tbf" in self._on_switch("tc", "qdisc", "show", "dev", f"port{number}"):
                self._on_switch("tc", "qdisc", "del", "dev", f"port{number}", "root")
            if "tbf" in self.hosts[number].run("tc", "qdisc", "show", "dev", f"eth{number}"):
                self.hosts[number].run("tc", "qdisc", "del", "dev", f"eth{number}", "root")

    def shape(self, rate: str, *, burst: str = "256kb", queue: str = "20ms") -> None:
        """Limit what every host receives to `rate` ("1gbit"), with `burst` bytes and `queue` of waiting."""
        for number in self._alive():
            self._on_switch(
                *("tc", "qdisc", "replace", "dev", f"port{number}", "root", "tbf"),
                *("rate", rate, "burst", burst, "latency", queue),
            )

    def slow_sender(self, number: int, rate: str, *, burst: str = "64kb", queue: str = "50ms") -> None:
        """Limit what one host sends to `rate`; see `shape`."""
        self.hosts[number].run(
            *("tc", "qdisc", "replace", "dev", f"eth{number}", "root", "tbf"),
            *("rate", rate, "burst", burst, "latency", queue),
        )

    def received_bytes(self, number: int) -> int:
        """Bytes that a host has received so far, by the switch's count."""
        path = f"/sys/class/net/port{number}/statistics/tx_bytes"
        return int(self._on_switch("cat", path))

    def _on_switch(self, *command: str) -> str:
        # Only its network (and its view of it): process numbers stay ours.
        enter = ["nsenter", "--target", str(self._switch_pid), "--net"]
        if command[0] == "cat":
            enter.append("--mount")
        done = subprocess.run(
            [*enter, *command], capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def close(self) -> None:
        """End all other hosts and the switch."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RayOnHosts:
    """A Ray cluster with a node on every host of a Lan; the head is on host 1. A context manager.

    Args:
        cpus: that every node offers.
        variables: more environment for everything that Ray starts.
    """

    def __init__(self, lan: Lan, *, cpus: int = 2, variables: dict[str, str] | None = None) -> None:
        self._lan = lan
        self._cpus = cpus
        self._environment = {**os.environ, **ENVIRONMENT, **(variables or {})}
        # Short: it holds sockets, whose paths may have 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="rmh"))
        self.address = f"{lan.hosts[1].address}:{RAY_PORT}"
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        # This process asks the cluster as well, and had imported Ray before `ENVIRONMENT` held.
        use(Access("token"))
        try:
            for number in self._lan.hosts:
                self.join(number)
        except BaseException:
            self.close()
            raise
        return self

    def join(self, number: int) -> None:
        """Start the node of a host, and wait for it."""
        host = self._lan.hosts[number]
        head = ["--head", f"--port={RAY_PORT}", "--include-dashboard=false", f"--temp-dir={self.folder}/ray"]
        how = head if number == 1 else [f"--address={self.address}"]
        command = [*_RAY, "start", *how, f"--node-ip-address={host.address}", f"--num-cpus={self._cpus}"]
        command += ["--num-gpus=0", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
        with (self.folder / f"host{number}.log").open("w") as log:
            node = host.start(*command, env=self._environment, stdout=log, stderr=log, cwd=self.folder)
        self._started.append(node)

        def joined() -> bool:
            if node.poll() is not None:
                raise AssertionError(f"the node of host {number} did not come up:\n{self.log(number)}")
            return host.address in self.nodes()

        wait_until(joined, f"host {number} has joined", JOIN_S)

    def log(self, number: int) -> str:
        """What `ray start` said on a host."""
        path = self.folder / f"host{number}.log"
        return path.read_text() if path.exists() else ""

    def nodes(self) -> set[str]:
        """Addresses of the nodes that Ray holds for alive."""
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(
                self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False
            )
        )
        try:
            return {n["NodeManagerAddress"] for n in state.node_table() if n["Alive"]}
        finally:
            state.disconnect()

    def wait_for_nodes(self, count: int, timeout_s: float = JOIN_S) -> None:
        """Until so many nodes are alive."""
        wait_until(lambda: len(self.nodes()) == count, f"{count} nodes are alive", timeout_s)

    def close(self) -> None:
        """End the nodes. Those on other hosts may be gone already."""
        for process in reversed(self._started):
            family = [process]
            with suppress(psutil.NoSuchProcess):
                family = [*psutil.Process(process.pid).children(recursive=True), process]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait(COMMAND_S)
        self._started.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_RAY = (sys.executable, "-m", "ray.scripts.scripts")
