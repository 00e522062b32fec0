"""Whether two workers share a kernel, a network namespace and a user: what memory and sockets between
processes need. The host's name says none of that; two containers may share one, and two hosts too.
Imports are cheap, for `relay doctor`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transport import memory

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")


@dataclass(frozen=True, slots=True)
class Host:
    """Where a process runs.

    Attributes:
        boot: the kernel's random id of this boot.
        network: its network namespace, which is where names of abstract sockets are looked up.
        uid: effective user.
    """

    boot: str
    network: str
    uid: int

    def apart(self, other: Host) -> str:
        """What separates the two; empty when nothing does."""
        if self.boot != other.boot:
            return "another host"
        if self.network != other.network:
            return "another network namespace"
        if self.uid != other.uid:
            return "another user"
        return ""


@cache
def this_host() -> Host:
    """Raises OSError: the system does not tell (no Linux, or no /proc)."""
    return Host(_BOOT_ID.read_text("ascii").strip(), os.readlink(_NETWORK), os.geteuid())


def probe() -> tuple[bool, str]:
    """Whether workers of this host can read each other's memory, and why (not)."""
    if sys.platform != "linux":
        return False, f"{sys.platform} has no memfd"
    try:
        this_host()
    except OSError as fault:
        return False, f"this system does not tell hosts apart: {fault}"
    return memory.probe()
