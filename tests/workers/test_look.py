"""Looking ahead: the fresh rows go first, and what the prompt's end reads helps to select."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import torch

from tests.workers import tiny
from transport.errors import ConfigError
from transport.types import Located, SegmentKey
from workers.attention import MassSpan, Probe
from workers.costs import rows_flops
from workers.engine import Part
from workers.methods import parse_method
from workers.methods.base import ModelProfile, Positions, RectifyPlan, Span
from workers.prefill import Prefill

pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = "context_mass:ratio=0.3+first=1+start=2+end=5+probes=0.1+drift=1+look=6+look_layer=3+look_from=1"


@dataclass(frozen=True)
class _Chosen:
    """A method that recomputes given offsets, without looking: the oracle for what comes after a look."""

    offsets: Mapping[int, Sequence[int]]
    band: tuple[int, int]

    def plan(
        self, spans: Sequence[Span], hits: Mapping[SegmentKey, Located], profile: ModelProfile
    ) -> RectifyPlan:
        plan = parse_method("naive").plan(spans, hits, profile)
        return RectifyPlan(
            tuple(
                replace(s, band=self.band, select=Positions(tuple(self.offsets[i]))) if s.source else s
                for i, s in enumerate(plan.spans)
            )
        )


def _selected(prefill: Prefill) -> dict[int, list[int]]:
    return {i: r.selected.tolist() for i, r in prefill._relayed.items()}


def test_after_the_look_it_is_the_same_prefill_with_other_tokens(family: str) -> None:
    """Starting again at the checkpoint from the states of the first pass changes nothing."""
    rig = tiny.Rig(tiny.build(family))
    pieces = rig.two_spans()
    logits, prefill = rig.run(parse_method(METHOD.replace("drift=1", "drift=0")), pieces)
    chosen = _selected(prefill)
    assert [len(v) for v in chosen.values()] == [12, 10]
    expected, plain = rig.run(_Chosen(chosen, (2, 5)), pieces)
    assert (logits - expected).abs().max() < 1e-4
    tokens = prefill.num_tokens
    assert (prefill.cache.kv[:, :, :, :tokens] - plain.cache.kv[:, :, :, :tokens]).abs().max() < 1e-4
    without, _ = rig.run(parse_method(METHOD.replace("look=6", "look=0")), pieces)
    assert (logits - without).abs().max() > 1e-3


def test_the_choice_is_mass_times_root_of_attention() -> None:
    """Against attention written out by hand over a naive prefill's cache."""
    rig = tiny.Rig(tiny.build("llama"))
    pieces = rig.two_spans()
    _, naive = rig.run(parse_method("naive"), pieces)
    n, start = naive.num_tokens, naive.num_tokens - 6
    seen: dict[int, torch.Tensor] = {}
    probes = tuple(Probe(layer, start) for layer in (1, 3))
    ids = [i for piece, _ in pieces for i in piece]
    rig.engine.step(
        [
            Part(
                cache=naive.cache,
                positions=torch.arange(n - 10, n),
                token_ids=torch.tensor(ids[n - 10 :]),
                probes=probes,
            )
        ]
    )
    for probe in probes:
        assert probe.query is not None
        keys = naive.cache.keys(probe.layer)[:, :n]
        keys = keys.repeat_interleave(probe.query.shape[0] // keys.shape[0], 0)
        scores = probe.query @ keys.transpose(1, 2) * probe.query.shape[-1] ** -0.5
        scores.masked_fill_(torch.arange(n)[None] > torch.arange(start, n)[:, None], float("-inf"))
        seen[probe.layer] = scores.softmax(-1).sum((0, 1))
    attended = torch.stack(list(seen.values())).mean(0).sqrt()
    method = METHOD.replace("probes=0.1", "probes=0").replace("first=1", "first=0")
    _, prefill = rig.run(parse_method(method), pieces)
    at = 0
    for i, (piece, source) in enumerate(pieces):
        if source is not None:
            score = source[1].gather("mass")[: len(piece)] * attended[at : at + len(piece)]
            best = score.topk(len(_selected(prefill)[i])).indices.sort().values.tolist()
            assert _selected(prefill)[i] == best
        at += len(piece)


@pytest.mark.parametrize("max_rows", [7, 16, 33])
def test_chunks_do_not_change_what_is_chosen(family: str, max_rows: int) -> None:
    rig = tiny.Rig(tiny.build(family))
    pieces = rig.two_spans()
    whole, first = rig.run(parse_method(METHOD), pieces)
    cut, second = rig.run(parse_method(METHOD), pieces, max_rows=max_rows)
    assert _selected(first) == _selected(second)
    assert (whole - cut).abs().max() < 1e-4


def test_what_looking_costs_is_counted() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = rig.two_spans()
    _, with_look = rig.run(parse_method(METHOD), pieces)
    _, without = rig.run(parse_method(METHOD.replace("look=6", "look=0")), pieces)
    fresh = 12 + 5 + 10
    assert with_look.counts.fresh == without.counts.fresh + fresh * (4 - 2)
    assert with_look.counts.rectified == without.counts.rectified
    positions = torch.cat([torch.arange(0, 12), torch.arange(52, 57), torch.arange(90, 100)]).numpy()
    extra = rows_flops(rig.shape.costs, positions, positions * 0 + 2, positions * 0 + 4)
    assert with_look.predicted_flops - without.predicted_flops == pytest.approx(extra)
    # Selected tokens lie elsewhere, so they see more or fewer keys; that is all that may differ.
    assert with_look.actual_flops - without.actual_flops == pytest.approx(extra, rel=0.1)


def test_where_it_looks_it_may_recompute_less() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = rig.two_spans()
    method = METHOD.replace("probes=0.1", "probes=0") + "+look_ratio=0.25"
    assert [len(v) for v in _selected(rig.run(parse_method(method), pieces)[1]).values()] == [10, 9]
    far = method.replace("look_from=1", "look_from=99")
    assert [len(v) for v in _selected(rig.run(parse_method(far), pieces)[1]).values()] == [12, 10]


def test_mass_of_fresh_text_is_counted_once() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = rig.two_spans()

    masses = (MassSpan(90, 100),)
    _, looked = rig.run(parse_method(METHOD.replace("drift=1", "drift=0")), pieces, masses=masses)
    _, plain = rig.run(_Chosen(_selected(looked), (2, 5)), pieces, masses=masses)
    expected = plain.cache.mass[90:100]
    assert expected.min() > 0
    assert (looked.cache.mass[90:100] - expected).abs().max() < 1e-5


def test_it_looks_only_where_that_pays() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    pieces = rig.two_spans()  # 73 relayed tokens, 15 fresh ones behind the first of them

    def looks(method: str) -> bool:
        return rig.run(parse_method(method), pieces)[1].plan.look is not None

    assert looks(METHOD.replace("look_from=1", "look_from=4.8"))
    assert not looks(METHOD.replace("look_from=1", "look_from=4.9"))
    assert not looks(METHOD.replace("ratio=0.3", "ratio=1"))
    assert not looks(METHOD.replace("first=1", "first=9")), "most of them are not a matter of rank"
    with pytest.raises(ConfigError, match="look_layer=5 must lie between start=2 and the last but one"):
        looks(METHOD.replace("look_layer=3", "look_layer=5"))
    with pytest.raises(ConfigError, match="look_layer=1 must lie between start=2"):
        looks(METHOD.replace("look_layer=3", "look_layer=1"))
    assert looks(METHOD.replace("look_layer=3", "look_layer=2"))
