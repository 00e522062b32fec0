"""The board, the rules and the document hold what the table of metrics holds, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from relay_cluster import grafana, grafana_parts, metrics_doc
from relay_cluster.metrics import BY_NAME, TABLE, Kind
from transport.types import Outcome

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS = ROOT / "configs" / "prometheus"
BOARD = json.loads((ROOT / "configs" / "grafana" / "relay.json").read_text("utf-8"))
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "rules" / "relay.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DOC = (ROOT / "docs" / "observability.md").read_text("utf-8")
PANELS = {panel["id"]: panel for panel in BOARD["panels"] if panel["type"] != "row"}


def labels_of(node: Any) -> set[str]:
    """Labels that the result of a query may have.

    Raises:
        KeyError: a metric that is not in the table. ValueError: a label that it has not got.
    """
    match node:
        case promql.VectorSelector():
            return _selected(node)
        case promql.MatrixSelector():
            return labels_of(node.vector_selector)
        case promql.AggregateExpr():
            return _grouped(node)
        case promql.Call():
            found = set[str]().union(*(labels_of(argument) for argument in node.args))
            return found - {"le"} if node.func.name == "histogram_quantile" else found
        case promql.BinaryExpr():
            return _joined(node)
        case promql.ParenExpr() | promql.UnaryExpr():
            return labels_of(node.expr)
        case promql.NumberLiteral() | promql.StringLiteral():
            return set()
        case _:
            raise ValueError(f"{type(node).__name__} is not expected here")


def _selected(node: promql.VectorSelector) -> set[str]:
    name = str(node.name)
    if name in RECORDED:
        labels = labels_of(promql.parse(RECORDED[name]))
    elif name == "up":  # Prometheus' own
        labels = {"job", "instance"}
    else:
        metric = BY_NAME.get(name) or BY_NAME[re.sub(r"_(bucket|sum|count)$", "", name)]
        assert name in metric.series, f"{name}: of a {metric.kind} there are {metric.series}"
        labels = {*metric.labels, *(["le"] if name.endswith("_bucket") else [])}
    _expect({matcher.name for matcher in node.matchers.matchers}, labels, name)
    return labels


def _grouped(node: promql.AggregateExpr) -> set[str]:
    inner = labels_of(node.expr)
    by = set(node.modifier.labels) if node.modifier is not None else set[str]()
    assert node.modifier is None or node.modifier.type == promql.AggModifierType.By
    _expect(by, inner, str(node))
    return by


def _joined(node: promql.BinaryExpr) -> set[str]:
    left, right = labels_of(node.lhs), labels_of(node.rhs)
    on = set(node.modifier.matching.labels) if node.modifier and node.modifier.matching else set[str]()
    for side in (left, right):
        _expect(on, side, str(node))
    if left and right and not on:
        assert left == right, f"{node}: {left} and {right} never match"
    return left or right


def _expect(used: set[str], there: set[str], where: str) -> None:
    if used - there:
        raise ValueError(f"{where}: no label {', '.join(sorted(used - there))}; there are {sorted(there)}")


def parsed(query: str) -> Any:
    plain = query.replace("$__rate_interval", "5m")
    return promql.parse(re.sub(r"\$\w+", ".*", plain))


# --- the table ----------------------------------------------------------------------------------------------


def test_names_follow_prometheus() -> None:
    assert len(BY_NAME) == len(TABLE)
    units = {"seconds": "_seconds", "bytes": "_bytes", "ratio": "_ratio", "nats": "_nats"}
    for metric in TABLE:
        assert re.fullmatch(r"relay_[a-z0-9_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER), metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help.endswith("."), metric.name
        stem = metric.name.removesuffix("_total")
        if metric.unit in units:
            assert stem.endswith(units[metric.unit]), metric.name
        for label in metric.labels:
            assert label not in ("id", "request", "request_id", "le", "user", "prompt"), metric.name


def test_fallbacks_that_alerts_know_are_reasons() -> None:
    named = re.search(r'reason=~"([^"]+)"', ALERTS["RelayWrongBytes"]["expr"])
    assert named
    assert set(named[1].split("|")) <= {outcome.value for outcome in Outcome}


# --- the board ----------------------------------------------------------------------------------------------


def test_the_board_is_what_the_table_makes() -> None:
    assert grafana.main(["--check"]) == 0, "run: python -m relay_cluster.grafana"


@pytest.mark.parametrize("panel", PANELS.values(), ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_there_is(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for target in panel["targets"]:
        there = labels_of(parsed(target["expr"]))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= there
    for change in panel.get("transformations", ()):
        assert {change["options"]["rowField"], change["options"]["columnField"]} <= there


def test_all_ten_questions_have_panels() -> None:
    numbered = {int(found[1]) for p in PANELS.values() if (found := re.match(r"(\d+) ", p["title"]))}
    assert numbered == set(range(1, 11))
    assert any(
        "src_node" in t["expr"] and "dst_node" in t["expr"] for p in PANELS.values() for t in p["targets"]
    )


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_a_query_over_something_else_fails() -> None:
    with pytest.raises(KeyError):
        grafana_parts.rate("relay_no_such_total")
    with pytest.raises(ValueError, match="no label pipeline"):
        grafana_parts.rate("relay_fallbacks_total", "pipeline")
    with pytest.raises(ValueError, match="is a histogram, not a counter"):
        grafana_parts.rate("relay_stage_seconds")
    with pytest.raises(ValueError, match="no label tenant"):
        labels_of(parsed("sum by (tenant) (rate(relay_fallbacks_total[5m]))"))
    with pytest.raises(KeyError):
        labels_of(parsed("relay_workers_up"))


def test_grafana_is_provisioned_from_files() -> None:
    folder = ROOT / "configs" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "relay.yml").read_text("utf-8"))["datasources"]
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    assert source["url"] == "${PROMETHEUS_URL}", "Grafana knows no ${NAME:-default}"
    (provider,) = yaml.safe_load((folder / "dashboards" / "relay.yml").read_text("utf-8"))["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"


# --- the rules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_asks_for_what_there_is(rule: dict[str, Any]) -> None:
    there = labels_of(promql.parse(rule["expr"]))
    told = " ".join(rule.get("annotations", {}).values())
    assert set(re.findall(r"\$labels\.(\w+)", told)) <= there


def test_every_alert_is_explained_and_tested() -> None:
    headings = re.findall(r"^### (Relay\w+)$", DOC, re.MULTILINE)
    assert sorted(headings) == sorted(ALERTS)
    cases = yaml.safe_load((PROMETHEUS / "tests" / "relay_test.yml").read_text("utf-8"))["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    fired = {check["alertname"] for check in checks if check["exp_alerts"]}
    assert fired == set(ALERTS)
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"]["runbook"] == f"docs/observability.md#{name.lower()}"


def test_prometheus_finds_its_rules() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    found = {path.name for pattern in config["rule_files"] for path in PROMETHEUS.glob(pattern)}
    assert found == {"relay.yml"}
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    named = re.search(r'job=~"([^"]+)"', ALERTS["RelayServiceDown"]["expr"])
    assert named
    assert all(re.fullmatch(named[1], job) for job in jobs)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "rules/relay.yml"),
        ("test", "rules", "tests/relay_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not on PATH (Debian: apt-get install prometheus)")
    done = subprocess.run(
        ["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# --- the document -------------------------------------------------------------------------------------------


def test_the_document_lists_the_table() -> None:
    assert metrics_doc.filled(DOC) == DOC, "run: python -m relay_cluster.metrics_doc docs/observability.md"
    listed = re.findall(r"^\| `(relay_\w+)` \|", DOC, re.MULTILINE)
    assert sorted(listed) == sorted(BY_NAME)


def test_other_metrics_that_the_document_names_exist() -> None:
    before = DOC[: DOC.index(metrics_doc.BEGIN)]
    for name in re.findall(r"`(relay_[a-z_]+)[` ]", before):
        assert name in BY_NAME or name == "relay_cluster", name


def test_links_into_the_operations_page_hit() -> None:
    def anchors(page: str) -> set[str]:
        text = (ROOT / "docs" / page).read_text("utf-8")
        return {_anchor(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}

    for page, anchor in re.findall(r"\]\((\w+\.md)#([^)]+)\)", DOC):
        assert anchor in anchors(page), f"{page}#{anchor}"


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_a_document_without_markers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a line"):
        metrics_doc.filled("# nothing")
    page = tmp_path / "page.md"
    page.write_text(f"a\n{metrics_doc.BEGIN}\nSTALE\n{metrics_doc.END}\nb\n", "utf-8")
    assert metrics_doc.main(["--check", str(page)]) == 1
    assert metrics_doc.main([str(page)]) == 0
    assert metrics_doc.main(["--check", str(page)]) == 0
    text = page.read_text("utf-8")
    assert text.startswith("a\n")
    assert text.endswith("b\n")
    assert "STALE" not in text
