"""`relay up`, `status`, `down` and the rolling restart, as commands, on a Ray head of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray

from relay_cluster import Cluster, ClusterConfig, heads
from relay_cluster.unchanged import unchanged
from tests.e2e.conftest import PIPELINE, QUESTION
from tests.e2e.test_serving_ray_serve import free_port, wait_until_up
from workers.embedded import cache_root
from workers.settings import DEFAULT_MODEL

# Long: a head and two workers take half a minute on two cores. Without Ray, what they rest on is tested in
# tests/relay_cluster/test_heads.py, test_standing.py, test_following.py and tests/workers/test_draining.py.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FILE = """\
name: standing
workers: 2
stream: off
worker: {device: cpu, cache_tokens: 4096, break_even: false}
transport: {arena_bytes: 64MiB}
ray: {num_cpus: 4, auth: disabled}
runtime: {max_retries: 0}
"""


class Standing:
    """A cluster file, and `relay` commands on it in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "standing.yaml"
        self.file.write_text(FILE, "utf-8")
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def relay(self, *arguments: str, status: int = 0, file: Path | None = None) -> Any:
        """A command's JSON; where it is refused, what it said."""
        line = [sys.executable, "-m", "relay_cluster", *arguments, str(file or self.file), "--json", "-"]
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=280, check=False, env=self.environment
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if status == 2 else json.loads(done.stdout)

    def workers(self) -> dict[str, dict[str, Any]]:
        return {w["worker"]: w for w in self.relay("status")["workers"]}


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """Records in a folder of the test's own; the converted model from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").symlink_to(cache_root() / "models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAY_CACHE_DIR", str(folder))
        found = Standing(folder)
        try:
            yield found
        finally:
            found.relay("down", "--drain-timeout-s", "0")


@pytest.fixture(scope="module")
def up(standing: Standing) -> dict[str, Any]:
    return standing.relay("up")


def config_of(standing: Standing) -> ClusterConfig:
    return ClusterConfig.load(standing.file)


def test_up_is_healthy_and_a_second_one_does_nothing(standing: Standing, up: dict[str, Any]) -> None:
    assert (up["started"], up["replaced"], up["new_head"]) == (["w0", "w1"], [], True)
    again = standing.relay("up")
    assert (again["started"], again["new_head"], again["differences"]) == ([], False, [])
    assert again["workers"] == up["workers"], "the same processes"
    assert unchanged(config_of(standing)) is not None, "so the second one did not need Ray"
    os.kill(up["workers"][1]["pid"], signal.SIGSTOP)
    try:
        assert unchanged(config_of(standing)) is None, "it does not answer"
    finally:
        os.kill(up["workers"][1]["pid"], signal.SIGCONT)
    told = standing.relay("status")
    assert (told["health"], told["why"], told["differences"]) == ("healthy", [], [])
    assert [w["state"] for w in told["workers"]] == ["up", "up"]
    assert [bool(s) for s in told["shards"].values()] == [True, True]
    # Another cluster of the same Ray, or none, is not taken for this one.
    record = heads.load("standing")
    assert record is not None
    assert record.head is not None
    assert record.head.pid == told["head"]["pid"]
    assert heads.load("another") is None


def test_runs_attach_and_leave_it_up(standing: Standing, up: dict[str, Any]) -> None:
    texts: list[str] = []
    for _ in range(2):
        with Cluster(config_of(standing), agents_hint=PIPELINE, attach=True) as cluster:
            assert cluster.attached
            result = cluster.run(PIPELINE, question=QUESTION, max_new_tokens=24)
            texts.append(result["critic"].text)
            assert result["critic"].relayed_tokens > 0
    assert texts[0] == texts[1]
    assert {w["pid"] for w in up["workers"]} == {w["pid"] for w in standing.workers().values()}
    # What the first run has left in the workers was found by the second.
    assert sum(w["segments"] for w in standing.workers().values()) > 0


def test_up_waits_for_a_worker_that_ray_starts_again(standing: Standing, up: dict[str, Any]) -> None:
    before = standing.workers()
    os.kill(before["w1"]["pid"], signal.SIGKILL)
    done = standing.relay("up")
    assert done["started"] == []
    after = {w["worker"]: w["incarnation"] for w in done["workers"]}
    assert after["w0"] == before["w0"]["incarnation"]
    assert after["w1"] > before["w1"]["incarnation"]
    assert unchanged(config_of(standing)) is not None, "as it is now"


def test_lost_workers_and_shards_are_replaced(standing: Standing, up: dict[str, Any]) -> None:
    before = standing.workers()
    with Cluster(config_of(standing), attach=True):
        ray.kill(ray.get_actor("relay-up-standing-w1"))
        ray.kill(ray.get_actor("relay-directory-up-standing-0"))
    told = standing.relay("status", status=4)
    assert told["health"] == "degraded"
    assert told["why"][0] == "worker w1 is missing"
    assert unchanged(config_of(standing)) is None
    done = standing.relay("up")
    assert done["replaced"] == ["w1"]
    after = standing.workers()
    assert after["w0"]["incarnation"] == before["w0"]["incarnation"]
    assert after["w1"]["incarnation"] > before["w1"]["incarnation"]
    told = standing.relay("status")
    assert (told["health"], len(told["shards"])) == ("healthy", 2)


def test_in_rays_of_others_a_cluster_comes_and_goes_and_ray_stays(
    standing: Standing, up: dict[str, Any], tmp_path: Path
) -> None:
    """The standing cluster's head stands for one that somebody else has started."""
    before = standing.relay("status")
    told = FILE.replace("standing", "guest").replace("workers: 2", "workers: 1")
    told = told.replace("ray: {", f"ray: {{address: '{up['address']}', ")
    file = tmp_path / "guest.yaml"
    file.write_text(told, "utf-8")
    guest = standing.relay("up", file=file)
    assert (guest["new_head"], guest["started"], guest["address"]) == (False, ["w0"], up["address"])
    assert standing.relay("status", file=file)["head"] is None
    greedy = tmp_path / "greedy.yaml"
    text = told.replace("guest", "greedy").replace("workers: 1", "workers: 9")
    greedy.write_text(text.replace("max_retries: 0", "start_timeout_s: 3"), "utf-8")
    said = standing.relay("up", status=2, file=greedy)
    assert "no room for 9 workers" in said
    assert standing.relay("status", status=3, file=greedy)["health"] == "down"
    assert standing.relay("down", file=file)["ended"]
    assert standing.relay("status", status=3, file=file)["health"] == "down"
    after = standing.relay("status")
    assert (after["health"], after["head"]) == ("healthy", before["head"])
    assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]


