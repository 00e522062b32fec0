"""The profiler: measuring against what tiny models really compute, and profiles in use."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.workers import tiny
from transport.errors import ConfigError, RelayError
from transport.types import SegmentKey
from workers.costs import full_prefill_flops
from workers.methods import parse_reuse
from workers.methods.base import Span, SpanPlan
from workers.profile import load_profile
from workers.profiler import GRID, Profiler, ProfileResult, ProfileSettings, check_candidates
from workers.profiling.lab import Lab, Reference, band_of
from workers.profiling.measure import long_flops, measure
from workers.profiling.tasks import Kind, load_tasks
from workers.segment import Prompt, SlotValue, digest_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS = tiny.LAYERS
SPACE = "tiny"


# -- tasks --


def test_tasks_are_drawn_by_the_seed() -> None:
    one, same, other = (load_tasks(None, 5, seed) for seed in (1, 1, 2))
    assert one == same
    assert one.texts != other.texts
    assert len(set(one.texts)) == 5
    assert len(load_tasks(None, 999, 0).texts) >= 12, "all there are"


def test_calibration_and_benchmarks_share_no_task() -> None:
    """What a benchmark measures must not have been tuned on."""
    root = Path(__file__).resolve().parents[2] / "configs"
    ours = {
        json.loads(x)["question"] for x in (root / "calibration" / "tasks.jsonl").read_text().splitlines()
    }
    theirs = {
        json.loads(x).get("question")
        for x in (root / "bench" / "tasks.jsonl").read_text("utf-8").splitlines()
        if x.strip()
    }
    assert not ours & theirs


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"question": "a"}\n{"question": ""}', "rows.jsonl:2 needs a text"),
        ('{"question": "a"}\n\n{no', "rows.jsonl:3 is not JSON"),
        ('{"answer": "a"}', "it has: answer"),
        ("[1]", "it has: list"),
        ("\n", "has no rows"),
    ],
)
def test_a_data_file_that_will_not_do_says_where(tmp_path: Path, content: str, fault: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(ConfigError, match=fault):
        load_tasks(file, 1, 0)


def test_candidates_are_checked_before_anything_is_measured() -> None:
    check_candidates(GRID)
    for text, fault in (
        ("context_mass:ratio=2", "between 0 and 1"),
        ("context_mass:start={begin}", "placeholders"),
        ("auto:fast", "not one of the methods"),
        ("contextmass", "not one of the methods"),
    ):
        with pytest.raises(ConfigError, match=fault):
            check_candidates([text])


# -- measuring, on tiny models --


class TokenWriter:
    """Prompts of random tokens: a role's own prefix, the task, every answer with a separator behind it."""

    space = SPACE

    def stage(self, task: int, outputs: Sequence[SlotValue], *, room: int) -> Prompt:
        del room
        return self._prompt(100 + len(outputs), task, outputs)

    def reader(self, task: int, outputs: Sequence[SlotValue], kind: Kind, *, room: int) -> Prompt:
        del room
        return self._prompt(200, task, outputs[:1] if kind == "single" else outputs)

    def splice(self, tokens: Sequence[int], reason: str) -> SlotValue:
        del reason
        return SlotValue(token_ids=tuple(tokens), kv_tokens=len(tokens) - 1)

    def _prompt(self, role: int, task: int, outputs: Sequence[SlotValue]) -> Prompt:
        pieces: list[tuple[tuple[int, ...], bool]] = [
            (tuple(tiny.tokens(9 + role % 7, role)), False),
            (tuple(tiny.tokens(6, 300 + task)), False),
        ]
        for i, value in enumerate(outputs):
            assert value.token_ids is not None
            pieces.append((value.token_ids[: value.kv_tokens], True))
            pieces.append((value.token_ids[value.kv_tokens :] + tuple(tiny.tokens(3, 400 + i)), False))
        pieces.append((tuple(tiny.tokens(5, 500)), False))
        ids: list[int] = []
        spans: list[Span] = []
        for run, keyed in pieces:
            key = SegmentKey(SPACE, digest_tokens(run)) if keyed else None
            spans.append(Span(len(ids), len(ids) + len(run), "a" if keyed else None, key))
            ids.extend(run)
        return Prompt(tuple(ids), tuple(spans))


