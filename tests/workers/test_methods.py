"""Method texts: what parses to what, what an error says, and that a resolved text means the same again."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.errors import ConfigError
from workers.methods import METHODS, check_presets, method_names, parse_method, parse_reuse
from workers.methods.base import HealMode, ModelProfile
from workers.methods.context_mass import ContextMass
from workers.methods.relay_caching import RelayCaching
from workers.profile import generic_profile, load_profile

PROFILE = ModelProfile(
    model="m",
    num_layers=12,
    checkpoint_layer=2,
    detection_layer=4,
    end_layer=11,
    ratio=0.3,
    first_tokens=5,
    presets={"fast": "context_mass:ratio=0.07+first=16", "balanced": "relay_caching:tau_diff=1.25"},
)


@pytest.mark.parametrize(
    ("text", "method", "heal"),
    [
        ("auto", RelayCaching(tau_diff=1.25, start=2, det=4, end=11), "off"),
        ("auto:balanced", RelayCaching(tau_diff=1.25, start=2, det=4, end=11), "off"),
        ("auto:strict", RelayCaching(tau_diff=1.25, start=2, det=4, end=11), "always"),
        ("auto:strict+heal=idle", RelayCaching(tau_diff=1.25, start=2, det=4, end=11), "idle"),
        ("auto:fast", ContextMass(0.07, 16, 2, 11), "off"),
        ("auto:fast+ratio=0.5+heal=always", ContextMass(0.5, 16, 2, 11), "always"),
        ("context_mass", ContextMass(0.3, 5, 2, 11), "off"),
        (" context_mass:end=6 ", ContextMass(0.3, 5, 2, 6), "off"),
    ],
)
def test_a_text_is_resolved_with_the_profile(text: str, method: object, heal: str) -> None:
    reuse = parse_reuse(text, PROFILE)
    assert (reuse.method, reuse.heal) == (method, HealMode(heal))


def test_the_resolved_text_names_every_parameter() -> None:
    assert parse_reuse("auto:fast", PROFILE).text == (
        "context_mass:ratio=0.07+first=16+start=2+end=11+probes=0.0+drift=0.0+drift_one=0.0"
        "+look=0+look_from=10.0"
    )
    assert (
        parse_reuse("auto:strict+heal_rows=32", PROFILE).text
        == "relay_caching:tau_diff=1.25+tau_down=1.45+suffix=10+start=2+det=4+end=11"
        "+heal=always+heal_rows=32+heal_steps=24"
    )
    assert parse_reuse("naive:heal=idle").text == "naive:heal=idle+heal_rows=64+heal_steps=0"
    assert parse_reuse("naive").text == "naive"


@pytest.mark.parametrize(
    "name",
    [
        *method_names(),
        *(f"{n}:heal=idle+heal_rows=7+heal_steps=9" for n in METHODS),
        "auto:strict+heal_rows=7",
        "auto:strict+heal=off",
        "naive:heal_rows=7",
    ],
)
def test_a_resolved_text_parses_to_the_same_reuse(name: str) -> None:
    once = parse_reuse(name, PROFILE)
    assert parse_reuse(once.text) == once
    assert parse_reuse(once.text, PROFILE) == once


@given(ratio=st.floats(0, 1), first=st.integers(0, 10_000))
def test_numbers_survive_the_text(ratio: float, first: int) -> None:
    once = parse_reuse(f"context_mass:ratio={ratio}+first={first}", PROFILE)
    assert parse_reuse(once.text, PROFILE).method == ContextMass(ratio, first, 2, 11)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nave", 'Did you mean "naive"?'),
        ("auto:fats", 'Did you mean "auto:fast"?'),
        ("auto:slow", "auto:strict"),
        ("naive:ratio=1", 'no parameter "ratio" \\(it has: heal, heal_rows, heal_steps\\)'),
        ("context_mass:ratio", "name:key=value"),
        ("context_mass:ratio=much", "not a number"),
        ("context_mass:ratio=nan", "between 0 and 1"),
        ("naive:heal=sometimes", "off, idle, always"),
        ("naive:heal_rows=0", "at least 1"),
        ("naive:heal=always+heal_steps=-1", "heal_steps=-1 must be at least 0"),
    ],
)
def test_a_wrong_text_says_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_reuse(text, PROFILE)
    with pytest.raises(ConfigError, match=says):
        parse_method(text)


@pytest.mark.parametrize(
    ("presets", "says"),
    [
        ({"fast": "naive"}, "lack balanced"),
        ({"fast": "naive", "balanced": "naive", "quick": "naive"}, "Presets: fast, balanced, strict"),
        ({"fast": "auto:balanced", "balanced": "naive"}, "cannot mean another"),
        ({"fast": "naive", "balanced": "nave"}, "Did you mean"),
    ],
)
def test_wrong_presets_are_refused(presets: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_presets(presets)


def test_every_profile_serves_every_preset() -> None:
    for profile in (generic_profile("unknown", 24), load_profile("smollm2-135m-instruct", 30)):
        check_presets(profile.presets)
        for preset in ("auto", "auto:fast", "auto:strict"):
            assert parse_reuse(preset, profile).method.uses_segments


def test_fields_that_a_profile_fills_exist() -> None:
    for name in METHODS:
        method = parse_method(name)
        fields = {f.name for f in dataclasses.fields(method)}  # pyright: ignore[reportArgumentType]
        assert set(method.from_profile) <= fields
        assert set(method.from_profile.values()) <= {f.name for f in dataclasses.fields(ModelProfile)}
