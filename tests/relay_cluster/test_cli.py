"""The `relay` command: what it passes on, what it writes, and how it fails.

Runs go to a fake cluster; the real one is tested end to end elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from relay_cluster import cli
from relay_cluster.report import AgentReport, ClusterReport, MachineReport, RowReport, RunReport
from transport.errors import PromptTooLong

ROOT = Path(__file__).resolve().parents[2]
MATHS = str(ROOT / "configs" / "pipelines" / "maths.yaml")
LOCAL = str(ROOT / "configs" / "clusters" / "local_cpu.yaml")
ONE_SCREEN = 24


def relay(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})


def refused(*arguments: str) -> str:
    """Standard error of a command that must end with status 2, one screen and no trace."""
    result = relay(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.strip().splitlines()
    assert 0 < len(lines) <= ONE_SCREEN
    return result.stderr


@pytest.fixture(autouse=True)
def quiet_logging() -> Iterator[None]:
    """The command attaches handlers to the process's loggers; take them off again."""
    yield
    for name in ("relay_cluster", "workers", "transport"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)


class FakeCluster:
    """Answers at once, and keeps what it was asked."""

    calls: list[dict[str, Any]]
    failure: Exception | None = None

    def __init__(self, config: Any, *, agents_hint: Any, attach: bool, on_event: Any, observer: Any) -> None:
        assert attach, "a cluster that is up is used"
        self.config = config
        on_event("cluster", "fake workers are ready")

    def __enter__(self) -> FakeCluster:
        return self

    def poll(self) -> None:
        """Nobody scrapes the metrics of these runs."""

    def __exit__(self, *error: object) -> None:
        type(self).calls.append({"closed": True})

    def run(self, pipeline: Any, inputs: dict[str, str], **options: Any) -> SimpleNamespace:
        if self.failure:
            raise self.failure
        type(self).calls.append({"inputs": inputs, "pipeline": pipeline, "config": self.config, **options})
        agents = tuple(
            AgentReport(
                agent=name,
                worker="w0",
                node="n",
                model="m",
                method=options["method"],
                prompt_tokens=10,
                fresh_tokens=10,
                relayed_tokens=0,
                ttft_s=0.1,
                text=f"answer of {name}",
            )
            for name in pipeline.order
        )
        machine = {field.name: "" for field in dataclasses.fields(MachineReport)}
        machine |= {"cores": 2, "memory_gib": 1.0, "gpus": ()}
        report = RunReport(
            pipeline=pipeline.name,
            method=options["method"],
            seed=options["seed"],
            max_new_tokens=options["max_new_tokens"],
            machine=MachineReport(**machine),
            cluster=ClusterReport(name="fake", workers=1, backend="inprocess"),
            rows=(RowReport(agents=agents, wall_s=0.1),),
        )
        return SimpleNamespace(report=report)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCluster]:
    class Fake(FakeCluster):
        calls: list[dict[str, Any]] = []  # noqa: RUF012  (one list per test)

    module = ModuleType("relay_cluster.cluster")
    module.Cluster = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "relay_cluster.cluster", module)
    monkeypatch.setattr(cli, "_fetch_models", lambda graph, config: None)
    return Fake