SMALL = ProfileSettings(
    composites=1,
    span_tokens=30,
    chain_tokens=20,
    positions=6,
    sweep_singles=2,
    sweep_composites=1,
    coarse=True,
    candidates=("naive", "epic:k=4", "context_mass:ratio=0.3+first=4+start={start}+end={end}"),
    cache_tokens=2048,
)


def make_lab(family: str, cache_tokens: int = 2048) -> Lab:
    rig = tiny.Rig(tiny.build(family))
    return Lab(rig.engine, rig.layout, rig.shape, stop_ids=frozenset(), cache_tokens=cache_tokens)


def run(family: str) -> ProfileResult:
    torch.manual_seed(0)
    with make_lab(family) as lab:
        return Profiler(lab, TokenWriter(), "tiny", 2, SMALL).run()


def references(lab: Lab, composite: bool = False) -> tuple[Reference, dict[str, Any]]:
    """One calibration pair, and the prompts that it came from."""
    writer = TokenWriter()
    outputs: list[SlotValue] = []
    upstream = {}
    first: Prompt | None = None
    for _ in range(2 if composite else 1):
        prompt = writer.stage(0, outputs, room=24)
        first = first or prompt
        with lab.answers([prompt], 24) as answers:
            value = writer.splice(answers[0].tokens, "length")
            assert value.token_ids is not None
            key = SegmentKey(SPACE, digest_tokens(value.token_ids[: value.kv_tokens]))
            upstream[key] = lab.segment(answers[0], key, value.kv_tokens)
        outputs.append(value)
    reader = writer.reader(0, outputs, "composite" if composite else "single", room=6)
    with lab.answers([reader], 6) as answers:
        reference = lab.reference(answers[0], upstream, 6)
    assert first is not None
    return reference, {"stage": first, "output": outputs[0], "reader": reader}


def hidden_states(model: Any, ids: Sequence[int]) -> list[torch.Tensor]:
    """Layer inputs by plain transformers: [tokens, hidden_size] each."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(torch.tensor(ids)[None], output_hidden_states=True).hidden_states
    return [h[0] for h in out[:-1]]


def test_deviations_are_those_of_the_models_own_hidden_states(family: str) -> None:
    """Layer inputs of the same tokens in both contexts, by plain transformers."""
    with make_lab(family) as lab:
        reference, made = references(lab)
    model = lab.engine.model
    answer = made["output"].token_ids[: made["output"].kv_tokens]
    before = hidden_states(model, [*made["stage"].token_ids, *answer])
    after = hidden_states(model, made["reader"].token_ids)
    span = next(s for s in made["reader"].spans if s.key is not None)
    start = len(made["stage"])
    table = reference.deviations[0][2]
    assert table.shape == (LAYERS, len(answer))
    assert float(table[0].max()) == 0.0
    for layer in range(1, LAYERS):
        old = before[layer][start : start + len(answer)]
        new = after[layer][span.start : span.stop]
        wanted = 1 - torch.nn.functional.cosine_similarity(old, new)
        assert (table[layer] - wanted).abs().max() < 1e-5
    assert float(table[1:].mean()) > 1e-4, "the contexts do differ"


def test_values_and_keys_of_an_unchanged_context_do_not_deviate() -> None:
    """Layer 0 is exact after the rotation, and nothing deviates where the context is the same."""
    with make_lab("llama") as lab:
        reference, made = references(lab)
        values, keys, _ = reference.deviations[0]
        assert float(values[0].max()) < 1e-5
        assert float(keys[0].max()) < 1e-5, "the rotation brings keys to their new position"
        assert float(keys[3].mean()) > 1e-4
        ids = (*made["stage"].token_ids, *made["output"].token_ids[: made["output"].kv_tokens], 7, 8)
        span = Span(len(made["stage"]), len(ids) - 2, "a", next(iter(reference.upstream)))
        same = Prompt(ids, (Span(0, span.start), span, Span(span.stop, len(ids))))
        with lab.answers([same], 4) as answers:
            unchanged = lab.reference(answers[0], reference.upstream, 4)
    assert float(unchanged.deviations[0].max()) < 1e-5


def test_recomputing_everything_is_exact_and_nothing_is_not(family: str) -> None:
    with make_lab(family) as lab:
        reference, _ = references(lab, composite=True)
        profile = tiny.Rig(lab.engine.model).profile()
        texts = ["context_mass:ratio=1+first=0+start=0+end=6", "naive", "full_prefill"]
        exact, naive, full = lab.run(reference, texts, profile)
    assert (exact.logits - reference.logits).abs().max() < 1e-4
    assert (full.logits - reference.logits).abs().max() < 1e-4
    assert (naive.logits - reference.logits).abs().max() > 1e-3
    assert (exact.reuse, naive.reuse) == (0.0, 1.0)
    assert full.flops == pytest.approx(full.flops_full) == full.flops_predicted
    assert naive.flops < exact.flops < full.flops


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_any_layer_serves_as_checkpoint(layer: int) -> None:
    """With the upstream's own context in front of it, a checkpoint at any layer is exact."""
    with make_lab("qwen3") as lab:
        reference, made = references(lab)
        ids = (*made["stage"].token_ids, *made["output"].token_ids[: made["output"].kv_tokens], 7, 8)
        span = Span(len(made["stage"]), len(ids) - 2, "a", next(iter(reference.upstream)))
        with torch.inference_mode():
            for block in (b for source in reference.upstream.values() for b in source.blocks):
                block.kv.body[layer:] = 3.0
        same = Prompt(ids, (Span(0, span.start), span, Span(span.stop, len(ids))))
        with lab.answers([same], 4) as answers:
            unchanged = lab.reference(answers[0], reference.upstream, 4)
        text = f"context_mass:ratio=1+first=0+start={layer}+end={LAYERS}"
        profile = tiny.Rig(lab.engine.model).profile()
        repaired, spoilt = lab.run(unchanged, [text, "naive"], profile)
    assert repaired.start == layer
    assert (repaired.logits - unchanged.logits).abs().max() < 1e-4
    assert (spoilt.logits - unchanged.logits).abs().max() > 1e-3