def test_a_rolling_restart_loses_no_request_and_takes_the_files_settings(
    standing: Standing, up: dict[str, Any]
) -> None:
    before = standing.workers()
    standing.file.write_text(FILE.replace("4096", "3072"), "utf-8")
    done = standing.relay("up")
    assert [d["key"] for d in done["differences"]] == ["worker.cache_tokens"]
    assert done["started"] == []
    answers: list[str] = []
    faults: list[Exception] = []
    stop = threading.Event()
    with Cluster(config_of(standing), agents_hint=PIPELINE, attach=True) as cluster:

        def ask(number: int) -> None:
            while not stop.is_set():
                try:
                    # No request is started again by the executor: runtime.max_retries is 0.
                    result = cluster.run(PIPELINE, question=f"{number}. {QUESTION}", max_new_tokens=12)
                    answers.append(result["critic"].text)
                except Exception as error:  # noqa: BLE001 - asserted below, with all of them
                    faults.append(error)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        done = standing.relay("up", "--restart")
        stop_after = len(answers) + 3  # the new ones answer as well
        deadline = time.monotonic() + 120
        while len(answers) < stop_after and not faults and time.monotonic() < deadline:
            time.sleep(0.1)  # requests go on meanwhile
        stop.set()
        for thread in threads:
            thread.join(120)
    assert not faults, faults
    assert len(answers) >= stop_after
    assert done["replaced"] == ["w0", "w1"]
    assert done["differences"] == []
    after = standing.workers()
    assert all(after[w]["incarnation"] > before[w]["incarnation"] for w in before)
    assert standing.relay("status")["differences"] == []


def test_a_service_over_it_answers_during_a_rolling_restart(standing: Standing, up: dict[str, Any]) -> None:
    before = standing.workers()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    line = [sys.executable, "-m", "relay_cluster", "serve", str(standing.file), "--port", str(port)]
    statuses: list[int] = []
    stop = threading.Event()

    def ask(number: int) -> None:
        body = {"model": DEFAULT_MODEL, "prompt": f"{number}. {QUESTION}", "max_tokens": 8}
        while not stop.is_set():
            statuses.append(httpx.post(f"{url}/v1/completions", json=body, timeout=200).status_code)

    with subprocess.Popen(line, env=standing.environment, stderr=subprocess.PIPE, text=True) as service:
        try:
            wait_until_up(url, service)
            threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
            for thread in threads:
                thread.start()
            done = standing.relay("up", "--restart")
            served = len(statuses)
            deadline = time.monotonic() + 120
            while len(statuses) < served + 6 and time.monotonic() < deadline:
                time.sleep(0.1)  # requests go on meanwhile
            stop.set()
            for thread in threads:
                thread.join(200)
            health = httpx.get(f"{url}/healthz", timeout=30).json()
            service.send_signal(signal.SIGINT)
            _, told = service.communicate(timeout=60)
        finally:
            stop.set()
            service.kill()
    assert set(statuses) == {200}, told
    assert len(statuses) >= served + 6, "the new workers answer too"
    assert done["replaced"] == ["w0", "w1"]
    assert health["workers"] == {"w0": "up", "w1": "up"}
    assert 'attaching to "standing", which is up' in told
    after = standing.workers()
    assert all(after[w]["incarnation"] > before[w]["incarnation"] for w in before)
    assert standing.relay("status")["health"] == "healthy", "the service's end leaves it up"


def test_down_ends_exactly_what_up_has_started(standing: Standing, up: dict[str, Any]) -> None:
    head = standing.relay("status")["head"]
    family = [psutil.Process(head["pid"]), *psutil.Process(head["pid"]).children(recursive=True)]
    assert len(family) > 4, "Ray's processes and our actors"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as bystander:
        try:
            assert standing.relay("down") == {"name": "standing", "ended": True}
            _, left = psutil.wait_procs(family, timeout=30)
            assert left == []
            assert bystander.poll() is None
        finally:
            bystander.kill()
    assert not Path(head["folder"]).exists()
    assert standing.relay("down") == {"name": "standing", "ended": False}
    assert standing.relay("status", status=3)["health"] == "down"
