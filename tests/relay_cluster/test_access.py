"""Which authentication of Ray is used, and what is said or refused where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from relay_cluster.access import (
    OPEN,
    decide,
    ensure_token,
    is_here,
    read_by_others,
    start_options,
    token_source,
    warn_of,
)
from relay_cluster.config import ClusterConfig, RaySettings
from relay_cluster.doctor import ray_access
from transport.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
OURS = RaySettings()
HERE = RaySettings(address="auto")
FAR = RaySettings(address="10.77.0.1:6379")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path


def give_token(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("secret")


@pytest.mark.parametrize(
    ("settings", "environment", "has_token", "mode", "warned"),
    [
        (OURS, {}, False, "token", False),
        (OURS, {}, True, "token", False),
        (OURS, {"RAY_AUTH_MODE": "disabled"}, True, "disabled", True),
        (OURS, {"RAY_AUTH_MODE": "token"}, False, "token", False),
        (replace(OURS, auth="disabled"), {}, True, "disabled", True),
        (replace(OURS, auth="disabled"), {"RAY_AUTH_MODE": "token"}, True, "disabled", True),
        (replace(OURS, auth="token"), {"RAY_AUTH_MODE": "disabled"}, False, "token", False),
        (HERE, {}, True, "token", False),
        (HERE, {}, False, "disabled", True),
        (FAR, {}, True, "token", False),
        (FAR, {"RAY_AUTH_TOKEN": "secret"}, False, "token", False),
        (FAR, {"RAY_AUTH_MODE": "disabled"}, False, "disabled", True),
        (replace(FAR, auth="disabled"), {}, False, "disabled", True),
        (replace(FAR, auth="token"), {"RAY_AUTH_TOKEN": "secret"}, False, "token", False),
    ],
)
def test_a_token_is_asked_for_unless_somebody_said_otherwise(
    home: Path, settings: RaySettings, environment: dict[str, str], has_token: bool, mode: str, warned: bool
) -> None:
    if has_token:
        give_token(home)
    access = decide(settings, environment, home)
    assert access.mode == mode
    assert bool(access.warning) == warned
    if warned:
        assert OPEN in access.warning
        assert "ray get-auth-token --generate" in access.warning
        assert "secret" not in access.warning


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        (FAR, {}),
        (replace(FAR, auth="token"), {}),
        (FAR, {"RAY_AUTH_MODE": "token"}),
        (FAR, {"RAY_AUTH_TOKEN": ""}),
        (FAR, {"RAY_AUTH_TOKEN_PATH": "/does/not/exist"}),
        (replace(HERE, auth="token"), {}),
        (HERE, {"RAY_AUTH_MODE": "token"}),
    ],
)
def test_a_cluster_of_others_is_refused_without_a_token(
    home: Path, settings: RaySettings, environment: dict[str, str]
) -> None:
    """And the error says what to do."""
    with pytest.raises(ConfigError) as refused:
        decide(settings, environment, home)
    for part in (str(settings.address), "ray get-auth-token --generate", "RAY_AUTH_TOKEN", "ray.auth: token"):
        assert part in str(refused.value)


def test_where_a_token_is_found_is_rays_own_order(home: Path) -> None:
    assert token_source({}, home) == ""
    give_token(home)
    default = str(home / ".ray" / "auth_token")
    assert token_source({}, home) == default
    other = home / "other"
    other.write_text("x")
    assert token_source({"RAY_AUTH_TOKEN_PATH": str(other)}, home) == str(other)
    assert token_source({"RAY_AUTH_TOKEN_PATH": str(home / "none")}, home) == "", "Ray does not look further"
    assert token_source({"RAY_AUTH_TOKEN": "x", "RAY_AUTH_TOKEN_PATH": str(other)}, home) == "RAY_AUTH_TOKEN"
    other.write_text("")
    assert token_source({"RAY_AUTH_TOKEN_PATH": str(other)}, home) == ""


def test_a_token_is_made_once_and_for_this_user_only(home: Path) -> None:
    ensure_token({"RAY_AUTH_TOKEN": "given"}, home)
    assert not (home / ".ray").exists()
    ensure_token({}, home)
    path = home / ".ray" / "auth_token"
    token = path.read_text()
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    ensure_token({}, home)
    assert path.read_text() == token
    assert not read_by_others(token_source({}, home))
    other = home / "elsewhere" / "token"
    ensure_token({"RAY_AUTH_TOKEN_PATH": str(other)}, home)
    assert other.read_text() not in ("", token)


def test_a_token_that_others_can_read_is_told(home: Path) -> None:
    give_token(home)
    path = home / ".ray" / "auth_token"
    path.chmod(0o644)
    found = ray_access(OURS, {}, home)
    assert (found.ok, found.note) == (False, f"chmod 600 {path}")
    path.chmod(0o600)
    assert ray_access(OURS, {}, home).ok is True
    assert not read_by_others("")
    assert not read_by_others("RAY_AUTH_TOKEN")


def test_a_home_that_cannot_be_written_says_what_to_do(home: Path) -> None:
    (home / ".ray").write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN"):
        ensure_token({}, home)


def test_the_dashboard_is_for_this_machine_only() -> None:
    for dashboard in (True, False):
        options = start_options(replace(OURS, dashboard=dashboard))
        assert (options["include_dashboard"], options["dashboard_host"]) == (dashboard, "127.0.0.1")


_DRIVER = """
import sys
from pathlib import Path
import ray
from relay_cluster.access import use, decide
from relay_cluster.config import RaySettings
from transport.errors import ConfigError

