"""What every part of the `relay` command shares: errors, signals, files, options.

Exit status: 0 done; 2 something that the user can put right, explained on one screen; 1 a fault of ours; 130
Ctrl-C.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, ParamSpec

import typer

from relay_cluster import console
from relay_cluster.log import set_up_logging
from transport.errors import ConfigError, RelayError

P = ParamSpec("P")

_SIGTERM_STATUS = 143
HELP = {"help_option_names": ["-h", "--help"]}


def examples(*lines: str) -> str:
    """An epilog; the blank lines keep rich from joining them."""
    return "\n\n".join(["[bold]Examples[/]", *(f"[cyan]$[/] {line}" for line in lines)])


DebugOption = Annotated[
    bool, typer.Option("--debug", help="Log everything and show the stack trace of an error.")
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output."),
]


def command(body: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into a message on one screen and an exit status."""

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = bool(kwargs.get("debug"))
        set_up_logging("DEBUG" if debug else None)
        try:
            with _signals():
                body(*args, **kwargs)
        except typer.Exit:
            raise  # a command that chose its status
        except KeyboardInterrupt:
            console.show_error("interrupted; everything that this run started has been stopped")
            raise typer.Exit(130) from None
        except RelayError as error:
            if debug:
                traceback.print_exc()
            console.show_error(str(error))
            raise typer.Exit(2) from None
        except Exception as error:  # noqa: BLE001  (the outermost frame: whatever is left is a fault of ours)
            if debug:
                traceback.print_exc()
            hint = "This is a fault of relay_cluster; --debug shows where."
            console.show_error(f"{type(error).__name__}: {error}\n{hint}")
            raise typer.Exit(1) from None

    return run


@contextmanager
def _signals() -> Iterator[None]:
    """The first Ctrl-C unwinds the run, which stops its processes; later ones must not interrupt that.
    SIGTERM unwinds it as well, instead of leaving workers behind."""
    seen = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            return
        seen = True
        if number == signal.SIGTERM:
            sys.exit(_SIGTERM_STATUS)
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def write_json(value: object, target: Path) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if str(target) == "-":
        typer.echo(text)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text + "\n", "utf-8")


def check_writable(target: Path) -> None:
    """Fail before the run, not after it."""
    if str(target) == "-":
        return
    if target.is_dir():
        raise ConfigError(f"{target}: is a folder; name a file in it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab"):
            pass
        if target.stat().st_size == 0:
            target.unlink()
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written: {error.strerror}") from error
