"""What a run reports: schema `relay.run/1`, as frozen dataclasses and as JSON.

Durations are in seconds and end in `_s`, sizes in bytes, bandwidths in 1e9 bytes per second. This module
does not know how anything was measured; it only names the facts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

SCHEMA = "relay.run/1"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Where an agent's time to first token went; together they are its TTFT, up to rounding.

    Attributes:
        dispatch_s: Ray call and result, that is TTFT minus everything that the worker itself saw.
        queue_s: waiting in the worker for a free sequence.
        lookup_s: asking the directory who holds the segments.
        lease_s: pinning them.
        pull_s: waiting for bytes; those that travel while others are computed with cost nothing.
        rotate_s: moving keys to their new positions.
        rectify_s: recomputing the selected (token, layer) entries of relayed spans.
        prefill_s: computing the fresh tokens.
        first_token_s: drawing the first token from the logits.
    """

    dispatch_s: float = 0.0
    queue_s: float = 0.0
    lookup_s: float = 0.0
    lease_s: float = 0.0
    pull_s: float = 0.0
    rotate_s: float = 0.0
    rectify_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """One pull. `outcome` is a `transport.types.Outcome` value; everything but "pulled" was computed
    instead."""

    segment: str
    slot: str
    source: str
    destination: str
    source_node: str
    backend: str
    blocks: int
    bytes: int
    seconds: float
    gb_s: float
    outcome: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackReport:
    """A slot whose tokens were computed although the method wanted to reuse them."""

    slot: str
    reason: str
    detail: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedReport:
    """A segment that the agent left for others: its output or a shared input."""

    segment: str
    tokens: int
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanCostReport:
    """What a span was expected to take by either way, and what it took: see `workers.messages.SpanCost`."""

    slot: str
    tokens: int
    relayed: bool
    predicted_pull_s: float | None = None
    predicted_relay_s: float | None = None
    predicted_prefill_s: float | None = None
    actual_relay_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareReport:
    """The same prompt under another method, on the same worker, interleaved with the first.

    Attributes:
        method: the other method.
        ttft_s: this run's method, median of the samples.
        base_ttft_s: the other method, median of the samples.
        speedup: base_ttft_s / ttft_s.
        samples: (ttft_s, base_ttft_s) of each repeat.
        top1: share of the compared tokens on which both methods have the same best token.
        kl_first: KL divergence of the first token's distribution; base is the reference.
        kl_mean: mean over the compared tokens, teacher-forced on the base's text.
        kl_p90: 90th percentile of the same.
        compared_tokens: how many were compared.
        text: what the other method wrote.
        same_text_prefix_tokens: leading tokens on which both texts agree.
    """

    method: str
    ttft_s: float
    base_ttft_s: float
    speedup: float
    samples: tuple[tuple[float, float], ...] = ()
    top1: float | None = None
    kl_first: float | None = None
    kl_mean: float | None = None
    kl_p90: float | None = None
    compared_tokens: int = 0
    text: str = ""
    same_text_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the quality gate did with a request, and the state of its edge afterwards.

    Attributes:
        edge: "question+solver -> critic": the slots whose text is relayed, and the agent.
        asked: method that was asked for.
        ladder: methods from the loosest (`asked`) to full prefill.
        rung: index into `ladder` that this request used; next_rung: that the next one will use.
        judged: method that a shadow check judged: the request's own, on the last rung the one before; "" when
            the request was not checked.
        kl_mean, top1, value_error: what it found; None without a verdict.
        checks, skipped: verdicts on the edge so far, and checks without one.
        falls, recoveries: demotions and ways back so far.
        reason: of the last change.
    """

    edge: str
    asked: str
    ladder: tuple[str, ...]
    rung: int
    next_rung: int
    judged: str = ""
    kl_mean: float | None = None
    top1: float | None = None
    value_error: float | None = None
    checks: int = 0
    skipped: int = 0
    falls: int = 0
    recoveries: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentReport:
    """One agent's request.

    Attributes:
        method: as it was asked for ("auto"); resolved_method: what that came to on the worker, every
            parameter included.
        prompt_tokens: fresh_tokens + relayed_tokens.
        prefix_tokens: the part of fresh_tokens that came from the exact local prefix cache.
        pulled_ahead_blocks, pulled_ahead_bytes: of what is relayed, came while upstream agents still wrote.
        prepared_tokens: the part of prefix_tokens that was computed while upstream agents still wrote.
        ahead: exact or relay, as was chosen meanwhile, and why; "" where nothing was to be prepared.
        reuse: share of the (token, layer) entries of relayed spans that were not recomputed; None without
            such spans.
        recomputed_entries: (token, layer) entries of relayed spans that were recomputed, of total_entries.
        ttft_s: measured by the executor, the Ray call included.
        finish_reason: "stop" or "length".
        flop_ratio_predicted, flop_ratio: FLOPs of the prefill over full prefill's, as planned and
            as computed.
        span_costs: of every span that was relayed, or was computed only because that was predicted to be
            faster (no fallback).
        retries: times the request was started again after its worker died; ttft_s is that of the last try.
        notes: plain sentences about what did not go as it should ("the answer was not published").
        healed_entries: stale (token, layer) entries that were made exact after the first token.
        healed_at_token: index of the first answer token that came from an exact cache (the answer's length
            where only its KV became exact); None where healing was off or did not get so far.
        gate: what the quality gate did; None without one.
        pull_hidden_s: for how long bytes travelled while the worker computed with those that had come; the
            time for which it waited is stages.pull_s.
    """

    agent: str
    worker: str
    node: str
    model: str
    method: str
    prompt_tokens: int
    fresh_tokens: int
    relayed_tokens: int
    prefix_tokens: int = 0
    prepared_tokens: int = 0
    pulled_ahead_blocks: int = 0
    pulled_ahead_bytes: int = 0
    ahead: str = ""
    reuse: float | None = None
    recomputed_entries: int = 0
    total_entries: int = 0
    ttft_s: float
    stages: Stages = field(default_factory=Stages)
    transfers: tuple[TransferReport, ...] = ()
    fallbacks: tuple[FallbackReport, ...] = ()
    published: tuple[PublishedReport, ...] = ()
    decode_tokens: int = 0
    decode_tokens_per_s: float | None = None
    finish_reason: str = ""
    text: str = ""
    tokens: tuple[int, ...] = ()
    retries: int = 0
    notes: tuple[str, ...] = ()
    compare: CompareReport | None = None
    resolved_method: str = ""
    flop_ratio_predicted: float | None = None
    flop_ratio: float | None = None
    span_costs: tuple[SpanCostReport, ...] = ()
    healed_entries: int = 0
    healed_at_token: int | None = None
    gate: GateReport | None = None
    pull_hidden_s: float = 0.0

    @property
    def pulled_bytes(self) -> int:
        """Bytes that arrived from other workers."""
        return sum(transfer.bytes for transfer in self.transfers)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowReport:
    """One run of the pipeline over one set of inputs; agents in the order in which they ran."""

    agents: tuple[AgentReport, ...]
    wall_s: float
    inputs_digest: str = ""

    def __getitem__(self, agent: str) -> AgentReport:
        return next(report for report in self.agents if report.agent == agent)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineReport:
    """The machine that the run was started from."""

    cpu: str
    cores: int
    memory_gib: float
    gpus: tuple[str, ...]
    platform: str
    python: str
    torch: str
    ray: str
    transformers: str
    nixl: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterReport:
    """The cluster as it was when the run ended.

    Attributes:
        name: of its configuration.
        workers: number of workers; nodes: number of machines.
        backend: the transport backend in use, or the setting when nothing was moved.
        device: of the workers ("cpu", "cuda").
        notes: plain sentences about downgrades ("nixl is not installed: tcp is used").
    """

    name: str
    workers: int
    backend: str
    nodes: int = 1
    device: str = "cpu"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Everything about one `relay run`."""

    pipeline: str
    method: str
    seed: int
    max_new_tokens: int
    machine: MachineReport
    cluster: ClusterReport
    rows: tuple[RowReport, ...]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: str = SCHEMA

    @property
    def ttft_s(self) -> float:
        """Time to first token of the last agent of the last row."""
        return self.rows[-1].agents[-1].ttft_s

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens, over all agents and rows, that came from relayed segments."""
        return sum(agent.relayed_tokens for row in self.rows for agent in row.agents)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities become null, because JSON has neither."""
        return cast("dict[str, Any]", _plain(self))

    def write(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(
            json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
        )
        part.replace(path)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> RunReport:
        """The report that `to_json` gave.

        Raises:
            ValueError: another schema, or fields that do not fit this one.
        """
        if data.get("schema") != SCHEMA:
            raise ValueError(f'schema is {data.get("schema")!r}, this version reads "{SCHEMA}"')
        return _build(RunReport, data)

    @staticmethod
    def merge(reports: Sequence[RunReport]) -> RunReport:
        """The rows of several runs of one pipeline in one report; everything else is taken from the last."""
        rows = tuple(row for report in reports for row in report.rows)
        return dataclasses.replace(reports[-1], rows=rows)


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[object]", value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _build(cls: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass from JSON values, by its type hints."""
    hints = typing.get_type_hints(cls)
    unknown = set(data) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
    try:
        return cls(**{name: _value(hints[name], value) for name, value in data.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def _value(hint: Any, value: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
        return _value(hint, value)
    if dataclasses.is_dataclass(hint):
        return _build(cast("type[Any]", hint), value)
    if origin is tuple:
        args = typing.get_args(hint)
        if args[-1] is Ellipsis:
            return tuple(_value(args[0], item) for item in value)
        return tuple(_value(arg, item) for arg, item in zip(args, value, strict=True))
    return value
