"""The `relay` command: it parses, checks, shows and exits; other modules do the work.

Exit status: 0 done; 2 something that the user can put right, explained on one screen; 1 a fault of ours; 130
Ctrl-C. torch, ray and transformers are imported inside the commands that need them, so `relay check` and
`--help` stay quick.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from relay_cluster import (
    __version__,
    cli_bench_directory,
    cli_bench_serve,
    cli_board,
    cli_decode,
    cli_directory,
    cli_faults,
    cli_kernels,
    cli_link,
    cli_profile,
    cli_pull,
    cli_serve,
    cli_simulate,
    cli_stream,
    cli_stream_faults,
    cli_submit,
    cli_transfer,
    cli_up,
    console,
)
from relay_cluster.cli_bench import bench_app
from relay_cluster.cli_common import (
    HELP,
    DebugOption,
    JsonOption,
    check_writable,
    command,
    examples,
    write_json,
)
from relay_cluster.cli_model import model_app
from relay_cluster.config import ClusterConfig, PipelineConfig, check_file, kind_of
from relay_cluster.pipeline import Pipeline
from transport.errors import ConfigError, PipelineError
from workers.methods import parse_method

if TYPE_CHECKING:
    from relay_cluster.doctor import Finding
    from relay_cluster.report import RunReport

app = typer.Typer(
    name="relay",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings=HELP,
    help="Agents on a cluster relay the KV cache of decoded text instead of prefilling it again.",
    epilog=examples(
        "relay run configs/pipelines/maths.yaml --example",
        "relay check configs/",
        "relay doctor",
    ),
)
app.add_typer(model_app, name="model", context_settings=HELP)
app.add_typer(bench_app, name="bench", context_settings=HELP)
bench_app.command("transfer", epilog=cli_transfer.EPILOG)(cli_transfer.transfer)
bench_app.command("decode", epilog=cli_decode.EPILOG)(cli_decode.decode)
bench_app.command("kernels", epilog=cli_kernels.EPILOG)(cli_kernels.kernels)
bench_app.command("directory", epilog=cli_bench_directory.EPILOG)(cli_bench_directory.directory)
bench_app.command("faults", epilog=cli_faults.EPILOG)(cli_faults.faults)
bench_app.command("link", epilog=cli_link.EPILOG)(cli_link.link)
bench_app.command("pull", epilog=cli_pull.EPILOG)(cli_pull.pull)
bench_app.command("stream", epilog=cli_stream.EPILOG)(cli_stream.stream)
bench_app.command("stream-faults", epilog=cli_stream_faults.EPILOG)(cli_stream_faults.stream_faults)
bench_app.command("serve", epilog=cli_bench_serve.EPILOG)(cli_bench_serve.serve)
app.command("profile", epilog=cli_profile.EPILOG)(cli_profile.profile)
app.command("serve", epilog=cli_serve.EPILOG)(cli_serve.serve)
app.command("dashboard", epilog=cli_board.DASHBOARD_EPILOG)(cli_board.dashboard)
app.command("top", epilog=cli_board.TOP_EPILOG)(cli_board.top)
app.command("simulate", epilog=cli_simulate.EPILOG)(cli_simulate.simulate)
app.command("submit", epilog=cli_submit.EPILOG)(cli_submit.submit)
cli_directory.add_to(app)
cli_up.add_to(app)


def main() -> None:
    """Entry point of `relay`."""
    app()


# --- run ----------------------------------------------------------------------------------------------------


# Options of `run`; what they stand for where they are not given is said at its signature.
_Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="NAME=TEXT", help="One input; may be given several times."),
]
_InputFile = Annotated[
    Path | None,
    typer.Option(
        "--input-file", metavar="FILE.jsonl", help="One JSON object of inputs per line; a run each."
    ),
]
_Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Take the first N rows of the file.")]
_Example = Annotated[bool, typer.Option("--example", help="Take the first of the pipeline's own examples.")]
_Cluster = Annotated[
    Path | None, typer.Option("--cluster", metavar="FILE", help="Cluster to run on; default: this machine.")
]
_Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="NAME",
        help="Reuse method: auto, auto:fast, auto:strict, NAME or NAME:key=value+key=value; "
        "default: the pipeline's, or auto.",
    ),
]
_Compare = Annotated[
    str | None,
    typer.Option("--compare", metavar="NAME", help="Run each prompt under this method too (full_prefill)."),
]
_Repeats = Annotated[
    int, typer.Option("--repeats", min=1, help="Timed samples of each method for --compare, at least 2.")
]
_MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="Limit of every agent's answer.")
]
_Seed = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Seed of sampled decoding.")]
_MetricsPort = Annotated[
    int | None,
    typer.Option(
        "--metrics-port", min=0, max=65535, metavar="N", help="Serve /metrics on 127.0.0.1; 0: a free port."
    ),
]
_MetricsFile = Annotated[
    Path | None,
    typer.Option("--metrics-file", metavar="FILE.prom", help="Write metrics as Prometheus text, row by row."),
]
_Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")]
_Stream = Annotated[
    Literal["off", "auto", "exact", "relay"] | None,
    typer.Option(
        "--stream",
        help="Prepare prompts while the agents that they contain still write [the file's, or off]. "
        "auto: compute what idle workers have time for, relay the rest; exact: relay nothing, the answers "
        "are full prefill's; relay: pull what is to be relayed as it is made, the answers are the method's.",
    ),
]


@app.command(
    epilog=examples(
        'relay run configs/pipelines/maths.yaml --input question="What is 17 * 23?"',
        "relay run configs/pipelines/code.yaml --example --method naive --compare full_prefill",
        "relay run configs/pipelines/maths.yaml --input-file rows.jsonl --json runs/m.json --plot runs/m.png",
    ),
)
@command
def run(
    pipeline: Annotated[
        Path, typer.Argument(metavar="PIPELINE.yaml", help="The pipeline to run.", show_default=False)
    ],
    inputs: _Inputs = None,
    input_file: _InputFile = None,
    limit: _Limit = None,
    example: _Example = False,
    cluster: _Cluster = None,
    method: _Method = None,
    compare: _Compare = None,
    repeats: _Repeats = 3,
    max_new_tokens: _MaxNewTokens = None,
    seed: _Seed = None,
    stream: _Stream = None,
    json_file: JsonOption = None,
    plot: _Plot = None,
    metrics_port: _MetricsPort = None,
    metrics_file: _MetricsFile = None,
    debug: DebugOption = False,
) -> None:
    """Run a pipeline of agents and report where the time went and what was reused."""
    config = PipelineConfig.load(pipeline)
    cluster_config = ClusterConfig.load(cluster) if cluster else ClusterConfig()
    graph = _with_limit(config.pipeline(), max_new_tokens)
    rows = _rows(config, graph, inputs or [], input_file, limit, example)
    for name in filter(None, (method, compare)):
        parse_method(name)
    if compare not in (None, "full_prefill"):
        raise ConfigError(
            f'--compare "{compare}" is not possible: only full_prefill is a reference. Write it out.'
        )
    for target in filter(None, (json_file, plot, metrics_file)):
        check_writable(target)
    _fetch_models(graph, cluster_config)
    report = _run_rows(
        graph,
        cluster_config,
        rows,
        metrics_port,
        metrics_file,
        method=method or config.method,
        compare=compare,
        repeats=repeats,
        max_new_tokens=max_new_tokens or config.sampling.max_new_tokens,
        seed=config.sampling.seed if seed is None else seed,
        stream=stream,
    )
    deliver(report, json_file, plot)


def _run_rows(
    graph: Pipeline,
    config: ClusterConfig,
    rows: Sequence[dict[str, str]],
    metrics_port: int | None,
    metrics_file: Path | None,
    **options: Any,
) -> RunReport:
    """Start the cluster, run every row, stop the cluster."""
    from relay_cluster.report import RunReport

    with console.RunProgress() as progress:
        progress("cluster", "starting Ray and the workers")
        from relay_cluster.cluster import Cluster
        from relay_cluster.exporting import RunMetrics

        models = {agent.model or graph.model or config.model for agent in graph.agents}
        with (
            RunMetrics(models, config.telemetry, port=metrics_port, file=metrics_file) as metrics,
            Cluster(
                config, agents_hint=graph, attach=True, on_event=progress, observer=metrics.observer
            ) as cluster,
        ):
            metrics.attach(cluster)
            if metrics.url is not None:
                progress("cluster", f"metrics on {metrics.url}")
            reports: list[RunReport] = []
            for index, row in enumerate(rows):
                progress.start_row(index, len(rows))
                reports.append(cluster.run(graph, row, on_event=progress, **options).report)
                metrics.write()
    return RunReport.merge(reports)


def deliver(report: RunReport, json_file: Path | None, plot: Path | None) -> None:
    """Tables on standard output, unless the JSON goes there; files where they were asked for."""
    if json_file and str(json_file) == "-":
        write_json(report.to_json(), json_file)
    else:
        console.show_report(report)
        if json_file:
            report.write(json_file)
    if plot:
        from relay_cluster.plot import plot_report

        plot_report(report, plot)
    saved = [str(path) for path in (json_file, plot) if path and str(path) != "-"]
    if saved:
        console.errors().print(Text(f"saved {' and '.join(saved)}", style="dim"), soft_wrap=True)


def _with_limit(graph: Pipeline, max_new_tokens: int | None) -> Pipeline:
    """The flag wins over what single agents say in the file."""
    if max_new_tokens is None:
        return graph
    return replace(graph, agents=[replace(agent, max_new_tokens=None) for agent in graph.agents])


def _rows(
    config: PipelineConfig,
    graph: Pipeline,
    inputs: Sequence[str],
    input_file: Path | None,
    limit: int | None,
    example: bool,
) -> list[dict[str, str]]:
    """Checked inputs, one dict per run; `--input` applies to every row of a file."""
    given = _assignments(inputs)
    if input_file:
        if example:
            raise ConfigError("--example and --input-file exclude each other")
        return _file_rows(graph, given, input_file, limit)
    if limit is not None:
        raise ConfigError("--limit counts rows of --input-file, which was not given")
    if example and not config.examples:
        raise ConfigError(f'pipeline "{graph.name}" has no examples; pass --input NAME=TEXT')
    return [graph.check_inputs({**config.examples[0], **given} if example else given)]


def _file_rows(
    graph: Pipeline, given: Mapping[str, str], input_file: Path, limit: int | None
) -> list[dict[str, str]]:
    unknown = {name: text for name, text in given.items() if name not in graph.inputs}
    if unknown:
        graph.check_inputs({**dict.fromkeys(graph.inputs, ""), **unknown})
    rows: list[dict[str, str]] = []
    for number, row in _json_lines(input_file):
        if limit is not None and len(rows) >= limit:
            break
        # Data sets carry more columns than a pipeline has inputs: only what the prompts name is taken.
        chosen = {name: value for name, value in {**row, **given}.items() if name in graph.inputs}
        try:
            rows.append(graph.check_inputs(chosen))
        except PipelineError as error:
            columns = ", ".join(row) or "none"
            raise ConfigError(f"{input_file}:{number} {error}\n  This row has: {columns}.") from error
    if not rows:
        raise ConfigError(f"{input_file}: has no rows")
    return rows


def _assignments(texts: Sequence[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ConfigError(
                f'--input "{text}" is not NAME=TEXT, for example --input question="What is 2 + 2?"'
            )
        if name.strip() in given:
            raise ConfigError(f'--input "{name.strip()}" is given twice')
        given[name.strip()] = value
    return given


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and object of each row; blank lines are skipped."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (--input-file)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            what = (
                f"{path}:{number} is not JSON ({error}). Every line must be an object like "
                + '{"question": "..."}'
            )
            raise ConfigError(what) from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number} must be an object of inputs, got a {type(row).__name__}")
        yield number, row


def _fetch_models(graph: Pipeline, config: ClusterConfig) -> None:
    """Say here, in a second, that a model cannot be used, instead of in a minute and from every worker. A
    cluster that runs elsewhere has its own disks: there the workers look."""
    if config.ray.address is not None:
        return
    from workers.model import describe, resolve

    for name in dict.fromkeys(agent.model or graph.model or config.model for agent in graph.agents):
        with console.fraction_bar(f"model {name}") as progress:
            found = resolve(name, progress=progress)
        if isinstance(found, Path) and (refusal := describe(name)["refusal"]):
            raise ConfigError(str(refusal))


# --- check --------------------------------------------------------------------------------------------------


@app.command(epilog=examples("relay check configs/", "relay check my_pipeline.yaml my_cluster.yaml"))
@command
def check(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Files, or folders of YAML files.", show_default=False),
    ],
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Validate configuration files offline: clusters, pipelines and model profiles."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("file", "kind", ""):
        table.add_column(name)
    faults: list[str] = []
    results: list[dict[str, Any]] = []
    for path, named in _yaml_files(paths):
        if (
            not named
            and kind_of(path) is None
            and path.parent.name not in ("clusters", "pipelines", "profiles")
        ):
            table.add_row(str(path), "-", "[dim]skipped: not a cluster, pipeline or profile[/]")
            continue
        try:
            kind = check_file(path)
        except ConfigError as error:
            faults.append(str(error))
            results.append({"file": str(path), "ok": False, "errors": str(error).splitlines()})
            table.add_row(str(path), "-", "[red]wrong[/]")
        else:
            results.append({"file": str(path), "kind": kind, "ok": True})
            table.add_row(str(path), kind, "[green]ok[/]")
    if json_file:
        write_json(results, json_file)
    if not json_file or str(json_file) != "-":
        console.output().print(table)
    if faults:
        raise ConfigError("\n".join(faults))


def _yaml_files(paths: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Files to check, and whether the user named them."""
    for path in paths:
        if not path.is_dir():
            yield path, True
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix in (".yaml", ".yml"))
        if not found:
            raise ConfigError(f"{path}: no .yaml files in this folder")
        yield from ((file, False) for file in found)


