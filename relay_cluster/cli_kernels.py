"""`relay bench kernels`: see `bench/kernels.py`. torch is imported inside the command."""

from __future__ import annotations

from typing import Annotated

import typer

from relay_cluster.cli_bench import deliver
from relay_cluster.cli_common import DebugOption, JsonOption, check_writable, command, examples
from transport.errors import ConfigError

EPILOG = examples(
    "relay bench kernels",
    "relay bench kernels --keys 4096,32768 --json runs/kernels.json",
    "relay bench kernels --heads 9 --kv-heads 3 --head-dim 64 --layers 30",
)


@command
def kernels(
    keys: Annotated[str, typer.Option("--keys", metavar="N,...", help="Tokens of context.")] = "2048,8192",
    heads: Annotated[int, typer.Option("--heads", min=1, metavar="N", help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option("--kv-heads", min=1, metavar="N", help="Heads of keys.")] = 8,
    head_dim: Annotated[int, typer.Option("--head-dim", min=8, metavar="N", help="Per head.")] = 128,
    layers: Annotated[int, typer.Option("--layers", min=1, metavar="N", help="Of the model.")] = 32,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="bfloat16, float16 or float32.")
    ] = "bfloat16",
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of the random inputs.")] = 0,
    json_file: JsonOption = None,
    debug: DebugOption = False,
) -> None:
    """Device time of every kernel, beside torch's own and the device's limits. Needs a GPU."""
    from relay_cluster.bench.common import int_list

    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f'--dtype "{dtype}" is not one of bfloat16, float16, float32')
    if heads % kv_heads:
        raise ConfigError(f"--heads {heads} is no multiple of --kv-heads {kv_heads}")
    if json_file:
        check_writable(json_file)
    wanted = int_list(keys, "--keys", at_least=128)
    from relay_cluster.bench.kernels import KernelSettings, run_kernels

    settings = KernelSettings(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        keys=wanted,
        dtype=dtype,
        seed=seed,
    )
    deliver(run_kernels(settings), json_file, None)
