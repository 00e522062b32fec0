"""The ragged step: any rows of any number of sequences, each with its own positions and cache, at any layers,
in one pass over the weights.

Drives the decoder layers of a Hugging Face causal LM one by one, with the attention function of
`workers/attention.py` and no HF cache object or mask. A prefill chunk, sparse rectified rows and decode
tokens are the same call. The only module that touches the inside of transformers' models. It knows nothing of
prompts, plans or schedules.

Layer ranges are half-open: a row with enter=4, exit=29 is computed in layers 4 .. 28.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedModel

from workers.attention import (
    ATTENTION_NAME,
    ActiveRows,
    MassSpan,
    PartRows,
    Probe,
    group_rows,
    relay_attention,
)
from workers.kv_cache import SequenceCache

AttentionInterface.register(ATTENTION_NAME, relay_attention)


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
        probe: queries wanted by the caller.
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
    probe: Probe | None = None
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
    """All rows of a step, concatenated over parts."""

    hidden: torch.Tensor
    enter: torch.Tensor
    exit: torch.Tensor
    offsets: list[int] = field(default_factory=list[int])


class Engine:
    """Runs ragged steps on one model. One step at a time; callers on several threads are serialised."""

    def __init__(self, model: PreTrainedModel) -> None:
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        body: Any = model.model
        self._layers: Sequence[Any] = body.layers
        self._embed: Any = body.embed_tokens
        self._norm: Any = body.norm
        self._rotary: Any = body.rotary_emb
        self._head: Any = model.get_output_embeddings()
        config: Any = model.config.get_text_config()
        self.num_layers = len(self._layers)
        self.device = next(model.parameters()).device
        self._final_softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Gemma 3 has one RoPE per layer type, and its rotary module then takes the type's name.
        self._typed_rope = "layer_type" in inspect.signature(self._rotary.forward).parameters
        self._layer_types: list[str] = list(getattr(config, "layer_types", None) or [""] * self.num_layers)
        self._lock = threading.Lock()
        self.counters = EngineCounters()

    @torch.inference_mode()
    def step(self, parts: Sequence[Part]) -> list[PartResult]:
        """Compute every row of every part in its layers.

        Side effects: keys and values (and checkpoints, masses, probes where asked) are written to the parts'
            caches.
        """
        with self._lock:
            return self._step(parts)

    def _step(self, parts: Sequence[Part]) -> list[PartResult]:
        rows = self._gather(parts)
        # Layers at which the set of rows changes; between them nothing is rebuilt.
        changes = set(rows.enter.tolist()) | set(rows.exit.tolist())
        saves = {p.checkpoint_layer for p in parts if p.checkpoint_layer is not None}
        active, hidden, index = None, rows.hidden[:0], torch.empty(0, dtype=torch.long)
        rotary: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in range(min(changes), max(changes)):
            if layer in changes:
                if active is not None:
                    rows.hidden[index] = hidden
                index = torch.nonzero((rows.enter <= layer) & (rows.exit > layer)).flatten()
                hidden = rows.hidden[index]
                active = self._activate(parts, rows, index)
                positions = torch.cat([p.positions for p in active.parts] or [index])
                rotary = self._rotate(hidden, positions.to(self.device))
            if active is None or not index.numel():
                continue
            if layer in saves:
                _save_checkpoints(parts, active, hidden, layer)
            kind = self._layer_types[layer] if self._typed_rope else ""
            hidden = self._layers[layer](
                hidden[None],
                attention_mask=None,
                past_key_values=None,
                use_cache=False,
                position_embeddings=rotary[kind],
                relay=active,
            )
            hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
            self.counters.row_layers += index.numel()
        if active is not None:
            rows.hidden[index] = hidden
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
        return _Rows(torch.cat(hidden), torch.cat(enter), torch.cat(exit_), offsets)

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

    def _activate(self, parts: Sequence[Part], rows: _Rows, index: torch.Tensor) -> ActiveRows:
        out: list[PartRows] = []
        start = 0
        bounds = torch.searchsorted(index, torch.tensor([*rows.offsets, rows.hidden.shape[0]])).tolist()
        for i, part in enumerate(parts):
            local = index[bounds[i] : bounds[i + 1]] - rows.offsets[i]
            if not local.numel():
                continue
            positions = part.positions[local]
            count = positions.shape[0]
            out.append(
                PartRows(
                    cache=part.cache,
                    start=start,
                    stop=start + count,
                    positions=positions.to(self.device),
                    groups=group_rows(positions.to(self.device)),
                    contiguous=int(positions[-1] - positions[0]) + 1 == count,
                    masses=part.masses,
                    probe=part.probe,
                )
            )
            start += count
        return ActiveRows(out, self.num_layers)

    def _rotate(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        if not positions.numel():
            return {}
        if not self._typed_rope:
            return {"": self._rotary(hidden[None], positions[None])}
        return {t: self._rotary(hidden[None], positions[None], t) for t in set(self._layer_types)}

    def _results(self, parts: Sequence[Part], rows: _Rows) -> list[PartResult]:
        wanted = [o + r for o, p in zip(rows.offsets, parts, strict=True) for r in p.logits_rows]
        if wanted:
            logits = self._head(self._norm(rows.hidden[torch.tensor(wanted)])).float()
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


def _save_checkpoints(parts: Sequence[Part], active: ActiveRows, hidden: torch.Tensor, layer: int) -> None:
    wanting = {id(p.cache) for p in parts if p.checkpoint_layer == layer}
    for rows in active.parts:
        if id(rows.cache) in wanting:
            rows.cache.checkpoint[rows.positions] = cast("torch.Tensor", hidden[rows.start : rows.stop])