@pytest.fixture
def pipeline_file(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text("agents:\n  a: {prompt: '{q}', max_new_tokens: 9}\n  b: {prompt: '{q} {a}'}\n", "utf-8")
    return path


# --- run ----------------------------------------------------------------------------------------------------


def test_run_passes_everything_on(fake: type[FakeCluster], pipeline_file: Path, tmp_path: Path) -> None:
    out, picture = tmp_path / "runs" / "r.json", tmp_path / "runs" / "r.png"
    result = relay(
        *("run", str(pipeline_file), "--input", "q=a=b", "--cluster", LOCAL, "--method", "naive"),
        *("--compare", "full_prefill", "--repeats", "3", "--max-new-tokens", "5", "--seed", "7"),
        *("--json", str(out), "--plot", str(picture)),
    )
    assert result.exit_code == 0, result.output
    call, closed = fake.calls
    assert closed == {"closed": True}
    assert call["inputs"] == {"q": "a=b"}
    assert (call["method"], call["compare"], call["repeats"]) == ("naive", "full_prefill", 3)
    assert (call["max_new_tokens"], call["seed"]) == (5, 7)
    assert call["config"].name == "local_cpu"
    assert call["pipeline"]["a"].max_new_tokens is None, "the flag wins over the file"
    assert json.loads(out.read_text("utf-8"))["schema"] == "relay.run/1"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "no fallbacks" in result.stdout
    assert "answer of b" in result.stdout


def test_run_takes_defaults_from_the_pipeline(fake: type[FakeCluster], pipeline_file: Path) -> None:
    assert relay("run", str(pipeline_file), "--input", "q=x").exit_code == 0
    call = fake.calls[0]
    assert (call["method"], call["compare"], call["max_new_tokens"], call["seed"]) == ("auto", None, 256, 0)
    assert call["pipeline"]["a"].max_new_tokens == 9


def test_run_example(fake: type[FakeCluster]) -> None:
    assert relay("run", MATHS, "--example").exit_code == 0
    assert "baker" in fake.calls[0]["inputs"]["question"]


def test_run_rows_of_a_file(fake: type[FakeCluster], pipeline_file: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "one", "answer": 1}\n\n{"q": "two"}\n{"q": "three"}\n', "utf-8")
    result = relay("run", str(pipeline_file), "--input-file", str(rows), "--limit", "2", "--json", "-")
    assert result.exit_code == 0, result.output
    assert [call["inputs"] for call in fake.calls[:-1]] == [{"q": "one"}, {"q": "two"}]
    assert len(json.loads(result.stdout)["rows"]) == 2


def test_flag_input_applies_to_every_row(fake: type[FakeCluster], tmp_path: Path) -> None:
    path, rows = tmp_path / "p.yaml", tmp_path / "rows.jsonl"
    path.write_text("agents:\n  a: {prompt: '{q} {style}'}\n", "utf-8")
    rows.write_text('{"q": "one"}\n', "utf-8")
    assert relay("run", str(path), "--input-file", str(rows), "--input", "style=short").exit_code == 0
    assert fake.calls[0]["inputs"] == {"q": "one", "style": "short"}
    assert "unknown input" in refused("run", str(path), "--input-file", str(rows), "--input", "stile=short")


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ('{"q": "x"}\n{"question": "x"}\n', 'rows.jsonl:2 pipeline "p": missing input "q"'),
        ('{"q": "x"}\nnot json\n', "rows.jsonl:2 is not JSON"),
        ("[1, 2]\n", "rows.jsonl:1 must be an object of inputs, got a list"),
        ('{"q": 5}\n', 'rows.jsonl:1 pipeline "p": input "q" must be text, not int'),
        ("\n", "rows.jsonl: has no rows"),
    ],
)
def test_bad_rows(fake: type[FakeCluster], pipeline_file: Path, tmp_path: Path, rows: str, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows, "utf-8")
    assert what in refused("run", str(pipeline_file), "--input-file", str(path))
    assert not fake.calls


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], 'missing input "q" (slot {q} of "a", "b"). Pass it, for example --input q=...'),
        (["--input", "q"], '--input "q" is not NAME=TEXT'),
        (["--input", "q=x", "--input", "q=y"], "given twice"),
        (["--input", "q=x", "--input", "r=y"], 'unknown input "r"'),
        (["--input", "q=x", "--method", "navie"], 'Did you mean "naive"?'),
        (["--input", "q=x", "--compare", "nothing"], 'method "nothing" is not known'),
        (["--input", "q=x", "--compare", "naive"], "only full_prefill is a reference"),
        (["--input", "q=x", "--cluster", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--input-file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--input", "q=x", "--limit", "3"], "--limit counts rows"),
        (["--example"], "has no examples"),
        (["--input", "q=x", "--json", "/proc/no/r.json"], "cannot be written"),
        (["--input", "q=x", "--json", "."], "is a folder"),
        (["--input", "q=x", "--repeats", "0"], "--repeats"),
        (["--input", "q=x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--input", "q=x", "--inptu", "q=x"], "--inptu"),
    ],
)
def test_bad_arguments(fake: type[FakeCluster], pipeline_file: Path, arguments: list[str], what: str) -> None:
    shown = refused("run", str(pipeline_file), *arguments)
    assert what in re.sub(r"\s+", " ", shown)
    assert not fake.calls


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "inputs: [q]\nagents:\n  solver: {prompt: '{q}'}\n  critic: {prompt: '{solvr}'}\n",
            "p.yaml:4 agents.critic.prompt: slot {solvr} names neither an agent nor a declared input. "
            'Did you mean "solver"?',
        ),
        ("agents:\n  a: {prompt: '{b}'}\n  b: {prompt: '{a}'}\n", "in a cycle: "),
        (
            "agents:\n  a: {prompt: '{q}', max_new_tokens: many}\n",
            'max_new_tokens: must be a whole number, got "many"',
        ),
        ("agents: 3\n", "p.yaml:1 agents: must be a mapping (key: value), got 3"),
        ("agents:\n  a: {prompt: '{q}', method: epik}\n", 'method "epik" is not known'),
    ],
)
def test_bad_pipelines(fake: type[FakeCluster], tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text, "utf-8")
    assert what in refused("run", str(path), "--input", "q=x")
    assert what in refused("check", str(path))


