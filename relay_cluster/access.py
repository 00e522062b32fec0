"""Who may enter the Ray cluster: which token authentication is used, and what to say where there is none.

Ray's own ports are open on every interface of a machine (2.60 has no setting against it), and whoever reaches
them runs code as us. So `ray.auth: auto` means a token, unless somebody has said otherwise:

    ours (no ray.address)    token; one is made in ~/.ray/auth_token where there is none yet
    on this machine          token where one is found, else none, and a warning
    on other machines        token; refused where none is found

RAY_AUTH_MODE in the environment and `ray.auth: disabled` are such words; they are followed, with a warning
where others could come in. `decide` and what it needs know of Ray only these names, and ask nothing of it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

from relay_cluster.config import RaySettings
from transport.errors import ConfigError
from transport.loopback import is_loopback

Mode = Literal["token", "disabled"]

MODE_ENV: Final = "RAY_AUTH_MODE"
TOKEN_ENV: Final = "RAY_AUTH_TOKEN"
TOKEN_PATH_ENV: Final = "RAY_AUTH_TOKEN_PATH"
DASHBOARD_HOST: Final = "127.0.0.1"
MAKE_ONE: Final = (
    "Make a token with `ray get-auth-token --generate`, give every machine the same one (the file "
    f"~/.ray/auth_token, or {TOKEN_ENV}), start Ray there with {MODE_ENV}=token, and set ray.auth: token"
)
_JOB_ENV: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the process of a submitted job, beside RAY_ADDRESS."""
OPEN: Final = "whoever reaches Ray's ports runs code on every machine of the cluster"


@dataclass(frozen=True, slots=True)
class Access:
    """How Ray is to be joined or started. warning: one line for people; empty when there is none."""

    mode: Mode
    warning: str = ""


def inside_job(environment: Mapping[str, str]) -> bool:
    """Whether this process is a submitted job (`ray job submit`, `relay submit`)."""
    return _JOB_ENV in environment


def users_home() -> Path:
    """Home of this user; the root folder for one who has none, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(os.sep)


def ensure_token(environment: Mapping[str, str], home: Path) -> None:
    """Make the token of a cluster of our own, where there is none: as Ray does, but readable by this user
    only (Ray leaves that to the umask).

    Raises:
        ConfigError: the file cannot be written.
    """
    if token_source(environment, home):
        return
    path = Path(environment.get(TOKEN_PATH_ENV) or home / ".ray" / "auth_token")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except OSError as error:
        raise ConfigError(
            f"the token of Ray cannot be written to {path}: {error.strerror}. Set {TOKEN_ENV} to a long "
            "random text, or, where nobody else reaches this machine, ray.auth: disabled."
        ) from error


def read_by_others(source: str) -> bool:
    """Whether other users of this machine may read the token at `source` (see `token_source`)."""
    if source in ("", TOKEN_ENV):
        return False
    try:
        return bool(Path(source).stat().st_mode & 0o077)
    except OSError:
        return False


def token_source(environment: Mapping[str, str], home: Path) -> str:
    """Where Ray would find its token, in its own order; empty when nowhere."""
    if environment.get(TOKEN_ENV):
        return TOKEN_ENV
    path = environment.get(TOKEN_PATH_ENV)
    if path:
        return path if _has_content(Path(path)) else ""
    default = home / ".ray" / "auth_token"
    return str(default) if _has_content(default) else ""


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def is_here(address: str) -> bool:
    """Whether `ray.address` names a cluster by way of this machine."""
    return address in ("auto", "local") or is_loopback(address.rsplit(":", 1)[0])


def use(access: Access) -> None:
    """Have Ray in this process, and in what it starts, do as decided. Ray has read its variables when it was
    imported, and would not look again."""
    os.environ[MODE_ENV] = access.mode
    # As Ray itself does where it turns its authentication on.
    config: Any = getattr(import_module("ray._raylet"), "Config", None)
    if config is not None:
        config.initialize("")


def start_options(settings: RaySettings) -> dict[str, Any]:
    """For `ray.init` of a cluster of our own. The dashboard takes jobs: it is for this machine only."""
    return {
        "num_cpus": settings.num_cpus,
        "include_dashboard": settings.dashboard,
        "dashboard_host": DASHBOARD_HOST,
        "object_store_memory": settings.object_store_bytes,
    }


def decide(settings: RaySettings, environment: Mapping[str, str], home: Path) -> Access:
    """Which authentication to use.

    Raises:
        ConfigError: a token is needed, and there is none.
    """
    address, said = settings.address, environment.get(MODE_ENV, "").lower()
    found = token_source(environment, home)
    if settings.auth == "disabled" or (settings.auth == "auto" and said == "disabled"):
        by = "ray.auth" if settings.auth == "disabled" else MODE_ENV
        return Access("disabled", f"{by} is disabled: {OPEN}. {MAKE_ONE}.")
    insisted = settings.auth == "token" or said == "token"
    if address is None or found:
        return Access("token")  # a cluster of our own gets one from `ensure_token`
    if is_here(address) and not insisted:
        return Access("disabled", f"no Ray token is found: {OPEN}. {MAKE_ONE}.")
    raise ConfigError(
        f'ray.address is "{address}", and this machine has no token to enter it: neither {TOKEN_ENV}, nor '
        f"{TOKEN_PATH_ENV}, nor ~/.ray/auth_token. {MAKE_ONE}. Only where nobody else reaches the network of "
        "these machines: ray.auth: disabled."
    )


def warn_of(access: Access, nodes: Iterable[str]) -> str:
    """What to say once it is known where the nodes are; empty where nobody else could come in.

    Args:
        nodes: addresses of the live ones.
    """
    far = sorted({node for node in nodes if not is_loopback(node)})
    if access.mode == "token" or not far:
        return ""
    return f"Ray on {', '.join(far)} asks nobody for a token: {access.warning}"
