"""`relay bench ...`: options in, a document, tables and a picture out. The benchmarks are in `bench/`.

torch and Ray are imported inside the commands. An option that is not given takes the full benchmark's
value, or with --quick a smaller one: the code that runs is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples, write_json
from transport.errors import ConfigError
from workers.settings import DEFAULT_MODEL

if TYPE_CHECKING:
    from relay_cluster.bench.common import Document
    from relay_cluster.bench.texts import Tasks

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure speed and fidelity of the reuse methods, side by side.",
    epilog=examples(
        "relay bench ttft --quick",
        "relay bench fidelity --data gsm8k_test.jsonl --samples 64 --json runs/fidelity.json",
    ),
)

QUICK_METHODS = "full_prefill,naive,epic,relay_caching,auto:fast,auto"

_Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="A,B,...",
        help="Reuse methods, separated by commas, each NAME or NAME:key=value+key=value; default: all of them.",
    ),
]
_Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data",
        metavar="FILE.jsonl",
        help="Rows with question and answer (GSM8K) or prompt (HumanEval); may be given several times. "
        "Default: a few tasks of our own.",
    ),
]
_Model = Annotated[str, typer.Option("--model", metavar="NAME", help="Name, folder or hub id.")]
_Seed = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Choice and order of prompts and rounds.")
]
_Threads = Annotated[
    int, typer.Option("--threads", min=0, metavar="N", help="CPU threads of a worker; 0: all.")
]
_Repeats = Annotated[
    int | None, typer.Option("--repeats", min=1, metavar="N", help="Timed rounds after a cold one.")
]
_Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Fewer methods, prompts and tokens; the same code.")]


@bench_app.command(
    epilog=examples(
        "relay bench ttft --quick",
        "relay bench ttft --methods naive,epic:k=16,relay_caching,auto:fast,auto --span-tokens 1024 --repeats 5",
        "relay bench ttft --data gsm8k_test.jsonl --json docs/results/ttft.json --plot docs/results/ttft.png",
    )
)
@command
def ttft(
    methods: _Methods = None,
    span_tokens: Annotated[
        str | None,
        typer.Option("--span-tokens", metavar="N,...", help="Tokens of upstream text [512,1024,2048]."),
    ] = None,
    spans: Annotated[
        str, typer.Option("--spans", metavar="N,...", help="Spans that it comes in; 0: 4 to 8 by its length.")
    ] = "1,0",
    fresh_tokens: Annotated[
        int, typer.Option("--fresh-tokens", min=1, metavar="N", help="Tokens that nobody has computed yet.")
    ] = 64,
    repeats: _Repeats = None,
    prompts: Annotated[
        int | None, typer.Option("--prompts", min=1, metavar="N", help="Prompts that the rounds go over [3].")
    ] = None,
    data: _Data = None,
    model: _Model = DEFAULT_MODEL,
    seed: _Seed = 0,
    threads: _Threads = 0,
    no_transformers: Annotated[
        bool, typer.Option("--no-transformers", help="Leave plain transformers out.")
    ] = False,
    quick: _Quick = False,
    json_file: JsonOption = None,
    plot: _Plot = None,
    debug: DebugOption = False,
) -> None:
    """Time to first token at one worker, segments local: every method on the same prompts."""
    from relay_cluster.bench.common import int_list, method_list

    sizes = int_list(span_tokens or ("256" if quick else "512,1024,2048"), "--span-tokens", at_least=16)
    counts = int_list(spans, "--spans", at_least=0)
    chosen = method_list(methods or (QUICK_METHODS if quick else None))
    tasks = _prepare(data, json_file, plot, model)
    from relay_cluster.bench.ttft import TtftSettings, run_ttft

    settings = TtftSettings(
        methods=chosen,
        model=model,
        span_tokens=sizes,
        spans=counts,
        fresh_tokens=fresh_tokens,
        repeats=repeats or (2 if quick else 5),
        prompts=prompts or (1 if quick else 3),
        seed=seed,
        threads=threads,
        transformers=not no_transformers,
    )
    _deliver(run_ttft(settings, tasks), json_file, plot)


def _prepare(data: list[Path] | None, json_file: Path | None, plot: Path | None, model: str) -> Tasks:
    """Everything that can go wrong before the first second is spent on measuring."""
    from relay_cluster.bench.texts import load_tasks

    for target in filter(None, (json_file, plot)):
        check_writable(target)
    tasks = load_tasks(data or [])
    from workers.model import describe, resolve

    with console.fraction_bar(f"model {model}") as progress:
        found = resolve(model, progress=progress)
    if isinstance(found, Path) and (refusal := describe(model)["refusal"]):
        raise ConfigError(str(refusal))
    return tasks


def _deliver(document: Document, json_file: Path | None, plot: Path | None) -> None:
    """Tables on standard output, unless the JSON goes there; files where they were asked for."""
    from relay_cluster.bench.common import write_document
    from relay_cluster.bench.show import show_document

    value = document.to_json()
    if json_file and str(json_file) == "-":
        write_json(value, json_file)
    else:
        show_document(document)
        if json_file:
            write_document(value, json_file)
    if plot:
        from relay_cluster.bench.plots import plot_document

        plot_document(value, plot)
    saved = [str(path) for path in (json_file, plot) if path and str(path) != "-"]
    if saved:
        console.errors().print(Text(f"saved {' and '.join(saved)}", style="dim"), soft_wrap=True)
