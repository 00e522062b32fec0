"""Entering a Ray cluster, or starting one that ends with this process: which address, which token, and what
is said about both. Knows nothing of workers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import ray
from ray.exceptions import RayError

from relay_cluster.access import (
    decide,
    ensure_token,
    inside_job,
    start_options,
    use,
    users_home,
    warn_of,
)
from relay_cluster.config import RaySettings
from transport.errors import ConfigError, RelayError

log = logging.getLogger(__name__)

Tell = Callable[[str], None]


def meant(settings: RaySettings, environment: Mapping[str, str]) -> RaySettings:
    """The settings with the address that is meant: in a submitted job "a cluster of our own" is the one that
    the job was sent to."""
    if settings.address is None and inside_job(environment):
        return replace(settings, address="auto")
    return settings


def join(settings: RaySettings, tell: Tell) -> None:
    """Join the Ray cluster at settings.address; without one, start a cluster that ends with `ray.shutdown`.

    Raises:
        ConfigError: a token is needed, and there is none. RelayError: Ray did not let us in or did not start.
    """
    settings = meant(settings, os.environ)
    access = decide(settings, os.environ, users_home())
    if access.mode == "token" and settings.address is None:
        ensure_token(os.environ, users_home())
    # Set explicitly: token authentication turns itself on where a token file lies about.
    use(access)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    tell("joining Ray" if settings.address else "starting Ray")
    options: dict[str, Any] = {"namespace": settings.namespace, **_QUIET}
    if settings.address:
        options["address"] = settings.address
    else:
        # "local": else Ray joins one that somebody has started on this machine, and refuses the options.
        options.update(address="local", **start_options(settings))
    try:
        ray.init(**options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        where = f"at {settings.address}" if settings.address else "here"
        raise RelayError(f"Ray could not be started {where}: {error}") from error
    nodes = (str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"])
    if warning := warn_of(access, nodes):
        log.warning("%s", warning)
        tell(f"security: {warning}")


_QUIET: Final[dict[str, Any]] = {
    "logging_level": logging.ERROR,
    "log_to_driver": False,
    "configure_logging": False,
}


@contextmanager
def visiting(settings: RaySettings) -> Iterator[None]:
    """Join a Ray cluster that runs, and leave it again; nothing is started where there is none. A process
    that has joined one already stays in it.

    Raises:
        ConfigError: no cluster there, or no token for it.
    """
    if ray.is_initialized():
        yield
        return
    here = replace(settings, address=settings.address or "auto")
    use(decide(here, os.environ, users_home()))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=here.address, namespace=settings.namespace, **_QUIET)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        where = settings.address or "this machine"
        raise ConfigError(
            f"no running Ray cluster was found at {where}: {error}. Start a relay cluster first, or name its "
            "file with --cluster."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
