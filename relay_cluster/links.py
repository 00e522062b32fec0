"""How fast the nodes of a cluster reach each other, and which format keys and values travel in because of it.

One plain socket, one direction at a time, around the ring of nodes: the slowest link decides, since every
segment may be wanted anywhere. Knows nothing of blocks or backends.
"""

from __future__ import annotations

import logging
import socket
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transport.settings import TransportSettings, WireFormat

log = logging.getLogger(__name__)

PROBE_NBYTES: Final = 32 << 20
PROBES: Final = 3
RAW_GBIT_S: Final = 8.0
"""From this link speed on exact bytes are worth their time (a local pull over loopback has 10-15)."""
BF16_GBIT_S: Final = 4.0
"""From this one on half of float32's bytes are enough; below it, 8 bits."""
_CHUNK: Final = 1 << 20
_START_S: Final = 30.0  # what starting an actor may take on a busy node


class Listener:
    """One end of a probe: takes bytes and tells how fast they came. Run on a node of its own."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._results: list[float] = []
        self._done = threading.Event()

    def open(self, timeout_s: float) -> tuple[str, int]:
        """Listen on this node's address for one connection."""
        host = ray.util.get_node_ip_address()
        self._socket.bind((host, 0))
        self._socket.listen(1)
        self._socket.settimeout(timeout_s)
        threading.Thread(target=self._take, name="relay-link-probe", daemon=True).start()
        return host, self._socket.getsockname()[1]

    def result(self, timeout_s: float) -> float:
        """Gbit/s, the median of the probes. Raises TimeoutError."""
        if not self._done.wait(timeout_s) or not self._results:
            raise TimeoutError(f"no probe came through within {timeout_s:g} s.")
        return statistics.median(self._results)

    def send(self, host: str, port: int, timeout_s: float) -> None:
        """The other end: send the probes, each after the one before was taken."""
        data = memoryview(bytes(_CHUNK))
        with socket.create_connection((host, port), timeout=timeout_s) as link:
            for _ in range(PROBES):
                for _ in range(PROBE_NBYTES // _CHUNK):
                    link.sendall(data)
                if link.recv(1) != b"k":
                    return

    def _take(self) -> None:
        try:
            with self._socket, self._socket.accept()[0] as link:
                link.settimeout(self._socket.gettimeout())
                buffer = bytearray(_CHUNK)
                for _ in range(PROBES):
                    first = link.recv_into(buffer)
                    begin, got = time.perf_counter(), first
                    while got < PROBE_NBYTES:
                        n = link.recv_into(buffer, min(_CHUNK, PROBE_NBYTES - got))
                        if n == 0:
                            return
                        got += n
                    self._results.append((got - first) * 8 / 1e9 / (time.perf_counter() - begin))
                    link.sendall(b"k")
        except OSError as fault:
            log.debug("a link probe broke off: %s", fault)
        finally:
            self._done.set()


def probe(sends: str, receives: str, *, timeout_s: float) -> float:
    """Gbit/s from one node to another.

    Args:
        sends, receives: Ray node ids. Insisted on: with both ends on one node nothing would be measured.
        timeout_s: deadline of every step.

    Raises:
        TimeoutError: too slow for its deadline, or it does not work.
    """
    actor: Any = ray.remote(Listener)
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in (sends, receives)]
    sender, receiver = (actor.options(num_cpus=0, scheduling_strategy=place).remote() for place in places)
    try:
        host, port = ray.get(receiver.open.remote(timeout_s), timeout=timeout_s + _START_S)
        sending = sender.send.remote(host, port, timeout_s)
        rate: float = ray.get(receiver.result.remote(timeout_s), timeout=timeout_s + _START_S)
        ray.get(sending, timeout=timeout_s)
    except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as fault:
        raise TimeoutError(str(fault)) from fault
    finally:
        for handle in (sender, receiver):
            ray.kill(handle)
    return rate


def measure_links(nodes: Sequence[str], *, timeout_s: float) -> dict[tuple[str, str], float]:
    """Gbit/s from every node to the next one around the ring.

    Args:
        nodes: Ray node ids, at least two.
        timeout_s: deadline of every step of a probe.

    Raises:
        TimeoutError: a link was too slow for its deadline, or does not work.
    """
    out: dict[tuple[str, str], float] = {}
    for i, here in enumerate(nodes):
        there = nodes[(i + 1) % len(nodes)]
        try:
            out[here, there] = probe(here, there, timeout_s=timeout_s)
        except TimeoutError as fault:
            raise TimeoutError(f"the link from node {here[:8]} to {there[:8]}: {fault}") from fault
    return out


def format_for(gbit_s: float) -> WireFormat:
    """The format in which keys and values travel over a link of that speed."""
    if gbit_s >= RAW_GBIT_S:
        return "raw"
    return "bf16" if gbit_s >= BF16_GBIT_S else "int8"


def choose_wire(
    settings: TransportSettings, nodes: Sequence[str], *, timeout_s: float
) -> tuple[WireFormat, str]:
    """(format, why) for a cluster on `nodes`. Where the links cannot be measured it is raw: slow, but exact.

    timeout_s: deadline of every step of a probe.
    """
    if settings.wire != "auto":
        return settings.wire, "transport.wire"
    if len(nodes) < 2:
        return "raw", "one node"
    try:
        links = measure_links(nodes, timeout_s=timeout_s)
    except TimeoutError as fault:
        log.warning("keys and values travel raw, because the links were not measured: %s", fault)
        return "raw", "the links could not be measured"
    slowest = min(links.values())
    return format_for(slowest), f"the slowest link between nodes has {slowest:.2f} Gbit/s"
