"""`relay run` as a user types it: the shipped maths pipeline on GSM8K-shaped rows, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from relay_cluster.report import RunReport
from tests.e2e.conftest import QUESTION

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
RELAY = [sys.executable, "-m", "relay_cluster", "run", "configs/pipelines/maths.yaml"]


def test_rows_of_a_file_end_in_one_report(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.json"
    lines = [{"question": f"{QUESTION} ({i})", "answer": "#### 43"} for i in range(3)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = tmp_path / "out.png"
    options = ["--input-file", str(rows), "--limit", "2", "--max-new-tokens", "18", "--stream", "off"]
    options += ["--json", str(out), "--plot", str(picture)]  # --compare: test_relay.py
    metrics = tmp_path / "relay.prom"
    options += ["--metrics-file", str(metrics), "--metrics-port", "0"]
    done = subprocess.run(
        [*RELAY, *options], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    report = RunReport.from_json(json.loads(out.read_text()))
    assert [[a.agent for a in row.agents] for row in report.rows] == [["solver", "critic", "judge"]] * 2
    for row in report.rows:
        assert len({a.worker for a in row.agents}) == 3
        for agent in row.agents:
            assert agent.fresh_tokens + agent.relayed_tokens == agent.prompt_tokens
            assert agent.compare is None
        assert row["judge"].relayed_tokens > row["critic"].relayed_tokens > 0
    assert picture.stat().st_size > 10_000
    assert "no fallbacks" in done.stdout
    families = text_string_to_metric_families(metrics.read_text("utf-8"))
    samples = [sample for family in families for sample in family.samples]
    relayed = {
        s.labels["agent_edge"]: s.value
        for s in samples
        if s.name == "relay_prompt_tokens_total" and s.labels["source"] == "relayed"
    }
    assert sum(relayed.values()) == report.reused_tokens
    edges = {"question -> solver", "question+solver -> critic", "question+solver+critic -> judge"}
    assert relayed.keys() == edges
    assert sum(s.value for s in samples if s.name == "relay_worker_up") == 3


def _family(process: psutil.Process) -> list[psutil.Process]:
    """The process and everything below it; Ray's own processes included."""
    return [process, *process.children(recursive=True)]


@pytest.mark.long
def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    command = [*RELAY, "--input", f"question={QUESTION}", "--max-new-tokens", "500"]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stderr, stderr=stderr, start_new_session=True)
    watched = psutil.Process(process.pid)
    deadline = time.monotonic() + 120
    while "started on" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    family = _family(watched)
    assert len(family) > 5, "Ray and three workers should be running"
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    _, alive = psutil.wait_procs(family[1:], timeout=30)
    assert [p.name() for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    assert "Traceback" not in log.read_text()
