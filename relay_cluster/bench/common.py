"""What the benchmarks share: the order of measurements, their statistics, and the document they end in.

    {"schema": "relay.bench.<name>/1", "machine": {...}, "settings": {...}, "rows": [...]}

Rows are frozen dataclasses; `check_document` holds a document to their fields and types. This module knows
neither models nor clusters, and imports neither torch nor Ray.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relay_cluster import __version__, console
from relay_cluster.bench.chain_stream_rows import ChainStreamRow
from relay_cluster.bench.decode_rows import DecodeRow
from relay_cluster.bench.directory_rows import DirectoryRow
from relay_cluster.bench.fault_rows import FaultRow
from relay_cluster.bench.kernel_rows import KernelRow
from relay_cluster.bench.pull_rows import PullRow
from relay_cluster.bench.serve_rows import ServeRow
from relay_cluster.bench.stream_fault_rows import StreamFaultRow
from relay_cluster.bench.stream_rows import StreamRow
from relay_cluster.bench.transfer_rows import TransferRow
from relay_cluster.doctor import this_machine
from transport.errors import ConfigError
from workers.methods import METHODS

BASE = "full_prefill"
"""The method that every speed-up and every distance refers to."""

TRANSFORMERS = "transformers"
"""Not a method of ours: `model(ids, logits_to_keep=1)` of plain transformers, measured beside them."""

_LINE_EVERY_S = 30.0

DEFAULT_METHODS = (*METHODS, "auto:fast", "auto")


# --- rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingRow:
    """One method on one shape of prompt: rows of `ttft` and of `chain`.

    Attributes:
        method: as the user named it, without parameters (presets keep theirs: "auto:fast").
        params: its parameters, all of them; of a preset the method that it came to.
        agent: position in the chain from 1; None where there is no chain.
        span_tokens: tokens of upstream text in the prompt; spans: in how many spans.
        fresh_tokens: tokens that no segment and no prefix holds.
        prefix_tokens: tokens of the role's own prefix, in the exact local prefix cache.
        prompt_tokens: all.
        samples: timed rounds, the cold one not counted.
        ttft_s_median, ttft_s_p90, ttft_s_min, ttft_s_max: seconds over the rounds.
        ttft_s_cold: of the first round; None where it was not measured.
        speedup: median of full_prefill in the same run / median.
        speedup_quoted: the same against the faster of full_prefill and transformers, named by quoted_against.
        reuse: share of the spans' (token, layer) entries that were not recomputed; None without reuse.
        flop_ratio_predicted, flop_ratio: FLOPs of this prompt / full prefill's, planned and done.
        over_bound: median / (full_prefill's median x flop_ratio); 1 is the FLOP bound.
        kl_first, kl32_mean: KL(full_prefill || method) in nats, at the first token and on average over up to
            32 teacher-forced tokens of full_prefill's greedy answer; averaged over the prompts.
        top1_32: share of these with the same most likely token.
        stages: median seconds of every stage (chain only).
    """

    method: str
    params: str
    agent: int | None
    span_tokens: int
    spans: int
    fresh_tokens: int
    prefix_tokens: int
    prompt_tokens: int
    samples: int
    ttft_s_median: float
    ttft_s_p90: float
    ttft_s_min: float
    ttft_s_max: float
    ttft_s_cold: float | None
    speedup: float
    speedup_quoted: float
    quoted_against: str
    reuse: float | None
    flop_ratio_predicted: float | None
    flop_ratio: float | None
    over_bound: float | None
    kl_first: float | None
    kl32_mean: float | None
    top1_32: float | None
    stages: dict[str, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityRow:
    """One method over the prompts of one kind.

    Attributes:
        heal: "off", "idle" or "always".
        spans: "single" (one relayed span), "composite" (four to eight) or "all".
        samples: prompts.
        kl_first_*: KL(full_prefill || method) in nats before the first token: mean, 90th percentile, worst.
        kl32_*, kl64_*: of every prompt's mean over its first 32 and 64 teacher-forced tokens.
        kl64_tail_mean: mean over tokens 32 to 63; None when no answer is that long.
        top1_32, top1_64: share of positions with the same most likely token.
        first_token_mismatch: share of prompts whose first greedy token differs.
        greedy_prefix_median: tokens up to the first difference of free-running greedy answers, of 64; a whole
            answer that is the same counts as 64.
        answer_agreement: share of maths prompts whose final number is full_prefill's; accuracy: ... is right.
            None unless asked for.
        reuse: mean share of the spans' (token, layer) entries that were not recomputed.
    """

    method: str
    params: str
    heal: str
    spans: str
    samples: int
    kl_first_mean: float
    kl_first_p90: float
    kl_first_worst: float
    kl32_mean: float
    kl32_p90: float
    kl32_worst: float
    kl64_mean: float
    kl64_p90: float
    kl64_worst: float
    kl64_tail_mean: float | None
    top1_32: float
    top1_64: float
    first_token_mismatch: float
    greedy_prefix_median: float | None
    answer_agreement: float | None
    accuracy: float | None
    reuse: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayRow:
    """The speed-up after so many novel queries.

    Attributes:
        queries: answered so far.
        speedup: median over the last window of queries of full_prefill's TTFT / the method's.
        warm_peak: largest such median so far, this one included.
        of_peak: speedup / warm_peak.
        ttft_s_median, base_ttft_s_median: of the window.
        reuse: mean over the window.
        relayed_share: share of the window's queries whose upstream text was relayed.
        evicted: segments that left the arena so far.
        segments: segments in the arena now.
    """

    method: str
    params: str
    queries: int
    speedup: float
    warm_peak: float
    of_peak: float
    ttft_s_median: float
    base_ttft_s_median: float
    reuse: float | None
    relayed_share: float
    evicted: int
    segments: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRow:
    """One method with a segment that comes over a network.

    Attributes:
        layer_groups: parts in which it comes.
        bytes: of the segment; link_gb_s: rate of a plain connection, in 1e9 bytes per second.
        samples: timed rounds.
        ttft_s_median, ttft_s_min, ttft_s_max: with the segment at the other node.
        near_ttft_s_median: with a segment of that length which the reader holds itself.
        wire_s: bytes at the rate of the link.
        over_bound: ttft_s_median / max(near_ttft_s_median, wire_s).
        exposed_s, hidden_s: median time that the request waited for bytes, and in which they travelled
            behind computing.
        base_ttft_s_median: full prefill's; speedup: that / ttft_s_median.
    """

    method: str
    params: str
    layer_groups: int
    backend: str
    span_tokens: int
    prompt_tokens: int
    bytes: int
    link_gb_s: float
    samples: int
    ttft_s_median: float
    ttft_s_min: float
    ttft_s_max: float
    near_ttft_s_median: float
    wire_s: float
    over_bound: float
    exposed_s: float
    hidden_s: float
    base_ttft_s_median: float
    speedup: float


ROWS: Mapping[str, type] = {
    "ttft": TimingRow,
    "chain": TimingRow,
    "chain_stream": ChainStreamRow,
    "fidelity": FidelityRow,
    "decay": DecayRow,
    "directory": DirectoryRow,
    "transfer": TransferRow,
    "faults": FaultRow,
    "link": LinkRow,
    "decode": DecodeRow,
    "kernels": KernelRow,
    "pull": PullRow,
    "stream": StreamRow,
    "stream_faults": StreamFaultRow,
    "serve": ServeRow,
}

Row = (
    TimingRow
    | ChainStreamRow
    | FidelityRow
    | DecayRow
    | DirectoryRow
    | TransferRow
    | FaultRow
    | LinkRow
    | DecodeRow
    | KernelRow
    | PullRow
    | StreamRow
    | StreamFaultRow
    | ServeRow
)


# --- document -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Document:
    """What a benchmark found.

    Attributes:
        name: a key of `ROWS`.
        settings: everything that it was run with, and how its inputs were made; plain JSON values.
        rows: see `ROWS`.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]

    def to_json(self) -> dict[str, Any]:
        """The document, checked.

        Raises:
            ValueError: a number is not finite, or a field is not what its row says.
        """
        stamp = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "relay_cluster": __version__}
        document = {
            "schema": f"relay.bench.{self.name}/1",
            "machine": _plain(dataclasses.asdict(this_machine())),
            "settings": _plain({**self.settings, **stamp}),
            "rows": [_plain(dataclasses.asdict(row)) for row in self.rows],
        }
        check_document(document)
        return document


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", "utf-8")
    partial.replace(path)


