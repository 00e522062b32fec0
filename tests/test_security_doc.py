"""docs/security.md: every test that it names exists, and every claim names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOC = (ROOT / "docs" / "security.md").read_text("utf-8")
_NAME = re.compile(r"`(test_\w+)`")
_LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)|\]\(#([^)]+)\)")


def names_of_tests() -> set[str]:
    """Names of test functions and methods, of what pytest collects."""
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        if path.name.startswith(("test_", "conformance")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    found.add(node.name)
    return found


def test_every_test_that_is_named_exists() -> None:
    named = set(_NAME.findall(DOC))
    assert len(named) > 40
    assert named - names_of_tests() == set()


def test_every_claim_names_a_test() -> None:
    rows, in_claims = 0, False
    for line in DOC.splitlines():
        if line.startswith("| claim "):
            in_claims = True
        elif not line.startswith("|"):
            in_claims = False
        elif in_claims and not line.startswith("|--"):
            rows += 1
            claim, tests = (cell.strip() for cell in line.strip("|").split("|"))
            assert _NAME.findall(tests), f"no test for: {claim}"
    assert rows > 20


def test_files_and_settings_that_are_named_exist() -> None:
    for name in re.findall(r"`((?:transport|workers|relay_cluster|tests)/[\w/]+\.py)`", DOC):
        assert (ROOT / name).is_file(), name
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in DOC.splitlines()
        if line.startswith("#")
    }
    for file, anchor in _LINK.findall(DOC):
        if file:
            assert (ROOT / "docs" / file).exists(), file
        else:
            assert anchor in headings, anchor