def test_candidates_in_one_step_are_what_they_are_alone() -> None:
    texts = ["epic:k=4", "relay_caching:start=2+det=3+end=6", "context_mass:ratio=0.3+start=1+end=5", "naive"]
    with make_lab("gemma3") as lab:
        reference, _ = references(lab, composite=True)
        profile = tiny.Rig(lab.engine.model).profile()
        together = lab.run(reference, texts, profile)
        alone = [lab.run(reference, [text], profile)[0] for text in texts]
    for a, b in zip(together, alone, strict=True):
        assert (a.text, a.start, a.end, a.reuse, a.flops) == (b.text, b.start, b.end, b.reuse, b.flops)
        assert (a.logits - b.logits).abs().max() < 1e-4


def test_a_plan_with_two_checkpoints_is_refused() -> None:
    """A segment carries the input of one layer."""
    with make_lab("llama") as lab:
        reference, _ = references(lab)
    source = next(iter(reference.upstream.values())).located
    span = next(s for s in reference.prompt.spans if s.key is not None)
    plans = [SpanPlan(span, source, band=(start, 4)) for start in (0, 1, 2)]
    assert band_of(plans[:2]) == (1, 4)
    with pytest.raises(ConfigError, match=r"joins at layers \[1, 2\]"):
        band_of(plans)


def test_a_whole_run_on_every_family(family: str) -> None:
    result = run(family)
    profile = result.profile
    assert profile.measured
    assert 0 <= profile.checkpoint_layer <= profile.detection_layer < profile.end_layer <= LAYERS
    assert result.cases == {"single": 2, "composite": 1}
    assert len(result.spans) == 2 + 4
    c = result.curves
    assert len(c.value) == len(c.key) == len(c.hidden) == len(c.mass_correlation) == LAYERS
    assert all(math.isfinite(v) and v >= 0 for v in (*c.value, *c.key, *c.hidden))
    assert np.array(c.correlation).shape == (LAYERS, LAYERS)
    assert 0.1 < c.top_share[0.1] < c.top_share[0.2] <= 1
    whole = result.ends[0]
    assert whole.end == LAYERS
    assert all(math.isfinite(r.single.kl_mean) for r in (*result.starts, *result.ends, *result.rows))
    for preset in ("fast", "balanced"):
        plan = parse_reuse(f"auto:{preset}", profile)
        band_start = getattr(plan.method, "start", 0)
        assert band_start in (None, 0, profile.checkpoint_layer), "segments of this profile can serve it"
    assert set(result.seconds) == {"decode", "reference", "sweep", "grid"}


