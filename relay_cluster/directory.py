"""Operators' access to the directory of a cluster that runs already, in this process or in another one.

A cluster's shards are named actors in its Ray namespace, so a second driver finds them there by their prefix.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.exceptions import RayError

from relay_cluster.config import RaySettings
from relay_cluster.joining import visiting
from transport.directory.operate import DirectoryOperator
from transport.directory.shard import create_shard, find_names, shard_name
from transport.directory.view import View
from transport.errors import ConfigError, RelayError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attached:
    """A running directory. prefix: of its shards' names."""

    prefix: str
    operator: DirectoryOperator


@contextmanager
def attached(settings: RaySettings, prefix: str | None = None) -> Iterator[Attached]:
    """Join the Ray cluster that runs at settings.address (None: on this machine), find its directory, and
    leave again.

    Args:
        prefix: of the shards' names; needed where several relay clusters run in one namespace.

    Raises:
        ConfigError: no Ray cluster, no token for it, no directory in the namespace, or several.
        DirectoryUnavailable: its shards do not answer.
    """
    with visiting(settings):
        found = _find(settings.namespace, prefix)
        yield Attached(found, DirectoryOperator.of(find_names()[found]))


def _find(namespace: str, prefix: str | None) -> str:
    known = sorted(find_names())
    if prefix is not None and prefix in known:
        return prefix
    if prefix is None and len(known) == 1:
        return known[0]
    there = ", ".join(known) or "none"
    if prefix is not None:
        raise ConfigError(f'no directory "{prefix}" runs in Ray namespace "{namespace}"; there are: {there}.')
    if known:
        raise ConfigError(f"several directories run there: {there}. Name one with --directory.")
    raise ConfigError(f'no directory runs in Ray namespace "{namespace}". Start a relay cluster first.')


def resize(operator: DirectoryOperator, prefix: str, shards: int, *, drain_s: float | None = None) -> View:
    """Make a running directory have so many shards; see DirectoryOperator.resize.

    Raises:
        ConfigError: fewer than one. RelayError: another resize came first, or a shard does not answer.
    """
    if shards < 1:
        raise ConfigError(f"a directory needs at least one shard, got {shards}.")
    settings = operator.settings

    def start(name: str) -> None:
        # Detached: it must outlive the process that resizes. The cluster ends it by its name.
        create_shard(name, settings, detached=True)

    def end(name: str) -> None:
        try:
            ray.kill(ray.get_actor(name))
        except (RayError, ValueError) as error:
            log.warning("directory shard %s could not be ended: %s", name, error)

    names = [shard_name(prefix, i) for i in range(shards)]
    try:
        return operator.resize(names, start=start, end=end, drain_s=drain_s)
    except RayError as error:
        raise RelayError(f"resize: a shard could not be started: {error}") from error
