"""Tiny random models of every family that we claim to drive, and helpers that play the upstream agent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

from transport.types import Incarnation, Located, NodeId, Owner, Segment, SegmentKey, WorkerId
from workers.attention import MassSpan
from workers.costs import model_costs
from workers.engine import Engine, Part
from workers.kv_cache import CachePool, SequenceCache
from workers.layout import KVLayout
from workers.methods.base import ModelProfile, Span
from workers.prefill import Prefill, PrefillModel
from workers.pulled import PulledSegment
from workers.relayable import inverse_frequencies
from workers.segment import digest_tokens
from workers.wire import WireFormat

VOCAB = 99
LAYERS = 6
_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWED = {"sliding_window": 9, "query_pre_attn_scalar": 8}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {}),
    "mistral": (tf.MistralConfig, tf.MistralForCausalLM, {"sliding_window": 9}),
    "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {"head_dim": None}),
    "qwen3": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {}),
    "gemma2": (tf.Gemma2Config, tf.Gemma2ForCausalLM, _WINDOWED),
    "gemma3": (
        tf.Gemma3TextConfig,
        tf.Gemma3ForCausalLM,
        {**_WINDOWED, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)},
    ),
    "phi3": (tf.Phi3Config, tf.Phi3ForCausalLM, {"head_dim": None}),
}


def build(family: str, *, initializer_range: float = 0.2) -> Any:
    """A random model. A wide initialisation makes attention uneven, so that mistakes show in the logits."""
    config_class, model_class, extra = FAMILIES[family]
    kwargs = {k: v for k, v in {**_BASE, **extra}.items() if v is not None}
    config = config_class(**kwargs, initializer_range=initializer_range)
    # The oracle: transformers' own plainest attention.
    config._attn_implementation = "eager"
    return model_class(config).eval().requires_grad_(False)


def reference_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[tokens, vocab] of plain `model(ids)` with eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor(ids)[None]).logits[0]


@dataclass
class Rig:
    """An engine with its cache pool on one model, without any transport."""

    model: Any
    checkpoint_layer: int = 2
    block_tokens: int = 16
    wire: WireFormat = "raw"

    def __post_init__(self) -> None:
        config = self.model.config
        self.layout = KVLayout(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            hidden_size=config.hidden_size,
            dtype="float32",
            block_tokens=self.block_tokens,
            checkpoint_layer=self.checkpoint_layer,
            wire=self.wire,
        )
        self.num_layers = config.num_hidden_layers
        self.engine = Engine(self.model)
        self.pool = CachePool(self.layout, 4096)
        freqs = torch.stack([inverse_frequencies(self.model, i) for i in range(self.num_layers)])
        self.shape = PrefillModel(self.num_layers, self.checkpoint_layer, freqs, model_costs(self.model))

    def profile(self, **changes: Any) -> ModelProfile:
        values: dict[str, Any] = {
            "model": "tiny",
            "num_layers": self.num_layers,
            "checkpoint_layer": self.checkpoint_layer,
            "detection_layer": self.checkpoint_layer + 1,
            "end_layer": self.num_layers,
            "ratio": 0.2,
            "first_tokens": 4,
        }
        return ModelProfile(**{**values, **changes})

    def compute(self, ids: Sequence[int], mass_from: int | None = None) -> SequenceCache:
        """Dense prefill of `ids` into a new cache; context mass for the rows from `mass_from` on."""
        cache = self.pool.allocate(len(ids), timeout_s=5)
        masses = () if mass_from is None else (MassSpan(mass_from, len(ids), sinks=1),)
        self.engine.step(
            [
                Part(
                    cache=cache,
                    positions=torch.arange(len(ids)),
                    token_ids=torch.tensor(ids),
                    checkpoint_layer=self.checkpoint_layer,
                    masses=masses,
                )
            ]
        )
        return cache

    def segment(self, prefix: Sequence[int], ids: Sequence[int]) -> tuple[Located, PulledSegment]:
        """KV of `ids` as an upstream agent with `prefix` in front of it would publish it."""
        self.model.set_attn_implementation("relay_cluster")
        cache = self.compute([*prefix, *ids], mass_from=len(prefix))
        start, count, size = len(prefix), len(ids), self.block_tokens
        blocks = []
        for i in range(self.layout.blocks_for(count)):
            views = self.layout.views(torch.zeros(self.layout.block_nbytes, dtype=torch.uint8))
            a, n = start + i * size, min(size, count - i * size)
            views.kv.put(cache.kv[:, :, :, a : a + n])
            views.checkpoint[:n] = cache.checkpoint[a : a + n]
            views.mass[:n] = cache.mass[a : a + n]
            blocks.append(views)
        self.pool.free(cache)
        segment = Segment(SegmentKey("tiny", digest_tokens(ids)), count, start, ())
        owner = Owner(WorkerId("up"), Incarnation(1), NodeId("n"))
        return Located(segment, owner), PulledSegment(tuple(blocks), count, start)

    def two_spans(self) -> list[tuple[list[int], tuple[Located, PulledSegment] | None]]:
        """Pieces of a prompt for `run`: 12 fresh tokens, 40 relayed, 5 fresh, 33 relayed, 10 fresh."""
        texts = [tokens(n, n) for n in (40, 33)]
        segments = [self.segment(tokens(9, 50 + i), t) for i, t in enumerate(texts)]
        return [
            (tokens(12, 7), None),
            (texts[0], segments[0]),
            (tokens(5, 8), None),
            (texts[1], segments[1]),
            (tokens(10, 9), None),
        ]

    def run(
        self,
        method: Any,
        pieces: Sequence[tuple[Sequence[int], tuple[Located, PulledSegment] | None]],
        *,
        max_rows: int = 1 << 20,
        profile: ModelProfile | None = None,
        times: int = 1,
        masses: tuple[MassSpan, ...] = (),
        more: Callable[[], None] | None = None,
    ) -> tuple[torch.Tensor, Prefill]:
        """Prefill a prompt of (ids, segment or None) pieces with `method`; returns (last logits, prefill).
        Every part is computed `times` times; the mass of `masses` is recorded. `more` is called whenever
        nothing can be computed before more layers arrive."""
        self.model.set_attn_implementation("relay_cluster")
        ids, spans, hits, pulled = [], [], {}, {}
        for piece_ids, source in pieces:
            key = None if source is None else source[0].segment.key
            spans.append(Span(len(ids), len(ids) + len(piece_ids), "s" if source else None, key))
            ids.extend(piece_ids)
            if source is not None:
                hits[source[0].segment.key], pulled[source[0].segment.key] = source
        plan = method.plan(spans, hits, profile or self.profile())
        cache = self.pool.allocate(len(ids), timeout_s=5)
        prefill = Prefill(plan, ids, cache, self.shape, masses=masses)
        prefill.load(
            {i: pulled[s.source.segment.key] for i, s in enumerate(plan.spans) if s.source is not None}
        )
        while not prefill.finished:
            if not prefill.absorb():
                assert more is not None  # or it would never end
                more()
                continue
            part = prefill.next_part(max_rows)
            results = [self.engine.step([part])[0] for _ in range(times)]
            prefill.done(part, results[-1])
        assert prefill.logits is not None
        return prefill.logits, prefill


def tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()
