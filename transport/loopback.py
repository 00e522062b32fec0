"""Which addresses only this machine can reach. Cheap imports: the doctor asks as well."""

from __future__ import annotations

import ipaddress
from typing import Final

LOOPBACK_DEVICE: Final = "lo"
"""Network device of the loopback addresses, as Linux and UCX name it."""


def is_loopback(host: str) -> bool:
    """Whether nobody beyond this machine can reach `host`; a name counts only when it is "localhost"."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
