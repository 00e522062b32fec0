"""`relay bench serve`: see `bench/serve.py`. torch and Ray are imported in the service's process only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from relay_cluster.cli_bench import deliver
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples
from transport.errors import ConfigError

EPILOG = examples(
    "relay bench serve --quick",
    "relay bench serve --parts overhead,next",
    "relay bench serve --concurrency 1,4,8 --pipelines 20 --json runs/serve.json --plot runs/serve.png",
    "relay bench serve --url http://127.0.0.1:8000 --api-key KEY",
)


@command
def serve(
    parts: Annotated[
        str | None,
        typer.Option(
            "--parts", metavar="NAME,...", help="Of overhead, next, pipelines and matching [all of them]."
        ),
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option("--concurrency", metavar="N,...", help="Pipelines at a time [1,4,8].")
    ] = None,
    pipelines: Annotated[
        int | None,
        typer.Option("--pipelines", min=1, metavar="N", help="Of each concurrency, relay on and off [20]."),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", min=1, metavar="N", help="Begin no round of a concurrency after so many."),
    ] = 1800.0,
    document_chars: Annotated[
        int | None,
        typer.Option("--document-chars", min=1, metavar="N", help="Of the text that all agents get [2400]."),
    ] = None,
    answer_tokens: Annotated[
        int | None, typer.Option("--answer-tokens", min=1, metavar="N", help="Most of an answer [64].")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Measure this service. Default: one of our own."),
    ] = None,
    api_key: Annotated[
        str, typer.Option("--api-key", metavar="KEY", envvar="RELAY_API_KEY", help="For --url.")
    ] = "none",
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", metavar="FILE", help="Of the service of our own; default: this machine."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", metavar="FILE.jsonl", help="Text for the documents. Default: tasks of our own."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Choice of documents.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few and short pipelines; the same code.")] = False,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")] = None,
    debug: DebugOption = False,
) -> None:
    """Pipelines of three agents over HTTP: throughput, time to first token and errors, relay on and off."""
    from contextlib import nullcontext

    from relay_cluster.bench.common import int_list
    from relay_cluster.bench.serve import PARTS, ServeBenchSettings, run_serve
    from relay_cluster.bench.serve_client import ServiceClient, own_service, served_model
    from relay_cluster.bench.texts import load_tasks

    chosen = tuple(filter(None, map(str.strip, (parts or ",".join(PARTS)).split(","))))
    if unknown := set(chosen) - set(PARTS):
        raise ConfigError(f"--parts: there is no {', '.join(sorted(unknown))}. Parts: {', '.join(PARTS)}.")
    settings = ServeBenchSettings(
        parts=chosen,
        concurrency=int_list(concurrency or ("1,2" if quick else "1,4,8"), "--concurrency"),
        pipelines=pipelines or (2 if quick else 20),
        seconds=seconds,
        document_chars=document_chars or (900 if quick else 2400),
        answer_tokens=answer_tokens or (12 if quick else 64),
        overhead_requests=40 if quick else 200,
        next_pairs=2 if quick else 8,
        matching_rounds=50 if quick else 200,
        seed=seed,
    )
    tasks = load_tasks(data or [])
    for target in filter(None, (json_file, plot)):
        check_writable(target)
    facts: dict[str, Any] = {"service": "given by --url" if url else "relay serve", "cluster": None}
    if cluster and not url:
        from relay_cluster.config import ClusterConfig

        facts["cluster"] = ClusterConfig.load(cluster).name
    with nullcontext(url.rstrip("/").removesuffix("/v1")) if url else own_service(cluster) as base:
        model = served_model(base, api_key)
        client = ServiceClient(base, model, api_key=api_key, seed=seed, timeout_s=settings.timeout_s)
        found = run_serve(settings, tasks, client, {**facts, "model": model})
    deliver(found, json_file, plot)
