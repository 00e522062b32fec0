"""`relay serve`: the OpenAI-compatible service. FastAPI, torch and Ray are imported inside the command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, command, examples
from relay_cluster.config import ClusterConfig
from relay_cluster.serving.tenants import load_tenants
from relay_cluster.tracing import make_tracing
from transport.errors import ConfigError

EPILOG = examples(
    "relay serve configs/clusters/local_cpu.yaml",
    "relay serve cluster.yaml --port 9000 --engine ray-serve",
    "curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' "
    '-d \'{"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello"}]}\'',
)


class Engine(StrEnum):
    """What carries HTTP."""

    UVICORN = "uvicorn"
    RAY_SERVE = "ray-serve"


@command
def serve(
    cluster: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CLUSTER.yaml]", help="Cluster to serve; default: this machine.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            "--host", metavar="ADDRESS", help="Listen here; elsewhere than on loopback, with keys only."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, metavar="N", help="Port.")] = 8000,
    engine: Annotated[
        Engine, typer.Option("--engine", help="uvicorn in this process, or Ray Serve.")
    ] = Engine.UVICORN,
    debug: DebugOption = False,
) -> None:
    """Serve the OpenAI API over a cluster, with transparent relay, until Ctrl-C."""
    config = ClusterConfig.load(cluster) if cluster else ClusterConfig()
    _check_installed()
    load_tenants(config.serve, host)  # before anything is started
    make_tracing(config.telemetry).close()  # likewise
    if config.ray.address is None:
        from workers.model import describe, resolve

        with console.fraction_bar(f"model {config.model}") as progress:
            found = resolve(config.model, progress=progress)
        if isinstance(found, Path) and (refusal := describe(config.model)["refusal"]):
            raise ConfigError(str(refusal))
    if engine is Engine.UVICORN:
        from relay_cluster.serving.app import run_uvicorn

        run_uvicorn(config, host=host, port=port, on_event=_tell)
    else:
        import threading

        from relay_cluster.serving.deployment import run_serve

        # A signal raises out of the wait; the deadline keeps the interpreter listening for it.
        def wait() -> None:
            while not threading.Event().wait(3600.0):
                pass

        run_serve(config, host=host, port=port, wait=wait, on_event=_tell)


def _tell(kind: str, text: str) -> None:
    console.errors().print(Text(text, style="dim"), soft_wrap=True)


def _check_installed() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed. Run: pip install 'relay-cluster[serve]'")
