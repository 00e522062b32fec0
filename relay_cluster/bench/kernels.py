"""`relay bench kernels`: the device's time for each kernel, beside what torch offers and beside the floor.

The floor comes from two ceilings that are measured in the same run: a copy within the device's memory, and a
product of large matrices. Inputs are random and laid out as in the engine: keys and values are slices of a
pool [layers, 2, kv_heads, tokens, head_dim]. Every result is compared with the float32 oracle first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F

from relay_cluster.bench.common import Document, median, progress
from relay_cluster.bench.kernel_rows import KernelRow
from transport.errors import ConfigError
from workers import kernels
from workers.kernels import reference

_ROPE_BASE: Final = 5e5
_CEILING_BYTES: Final = 1 << 30
_CEILING_SIDE: Final = 8192
_REPEAT_MS: Final = 100
_WARM_MS: Final = 25
_LAUNCHES: Final = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """Shapes of the model whose kernels are timed; the defaults are those of an 8B model (Llama 3).

    Attributes:
        heads, kv_heads, head_dim, layers: of the model.
        keys: tokens of context, in tokens.
        dtype: of keys and values: "bfloat16", "float16" or "float32".
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 32
    keys: tuple[int, ...] = (2048, 8192)
    dtype: str = "bfloat16"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device does at best, measured: bytes_s counts bytes read and written; flop_s in `dtype`."""

    bytes_s: float
    flop_s: float

    def floor_s(self, nbytes: float, flops: float) -> float:
        """Seconds that no implementation can do without."""
        return max(nbytes / self.bytes_s, flops / self.flop_s)


@dataclass(frozen=True, slots=True)
class _Case:
    """One call of a kernel. `run` and `baseline` give what `oracle` gives, in any dtype."""

    kernel: str
    shape: str
    rows: int
    keys: int
    nbytes: float
    flops: float
    baseline_name: str
    run: Callable[[], torch.Tensor]
    baseline: Callable[[], torch.Tensor]
    oracle: Callable[[], torch.Tensor]


def run_kernels(settings: KernelSettings) -> Document:
    """Time every kernel at every shape.

    Raises:
        ConfigError: no CUDA device, or no triton.
    """
    if not torch.cuda.is_available():
        raise ConfigError("relay bench kernels times CUDA kernels; torch sees no GPU. Run `relay doctor`.")
    ceilings = measure_ceilings(getattr(torch, settings.dtype))
    cases = list(_cases(settings))
    rows: list[KernelRow] = []
    with progress("kernels", len(cases)) as advance, torch.inference_mode():
        for case in cases:
            rows.append(_measure(case, settings, ceilings))
            advance(f"{case.kernel}, {case.shape}")
    facts = {
        **asdict(settings),
        "copy_gb_s": ceilings.bytes_s / 1e9,
        "matmul_tflop_s": ceilings.flop_s / 1e12,
        "gpu": torch.cuda.get_device_name(),
        "timing": "device events around a graph of the call, median, the device's caches emptied before",
    }
    return Document("kernels", facts, rows)


def seconds(run: Callable[[], Any]) -> float:
    """Median device seconds of one call, played back from a graph: without the time of launching it."""
    from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

    run()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    took: Any = do_bench(graph.replay, warmup=_WARM_MS, rep=_REPEAT_MS, return_mode="median")
    return float(took) / 1e3


def launch_seconds(run: Callable[[], Any]) -> float:
    """Median seconds that the caller is busy with one call; what the device does meanwhile does not count."""
    times: list[float] = []
    for _ in range(_LAUNCHES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times)


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """The device's copy bandwidth and its rate of multiplying matrices of `dtype`."""
    source = torch.randint(256, (_CEILING_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = seconds(lambda: target.copy_(source))
    a = torch.randn((_CEILING_SIDE, _CEILING_SIDE), device="cuda").to(dtype)
    product_s = seconds(lambda: a @ a)
    return Ceilings(2 * _CEILING_BYTES / copy_s, 2 * _CEILING_SIDE**3 / product_s)


def _measure(case: _Case, settings: KernelSettings, ceilings: Ceilings) -> KernelRow:
    wanted = case.oracle()
    error = float((case.run().float() - wanted).abs().max() / wanted.abs().max())
    if not math.isfinite(error):
        raise ConfigError(f"{case.kernel} ({case.shape}) gave something that is no number.")
    floor = ceilings.floor_s(case.nbytes, case.flops)
    took, theirs = seconds(case.run), seconds(case.baseline)
    return KernelRow(
        kernel=case.kernel,
        shape=case.shape,
        rows=case.rows,
        keys=case.keys,
        dtype=settings.dtype,
        seconds_p50=took,
        launch_s=launch_seconds(case.run),
        floor_s=floor,
        of_floor=took / floor,
        baseline=case.baseline_name,
        baseline_s=theirs,
        speedup=theirs / took,
        error=error,
    )


def _cases(settings: KernelSettings) -> Iterator[_Case]:
    for keys in settings.keys:
        for shape, rows, scattered in (
            ("decode", 1, False),
            ("fresh tail", 64, False),
            ("selected 10 %", keys // 10, True),
            ("full prefill", keys, False),
        ):
            yield _attention(settings, shape, rows, keys, scattered=scattered)
        yield _mass(settings, 64, keys)
        yield _deviation(settings, keys)
    for tokens in (64, 1024):
        yield _relocation(settings, tokens)


def _pool(settings: KernelSettings, tokens: int, layers: int = 1) -> torch.Tensor:
    """[layers, 2, kv_heads, tokens, head_dim], cut out of something longer, as in a pool of sequences."""
    generator = torch.Generator("cuda").manual_seed(settings.seed)
    shape = (layers, 2, settings.kv_heads, tokens + 64, settings.head_dim)
    values = torch.randn(shape, device="cuda", generator=generator).to(getattr(torch, settings.dtype))
    return values[:, :, :, 64:]


def _queries(settings: KernelSettings, rows: int) -> torch.Tensor:
    """[heads, rows, head_dim], transposed out of a projection."""
    generator = torch.Generator("cuda").manual_seed(settings.seed + 1)
    shape = (rows, settings.heads, settings.head_dim)
    values = torch.randn(shape, device="cuda", generator=generator)
    return values.to(getattr(torch, settings.dtype)).transpose(0, 1)


def _attention(settings: KernelSettings, shape: str, rows: int, keys: int, *, scattered: bool) -> _Case:
    kv, query = _pool(settings, keys)[0], _queries(settings, rows)
    at = torch.randperm(keys, generator=torch.Generator().manual_seed(settings.seed))[:rows].sort().values
    positions = (at if scattered else torch.arange(keys - rows, keys)).cuda()
    scaling = settings.head_dim**-0.5
    # What torch is given: a head of keys for every head of queries, which the clock does not count.
    groups = settings.heads // settings.kv_heads
    k, v = (kv[i].repeat_interleave(groups, 0)[None].contiguous() for i in (0, 1))
    q = query[None].contiguous()
    causal = rows == keys
    dense = not scattered and kernels.flash_serves(query)  # as `workers.attention` chooses
    mask = None
    if not causal and rows > 1:
        mask = torch.arange(keys, device="cuda")[None] <= positions[:, None]

    def baseline() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling)[0]

    def oracle() -> torch.Tensor:
        # In pieces: explicit scores of a full prefill would not fit.
        heads = range(settings.kv_heads)
        parts = [
            reference.attend_rows(
                query[h * groups : (h + 1) * groups].float(),
                kv[0, h : h + 1].float(),
                kv[1, h : h + 1].float(),
                positions,
                scaling=scaling,
            )[0]
            for h in heads
        ]
        return torch.cat(parts)

    def run() -> torch.Tensor:
        if dense:
            return kernels.flash_causal(query, kv[0], kv[1], scaling, None)[0]
        return kernels.attend_rows(query, kv[0], kv[1], positions, scaling=scaling)[0]

    seen = float((positions + 1).sum())
    return _Case(
        kernel="flash_causal" if dense else "attend_rows",
        shape=shape,
        rows=rows,
        keys=keys,
        nbytes=kv.element_size() * (kv.numel() + 2 * query.numel()),
        flops=4 * settings.heads * settings.head_dim * seen,
        baseline_name="scaled_dot_product_attention" + (", mask" if mask is not None else ""),
        run=run,
        baseline=baseline,
        oracle=oracle,
    )


def _mass(settings: KernelSettings, rows: int, keys: int) -> _Case:
    kv, query = _pool(settings, keys)[0], _queries(settings, rows)
    positions = torch.arange(keys - rows, keys, device="cuda")
    options: dict[str, Any] = {"start": 4, "stop": keys - rows, "scaling": settings.head_dim**-0.5}
    _, lse = kernels.attend_rows(query, kv[0], kv[1], positions, scaling=options["scaling"])
    return _Case(
        kernel="context_mass",
        shape="fresh tail",
        rows=rows,
        keys=keys,
        nbytes=kv.element_size() * (kv.numel() / 2 + query.numel()),
        flops=2 * settings.heads * settings.head_dim * rows * float(options["stop"] - options["start"]),
        baseline_name="explicit scores",
        run=lambda: kernels.context_mass(query, kv[0], lse, positions, **options),
        baseline=lambda: reference.context_mass(query, kv[0], lse, positions, **options),
        oracle=lambda: reference.context_mass(query.float(), kv[0].float(), lse, positions, **options),
    )


def _deviation(settings: KernelSettings, tokens: int) -> _Case:
    reused, computed = _pool(settings, tokens)[0]
    return _Case(
        kernel="value_deviation",
        shape="one layer",
        rows=tokens,
        keys=0,
        nbytes=2 * reused.numel() * reused.element_size() + 4 * tokens,
        flops=0,
        baseline_name="cosine_similarity",
        run=lambda: kernels.value_deviation(reused, computed),
        baseline=lambda: reference.value_deviation(reused, computed),
        oracle=lambda: reference.value_deviation(reused.float(), computed.float()),
    )


def _relocation(settings: KernelSettings, tokens: int) -> _Case:
    source = _pool(settings, tokens, settings.layers)
    out = torch.empty_like(_pool(settings, tokens + 64, settings.layers))[:, :, :, 64:]
    wanted = torch.empty_like(source, dtype=torch.float32)
    half = settings.head_dim // 2
    inv_freq = _ROPE_BASE ** -(torch.arange(half, device="cuda").float() / half)
    cos, sin = (t[None] for t in reference.rotation(inv_freq, 300))

    def run() -> torch.Tensor:
        kernels.relocate(source, cos, sin, out)
        return out

    def oracle() -> torch.Tensor:
        reference.relocate(source.float(), cos, sin, wanted)
        return wanted

    def baseline() -> torch.Tensor:
        reference.relocate(source, cos, sin, out)
        return out

    return _Case(
        kernel="relocate",
        shape="all layers",
        rows=tokens,
        keys=0,
        nbytes=2 * source.numel() * source.element_size(),
        flops=0,
        baseline_name="rotation in torch",
        run=run,
        baseline=baseline,
        oracle=oracle,
    )
