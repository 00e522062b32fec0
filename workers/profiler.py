"""`relay profile`: measure how a model tolerates reuse, and choose its layers and presets.

    tasks -> a chain of agents decodes answers -> readers of them are prefilled in full (the references)
          -> deviation curves -> sweeps over the checkpoint and the end layer -> L_start, L_end, L_det
          -> method texts on every reference -> presets

Every answer, prefill and method runs on the product's engine; the choices are `profiling/choose.py`'s. Greedy
throughout and batched the same way each time, so equal settings give equal results on one machine. Knows
nothing of files, terminals or Ray.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from transport.errors import ConfigError, RelayError
from transport.types import SegmentKey
from workers.costs import model_costs
from workers.engine import Engine
from workers.methods import METHODS, parse_reuse
from workers.methods.base import ModelProfile
from workers.model import LoadedModel
from workers.prefill import PrefillModel
from workers.profile import generic_profile
from workers.profiling.choose import (
    Chosen,
    Row,
    Rule,
    choose_detection,
    choose_end,
    choose_presets,
    choose_start,
)
from workers.profiling.lab import Lab, Upstream
from workers.profiling.measure import Case, Curves, curves, long_flops, measure, span_tokens
from workers.profiling.tasks import STAGES, Kind, TaskSet, TextWriter, Writer
from workers.relayable import inverse_frequencies
from workers.segment import Prompt, SlotValue, digest_tokens
from workers.settings import WorkerSettings
from workers.text_encoding import stop_token_ids

Progress = Callable[[float, str], None]
"""Takes the share that is done, 0 to 1, and a line of text."""

BASELINES: tuple[str, ...] = (
    "naive",
    "epic:k=8",
    "epic:k=16",
    "epic:k=32",
    "cacheblend:r=0.15",
)
GRID: tuple[str, ...] = (
    *(
        f"context_mass:ratio={ratio}+first=16+start={{start}}+end={{end}}"
        for ratio in (0.05, 0.08, 0.12, 0.16, 0.2, 0.3, 0.4)
    ),
    *(f"context_mass:ratio={ratio}+first=4+start={{start}}+end={{end}}" for ratio in (0.12, 0.2)),
    *(
        f"context_mass:ratio={ratio}+first=16+start={{start}}+end={{layers}}"
        for ratio in (0.12, 0.16, 0.2, 0.3, 0.4)
    ),
    *(
        f"context_mass:ratio={ratio}+first=16+start={{earlier}}+end={{layers}}"
        for ratio in (0.12, 0.2, 0.3, 0.4)
    ),
)
"""Method texts that are tried by default. {start}, {earlier}, {end}, {det}, {layers} stand for L_start, the
checkpoint before it in the sweep, L_end, L_det and the number of layers."""

QUICK_GRID: tuple[str, ...] = tuple(
    f"context_mass:ratio={ratio}+first=16+start={{start}}+end={{end}}" for ratio in (0.08, 0.16, 0.3)
)
REFERENCE = "relay_caching:start={start}+det={det}+end={end}"
"""What `auto:fast` is measured against: `relay_caching` at its defaults under this very profile."""

_WHOLE = "context_mass:ratio=1+first=0+start={start}+end={end}"
_STARTS = (1, 2, 4, 6, 8, 10, 14)
_ENDS = (0, 1, 2, 4, 6, 9)
_OF_LAYERS = 30
"""The two tuples above are layers of a model with this many; for others they scale."""

_SHORTEST = 24
"""Upstream answers do not end before so many tokens: shorter ones would not be relayed."""
_MEASURED_SHARE = {"decode": 0.4, "reference": 0.15, "sweep": 0.15, "grid": 0.3}
"""Rough share of the time of each phase, for the progress bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """How much is measured, and what is asked for.

    Attributes:
        composites: tasks that get a whole chain of agents, for prompts with several spans.
        span_tokens: longest answer of a chain's first agent; chain_tokens: of the others.
        positions: teacher-forced tokens over which KL is averaged.
        sweep_singles, sweep_composites: cases that the layer sweeps use.
        coarse: fewer layers in the sweeps.
        candidates: method texts with placeholders, see `GRID`.
        rule: see `profiling/choose.py`.
        cache_tokens: size of the KV pool.
    """

    composites: int = 6
    span_tokens: int = 192
    chain_tokens: int = 96
    positions: int = 32
    sweep_singles: int = 6
    sweep_composites: int = 3
    coarse: bool = False
    candidates: tuple[str, ...] = (*BASELINES, *GRID)
    rule: Rule = field(default_factory=Rule)
    cache_tokens: int = 8192

    def quick(self) -> ProfileSettings:
        """The same on fewer, shorter cases: to see that everything works, not to choose by."""
        return dataclasses.replace(
            self,
            composites=2,
            span_tokens=64,
            chain_tokens=32,
            positions=16,
            sweep_singles=2,
            sweep_composites=1,
            coarse=True,
            candidates=(*BASELINES[:3], *QUICK_GRID)
            if self.candidates == (*BASELINES, *GRID)
            else self.candidates,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """What the rule chose. correlation: L_det's mean rank correlation with the layers up to L_end."""

    start: int
    earlier: int
    end: int
    detection: int
    correlation: float
    chosen: Chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileResult:
    """Everything that a profiler run found.

    Attributes:
        profile: ready for use.
        picks: the rule's choices, before they became the profile.
        curves: deviations of decode KV.
        starts, ends: rows of the two layer sweeps.
        rows: every method text, the references of `fast` included.
        long_flops: method text -> predicted FLOPs as a share of full prefill's at 1,024 span tokens and 64
            fresh ones: as one span, and as four.
        cases: prompts measured, by kind. spans: tokens of their relayed spans.
        seconds: wall time by phase.
        notes: what did not go as it should, in plain sentences.
    """

    profile: ModelProfile
    picks: Picks
    curves: Curves
    starts: tuple[Row, ...]
    ends: tuple[Row, ...]
    rows: tuple[Row, ...]
    long_flops: Mapping[str, tuple[float, float]]
    cases: Mapping[Kind, int]
    spans: tuple[int, ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...]


def profile_model(
    loaded: LoadedModel, tasks: TaskSet, settings: ProfileSettings, progress: Progress = lambda _f, _t: None
) -> ProfileResult:
    """Profile a model on texts.

    Args:
        loaded: its own checkpoint layer does not matter.
        tasks: what the calibration agents work on.

    Raises:
        ConfigError: a candidate text does not parse. PromptTooLong: the model's context is too short.
        RelayError: the model's answers are too short to relay.
    """
    min_tokens = WorkerSettings().min_segment_tokens
    writer = TextWriter(loaded, tasks.texts, min_segment_tokens=min_tokens)
    engine = Engine(loaded.model)
    lab = Lab(
        engine,
        loaded.layout,
        prefill_model(loaded.model, loaded.layout.num_layers, engine.device),
        stop_ids=stop_token_ids(loaded.tokenizer, getattr(loaded.model, "generation_config", None)),
        cache_tokens=settings.cache_tokens,
    )
    with lab:
        return Profiler(lab, writer, loaded.name, len(tasks.texts), settings, progress).run()


def prefill_model(model: Any, num_layers: int, device: torch.device) -> PrefillModel:
    """What the prefill executor must know of a model; its checkpoint layer is set per plan."""
    frequencies = torch.stack([inverse_frequencies(model, i) for i in range(num_layers)])
    scaling = getattr(model.model.layers[0].self_attn, "scaling", None)
    return PrefillModel(num_layers, 0, frequencies.to(device), model_costs(model), scaling)


class Profiler:
    """One run over the tasks 0 .. tasks - 1 of `writer`. Call `run` once."""

    def __init__(
        self,
        lab: Lab,
        writer: Writer,
        model: str,
        tasks: int,
        settings: ProfileSettings,
        progress: Progress = lambda _f, _t: None,
    ) -> None:
        self._lab = lab
        self._writer = writer
        self._tasks = tasks
        self._settings = settings
        self._progress = progress
        self._generic = generic_profile(model, lab.num_layers)
        self._upstream: dict[SegmentKey, Upstream] = {}
        self._seconds: dict[str, float] = {}
        self._notes: list[str] = []
        self._done = 0.0
        check_candidates(settings.candidates)

    def run(self) -> ProfileResult:
        """Measure and choose; see `profile_model` for what it raises."""
        cases = self._cases(self._chains())
        self._upstream.clear()
        found = curves(cases)
        swept = self._sweep_cases(cases)
        starts = self._measure("sweep", swept, self._start_texts(), 0.5)
        start, earlier = self._pick_start(starts)
        ends = self._measure("sweep", swept, self._end_texts(start), 0.5)
        end = choose_end(ends, self._settings.rule, self._lab.num_layers)
        picks, rows = self._grid(cases, found, start, earlier, end)
        profile = self._profile(picks)
        return ProfileResult(
            profile=profile,
            picks=picks,
            curves=found,
            starts=tuple(starts),
            ends=tuple(ends),
            rows=tuple(rows),
            long_flops={
                row.text: (
                    long_flops(self._lab.shape.costs, row.text, profile),
                    long_flops(self._lab.shape.costs, row.text, profile, spans=4),
                )
                for row in rows
            },
            cases={k: sum(c.kind == k for c in cases) for k in ("single", "composite")},
            spans=tuple(span_tokens(cases)),
            seconds=self._seconds,
            notes=tuple(self._notes),
        )

    # -- calibration prompts -------------------------------------------------------------------------------

    def _chains(self) -> list[list[SlotValue]]:
        """Answers of every task's agents: of the first one, and of the whole chain where composites are
        made."""
        s = self._settings
        chains: list[list[SlotValue]] = [[] for _ in range(self._tasks)]
        composites = min(s.composites, self._tasks)
        work = self._tasks * s.span_tokens + (len(STAGES) - 1) * composites * s.chain_tokens
        for stage in range(len(STAGES)):
            limit = s.span_tokens if stage == 0 else s.chain_tokens
            members = list(range(self._tasks if stage == 0 else composites))
            prompts = [self._writer.stage(i, chains[i], room=limit) for i in members]
            for batch in self._lab.batches(prompts, limit):
                self._progress(self._done, f"agent {stage + 1} of {len(STAGES)} answers {len(batch)} tasks")
                begin = time.perf_counter()
                with self._lab.answers([prompts[i] for i in batch], limit, _SHORTEST) as answers:
                    for i, answer in zip(batch, answers, strict=True):
                        value = self._writer.splice(answer.tokens, answer.reason)
                        chains[members[i]].append(value)
                        if value.kv_tokens:
                            key = SegmentKey(self._writer.space, _digest(value))
                            self._upstream[key] = self._lab.segment(answer, key, value.kv_tokens)
                self._spent("decode", begin, len(batch) * limit / work)
        return chains

    def _cases(self, chains: Sequence[Sequence[SlotValue]]) -> list[Case]:
        """Every downstream prompt under full prefill. Prompts without anything to relay are left out, and
        noted."""
        s = self._settings
        wanted: list[tuple[int, Kind, Prompt]] = []
        for task, outputs in enumerate(chains):
            kinds: tuple[Kind, ...] = ("single", "composite") if len(outputs) > 1 else ("single",)
            for kind in kinds:
                prompt = self._writer.reader(task, outputs, kind, room=s.positions)
                relayed = sum(span.key in self._upstream for span in prompt.spans)
                if relayed >= (2 if kind == "composite" else 1):
                    wanted.append((task, kind, prompt))
                else:
                    self._notes.append(f"task {task + 1}, {kind}: the answers were too short to relay")
        prompts = [prompt for _, _, prompt in wanted]
        cases: list[Case] = []
        for batch in self._lab.batches(prompts, s.positions):
            self._progress(self._done, f"full prefill of {len(batch)} prompts that read the answers")
            begin = time.perf_counter()
            with self._lab.answers([prompts[i] for i in batch], s.positions) as answers:
                for i, answer in zip(batch, answers, strict=True):
                    task, kind, prompt = wanted[i]
                    keys = {span.key for span in prompt.spans if span.key in self._upstream}
                    upstream = {k: self._upstream[k] for k in keys if k is not None}
                    cases.append(Case(task, kind, self._lab.reference(answer, upstream, s.positions)))
            self._spent("reference", begin, len(batch) / len(prompts))
        if not any(c.kind == "single" for c in cases):
            raise RelayError(
                "none of the model's answers was long enough to relay, so there is nothing to measure. Give "
                "other tasks with --data, or profile an instruction-tuned model."
            )
        return cases

    def _sweep_cases(self, cases: Sequence[Case]) -> list[Case]:
        s = self._settings
        singles = [c for c in cases if c.kind == "single"][: s.sweep_singles]
        return singles + [c for c in cases if c.kind == "composite"][: s.sweep_composites]

    # -- layers --------------------------------------------------------------------------------------------

    def _start_texts(self) -> list[str]:
        layers = self._lab.num_layers
        grid = _STARTS[1::2] if self._settings.coarse else _STARTS
        starts = {min(max(1, round(n * layers / _OF_LAYERS)), layers - 2) for n in grid}
        return [_WHOLE.format(start=n, end=layers) for n in sorted(starts) if n > 0]

    def _end_texts(self, start: int) -> list[str]:
        layers = self._lab.num_layers
        grid = _ENDS[::2] if self._settings.coarse else _ENDS
        ends = {layers - round(n * layers / _OF_LAYERS) for n in grid}
        return [_WHOLE.format(start=start, end=n) for n in sorted(ends, reverse=True) if n > start + 2]

    def _pick_start(self, sweep: Sequence[Row]) -> tuple[int, int]:
        """L_start, and the checkpoint before it in the sweep (itself where there is none)."""
        start = choose_start(sweep, self._settings.rule)
        if start == 0:
            self._notes.append(
                "even the earliest checkpoint exceeds its share of the target errors: L_start is layer 0"
            )
        return start, max((r.start for r in sweep if r.start < start), default=start)

    # -- method texts --------------------------------------------------------------------------------------

    def _grid(
        self, cases: Sequence[Case], found: Curves, start: int, earlier: int, end: int
    ) -> tuple[Picks, list[Row]]:
        rule, layers = self._settings.rule, self._lab.num_layers
        detect = {n: choose_detection(found.correlation, n, end, rule) for n in (start, earlier)}
        texts = {n: REFERENCE.format(start=n, det=detect[n][0], end=end) for n in (start, earlier)}
        places = {"start": start, "earlier": earlier, "end": end, "det": detect[start][0], "layers": layers}
        candidates = [c.format(**places) for c in self._settings.candidates]
        everything = list(dict.fromkeys([*texts.values(), *candidates]))
        rows = self._measure("grid", cases, everything, 1.0)
        by_text = {row.text: row for row in rows}
        chosen = choose_presets(rows, {n: by_text[text] for n, text in texts.items()}, rule)
        if not chosen.balanced.met:
            self._notes.append(
                "no candidate keeps the target errors: `balanced` is the most faithful of them; give more "
                "with --candidate, or raise --target-kl"
            )
        layer = chosen.checkpoint_layer
        picks = Picks(
            start=start,
            earlier=earlier,
            end=end,
            detection=detect[layer][0],
            correlation=detect[layer][1],
            chosen=chosen,
        )
        return picks, rows

    def _measure(self, phase: str, cases: Sequence[Case], texts: list[str], share: float) -> list[Row]:
        """Rows of `texts`; `share`: how much of the phase this is."""
        begin = time.perf_counter()
        count = 0

        def step() -> None:
            nonlocal count
            count += 1
            self._advance(phase, share / len(cases))
            self._progress(self._done, f"{len(texts)} settings on prompt {count} of {len(cases)}")

        rows = measure(self._lab, cases, texts, self._generic, step)
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin
        return rows

    def _profile(self, picks: Picks) -> ModelProfile:
        chosen = picks.chosen
        method = parse_reuse(chosen.balanced.row.text).method
        ratio, first = getattr(method, "ratio", None), getattr(method, "first", None)
        return dataclasses.replace(
            self._generic,
            checkpoint_layer=chosen.checkpoint_layer,
            detection_layer=picks.detection,
            end_layer=picks.end,
            ratio=self._generic.ratio if ratio is None else ratio,
            first_tokens=self._generic.first_tokens if first is None else first,
            measured=True,
            presets={"fast": chosen.fast.row.text, "balanced": chosen.balanced.row.text},
        )

    # -- progress ------------------------------------------------------------------------------------------

    def _spent(self, phase: str, begin: float, share: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - begin
        self._advance(phase, share)

    def _advance(self, phase: str, share: float) -> None:
        self._done = min(1.0, self._done + _MEASURED_SHARE[phase] * share)


def check_candidates(texts: Iterable[str]) -> None:
    """Whether every candidate is a method text once its placeholders are filled.

    Raises:
        ConfigError: one is not.
    """
    for text in texts:
        try:
            filled = text.format(start=1, earlier=1, end=3, det=2, layers=4)
        except (KeyError, IndexError, ValueError):
            raise ConfigError(
                f'candidate "{text}": its placeholders may be {{start}}, {{earlier}}, {{end}}, {{det}} and '
                "{layers}."
            ) from None
        if filled.partition(":")[0] not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f'candidate "{text}" is not one of the methods {known}.')
        parse_reuse(filled)


def _digest(value: SlotValue) -> bytes:
    assert value.token_ids is not None  # answers are spliced as ids
    return digest_tokens(value.token_ids[: value.kv_tokens])
