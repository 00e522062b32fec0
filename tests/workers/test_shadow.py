"""Evidence for shadow checks: what is kept, how much of it, for how long, and the verdict that it gives."""

from __future__ import annotations

import math

import pytest
import torch

from tests.workers import tiny
from workers.methods import parse_method
from workers.shadow import Evidence, EvidenceBox, judge, relayed_positions


def _evidence(rows: int = 3, vocab: int = 8) -> Evidence:
    evidence = Evidence(rows, (), torch.empty(0, dtype=torch.long))
    evidence.take_logits(torch.zeros(rows, vocab))
    return evidence


def test_only_the_first_logits_are_kept() -> None:
    evidence = Evidence(3, (), torch.empty(0, dtype=torch.long))
    given = torch.randn(6, 10)
    evidence.take_logits(given[:1])
    evidence.take_logits(given[1:5])
    evidence.take_logits(given[5:])
    assert torch.equal(evidence.logits, given[:3])
    assert evidence.nbytes == 3 * 10 * 4, "a slice of a larger tensor would keep all of it"
    given.zero_()
    assert evidence.logits.abs().sum() > 0


def test_values_are_those_of_the_moment_they_were_taken(one_thread: None) -> None:
    rig = tiny.Rig(tiny.build("llama"))
    span = tiny.tokens(20, 2)
    source = rig.segment(tiny.tokens(9, 3), span)
    _, prefill = rig.run(
        parse_method("naive"), [(tiny.tokens(15, 1), None), (span, source), (tiny.tokens(8, 4), None)]
    )
    positions = relayed_positions(prefill.plan)
    assert positions.tolist() == list(range(15, 35))
    evidence = Evidence(1, (0, 5), positions)
    evidence.take_values(prefill.cache)
    assert evidence.value_errors(prefill.cache) == pytest.approx((0.0, 0.0), abs=1e-6)
    full = rig.compute(tiny.tokens(15, 1) + span + tiny.tokens(8, 4))
    shallow, deep = evidence.value_errors(full)
    assert shallow == pytest.approx(0.0, abs=1e-6), "values of layer 0 know no context"
    assert deep > 1e-2
    prefill.cache.kv.zero_()
    assert evidence.value_errors(full)[1] == pytest.approx(deep), "healing does not reach what is kept"


def test_the_box_keeps_a_bounded_number_a_bounded_size_and_a_bounded_time() -> None:
    box = EvidenceBox(most=2, max_bytes=10_000)
    for i in range(3):
        box.put(f"r{i}", _evidence(), now=0.0, keep_s=10.0)
    assert box.take("r0", now=1.0) is None
    assert box.take("r1", now=1.0) is not None
    assert box.take("r1", now=1.0) is None, "it is judged once"
    assert box.nbytes == 3 * 8 * 4
    assert box.take("r2", now=10.0) is None, "nobody came for it in time"
    assert box.nbytes == 0
    box.put("large", _evidence(rows=1000), now=0.0, keep_s=10.0)
    assert box.nbytes == 0, "what is too large is not kept at all"
    box.put("a", _evidence(rows=200), now=0.0, keep_s=10.0)
    box.put("b", _evidence(rows=200), now=0.0, keep_s=10.0)
    assert box.take("a", now=1.0) is None
    assert box.take("b", now=1.0) is not None


def test_the_verdict_is_kl_and_agreement_against_the_reference() -> None:
    reference = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    ours = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]]))
    check = judge(ours, reference, (3, 5), (0.1, 0.2), "naive")
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert (check.kl_first, check.top1, check.tokens) == (0.0, 0.5, 2)
    assert check.kl_mean == pytest.approx(expected / 2)
    assert check.value_errors == ((3, 0.1), (5, 0.2))