def test_zero_workers(fake: type[FakeCluster], pipeline_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("workers: 0\n", "utf-8")
    shown = refused("run", str(pipeline_file), "--input", "q=x", "--cluster", str(path))
    assert "c.yaml:1 workers: a cluster needs at least one worker, got 0" in shown


def test_model_folder_that_is_not_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = tmp_path / "p.yaml"
    path.write_text(f"model: {folder}\nagents:\n  a: {{prompt: '{{q}}'}}\n", "utf-8")
    assert str(folder) in refused("run", str(path), "--input", "q=x")


def test_errors_from_the_cluster(
    fake: type[FakeCluster], pipeline_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        fake, "failure", PromptTooLong("the prompt of a has 9000 tokens; the model takes 8192")
    )
    out = tmp_path / "r.json"
    shown = refused("run", str(pipeline_file), "--input", "q=x", "--json", str(out))
    assert "error: the prompt of a has 9000 tokens" in shown
    assert fake.calls == [{"closed": True}]
    assert not out.exists()


def test_debug_shows_the_trace(pipeline_file: Path) -> None:
    result = relay("run", str(pipeline_file), "--debug")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith('error: pipeline "p": missing input "q"')


def test_fault_of_ours_is_status_1(
    fake: type[FakeCluster], pipeline_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "failure", ZeroDivisionError("oops"))
    result = relay("run", str(pipeline_file), "--input", "q=x")
    assert result.exit_code == 1
    assert "ZeroDivisionError: oops" in result.stderr
    assert "Traceback" not in result.stderr


_SLOW_RUN = """
import sys, time
from types import ModuleType
from relay_cluster import cli

class Cluster:
    def __init__(self, *args, **kwargs): pass
    def poll(self): pass
    def __enter__(self): return self
    def __exit__(self, *error):
        print("stopping", flush=True)
        time.sleep(1)
        print("stopped", flush=True)
    def run(self, *args, **kwargs):
        print("running", flush=True)
        time.sleep(60)

module = ModuleType("relay_cluster.cluster")
module.Cluster = Cluster
sys.modules["relay_cluster.cluster"] = module
cli._fetch_models = lambda graph, config: None
sys.argv = ["relay", "run", sys.argv[1], "--input", "q=x"]
cli.main()
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_the_cluster_first(pipeline_file: Path, number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-c", _SLOW_RUN, str(pipeline_file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        child.send_signal(number)
        assert child.stdout.readline() == "stopping\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)  # impatience must not leave anything behind
        rest, shown = child.communicate(timeout=30)
    assert rest == "stopped\n"
    assert child.returncode == status
    assert "Traceback" not in shown


# --- check --------------------------------------------------------------------------------------------------


def test_check_shipped_configs(tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    result = relay("check", str(ROOT / "configs"), "--json", str(out))
    assert result.exit_code == 0, result.output
    assert all(entry["ok"] for entry in json.loads(out.read_text("utf-8")))


def test_check_says_everything_about_every_file(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("workers: 1\n", "utf-8")
    (tmp_path / "one.yaml").write_text("workers: 0\nnmae: x\n", "utf-8")
    (tmp_path / "two.yaml").write_text("agents: {}\n", "utf-8")
    (tmp_path / "prometheus.yml").write_text("scrape_configs: []\n", "utf-8")
    result = relay("check", str(tmp_path))
    assert result.exit_code == 2
    shown = result.stderr
    assert "one.yaml:1 workers" in shown
    assert 'one.yaml:2 nmae: is not a setting of this file. Did you mean "name"?' in shown
    assert "two.yaml:1 agents: a pipeline needs at least one agent" in shown
    assert "prometheus" not in shown
    assert "skipped" in result.stdout


def test_check_of_a_foreign_file_by_name(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("colour: red\n", "utf-8")
    assert "neither a cluster, a pipeline nor a profile" in refused("check", str(path))
    assert "no such file" in refused("check", str(tmp_path / "nowhere.yaml"))


# --- the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[], ["run"], ["check"], ["doctor"], ["model", "list"], ["model", "import"], ["model", "info"]]
)
def test_help_has_examples(command: list[str]) -> None:
    result = relay(*command, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"$ relay {' '.join(command)}".strip() in result.stdout


def test_version() -> None:
    result = relay("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"relay \d+\.\d+\.\d+\n", result.stdout)


def test_doctor_tells_what_and_why() -> None:
    result = relay("doctor", "--json", "-")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    topics = {finding["topic"] for finding in facts["findings"]}
    assert topics >= {"gpus", "nixl", "ucx transports", "flash-attn", "triton", "ray", "embedded model"}
    choices = {choice["topic"]: choice for choice in facts["choices"]}
    assert set(choices) == {"device", "dtype", "attention", "transport"}
    assert choices["transport"]["value"] in ("nixl", "tcp", "shm, nixl", "shm, tcp")
    assert all(choice["note"] for choice in choices.values() if choice["topic"] != "attention")


def test_doctor_warns_of_a_cluster_that_asks_for_no_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a cluster of several machines it says what to do; where there is a token, where it is taken from."""
    from relay_cluster import doctor

    monkeypatch.setattr(doctor, "_NIXL_PROBE", "raise SystemExit(1)")  # not what is asked for here
    monkeypatch.setattr(doctor, "_TORCH_PROBE", "raise SystemExit(1)")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)

    def access(*options: str) -> dict[str, Any]:
        result = relay("doctor", "--json", "-", *options)
        assert result.exit_code == 0, result.output
        (found,) = (f for f in json.loads(result.stdout)["findings"] if f["topic"] == "ray access")
        return found

    two_nodes = str(ROOT / "configs" / "clusters" / "two_nodes.yaml")
    refused = access("--cluster", two_nodes)
    assert refused["ok"] is False
    assert "ray get-auth-token --generate" in refused["note"]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert access("--cluster", two_nodes) == {
        "topic": "ray access",
        "value": "with the token of RAY_AUTH_TOKEN",
        "ok": True,
        "note": "",
    }
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert access()["ok"] is False
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert access()["ok"] is True


