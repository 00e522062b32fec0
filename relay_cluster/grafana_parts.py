"""Queries and panels of the Grafana board, checked against the table of metrics: one over a metric or a label
that the table has not got fails here, not on somebody's board. Plain dicts, as Grafana's JSON has them: the
Python package of Grafana's schema ends at Grafana 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from relay_cluster.metrics import BY_NAME, Kind, Metric

SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
FILTERS: Final = ("model", "pipeline")
"""Labels that the board's variables choose."""
_RATE = "$__rate_interval"
_UNITS = {
    "seconds": "s",
    "bytes": "bytes",
    "bytes per second": "binBps",
    "ratio": "percentunit",
    "nats": "none",
}


@dataclass(frozen=True, slots=True)
class Query:
    """One query of a panel. legend: with {{label}} for values of labels."""

    expr: str
    legend: str
    unit: str = ""
    instant: bool = False


# --- queries ------------------------------------------------------------------------------------------------


def _metric(name: str, kind: Kind, *labels: str) -> Metric:
    metric = BY_NAME[name]
    if metric.kind is not kind:
        raise ValueError(f"{name} is a {metric.kind}, not a {kind}.")
    unknown = [label for label in labels if label not in metric.labels]
    if unknown:
        raise ValueError(f"{name} has no label {', '.join(unknown)}.")
    return metric


def _where(metric: Metric, where: str = "") -> str:
    chosen = [f'{label}=~"${label}"' for label in FILTERS if label in metric.labels]
    parts = [*chosen, *([where] if where else [])]
    return "{" + ", ".join(parts) + "}" if parts else ""


def rate(name: str, *by: str, where: str = "") -> str:
    """A counter's increase per second, summed over all but `by`."""
    metric = _metric(name, Kind.COUNTER, *by)
    return f"sum by ({', '.join(by)}) (rate({name}{_where(metric, where)}[{_RATE}]))"


def quantile(share: float, name: str, *by: str, where: str = "") -> str:
    """A quantile of a histogram, by some of its labels."""
    metric = _metric(name, Kind.HISTOGRAM, *by)
    groups = ", ".join(("le", *by))
    rates = f"rate({name}_bucket{_where(metric, where)}[{_RATE}])"
    return f"histogram_quantile({share:g}, sum by ({groups}) ({rates}))"


def mean(name: str, *by: str) -> str:
    """The mean of what a histogram saw."""
    metric = _metric(name, Kind.HISTOGRAM, *by)
    where, groups = _where(metric), ", ".join(by)
    total, count = (f"sum by ({groups}) (rate({name}_{part}{where}[{_RATE}]))" for part in ("sum", "count"))
    return f"{total} / {count}"


def count(name: str, *by: str) -> str:
    """How often per second a histogram saw something."""
    metric = _metric(name, Kind.HISTOGRAM, *by)
    return f"sum by ({', '.join(by)}) (rate({name}_count{_where(metric)}[{_RATE}]))"


def gauge(name: str, *by: str, where: str = "", how: str = "sum") -> str:
    """A gauge, put together by `how` over all but `by`."""
    metric = _metric(name, Kind.GAUGE, *by)
    return f"{how} by ({', '.join(by)}) ({name}{_where(metric, where)})"


def of(name: str, expr: str, legend: str, *, unit: str | None = None) -> Query:
    """A query in the unit of a metric."""
    return Query(expr, legend, _UNITS.get(BY_NAME[name].unit, "short") if unit is None else unit)


def quantiles(name: str, *by: str) -> list[Query]:
    """p50, p95 and p99."""
    tail = "".join(f" {{{{{label}}}}}" for label in by)
    return [of(name, quantile(q, name, *by), f"p{q * 100:g}{tail}") for q in (0.5, 0.95, 0.99)]


# --- panels -------------------------------------------------------------------------------------------------


def panel(
    title: str,
    queries: Sequence[Query],
    *,
    about: str,
    width: int = 12,
    height: int = 8,
    kind: str = "timeseries",
    stacked: bool = False,
) -> dict[str, Any]:
    """A panel over time, or numbers (`kind="stat"`). about: what to see in it."""
    custom: dict[str, Any] = {"fillOpacity": 70 if stacked else 8, "lineWidth": 1, "showPoints": "never"}
    if stacked:
        custom["stacking"] = {"mode": "normal"}
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    if kind == "stat":
        custom, options = {}, {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"}
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {
            "defaults": {"unit": queries[0].unit or "short", "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": options,
        "targets": _targets(queries),
    }


def _targets(queries: Sequence[Query]) -> list[dict[str, Any]]:
    return [
        {
            "refId": chr(ord("A") + i),
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "range": not query.instant,
            "instant": query.instant,
            **({"format": "table"} if query.instant else {}),
        }
        for i, query in enumerate(queries)
    ]


def matrix(
    title: str, query: Query, *, rows: str, columns: str, about: str, steps: Sequence[Any]
) -> dict[str, Any]:
    """Values as coloured cells of a table, by two labels. steps: (from value, colour)."""
    thresholds = [{"value": value, "color": colour} for value, colour in steps]
    made = panel(title, [query], about=about, kind="table")
    made["fieldConfig"]["defaults"] = {
        "unit": query.unit,
        "custom": {"align": "center", "cellOptions": {"type": "color-background", "mode": "gradient"}},
        "thresholds": {"mode": "absolute", "steps": thresholds},
    }
    made["options"] = {"cellHeight": "lg", "showHeader": True}
    fields = {"rowField": rows, "columnField": columns, "valueField": "Value"}
    made["transformations"] = [{"id": "groupingToMatrix", "options": fields}]
    return made
