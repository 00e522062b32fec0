"""The ragged step: any rows of any number of sequences, each with its own positions and cache, at any layers,
in one pass over the weights.

Drives the decoder layers of a Hugging Face causal LM one by one (`workers/layers.py`), with the attention of
`workers/attention.py` and no HF cache object or mask. A prefill chunk, sparse rectified rows and decode
tokens are the same call. It knows nothing of prompts, plans or schedules.

Layer ranges are half-open: a row with enter=4, exit=29 is computed in layers 4 .. 28.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from workers.attention import MassSpan, PartRows, Probe, RaggedAttention, SingleRow, group_rows
from workers.cores import CoreShare
from workers.drift import Drift
from workers.kv_cache import SequenceCache
from workers.layers import Rotary, RotaryTables, linear, module_attention, prepare_layers

ATTENTION_NAME = "relay_cluster"

AttentionInterface.register(ATTENTION_NAME, module_attention)


@dataclass(slots=True, kw_only=True)
class Part:
    """One sequence's share of a step.

    Attributes:
        cache: where its keys and values live.
        positions: [rows] int64, ascending, without repeats.
        token_ids: [rows] int64; used for rows that enter at layer 0.
        enter, exit: [rows] int64 layer range [enter, exit) of every row; None means [0, L).
        hidden: [rows, hidden_size]; input of layer `enter` for rows with enter > 0.
        logits_rows: indices of rows whose logits are wanted; their exit must be L.
        checkpoint_layer: save the input of this layer to `cache.checkpoint`; None = do not.
        masses: spans whose context mass is recorded.
        probes: queries wanted by the caller.
        drifts: relayed spans whose other entries follow the probes among the rows.
        keep_hidden: return the hidden states with which rows left.
    """

    cache: SequenceCache
    positions: torch.Tensor
    token_ids: torch.Tensor
    enter: torch.Tensor | None = None
    exit: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    logits_rows: tuple[int, ...] = ()
    checkpoint_layer: int | None = None
    masses: tuple[MassSpan, ...] = ()
    probes: tuple[Probe, ...] = ()
    drifts: tuple[Drift, ...] = ()
    keep_hidden: bool = False

    @property
    def rows(self) -> int:
        return self.positions.shape[0]


@dataclass(slots=True)
class PartResult:
    """logits: [len(logits_rows), vocab] float32; hidden: [rows, hidden_size] at each row's exit, or None."""

    logits: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(slots=True)
class EngineCounters:
    """Work done so far. weight_passes: steps; rows: rows entered; row_layers: (row, layer) entries
    computed."""

    weight_passes: int = 0
    rows: int = 0
    row_layers: int = 0


@dataclass(slots=True)
class _Rows:
    """All rows of a step, concatenated over parts; `uniform` when all of them take all layers."""

    hidden: torch.Tensor
    enter: torch.Tensor
    exit: torch.Tensor
    offsets: list[int]
    uniform: bool

    def changes(self) -> list[int]:
        """Layers at which rows enter or leave, ascending."""
        if self.uniform:
            return [int(self.enter[0]), int(self.exit[0])]
        return sorted({*self.enter.tolist(), *self.exit.tolist()})

    def active(self, layer: int) -> slice | torch.Tensor:
        """The rows that are computed at `layer`."""
        if self.uniform:
            return slice(0, self.hidden.shape[0])
        return torch.nonzero((self.enter <= layer) & (self.exit > layer)).flatten()


class StepGivenUp(Exception):
    """Somebody else needs the engine sooner than the step's rows are needed."""


