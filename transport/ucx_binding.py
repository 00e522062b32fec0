"""Loads ucxx, the Python binding of UCX, without leaving traces in this process's environment.

`import ucxx` sets UCX variables for itself. Those would reach NIXL's own UCX as well and make its
shared-memory path ~5x slower, so they are taken out again and handed to our contexts alone.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from transport.errors import TransportError
from transport.loopback import LOOPBACK_DEVICE

INSTALL_HINT: Final = "install it with `pip install 'relay-cluster[ucx]'` (or ucxx-cu12)"

# Keepalives notice a dead link within seconds; the sizes double tcp bandwidth (as for nixl).
_DEFAULTS: Final = {
    "TCP_TX_SEG_SIZE": "64K",
    "TCP_RX_SEG_SIZE": "256K",
    "TCP_KEEPIDLE": "1s",
    "TCP_KEEPINTVL": "1s",
    "TCP_KEEPCNT": "3",
    "WARN_UNUSED_ENV_VARS": "n",
}
_PREFIX: Final = "UCX_"
_CLOSE_PERIOD_NS: Final = 10_000_000
_CLOSE_ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True)
class Binding:
    """What of ucxx is used.

    Attributes:
        api: its module of plain, blocking classes (contexts, workers, endpoints).
        array: wraps a buffer for `api`.
        config: UCX options for our contexts, without the prefix "UCX_".
    """

    api: Any
    array: Any
    config: dict[str, str]

    def make_worker(self, *, loopback: bool = True) -> Any:
        """A worker with a context of its own.

        Args:
            loopback: take connections of this machine only; else on every device that UCX finds.

        Raises:
            TransportError: UCX does not come up.
        """
        features = (self.api.Feature.TAG, self.api.Feature.AM, self.api.Feature.WAKEUP)
        try:
            # The user's own variables win over our defaults.
            ours = {**self.config, "NET_DEVICES": LOOPBACK_DEVICE} if loopback else self.config
            config = {k: v for k, v in ours.items() if _PREFIX + k not in os.environ}
            worker = self.api.UCXWorker(self.api.UCXContext(config, features))
            worker.init_blocking_progress_mode()
        except (self.api.UCXError, RuntimeError, ValueError) as fault:
            raise TransportError(
                f"ucx: UCX does not come up ({fault}). Check UCX_TLS and UCX_NET_DEVICES, or set "
                "transport.backend: tcp."
            ) from fault
        return worker


@cache
def load_binding() -> Binding:
    """ucxx.

    Raises:
        TransportError: it is not installed, or cannot be loaded.
    """
    before = {name for name in os.environ if name.startswith(_PREFIX)}
    try:
        # Its public face is asyncio only; its own benchmarks drive this module, as we do.
        api = importlib.import_module("ucxx._lib.libucxx")
        arrays = importlib.import_module("ucxx._lib.arr")
    except (ImportError, OSError, RuntimeError) as fault:
        raise TransportError(f"ucxx cannot be imported ({fault}); {INSTALL_HINT}.") from fault
    finally:
        added = {n: os.environ.pop(n) for n in list(os.environ) if n.startswith(_PREFIX) and n not in before}
    config = {**_DEFAULTS, **{name.removeprefix(_PREFIX): value for name, value in added.items()}}
    return Binding(api, arrays.Array, config)


def close_endpoint(endpoint: Any) -> None:
    """Cancel what is in flight and close. `close()` would crash in the next progress call where the endpoint
    has failed (ucxx 0.52); an endpoint that has failed is closed already."""
    if endpoint.alive:
        endpoint.close_blocking(_CLOSE_PERIOD_NS, _CLOSE_ATTEMPTS)


def probe() -> tuple[bool, str]:
    """Whether ucxx is installed and UCX comes up, and why (not)."""
    try:
        binding = load_binding()
        binding.make_worker()
    except TransportError as fault:
        return False, str(fault)
    return True, f"ucxx over UCX {'.'.join(str(n) for n in binding.api.get_ucx_version())}"
