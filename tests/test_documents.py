"""The documents: what they point at is there."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "results/*.md",
        "benchmarks/**/*.md",
        "examples/**/*.md",
        "tests/**/*.md",
        "configs/**/*.md",
    )
    for path in ROOT.glob(pattern)
)


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_test_that_is_named_is_there():
    rows = [row for row in (ROOT / "docs/tests.md").read_text().splitlines() if "tests/" in row and row.startswith("|")]
    for row in rows:
        file = None
        for named in re.findall(r"`(?:(?=tests/)|(?=test_))([\w/.:]+)`", row):
            path, _, test = named.partition("::")
            # The second of a row may be named alone: it stands beside the first.
            file = ROOT / path if "/" in path else file.parent / path
            assert file.exists(), named
            defined = (
                {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
                if test
                else set()
            )
            assert not test or test in defined, named
        assert file is not None, row


@pytest.mark.parametrize("name", ["options", "api"])
def test_pages_that_are_written_from_the_code_are_up_to_date(name):
    page = runpy.run_path(str(ROOT / "docs" / f"{name}.py"))
    assert page["TARGET"].read_text() == page["render"](), f"run: python docs/{name}.py"
