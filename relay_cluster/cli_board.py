"""`relay dashboard` and `relay top`: a running service, live, in the browser and in the terminal."""

from __future__ import annotations

import webbrowser
from contextlib import suppress
from typing import Annotated

import typer
from rich.text import Text

from relay_cluster import console
from relay_cluster.board.client import KEY_VARIABLE, BoardClient
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples, write_json
from transport.errors import ConfigError, RelayError

DASHBOARD_EPILOG = examples(
    "relay dashboard",
    "relay dashboard --url http://10.0.0.5:8000 --port 8081 --open",
    f"{KEY_VARIABLE}=sk-... relay dashboard --url https://relay.example.org",
)
TOP_EPILOG = examples("relay top", "relay top --once", "relay top --once --json - | jq .totals")

_Url = Annotated[str, typer.Option("--url", metavar="URL", help="The service.")]
_DEFAULT_URL = "http://127.0.0.1:8000"


@command
def dashboard(
    url: _Url = _DEFAULT_URL,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, metavar="N", help="Port of the page; 0 picks one.")
    ] = 8080,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    debug: DebugOption = False,
) -> None:
    """Serve the live page of a running service, until Ctrl-C.

    A service has the page itself, at /dashboard; this is for one that your browser cannot reach, or whose key
    it should not know.
    """
    from relay_cluster.board.proxy import PageServer

    client = BoardClient(url)
    try:
        client.board()
    except (RelayError, ConfigError) as error:
        # The page says so as well, and goes on asking: the service may come up later.
        console.errors().print(Text(f"not yet: {error}", style="yellow"), soft_wrap=True)
    try:
        server = PageServer(port, client)
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be listened on: {error.strerror}. Choose another --port, or --port 0."
        ) from error
    with server:
        console.output().print(Text(f"live page of {client.url}: {server.url}"), soft_wrap=True)
        if open_page:
            webbrowser.open(server.url)
        with suppress(KeyboardInterrupt):  # how it is meant to end
            server.serve_forever(poll_interval=0.2)


@command
def top(
    url: _Url = _DEFAULT_URL,
    every_s: Annotated[
        float, typer.Option("--every-s", min=0.2, metavar="N", help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, print, and end.")] = False,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Watch a running service: workers, times to first token, reuse, fallbacks, last requests."""
    from relay_cluster.board.top import show, watch

    client = BoardClient(url)
    if json_file or once:
        found = client.board()
        if json_file:
            write_json(found, json_file)
        if json_file is None or str(json_file) != "-":
            screen = console.output()
            screen.print(show(found, width=screen.width))
        return
    with suppress(KeyboardInterrupt):
        watch(client, console.output(), every_s=every_s)
