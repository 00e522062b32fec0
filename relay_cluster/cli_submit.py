"""`relay submit`: run a pipeline as a job of a Ray cluster. Parses, shows and exits; `submitting.py` does the
work."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples, write_json
from relay_cluster.config import ClusterConfig, PipelineConfig

if TYPE_CHECKING:
    from relay_cluster.submitting import Ended, Jobs

EPILOG = examples(
    "relay submit configs/pipelines/demo.yaml --address http://127.0.0.1:8265 -- --example",
    "relay submit pipeline.yaml --cluster cluster.yaml --env RELAY_LOG_LEVEL=INFO -- --input question=Why",
    "relay submit pipeline.yaml --no-wait -- --example",
)


class OnInterrupt(StrEnum):
    """What Ctrl-C does to the job."""

    LEAVE = "leave"
    STOP = "stop"


_Pipeline = Annotated[
    Path, typer.Argument(metavar="PIPELINE.yaml", help="The pipeline to run.", show_default=False)
]
_RunOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- OPTIONS]", help="Options of `relay run`.", show_default=False),
]
_Address = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="Ray's dashboard; default: as for `ray job submit`, or port 8265."
    ),
]
_Cluster = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="Cluster file of the run; one that is up is used."),
]
_WorkingDir = Annotated[
    Path, typer.Option("--working-dir", metavar="FOLDER", help="What the job gets, but for .gitignore's.")
]
_RuntimeEnv = Annotated[
    Path | None,
    typer.Option("--runtime-env", metavar="FILE", help="Ray's runtime environment, YAML or JSON."),
]
_Env = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME=VALUE", help="A variable of the job; several times."),
]
_Id = Annotated[
    str | None, typer.Option("--submission-id", metavar="ID", help="Id of the job; default: Ray's choice.")
]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow its logs until it ends.")]
_OnInterrupt = Annotated[OnInterrupt, typer.Option("--on-interrupt", help="What Ctrl-C does to the job.")]


@command
def submit(
    pipeline: _Pipeline,
    run_options: _RunOptions = None,
    address: _Address = None,
    cluster: _Cluster = None,
    working_dir: _WorkingDir = Path(),
    runtime_env: _RuntimeEnv = None,
    env: _Env = None,
    submission_id: _Id = None,
    wait: _Wait = True,
    on_interrupt: _OnInterrupt = OnInterrupt.LEAVE,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Run a pipeline as a job of a Ray cluster, and follow it. Exit status: the job's own; 130 if stopped."""
    PipelineConfig.load(pipeline)  # said here, and not from a job
    if cluster is not None:
        ClusterConfig.load(cluster)
    from relay_cluster.submitting import Job, Jobs, command_line, default_address, read_runtime_env

    job = Job(
        command_line(working_dir, pipeline, cluster, run_options or ()),
        working_dir,
        read_runtime_env(runtime_env, env or ()),
        submission_id,
    )
    url = address or default_address(os.environ)
    with console.errors().status(f"sending {working_dir.resolve().name} to {url}"):
        jobs = Jobs(url)
        name = jobs.submit(job)
    _tell(f"job {name} at {url}")
    ended = _follow(jobs, name, on_interrupt, quiet=str(json_file) == "-") if wait else jobs.look(name)
    if json_file:
        facts = {"submission_id": name, "address": url, "status": ended.status, "message": ended.message}
        write_json({**facts, "exit_code": ended.exit_code}, json_file)
    if wait:
        _tell(f"job {name}: {ended.status}" + (f" ({ended.message})" if ended.exit_status else ""))
    if ended.exit_status:
        raise typer.Exit(ended.exit_status)


def _follow(jobs: Jobs, name: str, on_interrupt: OnInterrupt, *, quiet: bool) -> Ended:
    """Pass the job's output on; Ctrl-C leaves it or stops it."""

    def write(text: str) -> None:
        out = sys.stderr if quiet else sys.stdout  # standard output is the JSON's then
        out.write(text)
        out.flush()

    try:
        return jobs.follow(name, write)
    except KeyboardInterrupt:
        if on_interrupt is OnInterrupt.STOP:
            jobs.stop(name)
            _tell(f"job {name} is being stopped")
        else:
            _tell(f"job {name} goes on: `ray job logs -f {name}` follows it, `ray job stop {name}` ends it")
        raise typer.Exit(130) from None


def _tell(text: str) -> None:
    console.errors().print(Text(text, style="dim"), soft_wrap=True)
