"""What docs/security.md says is shown by tests is shown by tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "security.md"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
LINKED = re.compile(r"\]\((?!https?:)([^)#]+)")
LEAST = 40


def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, kinds)}


def test_every_test_that_the_page_names_exists() -> None:
    named = NAMED.findall(PAGE.read_text(encoding="utf-8"))
    assert len(named) > LEAST
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [
        f"{file}::{test}"
        for file, test in named
        if file not in files or test not in names_in(files[file])
    ]
    assert missing == []


def test_every_test_of_an_attacker_is_on_the_page() -> None:
    """What is played against real daemons is what an attacker would try: the page says what came of it."""
    page = PAGE.read_text(encoding="utf-8")
    attacks = {
        f"{path.name}::{test}"
        for path in (ROOT / "tests").rglob("test_attacks_*.py")
        for test in names_in(path)
        if test.startswith("test_")
    }
    assert attacks
    assert sorted(one for one in attacks if one not in page) == []


def test_links_lead_somewhere() -> None:
    for page in (PAGE, ROOT / "SECURITY.md"):
        for link in LINKED.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), link