def test_doctor_survives_a_broken_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from relay_cluster import doctor

    monkeypatch.setattr(doctor, "_NIXL_PROBE", "import nothing_like_this")
    monkeypatch.setattr(doctor, "_TORCH_PROBE", "import os; os.abort()")
    diagnosis = doctor.diagnose()
    choices = {choice.topic: choice for choice in diagnosis.choices}
    assert choices["transport"].value in ("tcp", "shm, tcp")
    assert choices["device"].value == "cpu"


def test_model_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    embedded, model = ModuleType("workers.embedded"), ModuleType("workers.model")
    embedded.import_embedded = lambda progress: progress(1.0, "ready") or tmp_path / "m"  # type: ignore[attr-defined]
    row = {"name": "m", "path": str(tmp_path), "ready": False, "bytes": 270e6, "embedded": True}
    model.list_models = lambda: [row]  # type: ignore[attr-defined]
    model.describe = lambda name: {"name": name, "layers": 30, "refusal": None}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "workers.embedded", embedded)
    monkeypatch.setitem(sys.modules, "workers.model", model)
    assert str(tmp_path / "m") in relay("model", "import").stdout
    assert "not imported yet" in relay("model", "list").stdout
    shown = relay("model", "info", "some/model").stdout
    assert re.search(r"can be relayed\s+yes", shown)
    assert json.loads(relay("model", "info", "x", "--json", "-").stdout)["layers"] == 30
