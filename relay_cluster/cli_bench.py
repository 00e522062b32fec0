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
from transport.settings import WireFormat
from workers.settings import DEFAULT_MODEL

if TYPE_CHECKING:
    from relay_cluster.bench.common import Document
    from relay_cluster.bench.texts import Tasks
    from relay_cluster.config import ClusterConfig

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure speed and fidelity of the reuse methods, side by side.",
    epilog=examples(
        "relay bench ttft --quick",
        "relay bench fidelity --data gsm8k_test.jsonl --samples 64 --json runs/fidelity.json",
    ),
)

QUICK_METHODS = "full_prefill,naive,relay_caching,auto:fast,auto"
QUICK_FEW_METHODS = "full_prefill,relay_caching,auto"

_Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="A,B,...",
        help="Reuse methods, separated by commas, each NAME or NAME:key=value+...; default: all of them.",
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
        "relay bench ttft --methods epic:k=16,relay_caching,auto:fast,auto --span-tokens 1024",
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
    tasks = prepare_tasks(data, json_file, plot, model)
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
    deliver(run_ttft(settings, tasks), json_file, plot)


@bench_app.command(
    epilog=examples(
        "relay bench chain --quick",
        "relay bench chain --methods exact_prefix,relay_caching,auto:fast,auto --agents 5 --repeats 3",
        "relay bench chain --data gsm8k_test.jsonl --json docs/results/chain.json",
        "relay bench chain --stream off,exact,auto --threads 1 --output-tokens 128 --repeats 1",
    )
)
@command
def chain(
    methods: _Methods = None,
    agents: Annotated[
        int | None, typer.Option("--agents", min=2, metavar="N", help="Length of the chain [5].")
    ] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option("--prefix-tokens", min=64, metavar="N", help="Of every agent's own [512].")
    ] = None,
    input_tokens: Annotated[
        int | None, typer.Option("--input-tokens", min=16, metavar="N", help="Of the shared input [1000].")
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option("--output-tokens", min=17, metavar="N", help="Of every answer [512].")
    ] = None,
    repeats: _Repeats = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster", metavar="FILE", help="Cluster with two workers or more; default: this machine."
        ),
    ] = None,
    no_fidelity: Annotated[bool, typer.Option("--no-fidelity", help="Measure times only.")] = False,
    stream: Annotated[
        str | None,
        typer.Option(
            "--stream",
            metavar="A,B,...",
            help="Run whole pipelines instead, full_prefill beside off, exact, auto and relay: readers get "
            "ready while writers write. --methods then names the one of all but exact.",
        ),
    ] = None,
    data: _Data = None,
    model: _Model = DEFAULT_MODEL,
    seed: _Seed = 0,
    threads: _Threads = 0,
    quick: _Quick = False,
    json_file: JsonOption = None,
    plot: _Plot = None,
    debug: DebugOption = False,
) -> None:
    """Five fully connected agents over Ray workers: everything inside the time to first token."""
    from relay_cluster.bench.common import method_list
    from relay_cluster.config import ClusterConfig

    if stream is None:
        chosen, modes = method_list(methods or (QUICK_FEW_METHODS if quick else None)), ()
    else:
        from relay_cluster.bench.chain_stream import parse_modes

        chosen, modes = _one_method(methods), parse_modes(stream)
    config = _cluster_config(ClusterConfig.load(cluster) if cluster else None, model, threads)
    tasks = prepare_tasks(data, json_file, plot, config.model)
    shape: dict[str, int] = {
        "agents": agents or (3 if quick else 5),
        "prefix_tokens": prefix_tokens or (64 if quick else 512),
        "input_tokens": input_tokens or (200 if quick else 1000),
        "output_tokens": output_tokens or (48 if quick else 512),
        "seed": seed,
    }
    if modes:
        from relay_cluster.bench.chain_stream import ChainStreamSettings, run_chain_stream

        whole = ChainStreamSettings(
            modes=modes, method=chosen[0], repeats=repeats or (1 if quick else 3), cold=not quick, **shape
        )
        deliver(run_chain_stream(whole, tasks, config), json_file, plot)
        return
    from relay_cluster.bench.chain import ChainSettings, run_chain

    settings = ChainSettings(
        methods=chosen, repeats=repeats or (2 if quick else 3), fidelity=not no_fidelity, **shape
    )
    deliver(run_chain(settings, tasks, config), json_file, plot)


def _one_method(methods: str | None) -> tuple[str, ...]:
    """Raises ConfigError: several, or one that cannot be parsed."""
    from workers.methods import parse_reuse

    if "," in (methods or ""):
        raise ConfigError(f'--methods "{methods}": with --stream there is one method, that of off and auto.')
    parse_reuse(methods or "auto")
    return (methods or "auto",)


def _cluster_config(given: ClusterConfig | None, model: str, threads: int) -> ClusterConfig:
    """The cluster of the file, or two workers on this machine."""
    from relay_cluster.config import ClusterConfig

    if given is not None:
        if model != DEFAULT_MODEL or threads:
            raise ConfigError("--model and --threads are settings of the cluster file where one is given")
        return given
    values = {"name": "bench", "workers": 2, "model": model, "worker": {"threads": threads}}
    return ClusterConfig.model_validate(values)


