"""Every command of docker-compose.yml that is ours, run outside Docker: head, both workers and service, with
a token, against each other, until the service answers; and the health checks of all of them."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.e2e.test_serving_ray_serve import free_port
from tests.test_compose import COMPOSE, OURS, ROOT, SERVICES, load

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
KEY = "a-key-of-mine"
START_S = 200.0


class Outside:
    """The containers' processes on this machine: their commands with other addresses, ports and secret files,
    and nothing else changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports = {name: free_port() for name in ("6379", "8265", "8000")}
        self._secrets = {
            "ray_auth_token": secrets.token_hex(32),
            "relay_api_keys": f"keys: [{{tenant: me, sha256: {hashlib.sha256(KEY.encode()).hexdigest()}}}]\n",
        }
        assert set(self._secrets) < set(load(COMPOSE)["secrets"])
        for name, text in self._secrets.items():
            (folder / name).write_text(text, "utf-8")
        shutil.copytree(ROOT / "configs", folder / "configs")
        file = folder / "configs" / "clusters" / "compose.yaml"
        file.write_text(self.here(file.read_text("utf-8")), "utf-8")
        # Ray's sockets lie below it, so it has to be short; and nothing else on this machine finds it.
        self.tmp = Path(tempfile.mkdtemp(prefix="rc-"))
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        """A word of a command, or a file, as it is on this machine."""
        text = text.replace("/run/secrets", str(self._folder)).replace("head:", "127.0.0.1:")
        for port, other in self._ports.items():
            text = text.replace(f":{port}", f":{other}").replace(f"port={port}", f"port={other}")
            text = text.replace(f"--port {port}", f"--port {other}")
        # Each container has its own port 8080; here they share one machine.
        return text.replace("--metrics-export-port=8080", "--metrics-export-port=0")

    def environment(self, service: Mapping[str, Any]) -> dict[str, str]:
        given = {key: self.here(str(value)) for key, value in service["environment"].items()}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        base = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return {**base, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.tmp), **given}

    def start(self, name: str) -> None:
        service = SERVICES[name]
        with (self._folder / f"{name}.log").open("wb") as out:
            self.running[name] = subprocess.Popen(
                [self.here(word) for word in service["command"]],
                cwd=self._folder,
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def healthy(self, name: str) -> bool:
        """As Docker asks."""
        service = SERVICES[name]
        kind, *command = service["healthcheck"]["test"]
        assert kind == "CMD"
        done = subprocess.run(
            [self.here(word) for word in command],
            cwd=self._folder,
            env=self.environment(service),
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.returncode == 0

    def await_healthy(self, name: str) -> None:
        deadline = time.monotonic() + START_S
        while not self.healthy(name):
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)  # between two health checks

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text("utf-8", errors="replace")[-3000:]

    def get(self, path: str, key: str | None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.get(f"http://127.0.0.1:{self._ports['8000']}{path}", headers=headers, timeout=30)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"http://127.0.0.1:{self._ports['8000']}{path}"
        return httpx.post(url, headers=headers, json=body, timeout=120)

    def close(self) -> None:
        """End what has our folder for Ray in its environment: no other process has."""
        mine: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_TMPDIR") == str(self.tmp):
                    mine.append(process)
            except psutil.Error:
                continue
        for process in mine:
            if process.pid != os.getpid():
                try:
                    process.kill()
                except psutil.Error:
                    continue
        psutil.wait_procs(mine, timeout=20)
        for process in self.running.values():
            process.wait(20)
        shutil.rmtree(self.tmp, ignore_errors=True)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    found = Outside(tmp_path_factory.mktemp("compose"))
    try:
        yield found
    finally:
        found.close()


def test_the_containers_commands_bring_up_a_service(outside: Outside) -> None:
    """In the order of depends_on."""
    for name in OURS:
        for upstream, how in SERVICES[name].get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert upstream in outside.running
        assert name != "head" or not outside.healthy(name), "a health check that can fail"
        outside.start(name)
        if name != "worker-1":  # both workers are waited for together
            outside.await_healthy(name)
    assert outside.get("/v1/models", None).status_code == 401, "keys are asked for"
    assert outside.get("/v1/models", "another").status_code == 401
    (model,) = outside.get("/v1/models", KEY).json()["data"]
    ask = {
        "model": model["id"],
        "messages": [{"role": "user", "content": "Name a river."}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = outside.post("/v1/chat/completions", ask)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] > 0
    told = yaml.safe_load(outside.get("/healthz", None).text)
    assert told["workers"] == {"w0": "up", "w1": "up"}
    assert "relay_" in outside.get("/metrics", None).text, "what Prometheus asks for, without a key"