@ray.remote(num_cpus=0)
def ran():
    return "RAN CODE"

try:
    use(decide(RaySettings(address=sys.argv[1], auth=sys.argv[2]), {"RAY_AUTH_MODE": ""}, Path.home()))
    ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
    print(ray.get(ran.remote(), timeout=60))
except Exception as error:
    print("KEPT OUT", type(error).__name__, error)
"""


def join(address: str, auth: str, home: Path) -> str:
    """What a program of somebody with that home says that joins the cluster and runs code on it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, address, auth],
        env={**environment, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr[-2000:]


_OWNER = """
import sys
import ray
from relay_cluster.cluster import Cluster
from relay_cluster.config import ClusterConfig, RaySettings

settings = RaySettings(num_cpus=1, object_store_bytes=80_000_000)
with Cluster(ClusterConfig(ray=settings)) as cluster:
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.ray
@pytest.mark.long
def test_a_cluster_of_our_own_keeps_others_out(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Started as `relay run` does, with a user's home that has no token yet: whoever has the token that it
    made runs code there, who has none or another does not."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER],
        env={**environment, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        assert address, "the cluster did not start"
        assert not read_by_others(token_source({}, home))
        nobody, stranger = tmp_path_factory.mktemp("nobody"), tmp_path_factory.mktemp("stranger")
        ensure_token({}, stranger)
        tries = [("auto", home), ("disabled", nobody), ("token", stranger)]
        with ThreadPoolExecutor(len(tries)) as pool:
            said = list(pool.map(lambda by: join(address, *by), tries))
        assert "RAN CODE" in said[0]
        assert "KEPT OUT" in said[1]
        assert "KEPT OUT" in said[2]
    finally:
        owner.communicate("\n", timeout=60)


def test_what_is_this_machine() -> None:
    assert all(is_here(a) for a in ("auto", "local", "127.0.0.1:6379", "localhost:6379", "[::1]:6379"))
    assert not any(is_here(a) for a in ("10.0.0.1:6379", "head:6379", "ray://head:10001", "0.0.0.0:6379"))


def test_who_could_come_in_is_warned_of(home: Path) -> None:
    open_one = decide(replace(OURS, auth="disabled"), {}, home)
    said = warn_of(open_one, ["10.77.0.2", "10.77.0.1", "10.77.0.1"])
    assert said.startswith("Ray on 10.77.0.1, 10.77.0.2 asks nobody for a token")
    assert OPEN in said
    assert warn_of(open_one, ["127.0.0.1"]) == "", "nobody else reaches it"
    assert warn_of(decide(OURS, {}, home), ["10.77.0.1"]) == ""


def test_cluster_files_of_several_machines_ask_for_a_token(home: Path) -> None:
    """Whatever the environment says."""
    found = 0
    for path in sorted((ROOT / "configs" / "clusters").glob("*.yaml")):
        config = ClusterConfig.load(path)
        if config.nodes or (config.ray.address and not is_here(config.ray.address)):
            found += 1
            assert config.ray.auth == "token", path.name
            with pytest.raises(ConfigError):
                decide(config.ray, {"RAY_AUTH_MODE": "disabled"}, home)
        else:
            assert config.ray.auth != "disabled", path.name
    assert found
