"""API keys and whose they are. A key file holds digests, never keys:

keys:
  - {tenant: acme, sha256: 9f86d08...}      # sha256 of the key, in hex
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from relay_cluster.serving.settings import ServeSettings
from transport.errors import ConfigError

_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Tenants:
    """Digests of keys, and the tenant of each.

    Args:
        digests: SHA-256 of a key in hex -> tenant. Empty: no key is asked for, and all requests are of one
            nameless tenant, "".

    Raises:
        ConfigError: a name or a digest that is none.
    """

    def __init__(self, digests: Mapping[str, str]) -> None:
        for digest, tenant in digests.items():
            if not _TENANT.fullmatch(tenant):
                raise ConfigError(f'tenant "{tenant}": a name is up to 64 letters, digits, ".", "_" and "-".')
            if not _DIGEST.fullmatch(digest):
                raise ConfigError(
                    f'tenant "{tenant}": sha256 must be 64 hexadecimal digits: '
                    "`printf %s KEY | sha256sum`. Never write the key itself."
                )
        self._digests = dict(digests)

    @property
    def open(self) -> bool:
        """Whether nobody is asked for a key."""
        return not self._digests

    @property
    def names(self) -> frozenset[str]:
        """Whose keys there are."""
        return frozenset(self._digests.values())

    @property
    def label_key(self) -> bytes:
        """Key of the hash under which tenants appear in metrics: the same as long as the API keys are."""
        return hashlib.blake2b("\n".join(sorted(self._digests)).encode(), person=b"relay-metrics").digest()

    def of(self, authorization: str | None) -> str | None:
        """The tenant of an Authorization header; None when its key is not known."""
        if self.open:
            return ""
        kind, _, key = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not key.strip():
            return None
        given = hashlib.sha256(key.strip().encode()).hexdigest()
        found = None
        for digest, tenant in self._digests.items():  # all of them: time must not tell how far one came
            if hmac.compare_digest(digest, given):
                found = tenant
        return found

    @staticmethod
    def load(path: Path) -> Tenants:
        """Read a key file.

        Raises:
            ConfigError: it cannot be read, or is not such a file.
        """
        try:
            data = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read: {type(error).__name__}") from error
        rows: Any = data.get("keys") if isinstance(data, dict) else None
        if not isinstance(rows, list) or not rows:
            raise ConfigError(f"{path}: needs `keys`, a list of {{tenant: ..., sha256: ...}}")
        digests: dict[str, str] = {}
        for row in rows:
            if not isinstance(row, dict) or set(row) != {"tenant", "sha256"}:
                raise ConfigError(f"{path}: every key is {{tenant: NAME, sha256: HEX}}, nothing else")
            digests[str(row["sha256"]).lower()] = str(row["tenant"])
        return Tenants(digests)


def load_tenants(settings: ServeSettings, host: str) -> Tenants:
    """Whose keys are taken.

    Raises:
        ConfigError: a key file that cannot be used; or none, though others than this machine are served.
    """
    if settings.api_keys_file is not None:
        return Tenants.load(Path(settings.api_keys_file))
    if not _is_loopback(host):
        raise ConfigError(
            f"serving on {host} without API keys would let anybody in. Set serve.api_keys_file, or serve on "
            "127.0.0.1."
        )
    return Tenants({})


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