@bench_app.command(
    epilog=examples(
        "relay bench fidelity --quick",
        "relay bench fidelity --data gsm8k_test.jsonl --data humaneval_py.jsonl --samples 64",
        "relay bench fidelity --data gsm8k_test.jsonl --answers --heal --json docs/results/fidelity.json",
    )
)
@command
def fidelity(
    methods: _Methods = None,
    data: _Data = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, metavar="N", help="Prompts to be measured [64].")
    ] = None,
    span_tokens: Annotated[
        int | None, typer.Option("--span-tokens", min=24, metavar="N", help="Longest decoded answer [128].")
    ] = None,
    heal: Annotated[
        bool, typer.Option("--heal", help="Add heal=always to every method that reuses.")
    ] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="Judge final numbers of maths prompts as well (slow).")
    ] = False,
    no_greedy: Annotated[
        bool, typer.Option("--no-greedy", help="Leave out free-running answers (faster).")
    ] = False,
    batch: Annotated[int, typer.Option("--batch", min=1, metavar="N", help="Prompts decoded together.")] = 8,
    cases_cache: Annotated[
        Path | None,
        typer.Option("--cases-cache", metavar="DIR", help="Keep decoded answers here for later runs."),
    ] = None,
    wire: Annotated[
        WireFormat, typer.Option("--wire", help="Format in which keys and values travel.")
    ] = "raw",
    model: _Model = DEFAULT_MODEL,
    seed: _Seed = 0,
    threads: _Threads = 0,
    quick: _Quick = False,
    json_file: JsonOption = None,
    plot: _Plot = None,
    debug: DebugOption = False,
) -> None:
    """Distance from full prefill's answers, over chains whose spans are really decoded."""
    from relay_cluster.bench.common import method_list

    if answers and no_greedy:
        raise ConfigError("--answers judges free-running answers, which --no-greedy leaves out")
    chosen = method_list(methods or (QUICK_FEW_METHODS if quick else None))
    tasks = prepare_tasks(data, json_file, plot, model)
    from relay_cluster.bench.fidelity import FidelitySettings, run_fidelity

    settings = FidelitySettings(
        methods=chosen,
        model=model,
        samples=samples or (3 if quick else 64),
        span_tokens=span_tokens or (32 if quick else 128),
        heal=heal,
        greedy=not no_greedy,
        answers=answers,
        batch=batch,
        seed=seed,
        threads=threads,
        cases_cache=cases_cache,
        wire=wire,
    )
    deliver(run_fidelity(settings, tasks), json_file, plot)


@bench_app.command(
    epilog=examples(
        "relay bench decay --quick",
        "relay bench decay --queries 500 --span-tokens 256 --method auto:fast --plot docs/results/decay.png",
    )
)
@command
def decay(
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="The method that is watched.")
    ] = "auto",
    queries: Annotated[
        int | None, typer.Option("--queries", min=2, metavar="N", help="Novel queries [500].")
    ] = None,
    span_tokens: Annotated[
        int | None, typer.Option("--span-tokens", min=16, metavar="N", help="Of every upstream answer [256].")
    ] = None,
    fresh_tokens: Annotated[
        int, typer.Option("--fresh-tokens", min=1, metavar="N", help="Of the reader's own question.")
    ] = 32,
    window: Annotated[
        int | None, typer.Option("--window", min=1, metavar="N", help="Queries that one row sums up [50].")
    ] = None,
    arena_spans: Annotated[
        int | None,
        typer.Option("--arena-spans", min=1, metavar="N", help="Answers that the arena holds [32]."),
    ] = None,
    data: _Data = None,
    model: _Model = DEFAULT_MODEL,
    seed: _Seed = 0,
    threads: _Threads = 0,
    quick: _Quick = False,
    json_file: JsonOption = None,
    plot: _Plot = None,
    debug: DebugOption = False,
) -> None:
    """Speed-up while novel queries keep arriving and the arena must evict."""
    from workers.methods import parse_reuse

    parse_reuse(method)
    tasks = prepare_tasks(data, json_file, plot, model)
    from relay_cluster.bench.decay import DecaySettings, run_decay

    settings = DecaySettings(
        method=method,
        model=model,
        queries=queries or (12 if quick else 500),
        span_tokens=span_tokens or (128 if quick else 256),
        fresh_tokens=fresh_tokens,
        window=window or (4 if quick else 50),
        arena_spans=arena_spans or (4 if quick else 32),
        seed=seed,
        threads=threads,
    )
    deliver(run_decay(settings, tasks), json_file, plot)


# --- what they share ----------------------------------------------------------------------------------------


def prepare_tasks(data: list[Path] | None, json_file: Path | None, plot: Path | None, model: str) -> Tasks:
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


def deliver(document: Document, json_file: Path | None, plot: Path | None) -> None:
    """Tables on standard output, unless the JSON goes there; files where they were asked for. The JSON is
    written first: minutes of measuring are not to be lost with a table."""
    from relay_cluster.bench.common import write_document
    from relay_cluster.bench.show import show_document

    value = document.to_json()
    if json_file and str(json_file) == "-":
        write_json(value, json_file)
    else:
        if json_file:
            write_document(value, json_file)
        show_document(document)
    if plot:
        from relay_cluster.bench.plots import plot_document

        plot_document(value, plot)
    saved = [str(path) for path in (json_file, plot) if path and str(path) != "-"]
    if saved:
        console.errors().print(Text(f"saved {' and '.join(saved)}", style="dim"), soft_wrap=True)
