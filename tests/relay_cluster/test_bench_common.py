"""Benchmarks: order of measurements, statistics, methods and numbers as users write them, and the schema."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_cluster.bench import common
from relay_cluster.bench.chain_stream_rows import ChainStreamRow
from relay_cluster.bench.common import (
    BASE,
    DecayRow,
    Document,
    FidelityRow,
    LinkRow,
    TimingRow,
    check_document,
    common_prefix,
    int_list,
    learners,
    mean,
    mean_or_none,
    method_list,
    quantile,
    rounds,
    split_method,
    write_document,
)
from transport.errors import ConfigError
from workers.methods import METHODS, parse_reuse

seconds = st.floats(1e-6, 1e6)
samples = st.lists(seconds, min_size=1, max_size=40)

TIMING = TimingRow(
    method="epic",
    params="k=16",
    agent=None,
    span_tokens=512,
    spans=1,
    fresh_tokens=64,
    prefix_tokens=60,
    prompt_tokens=636,
    samples=5,
    ttft_s_median=0.5,
    ttft_s_p90=0.6,
    ttft_s_min=0.4,
    ttft_s_max=0.7,
    ttft_s_cold=0.9,
    speedup=2.0,
    speedup_quoted=1.9,
    quoted_against="transformers",
    reuse=0.94,
    flop_ratio_predicted=0.2,
    flop_ratio=0.21,
    over_bound=1.2,
    kl_first=0.01,
    kl32_mean=0.005,
    top1_32=1.0,
    stages=None,
)


# --- order --------------------------------------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 12), st.integers(0, 5))
def test_every_round_has_every_method_once(count: int, repeats: int, seed: int) -> None:
    methods = [f"m{i}" for i in range(count)]
    turns = list(rounds(methods, repeats, seed))
    assert [t.index for t in turns] == list(range(repeats + 1))
    assert [t.cold for t in turns] == [True] + [False] * repeats
    assert all(Counter(t.order) == Counter(methods) for t in turns)
    assert turns == list(rounds(methods, repeats, seed))


def test_no_method_always_follows_the_same_one() -> None:
    methods = ["a", "b", "c", "d"]
    before = {m: set() for m in methods}
    for turn in rounds(methods, 12, seed=0):
        for previous, method in zip(turn.order, turn.order[1:], strict=False):
            before[method].add(previous)
    assert all(len(seen) >= 2 for seen in before.values())


# --- statistics ---------------------------------------------------------------------------------------------


@given(samples, st.floats(0, 1))
def test_quantile_is_numpys(values: list[float], q: float) -> None:
    assert quantile(values, q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9)
    assert min(values) <= quantile(values, q) <= max(values)


@given(samples, st.floats(0, 1), st.floats(0, 1))
def test_quantiles_are_ordered(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert quantile(values, low) <= quantile(values, high)


@given(samples)
def test_mean_ignores_order(values: list[float]) -> None:
    assert mean(values) == mean(values[::-1])


def test_what_has_no_quantile() -> None:
    for values, q in (([], 0.5), ([1.0], 1.5)):
        with pytest.raises(ValueError, match="quantile"):
            quantile(values, q)


def test_mean_of_what_is_there() -> None:
    assert mean_or_none([1.0, None, 3.0]) == 2.0
    assert mean_or_none([None]) is None


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_common_prefix_is_common_and_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


# --- options ------------------------------------------------------------------------------------------------


def test_the_base_comes_first_and_nothing_twice() -> None:
    assert method_list("naive, auto,full_prefill,naive") == (BASE, "naive", "auto")


def test_by_default_every_method_is_measured() -> None:
    chosen = method_list(None)
    assert chosen[0] == BASE
    assert set(METHODS) | {"auto:fast", "auto"} == set(chosen)


def test_a_wrong_method_is_refused_with_the_right_ones() -> None:
    with pytest.raises(ConfigError, match="epic"):
        method_list("naive,epik")


def test_numbers() -> None:
    assert int_list("512, 1024", "--x") == (512, 1024)
    for text in ("512,x", "", "0"):
        with pytest.raises(ConfigError, match="--x"):
            int_list(text, "--x")
    assert int_list("1,0", "--x", at_least=0) == (1, 0)


@pytest.mark.parametrize(
    ("asked", "method"),
    [
        ("epic:k=16", "epic"),
        ("naive", "naive"),
        ("auto", "auto"),
        ("auto:fast", "auto:fast"),
        ("auto:ratio=0.3", "auto"),
        ("auto:strict+heal_rows=8", "auto:strict"),
    ],
)
def test_rows_name_the_method_and_say_its_parameters(asked: str, method: str) -> None:
    resolved = parse_reuse(asked).text
    name, params = split_method(asked, resolved)
    assert name == method
    # What a row says is enough to ask for the same again.
    again = params if asked.startswith("auto") else f"{name}:{params}" if params else name
    assert parse_reuse(again) == parse_reuse(resolved)


def test_only_kvcomm_learns() -> None:
    assert learners(["naive", "kvcomm", "kvcomm:bits=8", "auto"]) == ("kvcomm", "kvcomm:bits=8")


# --- schema -------------------------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    return Document("ttft", {"model": "m", "span_tokens": (512,)}, [TIMING]).to_json()


def test_a_document_has_four_parts_and_survives_the_disk(tmp_path: Path) -> None:
    value = document()
    assert list(value) == ["schema", "machine", "settings", "rows"]
    assert value["schema"] == "relay.bench.ttft/1"
    assert value["machine"]["cores"] >= 1
    write_document(value, tmp_path / "new" / "x.json")
    read = json.loads((tmp_path / "new" / "x.json").read_text("utf-8"))
    check_document(read)
    assert read == value
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.json"]


REQUIRED = {
    "ttft": "method params agent span_tokens spans fresh_tokens prompt_tokens ttft_s_median ttft_s_p90 "
    "speedup reuse flop_ratio_predicted kl_first kl32_mean stages",
    "fidelity": "method params heal samples kl_first_mean kl_first_p90 kl32_mean kl32_p90 kl64_tail_mean "
    "top1_32 first_token_mismatch greedy_prefix_median answer_agreement accuracy reuse",
    "decay": "queries speedup warm_peak",
}


@pytest.mark.parametrize(("name", "keys"), REQUIRED.items())
def test_rows_have_the_agreed_keys(name: str, keys: str) -> None:
    fields = {f.name for f in dataclasses.fields(common.ROWS[name])}
    assert set(keys.split()) <= fields
    assert common.ROWS["chain"] is common.ROWS["ttft"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("rows", 0, "speedup"), float("nan"), "speedup"),
        (("rows", 0, "speedup"), "2", "speedup"),
        (("rows", 0, "speedup"), None, "speedup"),
        (("rows", 0, "spans"), 1.0, "spans"),
        (("rows", 0, "spans"), True, "spans"),
        (("rows", 0, "extra"), 1, "extra"),
        (("rows", 0, "stages"), {"pull_s": "x"}, "stages"),
        (("schema",), "relay.bench.speed/1", "schema"),
        (("schema",), "relay.bench.ttft/2", "schema"),
        (("machine",), [], "machine"),
        (("more",), 1, "more"),
    ],
)
def test_a_document_that_is_not_to_the_schema_is_refused(
    path: tuple[Any, ...], value: Any, said: str
) -> None:
    broken = copy.deepcopy(document())
    target = broken
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ValueError, match=said):
        check_document(broken)


def test_a_missing_key_is_refused() -> None:
    broken = document()
    del broken["rows"][0]["reuse"]
    with pytest.raises(ValueError, match="reuse"):
        check_document(broken)


def test_stages_may_be_there_and_whole_numbers_may_stand_for_seconds() -> None:
    value = document()
    value["rows"][0] |= {"stages": {"pull_s": 0.1}, "ttft_s_cold": 1}
    check_document(value)


# --- what people see ----------------------------------------------------------------------------------------


def rows_of(name: str) -> list[Any]:
    if name in ("ttft", "chain"):
        agents = (1, 2) if name == "chain" else (None,)
        return [
            dataclasses.replace(TIMING, method=m, agent=a, stages={"pull_s": 0.1} if a else None)
            for a in agents
            for m in ("full_prefill", "epic", "auto")
        ]
    if name == "fidelity":
        numbers = {f.name: 0.25 for f in dataclasses.fields(FidelityRow)}
        return [
            FidelityRow(**{**numbers, "method": m, "params": "", "heal": "off", "spans": s, "samples": 4})
            for s in ("single", "composite", "all")
            for m in ("full_prefill", "naive")
        ]
    if name == "chain_stream":
        numbers = {f.name: 4 if f.type == "int" else 0.5 for f in dataclasses.fields(ChainStreamRow)}
        return [
            ChainStreamRow(**{**numbers, "mode": mode, "method": "auto"})
            for mode in ("full_prefill", "off", "exact", "auto")
        ]
    if name == "link":
        numbers = {f.name: 1 if f.type == "int" else 0.5 for f in dataclasses.fields(LinkRow)}
        said = {"method": "auto:fast", "params": "", "backend": "nixl"}
        return [LinkRow(**{**numbers, **said, "layer_groups": groups}) for groups in (6, 1)]
    numbers = {f.name: 0.5 for f in dataclasses.fields(DecayRow)}
    return [
        DecayRow(**{**numbers, "method": "auto", "params": "", "queries": q, "evicted": 0, "segments": 3})
        for q in (50, 100)
    ]


@pytest.mark.parametrize("name", ["ttft", "chain", "chain_stream", "fidelity", "decay"])
def test_every_document_has_a_table_and_a_picture(name: str, tmp_path: Path) -> None:
    from rich.console import Console

    from relay_cluster.bench.plots import plot_document
    from relay_cluster.bench.show import show_document

    found = Document(name, {"model": "m", "data": ["d"], "seed": 0}, rows_of(name))
    out = Console(record=True, width=160, file=(tmp_path / "out.txt").open("w"))
    show_document(found, out)
    text = out.export_text()
    assert "auto" in text or "naive" in text
    assert len(text.splitlines()) >= len(found.rows)
    plot_document(found.to_json(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    out.file.close()


def test_where_there_is_no_terminal_progress_is_told_in_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "_LINE_EVERY_S", 0.0)  # the clock is real: half a minute is too long
    with common.progress("stream", 3) as advance:
        advance("[64] fresh: exact")
        advance("")
    assert capsys.readouterr().err.splitlines() == ["stream: 1/3 [64] fresh: exact", "stream: 2/3 "]
    monkeypatch.setattr(common, "_LINE_EVERY_S", 3600.0)
    with common.progress("stream", 3) as advance:
        advance("exact")
    assert capsys.readouterr().err == "", "not for every step"
