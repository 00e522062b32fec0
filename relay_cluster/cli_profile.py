"""`relay profile`: options in; a profile, a picture, tables and a document out. Measuring and the rule are in
`workers/profiler.py`.

torch is imported inside the command. With --quick the same code runs on fewer and shorter prompts.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from relay_cluster import console
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples, write_json
from transport.errors import ConfigError
from workers.settings import DEFAULT_MODEL

if TYPE_CHECKING:
    from workers.model import LoadedModel
    from workers.profiler import ProfileResult, ProfileSettings, Progress
    from workers.profiling.choose import Row
    from workers.profiling.tasks import TaskSet

SAMPLES = 12
QUICK_SAMPLES = 4

EPILOG = examples(
    "relay profile --quick",
    "relay profile --data gsm8k_test.jsonl --samples 16 --json runs/profile.json",
    "relay profile --model Qwen/Qwen3-0.6B --out my_profile.yaml",
    'relay profile --candidate "context_mass:ratio=0.1+start={start}+end={end}" --candidate epic:k=24',
)

_Model = Annotated[str, typer.Option("--model", metavar="NAME", help="Name, folder or hub id.")]
_Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE.jsonl",
        help="Tasks, one per line, in the field question (GSM8K) or prompt (HumanEval). Default: a dozen of "
        "our own.",
    ),
]
_Samples = Annotated[
    int | None,
    typer.Option(
        "--samples", min=1, metavar="N", help=f"Tasks to draw; default {SAMPLES}, or {QUICK_SAMPLES}."
    ),
]
_Composites = Annotated[
    int | None,
    typer.Option(
        "--composites", min=0, metavar="N", help="How many of them become prompts of several spans."
    ),
]
_Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Which tasks are drawn.")]
_Target = Annotated[
    float, typer.Option("--target-kl", metavar="NATS", help="Mean KL that `balanced` keeps, single spans.")
]
_TargetComposite = Annotated[
    float, typer.Option("--target-kl-composite", metavar="NATS", help="The same on prompts of several spans.")
]
_Candidates = Annotated[
    list[str] | None,
    typer.Option(
        "--candidate",
        metavar="METHOD",
        help="Another method text to try; {start}, {earlier}, {end}, {det} and {layers} stand for the layers "
        "that are found. May be given several times.",
    ),
]
_Only = Annotated[bool, typer.Option("--only-candidates", help="Try only what --candidate names.")]
_Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE.yaml",
        help="The profile; default: where workers look for the model's own, or runs/ with --quick.",
    ),
]
_Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.png", help="The picture; default: beside the profile.")
]
_Quick = Annotated[bool, typer.Option("--quick", help="Fewer, shorter prompts: to try, not to choose by.")]


@command
def profile(
    model: _Model = DEFAULT_MODEL,
    data: _Data = None,
    samples: _Samples = None,
    composites: _Composites = None,
    seed: _Seed = 0,
    target_kl: _Target = 0.005,
    target_kl_composite: _TargetComposite = 0.012,
    candidates: _Candidates = None,
    only_candidates: _Only = False,
    out: _Out = None,
    plot: _Plot = None,
    json_file: JsonOption = None,
    quick: _Quick = False,
    debug: DebugOption = False,
) -> None:
    """Measure how a model tolerates reuse, and choose its layers and the presets auto:fast and auto."""
    from workers.profile import profile_name
    from workers.profiling.tasks import load_tasks

    shipped = Path(str(resources.files("configs"))) / "profiles"
    target = out or (Path("runs") if quick else shipped) / f"{profile_name(model)}.yaml"
    picture = plot or target.with_suffix(".png")
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{target}: a profile is a YAML file; name it .yaml (--out)")
    for file in filter(None, (target, picture, json_file)):
        check_writable(file)
    settings = _settings(
        quick, composites, target_kl, target_kl_composite, candidates or [], only=only_candidates
    )
    tasks = load_tasks(data, samples or (QUICK_SAMPLES if quick else SAMPLES), seed)
    loaded = _load(model)
    with console.fraction_bar(f"profiling {model}") as progress:
        from workers.profiler import profile_model

        result = profile_model(loaded, tasks, settings, _spoken(progress))
    deliver(result, settings, loaded, tasks, (seed, quick), target, picture, json_file)


def _settings(
    quick: bool,
    composites: int | None,
    target_kl: float,
    target_kl_composite: float,
    candidates: list[str],
    *,
    only: bool,
) -> ProfileSettings:
    from dataclasses import replace

    from workers.profiler import ProfileSettings, check_candidates
    from workers.profiling.choose import Rule

    for name, value in (("--target-kl", target_kl), ("--target-kl-composite", target_kl_composite)):
        if value <= 0:
            raise ConfigError(f"{name} {value:g} must be above 0: only full prefill has no error at all")
    if only and not candidates:
        raise ConfigError("--only-candidates needs at least one --candidate")
    check_candidates(candidates)
    rule = Rule(target_single=target_kl, target_composite=target_kl_composite)
    settings = ProfileSettings(rule=rule)
    settings = settings.quick() if quick else settings
    if composites is not None:
        settings = replace(settings, composites=composites)
    tried = () if only else settings.candidates
    return replace(settings, candidates=tuple(dict.fromkeys((*tried, *candidates))))


def _load(model: str) -> LoadedModel:
    from workers.model import load_model

    with console.fraction_bar(f"model {model}") as progress:
        return load_model(model, progress=progress)


def _spoken(bar: Progress) -> Progress:
    """The bar; where standard error is no terminal, a line for every tenth instead."""
    if sys.stderr.isatty():
        return bar
    said = -1

    def say(fraction: float, text: str) -> None:
        nonlocal said
        if int(fraction * 10) > said:
            said = int(fraction * 10)
            console.errors().print(Text(f"{fraction:4.0%}  {text}"), soft_wrap=True)

    return say


def deliver(
    result: ProfileResult,
    settings: ProfileSettings,
    loaded: LoadedModel,
    tasks: TaskSet,
    drawn: tuple[int, bool],
    target: Path,
    picture: Path,
    json_file: Path | None,
) -> None:
    from relay_cluster.doctor import this_machine
    from relay_cluster.plot_profile import plot_profile
    from relay_cluster.profile_report import ProfileRun, json_document, profile_document, write_yaml

    seed, quick = drawn
    run = ProfileRun(
        command=_command_line(loaded.name, tasks, seed, quick, settings),
        data=tasks.source,
        tasks=len(tasks.texts),
        seed=seed,
        quick=quick,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=loaded.device.type,
    )
    heading = [
        f"How {loaded.name} tolerates reuse. Made by `{run.command}`; docs/profiler.md explains it.",
        "Workers read the keys before `calibration`, which says how they were found. Bands are half-open.",
    ]
    write_yaml(target, profile_document(result, settings, run), heading)
    plot_profile(result, settings.rule, picture)
    if json_file:
        write_json(json_document(result, settings, run, asdict(this_machine())), json_file)
    if not json_file or str(json_file) != "-":
        show_result(result)
    saved = [str(p) for p in (target, picture, json_file) if p and str(p) != "-"]
    console.errors().print(Text(f"saved {', '.join(saved)}", style="dim"), soft_wrap=True)


def _command_line(model: str, tasks: TaskSet, seed: int, quick: bool, settings: ProfileSettings) -> str:
    """How to make this profile again; the data file without its folder."""
    words = ["relay", "profile", "--model", model]
    if tasks.source != "built-in":
        words += ["--data", tasks.source]
    words += [
        "--samples",
        str(len(tasks.texts)),
        "--composites",
        str(settings.composites),
        "--seed",
        str(seed),
    ]
    words += ["--target-kl", f"{settings.rule.target_single:g}"]
    words += ["--target-kl-composite", f"{settings.rule.target_composite:g}"]
    return shlex.join([*words, *(["--quick"] if quick else [])])


# --- what people see ----------------------------------------------------------------------------------------


def show_result(result: ProfileResult) -> None:
    """The choices in words, and a table of what was measured, the cheapest first."""
    out = console.output()
    picks, found = result.picks, result.profile
    rows = sorted(result.rows, key=lambda r: r.cost)
    out.print()
    out.print(_rows_table(rows, picks.chosen.fast.row, picks.chosen.balanced.row))
    lines = [
        f"layers: checkpoint {found.checkpoint_layer}, detection {found.detection_layer} "
        f"(rank correlation {picks.correlation:.2f} with the layers behind), end {found.end_layer} of "
        f"{found.num_layers}",
        f"auto:fast is {found.presets['fast']}",
        f"auto      is {found.presets['balanced']}",
    ]
    for line in lines:
        out.print(Text(line), soft_wrap=True)
    for note in result.notes:
        out.print(Text(note, style="yellow"), soft_wrap=True)
    prompts = ", ".join(f"{count} {kind}" for kind, count in result.cases.items())
    took = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in result.seconds.items())
    out.print(Text(f"prompts: {prompts}; {took}", style="dim"), soft_wrap=True)


def _rows_table(rows: list[Row], fast: Row, balanced: Row) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", overflow="fold")
    for name in ("FLOPs", "KL first", "KL mean", "top-1", "FLOPs*", "KL first*", "KL mean*", "top-1*"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        marks = [name for name, chosen in (("fast", fast), ("balanced", balanced)) if chosen.text == row.text]
        cells: list[str] = []
        for e in (row.single, row.composite):
            cells += (
                ["-"] * 4
                if e is None
                else [f"{e.flops:.3f}", f"{e.kl_first:.4f}", f"{e.kl_mean:.4f}", f"{e.top1:.3f}"]
            )
        table.add_row(Text(row.text), *cells, ", ".join(marks), style="bold" if marks else "")
    table.caption = "FLOPs: share of a full prefill. *: prompts of several spans."
    table.caption_justify = "left"
    return table