class Engine:
    """Runs ragged steps on one model. One step at a time; callers on several threads are serialised."""

    def __init__(self, model: PreTrainedModel, cores: CoreShare | None = None) -> None:
        """cores: what its steps compute on; None: on as many threads as torch has been told."""
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        body: Any = model.model
        self._embed: Any = body.embed_tokens
        self._norm: Any = body.norm
        self._rotary: Any = body.rotary_emb
        self._head: Any = model.get_output_embeddings()
        config: Any = model.config.get_text_config()
        self.num_layers = len(body.layers)
        self._heads = int(config.num_attention_heads)
        self.device = next(model.parameters()).device
        self._final_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Gemma 3 has one RoPE per layer type, and its rotary module then takes the type's name.
        self._typed_rope = "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._layer_types: list[str] = list(getattr(config, "layer_types", None) or [""] * self.num_layers)
        self._layers = prepare_layers(model, self._rotary_of)
        self._lock = threading.Lock()
        self._cores = cores
        self.counters = EngineCounters()

    @torch.inference_mode()
    def step(self, parts: Sequence[Part], give_up: Callable[[float], bool] | None = None) -> list[PartResult]:
        """Compute every row of every part in its layers.

        Side effects: keys and values (and checkpoints, masses, probes where asked) are written to the parts'
            caches.

        Args:
            give_up: asked before every layer, with the share of the layers that are done.

        Raises:
            StepGivenUp: it said so. Keys, values and checkpoints of the parts' rows are then of no use.
        """
        with self._lock, self._cores.computing() if self._cores else nullcontext():
            return self._step(parts, give_up)

    def _step(
        self, parts: Sequence[Part], give_up: Callable[[float], bool] | None = None
    ) -> list[PartResult]:
        rows = self._gather(parts)
        # Layers at which the set of rows changes; between them nothing is rebuilt.
        changes = rows.changes()
        saves = {p.checkpoint_layer for p in parts if p.checkpoint_layer is not None}
        active: RaggedAttention | None = None
        hidden, index = rows.hidden, slice(0, 0)
        rotary: dict[str, RotaryTables] = {}
        for layer in range(changes[0], changes[-1]):
            if give_up is not None and give_up(layer / self.num_layers):
                raise StepGivenUp
            if self._cores is not None:
                self._cores.tune()
            if layer in changes:
                if active is not None:
                    rows.hidden[index] = hidden
                    active.finish(self._heads)
                index = rows.active(layer)
                active = self._activate(parts, rows, index)
                if active is None:
                    continue
                hidden = rows.hidden[index]
                rotary = self._rotate(hidden, active)
            if active is None:
                continue
            if layer in saves:
                _save_checkpoints(parts, active, hidden, layer)
            kind = self._layer_types[layer] if self._typed_rope else ""
            hidden = self._layers[layer].forward(hidden, rotary[kind], active)
            self.counters.row_layers += hidden.shape[0]
        if active is not None:
            rows.hidden[index] = hidden
            active.finish(self._heads)
        self.counters.weight_passes += 1
        self.counters.rows += rows.hidden.shape[0]
        return self._results(parts, rows)

    def _gather(self, parts: Sequence[Part]) -> _Rows:
        hidden, enter, exit_, offsets, total = [], [], [], [], 0
        for part in parts:
            if part.rows == 0:
                raise ValueError("a part of a step has no rows.")
            offsets.append(total)
            total += part.rows
            hidden.append(self._entry_states(part))
            enter.append(torch.zeros(part.rows, dtype=torch.long) if part.enter is None else part.enter)
            exit_.append(
                torch.full((part.rows,), self.num_layers, dtype=torch.long)
                if part.exit is None
                else part.exit
            )
        first, last = torch.cat(enter), torch.cat(exit_)
        uniform = bool((first == first[0]).all()) and bool((last == last[0]).all())
        # Layers overwrite the states, so they must be the step's own.
        states = torch.cat(hidden) if len(hidden) > 1 or parts[0].hidden is not None else hidden[0]
        if states is parts[0].hidden:
            states = states.clone()
        return _Rows(states, first, last, offsets, uniform)

    def _entry_states(self, part: Part) -> torch.Tensor:
        """[rows, hidden_size]: embeddings for rows that enter at layer 0, given states for the others."""
        if part.hidden is None:
            return self._embed(part.token_ids.to(self.device)[None])[0]
        if part.enter is None:
            return part.hidden
        states = part.hidden.clone()
        from_start = torch.nonzero(part.enter == 0).flatten()
        if from_start.numel():
            states[from_start] = self._embed(part.token_ids[from_start].to(self.device)[None])[0]
        return states

    def _activate(
        self, parts: Sequence[Part], rows: _Rows, index: slice | torch.Tensor
    ) -> RaggedAttention | None:
        """What attention needs to know of the rows `index`; None if there are none."""
        bounds = [*rows.offsets, rows.hidden.shape[0]]
        if isinstance(index, torch.Tensor):
            if not index.numel():
                return None
            bounds = torch.searchsorted(index, torch.tensor(bounds)).tolist()
        out: list[PartRows] = []
        singles: list[SingleRow] = []
        where: list[torch.Tensor] = []
        for i, part in enumerate(parts):
            start, stop = bounds[i], bounds[i + 1]
            if start == stop:
                continue
            positions = part.positions
            if isinstance(index, torch.Tensor):
                positions = positions[index[start:stop] - rows.offsets[i]]
            where.append(positions)
            if stop - start == 1 and self.device.type == "cpu" and not part.probes and not part.drifts:
                singles.append(SingleRow.of(part.cache, start, int(positions[0]), part.masses))
            else:
                out.append(self._part_rows(part, start, stop, positions))
        everywhere = torch.cat(where) if len(where) > 1 else where[0]
        return RaggedAttention(out, singles, everywhere.to(self.device), self.num_layers)

    def _part_rows(self, part: Part, start: int, stop: int, positions: torch.Tensor) -> PartRows:
        groups = group_rows(positions)
        first, last = groups[0].first, groups[-1].stop
        there = positions.to(self.device)
        for group in groups:
            group.positions = there[group.rows]
        return PartRows(
            cache=part.cache,
            start=start,
            stop=stop,
            positions=there,
            groups=groups,
            contiguous=first if last - first == stop - start else None,
            masses=part.masses,
            probes=part.probes,
            drifts=[(d, torch.searchsorted(positions, d.probes).to(self.device)) for d in part.drifts],
        )

    def _rotary_of(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> Rotary:
        if not self._typed_rope:
            return self._rotary(hidden[None], positions[None])
        return self._rotary(hidden[None], positions[None], self._layer_types[layer])

    def _rotate(self, hidden: torch.Tensor, active: RaggedAttention) -> dict[str, RotaryTables]:
        """cos and sin of the active rows, per layer type where the model has several RoPEs."""
        kinds = self._layer_types if self._typed_rope else [""]
        return {
            kind: RotaryTables.of(self._rotary_of(kinds.index(kind), hidden, active.positions))
            for kind in set(kinds)
        }

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocab]"""
        if type(self._head) is torch.nn.Linear:
            return linear(hidden, self._head.weight, self._head.bias)
        return self._head(hidden)

    def _results(self, parts: Sequence[Part], rows: _Rows) -> list[PartResult]:
        wanted = [o + r for o, p in zip(rows.offsets, parts, strict=True) for r in p.logits_rows]
        if wanted:
            logits = self._logits(self._norm(rows.hidden[torch.tensor(wanted)])).float()
            if self._final_softcap is not None:
                logits = torch.tanh(logits / self._final_softcap) * self._final_softcap
        else:
            logits = rows.hidden.new_empty((0, 0)).float()
        results, used = [], 0
        for offset, part in zip(rows.offsets, parts, strict=True):
            count = len(part.logits_rows)
            kept = rows.hidden[offset : offset + part.rows].clone() if part.keep_hidden else None
            results.append(PartResult(logits[used : used + count], kept))
            used += count
        return results


def _save_checkpoints(
    parts: Sequence[Part], active: RaggedAttention, hidden: torch.Tensor, layer: int
) -> None:
    wanting = {id(p.cache) for p in parts if p.checkpoint_layer == layer}
    for one in active.singles:
        if id(one.cache) in wanting:
            one.cache.checkpoint[one.position] = hidden[one.row]
    for rows in active.parts:
        if id(rows.cache) in wanting:
            states = hidden[rows.start : rows.stop]
            if rows.contiguous is not None:
                rows.cache.checkpoint[rows.contiguous : rows.contiguous + states.shape[0]] = states
            else:
                rows.cache.checkpoint[rows.positions] = states