def test_equal_runs_give_equal_results() -> None:
    a, b = run("llama"), run("llama")
    skipped = {"seconds"}
    for field in dataclasses.fields(ProfileResult):
        if field.name not in skipped:
            assert getattr(a, field.name) == getattr(b, field.name), field.name


def test_a_run_without_composites_chooses_by_single_spans() -> None:
    torch.manual_seed(0)
    alone = dataclasses.replace(SMALL, composites=0, cache_tokens=256)
    with make_lab("llama") as lab:
        result = Profiler(lab, TokenWriter(), "tiny", 3, alone).run()
    assert result.cases == {"single": 3, "composite": 0}
    assert result.curves.value_composite == ()
    assert all(r.composite is None for r in (*result.starts, *result.ends, *result.rows))
    assert result.profile.measured


def test_a_small_cache_only_makes_smaller_groups() -> None:
    texts = ["naive", "epic:k=4", "epic:k=8", "full_prefill"]
    with make_lab("llama") as large, make_lab("llama", cache_tokens=96) as small:
        pairs = [(lab, references(lab)[0]) for lab in (large, small)]
        profile = tiny.Rig(large.engine.model).profile()
        many, few = (lab.run(reference, texts, profile) for lab, reference in pairs)
    assert [o.text for o in many] == [o.text for o in few] == texts
    assert [o.reuse for o in many] == [o.reuse for o in few]


def test_rows_average_over_prompts() -> None:
    """Twice the same prompt is the same row, on twice as many cases."""
    from workers.profiling.measure import Case

    with make_lab("llama") as lab:
        reference, _ = references(lab)
        profile = tiny.Rig(lab.engine.model).profile()
        once = measure(lab, [Case(0, "single", reference)], ["naive"], profile)[0].single
        twice = measure(lab, [Case(0, "single", reference)] * 2, ["naive"], profile)[0].single
    assert (once.cases, twice.cases) == (1, 2)
    assert twice.kl_mean == pytest.approx(once.kl_mean)
    assert twice.kl_cases == (once.kl_cases[0],) * 2
    assert once.kl_first > 0


def test_a_model_that_says_too_little_is_refused() -> None:
    class Terse(TokenWriter):
        def splice(self, tokens: Sequence[int], reason: str) -> SlotValue:
            return SlotValue(token_ids=tuple(tokens), kv_tokens=0)

        def _prompt(self, role: int, task: int, outputs: Sequence[SlotValue]) -> Prompt:
            return super()._prompt(role, task, [])

    with make_lab("llama") as lab, pytest.raises(RelayError, match="long enough to relay"):
        Profiler(lab, Terse(), "tiny", 2, SMALL).run()


def test_long_prompts_cost_what_the_plan_says() -> None:
    rig = tiny.Rig(tiny.build("llama"))
    profile = rig.profile()
    costs = rig.shape.costs
    naive, whole = (long_flops(costs, t, profile) for t in ("naive", "full_prefill"))
    assert whole == pytest.approx(1.0)
    assert 0.03 < naive < 0.1, "64 fresh of 1,152 tokens, and attention over all of them"
    assert long_flops(costs, "epic:k=16", profile, spans=4) > long_flops(costs, "epic:k=16", profile)
    assert full_prefill_flops(costs, 1152) > 0


# -- a profile in use --


def test_a_profile_may_be_any_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    values = dataclasses.asdict(tiny.Rig(tiny.build("llama")).profile())
    file.write_text(json.dumps({**values, "calibration": {"curves": [1, 2]}}))
    profile = load_profile("whatever", LAYERS, str(file))
    assert profile.checkpoint_layer == values["checkpoint_layer"]
    with pytest.raises(ConfigError, match=r"mine\.yaml is for 6 layers, the model has 30"):
        load_profile("whatever", 30, str(file))
    with pytest.raises(ConfigError, match="no such file"):
        load_profile("whatever", LAYERS, str(tmp_path / "none.yaml"))
    file.write_text("- a list")
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        load_profile("whatever", LAYERS, str(file))