def check_document(document: Mapping[str, Any]) -> None:
    """Hold a document to its schema: exactly these keys, each of its type, every number finite.

    Raises:
        ValueError: what is wrong, and where.
    """
    if set(document) != {"schema", "machine", "settings", "rows"}:
        raise ValueError(f"a document has schema, machine, settings and rows, not {sorted(document)}")
    prefix, _, version = str(document["schema"]).rpartition("/")
    row_type = ROWS.get(prefix.removeprefix("relay.bench."))
    if not prefix.startswith("relay.bench.") or version != "1" or row_type is None:
        raise ValueError(f"unknown schema {document['schema']!r}")
    for part in ("machine", "settings"):
        if not isinstance(document[part], dict):
            raise ValueError(f"{part} must be an object")  # noqa: TRY004 - one kind of error for all faults
    hints = typing.get_type_hints(row_type)
    for number, row in enumerate(document["rows"]):
        if set(row) != set(hints):
            odd = sorted(set(row) ^ set(hints))
            raise ValueError(f"rows[{number}]: missing or unknown keys {odd}")
        for key, value in row.items():
            if not _fits(value, hints[key]):
                raise ValueError(f"rows[{number}].{key}: {value!r} is not {hints[key]}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is dict:
        _, item = typing.get_args(hint)
        return isinstance(value, dict) and all(
            isinstance(k, str) and _fits(v, item) for k, v in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint if hint is not type(None) else value is None


def _plain(value: Any) -> Any:
    """JSON values only; tuples become lists and numbers keep six significant digits."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return str(value) if isinstance(value, Path) else value


# --- statistics ---------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile with linear interpolation between order statistics (numpy's default).

    Raises:
        ValueError: no values, or q outside [0, 1].
    """
    if not values or not 0 <= q <= 1:
        raise ValueError(f"quantile {q} of {len(values)} values")
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    share = at - low
    # Never outside the two, which a sum of products may be by a rounding.
    return min(max(ordered[low] + (ordered[high] - ordered[low]) * share, ordered[low]), ordered[high])


def median(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """Mean of what is there."""
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


# --- order --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over all methods. index 0 is the cold one."""

    index: int
    order: tuple[str, ...]

    @property
    def cold(self) -> bool:
        return self.index == 0


def rounds(methods: Sequence[str], repeats: int, seed: int) -> Iterator[Round]:
    """A cold round and `repeats` timed ones, each with every method once.

    The order within the timed rounds is shuffled by `seed`, so that no method always runs after the same
    other one; drifts of the machine then meet all methods alike.
    """
    chance = random.Random(f"rounds-{seed}")
    yield Round(0, tuple(methods))
    for index in range(1, repeats + 1):
        order = list(methods)
        chance.shuffle(order)
        yield Round(index, tuple(order))


# --- options ------------------------------------------------------------------------------------------------


def method_list(text: str | None) -> tuple[str, ...]:
    """Methods of a comma-separated list, the base first whether named or not, none twice.

    Raises:
        ConfigError: one of them cannot be parsed.
    """
    from workers.methods import parse_reuse

    named = [m.strip() for m in text.split(",")] if text else list(DEFAULT_METHODS)
    chosen = tuple(dict.fromkeys([BASE, *filter(None, named)]))
    for method in chosen:
        parse_reuse(method)
    return chosen


def learners(methods: Sequence[str]) -> tuple[str, ...]:
    """Those methods that must have seen other prompts of a template before they can reuse anything."""
    from workers.methods import parse_method
    from workers.methods.kvcomm import KVComm

    return tuple(m for m in methods if isinstance(parse_method(m), KVComm))


def int_list(text: str, option: str, *, at_least: int = 1) -> tuple[int, ...]:
    """Whole numbers of a comma-separated list.

    Raises:
        ConfigError: not numbers, too small, or none.
    """
    try:
        numbers = tuple(int(item) for item in text.split(",") if item.strip())
    except ValueError:
        raise ConfigError(f'{option} "{text}" is not a list of whole numbers, like 512,1024') from None
    if not numbers or min(numbers) < at_least:
        raise ConfigError(f'{option} "{text}": every number must be at least {at_least}')
    return numbers


def split_method(asked: str, resolved: str) -> tuple[str, str]:
    """(method, params) of a row.

    Args:
        asked: as the user wrote it. resolved: `workers.methods.base.Reuse.text`.
    """
    name, _, rest = asked.partition(":")
    if name == "auto":
        preset = rest.partition("+")[0]
        return (f"auto:{preset}" if preset and "=" not in preset else "auto"), resolved
    return name, resolved.partition(":")[2]


# --- progress -----------------------------------------------------------------------------------------------

Advance = Callable[[str], None]
"""Called after every step with what comes next."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Advance]:
    """A bar on standard error; where that is not a terminal, a line every half a minute."""
    out = console.errors()
    told, done = time.monotonic(), 0
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[status]}"),
        console=out,
        transient=True,
        disable=not out.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=total, status="")

        def advance(status: str) -> None:
            nonlocal told, done
            done += 1
            bar.update(task, advance=1, status=status)
            if not out.is_terminal and time.monotonic() - told >= _LINE_EVERY_S:
                told = time.monotonic()
                out.print(f"{title}: {done}/{total} {status}", markup=False, highlight=False)

        yield advance
