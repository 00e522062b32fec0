"""NIXL's C++ binding: loading it without side effects, making agents, registering an arena.

This module does not know of peers or transfers.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from functools import cache
from typing import Any, Final

from transport.arena import Arena
from transport.errors import TransportError
from transport.loopback import LOOPBACK_DEVICE

logger = logging.getLogger(__name__)

OWNER_POLL_US: Final = 10_000
"""Longest sleep of the owner agent's progress thread; traffic wakes it at once (4 KiB over tcp: 60-260 us at
any value). Idle CPU of the owner's process, 2 cores, nixl-cu12 1.5.1: 0 us -> a full core, 100 and 1,000 us
-> 1.7-2.3 % of a core, 10,000 us -> 0.7 %, 100,000 us -> 0.1 %."""
# UCX ends the *owner's* process ("Fatal: unexpected error: Endpoint timeout") when the kernel gives up one of
# its connections: 4 s after a cable was pulled with keepalives of a second. Pulls have their own deadlines,
# so the kernel is told to be patient. CONN_NB: else the first word to a host that cannot be reached blocks
# for 72 s, whatever the deadline. The sizes double tcp bandwidth. CUDA_IPC...: else UCX
# 1.23 reads between two processes on one GPU through main memory, at 1.5 GB/s instead of 54 (H100).
_UCX_DEFAULTS: Final = {
    "UCX_TCP_TX_SEG_SIZE": "64K",
    "UCX_TCP_RX_SEG_SIZE": "256K",
    "UCX_TCP_KEEPIDLE": "32000s",
    "UCX_TCP_USER_TIMEOUT": "86400s",
    "UCX_TCP_CONN_NB": "y",
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
}
_MODULES: Final = ("nixl_cu12", "nixl_cu13", "nixl")
INSTALL_HINT: Final = "install it with `pip install nixl-cu12` (or nixl-cu13 for CUDA 13)"


@cache
def load_bindings() -> Any:
    """The NIXL C++ binding of whichever CUDA variant is installed.

    Raises:
        TransportError: none is, or it cannot be loaded.
    """
    _set_ucx_defaults()
    faults: list[str] = []
    raise_exceptions = logging.raiseExceptions
    for name in _MODULES:
        try:
            api = importlib.import_module(f"{name}._api")
        except (ImportError, OSError, RuntimeError) as fault:
            faults.append(f"{name}: {fault}")
            continue
        finally:
            _restore_logging(raise_exceptions)
        return api.nixlBind
    raise TransportError(f"nixl cannot be imported; {INSTALL_HINT}. Tried: {'; '.join(faults)}")


def probe() -> tuple[bool, str]:
    """Whether NIXL is installed and its UCX backend comes up, and why (not)."""
    try:
        bind = load_bindings()
        make_agent(bind, f"relay-probe-{os.getpid()}-{time.time_ns()}", progress=False)
    except TransportError as fault:
        return False, str(fault)
    return True, f"{bind.__name__.split('.')[0]} with UCX"


def _set_ucx_defaults() -> None:
    for name, value in _UCX_DEFAULTS.items():
        os.environ.setdefault(name, value)
    # `import ucxx` sets this behind the user's back, and it makes NIXL's shared-memory path ~5x slower.
    if "ucxx" in sys.modules and os.environ.pop("UCX_RNDV_THRESH", None) is not None:
        logger.info("removed UCX_RNDV_THRESH, which ucxx has set, before creating a NIXL agent")


def _restore_logging(raise_exceptions: bool) -> None:
    # Importing nixl attaches a stdout handler and clears logging.raiseExceptions for the whole process.
    logging.raiseExceptions = raise_exceptions
    nixl_logger = logging.getLogger("nixl")
    nixl_logger.handlers.clear()
    nixl_logger.propagate = True


def binding_faults(bind: Any) -> tuple[type[BaseException], ...]:
    """Every exception type that the binding raises."""
    own = tuple(getattr(bind, n) for n in dir(bind) if n.startswith("nixl") and n.endswith("Error"))
    return (*own, RuntimeError, ValueError)


def make_agent(bind: Any, name: str, *, progress: bool, loopback: bool = True) -> Any:
    """An agent with its UCX backend.

    Args:
        progress: it serves reads.
        loopback: listen where only this machine can connect; else UCX listens on every device that it finds.
            What UCX_NET_DEVICES says goes before.

    Raises:
        TransportError: UCX does not come up.
    """
    config = bind.nixlAgentConfig()
    config.useProgThread = progress
    config.useListenThread = False
    config.pthrDelay = OWNER_POLL_US if progress else 0
    # The puller is guarded by our lock; nothing calls the owner after its metadata has been read.
    config.syncMode = bind.NIXL_THREAD_SYNC_NONE
    try:
        agent = bind.nixlAgent(name, config)
        agent.createBackend("UCX", _ucx_config(loopback))
    except binding_faults(bind) as fault:
        raise TransportError(
            f"nixl: the UCX backend does not come up ({fault}). Check UCX_TLS and UCX_NET_DEVICES, or set "
            "transport.backend: tcp."
        ) from fault
    return agent


def _ucx_config(loopback: bool) -> dict[str, str]:
    if not loopback or "UCX_NET_DEVICES" in os.environ:
        return {}
    return {"engine_config": f"NET_DEVICES={LOOPBACK_DEVICE}"}


def segment_kind(bind: Any, kind: str) -> Any:
    return bind.VRAM_SEG if kind == "cuda" else bind.DRAM_SEG


def register_arena(bind: Any, agent: Any, arena: Arena) -> None:
    region = (arena.base_address(), arena.nbytes, arena.device.index or 0, b"")
    try:
        agent.registerMem(bind.nixlRegDList(segment_kind(bind, arena.device.type), [region]), [])
    except binding_faults(bind) as fault:
        raise TransportError(
            f"nixl: the arena of {arena.nbytes} bytes on {arena.device} cannot be registered: {fault}."
        ) from fault
