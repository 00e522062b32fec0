"""`relay submit`, plain `ray job submit`, and what KubeRay would deploy, on a standing cluster with Ray's
dashboard."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.test_serving_ray_serve import free_port
from workers.embedded import cache_root

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

ROOT = Path(__file__).resolve().parent.parent.parent
LONGEST_S = 280
FILE = """\
name: jobs
workers: 1
worker: {{device: cpu, cache_tokens: 4096}}
transport: {{arena_bytes: 64MiB}}
ray: {{num_cpus: 4, auth: disabled, dashboard: true, dashboard_port: {port}}}
"""
PIPELINE = """\
agents:
  writer: {prompt: "Write about {topic}.", max_new_tokens: 8}
  critic: {prompt: "Judge: {writer}", max_new_tokens: 8}
examples: [{topic: "rivers"}]
"""


@dataclass(frozen=True)
class Place:
    """A folder to send, and where to."""

    folder: Path
    url: str
    environment: dict[str, str]

    def start(self, *arguments: str, module: str = "relay_cluster") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, module: str = "relay_cluster") -> tuple[int, str, str]:
        with self.start(*arguments, module=module) as process:
            try:
                out, err = process.communicate(timeout=LONGEST_S)
            finally:
                process.kill()
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def status(self, job: str) -> str:
        from ray.job_submission import JobSubmissionClient

        return JobSubmissionClient(self.url).get_job_status(job).value

    def await_status(self, job: str, *wanted: str) -> None:
        deadline = time.monotonic() + 120
        while (found := self.status(job)) not in wanted and time.monotonic() < deadline:
            time.sleep(0.2)  # between two looks at the job
        assert found in wanted


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("send")
    for room in ("relay_cluster", "workers", "transport", "configs"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    port = free_port()
    (folder / "cluster.yaml").write_text(FILE.format(port=port), "utf-8")
    (folder / "pipeline.yaml").write_text(PIPELINE, "utf-8")
    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").symlink_to(cache_root() / "models")
    environment = {**os.environ, "RELAY_CACHE_DIR": str(cache), "PYTHONPATH": ""}
    found = Place(folder, f"http://127.0.0.1:{port}", environment)
    try:
        code, _, err = found.run("up", "cluster.yaml")
        assert code == 0, err
        yield found
    finally:
        found.run("down", "cluster.yaml", "--drain-timeout-s", "0")


def test_a_job_runs_on_the_workers_that_are_up(place: Place) -> None:
    line = ("submit", "pipeline.yaml", "--address", place.url, "--cluster", "cluster.yaml")
    code, out, err = place.run(*line, "--", "--example", "--json", "-")
    assert code == 0, err
    # What it printed has come while it ran: its events, and at last its report.
    assert 'attaching to "jobs", which is up' in out
    report = json.loads(out[out.index("{\n") : out.rindex("}") + 1])
    assert [a["agent"] for a in report["rows"][0]["agents"]] == ["writer", "critic"]
    assert report["cluster"]["workers"] == 1
    assert "SUCCEEDED" in err
    assert place.run("status", "cluster.yaml")[0] == 0, "the cluster stays up"


def test_without_a_standing_cluster_of_its_name_a_job_starts_workers_of_its_own(place: Place) -> None:
    (place.folder / "own.yaml").write_text(FILE.format(port=8265).replace("jobs", "own"), "utf-8")
    line = ("submit", "pipeline.yaml", "--address", place.url, "--cluster", "own.yaml")
    code, out, err = place.run(*line, "--", "--example")
    assert code == 0, err
    assert "starting 1 workers" in out
    assert place.run("status", "own.yaml")[0] == 3


def test_the_exit_status_is_that_of_the_job(place: Place) -> None:
    line = ("submit", "pipeline.yaml", "--address", place.url, "--json", "-")
    code, out, err = place.run(*line, "--", "--input", "topc=rivers")
    assert code == 2, err
    told = json.loads(out)
    assert (told["status"], told["exit_code"]) == ("FAILED", 2)
    assert "topc" in err, "its log, on the other stream"


def test_plain_ray_job_submit(place: Place) -> None:
    line = ("job", "submit", "--address", place.url, "--working-dir", ".", "--")
    run = ("python", "-m", "relay_cluster", "run", "pipeline.yaml", "--example", "--cluster", "cluster.yaml")
    code, out, err = place.run(*line, *run, module="ray.scripts.scripts")
    assert code == 0, err
    assert 'attaching to "jobs", which is up' in out + err


@pytest.mark.parametrize("choice", ["leave", "stop"])
def test_ctrl_c_leaves_the_job_or_stops_it(place: Place, choice: str) -> None:
    job = f"long-{choice}"
    line = ("submit", "pipeline.yaml", "--address", place.url, "--cluster", "cluster.yaml")
    more = ("--submission-id", job, "--on-interrupt", choice)
    # Long enough to be met at work on any machine: the second agent alone has 1,500 tokens to write.
    run = ("--", "--example", "--max-new-tokens", "1500")
    with place.start(*line, *more, *run) as process:
        try:
            assert process.stdout is not None
            for text in process.stdout:
                if "writer started" in text:
                    break
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, err
    if choice == "leave":
        assert f"job {job} goes on" in err
        assert place.status(job) == "RUNNING"
        place.run("job", "stop", "--address", place.url, job, module="ray.scripts.scripts")
    else:
        assert f"job {job} is being stopped" in err
    place.await_status(job, "STOPPED")


def test_what_kuberay_deploys(place: Place) -> None:
    """The manifest's serveConfigV2, through Ray's own command, with paths and ports of this machine."""
    served, key = free_port(), "a-key"
    keys = place.folder / "keys.yaml"
    keys.write_text(f"keys: [{{tenant: me, sha256: {hashlib.sha256(key.encode()).hexdigest()}}}]\n", "utf-8")
    cluster = yaml.safe_load((ROOT / "configs" / "clusters" / "kuberay.yaml").read_text("utf-8"))
    cluster["workers"] = 1
    cluster["ray"]["auth"] = "disabled"
    cluster["serve"]["api_keys_file"] = str(keys)
    file = place.folder / "kuberay.yaml"
    file.write_text(yaml.safe_dump(cluster), "utf-8")
    manifest = (ROOT / "configs" / "k8s" / "rayservice.yml").read_text("utf-8")
    config = yaml.safe_load(next(yaml.safe_load_all(manifest))["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": served}
    (application,) = config["applications"]
    application["args"]["cluster"] = str(file)
    application["runtime_env"] = {"env_vars": {"PYTHONPATH": str(place.folder)}}
    told = place.folder / "serve.yaml"
    told.write_text(yaml.safe_dump(config), "utf-8")
    address = ("--address", place.url)
    code, _, err = place.run("deploy", str(told), *address, module="ray.serve.scripts")
    assert code == 0, err
    ask = {"model": cluster["model"], "prompt": "Rivers", "max_tokens": 4}
    url = f"http://127.0.0.1:{served}/v1/completions"
    deadline = time.monotonic() + 180
    status = 0
    while status != 200 and time.monotonic() < deadline:
        try:
            answer = httpx.post(url, json=ask, headers={"Authorization": f"Bearer {key}"}, timeout=60)
            status = answer.status_code
        except httpx.TransportError:
            status = 0  # not listening yet
        time.sleep(0.0 if status == 200 else 0.5)  # until it is up
    _, state, _ = place.run("status", *address, module="ray.serve.scripts")
    assert status == 200, state
    assert httpx.post(url, json=ask, timeout=60).status_code == 401
    code, _, err = place.run("shutdown", "--yes", *address, module="ray.serve.scripts")
    assert code == 0, err