# --- doctor -------------------------------------------------------------------------------------------------


@app.command(
    epilog=examples(
        "relay doctor", "relay doctor --cluster configs/clusters/two_nodes.yaml", "relay doctor --json -"
    )
)
@command
def doctor(cluster: _Cluster = None, json_file: JsonOption = None, debug: DebugOption = False) -> None:
    """Say what this machine has, what will be used, and why."""
    from relay_cluster.doctor import diagnose

    with console.errors().status("looking around"):
        diagnosis = diagnose(ClusterConfig.load(cluster).ray if cluster else None)
    if json_file:
        write_json(diagnosis.to_json(), json_file)
    if json_file and str(json_file) == "-":
        return
    out = console.output()
    out.print(_findings_table("this machine has", diagnosis.findings))
    out.print(_findings_table("a run will use", diagnosis.choices))


def _findings_table(title: str, findings: Sequence[Finding]) -> Table:
    marks = {True: "[green]ok[/]", False: "[red]no[/]", None: "[dim]-[/]"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, style="bold", no_wrap=True)
    table.add_column("")
    table.add_column("")
    table.add_column("", style="dim")
    for finding in findings:
        table.add_row(finding.topic, marks[finding.ok], Text(finding.value), Text(finding.note))
    return table


# --- version ------------------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        _print_version()


def _print_version() -> NoReturn:
    typer.echo(f"relay {__version__}")
    raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    del version


if __name__ == "__main__":
    main()
