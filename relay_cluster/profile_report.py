"""A profiler run as documents: the profile's YAML, and the JSON of schema `relay.profile/1`.

The YAML holds what a worker loads and, under `calibration`, how it was found: curves, measured rows, settings
and the rule, nothing of the machine. The JSON adds the machine, times and every prompt's error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from relay_cluster import __version__

if TYPE_CHECKING:
    from workers.profiler import ProfileResult, ProfileSettings
    from workers.profiling.choose import Errors, Row

SCHEMA = "relay.profile/1"

_DIGITS = 4
_EXACT = ("ratio",)
"""Keys whose numbers are settings, not measurements."""


@dataclass(frozen=True, slots=True)
class ProfileRun:
    """What was asked for, besides `ProfileSettings`.

    Attributes:
        command: how it was called, without paths of this machine.
        data: name of the data file, or "built-in"; tasks: how many of its tasks were used.
        quick: whether --quick made it smaller.
        dtype, device: of the model.
    """

    command: str
    data: str
    tasks: int
    seed: int
    quick: bool
    dtype: str
    device: str


def calibration(result: ProfileResult, settings: ProfileSettings, run: ProfileRun) -> dict[str, Any]:
    """How the profile was found; the same for equal settings on any run of one machine."""
    picks, rule = result.picks, settings.rule
    return {
        "made_with": run.command,
        "version": __version__,
        "data": {"source": run.data, "tasks": run.tasks, "seed": run.seed, "quick": run.quick},
        "model": {"dtype": run.dtype, "device": run.device},
        "prompts": dict(result.cases),
        "span_tokens": {
            "shortest": min(result.spans),
            "mean": sum(result.spans) / len(result.spans),
            "longest": max(result.spans),
        },
        "positions": settings.positions,
        "rule": {
            **dataclasses.asdict(rule),
            "text": (
                "L_start: latest checkpoint that leaves at most `share` of the targets when everything above "
                "is recomputed; L_end: earliest end that adds at most as much; L_det: best mean rank "
                "correlation with the layers up to L_end, within `detection_window` of the layers above "
                "L_start. balanced: least FLOPs within (1 - margin) of the targets; fast: least FLOPs within "
                "(1 - paired_margin) of relay_caching's own errors."
            ),
        },
        "picks": {
            "l_start": picks.start,
            "l_end": picks.end,
            "l_det": picks.detection,
            "l_det_correlation": picks.correlation,
            "checkpoint_layer": picks.chosen.checkpoint_layer,
            "fast": picks.chosen.fast.row.text,
            "balanced": picks.chosen.balanced.row.text,
            "balanced_meets_target": picks.chosen.balanced.met,
        },
        "notes": list(result.notes),
        "curves": _curves(result),
        "start_sweep": [_row(row) for row in result.starts],
        "end_sweep": [_row(row) for row in result.ends],
        "rows": [_row(row, result.long_flops.get(row.text)) for row in result.rows],
    }


def profile_document(result: ProfileResult, settings: ProfileSettings, run: ProfileRun) -> dict[str, Any]:
    """Content of the profile's YAML file."""
    profile = dataclasses.asdict(result.profile)
    profile["presets"] = dict(result.profile.presets)
    return {**profile, "calibration": calibration(result, settings, run)}


def json_document(
    result: ProfileResult, settings: ProfileSettings, run: ProfileRun, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything, with the machine, the times and every prompt's error."""
    document = calibration(result, settings, run)
    details = {
        "start_sweep": result.starts,
        "end_sweep": result.ends,
        "rows": result.rows,
    }
    for name, rows in details.items():
        for entry, row in zip(document[name], rows, strict=True):
            for kind, errors in _kinds(row):
                entry[kind]["kl_cases"] = list(errors.kl_cases)
    profile = {**dataclasses.asdict(result.profile), "presets": dict(result.profile.presets)}
    rows = document.pop("rows")
    return {
        "schema": SCHEMA,
        "machine": dict(machine),
        "settings": {
            **document["data"],
            **{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if f.name != "rule"},
            "candidates": list(settings.candidates),
        },
        "profile": profile,
        **{k: v for k, v in document.items() if k != "data"},
        "seconds": dict(result.seconds),
        "rows": rows,
    }


def write_yaml(path: Path, document: Mapping[str, Any], heading: Sequence[str]) -> None:
    """Write a profile; numbers that were measured with four significant digits, lists on one line."""
    lines = "".join(f"# {line}\n" for line in heading)
    text = yaml.dump(
        _rounded(document),
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=116,
        allow_unicode=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines + text, "utf-8")


class _Dumper(yaml.SafeDumper):
    """Never anchors and aliases: a profile is read by people."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _curves(result: ProfileResult) -> dict[str, Any]:
    c = result.curves
    return {
        "spans": c.spans,
        "tokens": c.tokens,
        "value_deviation": list(c.value),
        "value_deviation_composite": list(c.value_composite),
        "key_deviation": list(c.key),
        "hidden_deviation": list(c.hidden),
        "top_share": {f"{share:g}": value for share, value in c.top_share.items()},
        "first_ratio": {str(n): value for n, value in c.first_ratio.items()},
        "last_32_ratio": c.last_ratio,
        "mass_correlation": list(c.mass_correlation),
        "mass_correlation_mean": c.mass_correlation_mean,
        "position_correlation_mean": c.position_correlation_mean,
        "rank_correlation": [list(row) for row in c.correlation],
    }


def _row(row: Row, long: tuple[float, float] | None = None) -> dict[str, Any]:
    entry: dict[str, Any] = {"method": row.text, "start": row.start, "end": row.end}
    for kind, errors in _kinds(row):
        entry[kind] = {
            f.name: getattr(errors, f.name) for f in dataclasses.fields(errors) if f.name != "kl_cases"
        }
    if long is not None:
        entry["flops_predicted_1024"] = {"one_span": long[0], "four_spans": long[1]}
    return entry


def _kinds(row: Row) -> list[tuple[str, Errors]]:
    pairs = [("single", row.single)]
    return pairs if row.composite is None else [*pairs, ("composite", row.composite)]


def _rounded(value: Any, key: str = "") -> Any:
    if isinstance(value, Mapping):
        return {k: _rounded(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    if isinstance(value, float) and key not in _EXACT and value and math.isfinite(value):
        return round(value, _DIGITS - 1 - math.floor(math.log10(abs(value))))
    return value
