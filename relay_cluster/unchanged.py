"""Whether a standing cluster is as the last `relay up` of the same file left it, told without Ray: importing
Ray and joining a cluster takes longer than everything else that a second `up` does.

    the file is the one of the record -> Ray's head lives and listens -> every worker says over its socket
    that it is the same process, takes requests, and reaches every shard of the directory that was there

Any doubt is a no: then Ray is asked, as ever. Imports neither Ray nor torch.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from relay_cluster import __version__, heads
from relay_cluster.access import inside_job
from relay_cluster.config import ClusterConfig
from relay_cluster.heads import Made, Record
from workers.pulse import ask_pulse, pulse_path

WORKER_FACTS: Final = ("worker", "node", "device", "pid", "incarnation")
_ASK_S: Final = 1.5
"""For a worker to answer; it asks the directory's shards meanwhile."""
_CONNECT_S: Final = 0.5


def made(config: ClusterConfig, workers: Sequence[Any], shards: Iterable[str]) -> Made:
    """What is to be written down of a cluster that is up now.

    Args:
        workers: what each tells of itself (`workers.actor.WorkerInfo`).
    """
    facts = tuple({name: getattr(one, name) for name in WORKER_FACTS} for one in workers)
    return Made(_digest(config), facts, tuple(sorted(shards)))


def unchanged(config: ClusterConfig) -> Record | None:
    """The record of the cluster of this file, if it is up and as it was made; None where that is not sure."""
    record = heads.load(config.name)
    if record is None or record.head is None or record.made is None:
        return None
    if config.ray.address is not None or inside_job(os.environ) or record.made.digest != _digest(config):
        return None
    if not heads.is_alive(record.head) or not _listens(record.address):
        return None
    known, folder = record.made, record.head.folder
    with ThreadPoolExecutor(len(known.workers) or 1) as threads:
        answers = threads.map(lambda one: _same(one, folder, known.shards), known.workers)
        return record if known.workers and all(answers) else None


def _digest(config: ClusterConfig) -> str:
    """Of everything that the file says, and of the program that read it."""
    return hashlib.sha256(f"{__version__}\0{config.model_dump_json()}".encode()).hexdigest()


def _listens(address: str) -> bool:
    """Whether Ray's control store takes connections."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def _same(worker: dict[str, Any], folder: str, shards: tuple[str, ...]) -> bool:
    """Whether a worker is the process that it was, and at work."""
    told = ask_pulse(pulse_path(folder, worker["worker"]), timeout_s=_ASK_S)
    wanted = {"incarnation": worker["incarnation"], "accepting": True, "shards": list(shards)}
    return told is not None and {**told, **wanted, "shards_up": len(shards)} == told
