"""`relay bench link`: see `bench/link.py`. torch and Ray are imported inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relay_cluster.cli_bench import deliver, prepare_tasks
from relay_cluster.cli_common import DebugOption, JsonOption, command, examples

EPILOG = examples(
    "relay bench link --cluster configs/clusters/two_nodes.yaml",
    "relay bench link --cluster two.yaml --methods auto:fast,epic:k=16 --layer-groups 6,1 --json link.json",
)


@command
def link(
    cluster: Annotated[
        Path, typer.Option("--cluster", metavar="FILE", help="Cluster with two `nodes` or more.")
    ],
    methods: Annotated[
        str, typer.Option("--methods", metavar="A,B,...", help="Reuse methods, separated by commas.")
    ] = "auto:fast,epic:k=16",
    span_tokens: Annotated[
        int, typer.Option("--span-tokens", min=64, metavar="N", help="Tokens of the relayed text.")
    ] = 1024,
    layer_groups: Annotated[
        str, typer.Option("--layer-groups", metavar="N,...", help="Values of transport.layer_groups.")
    ] = "6,1",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, metavar="N", help="Timed rounds after a cold one.")
    ] = 5,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="FILE.jsonl", help="Texts; default: our own.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Choice of texts.")] = 0,
    json_file: JsonOption = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")] = None,
    debug: DebugOption = False,
) -> None:
    """Time to first token over the network between two nodes, against its bound and full prefill."""
    from relay_cluster.bench.common import int_list, method_list
    from relay_cluster.config import ClusterConfig

    config = ClusterConfig.load(cluster)
    groups = int_list(layer_groups, "--layer-groups", at_least=1)
    chosen = method_list(methods)
    tasks = prepare_tasks(data, json_file, None, config.model)
    from relay_cluster.bench.link import LinkSettings, run_link

    settings = LinkSettings(
        methods=chosen, span_tokens=span_tokens, layer_groups=groups, repeats=repeats, seed=seed
    )
    deliver(run_link(settings, tasks, config), json_file, None)
