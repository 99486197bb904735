"""What the audit of the installed packages says of pins and of an advisory database's answer."""

from __future__ import annotations

import json

import pytest
from tests.unit.support_deploy import load_script
from tests.unit.support_wheel import ROOT

audit = load_script(ROOT / "deploy" / "audit.py")
PINS = {"trio": "0.35.0", "typing-extensions": "4.16.0"}


def answer(*rows: dict[str, object]) -> str:
    return json.dumps({"dependencies": list(rows), "fixes": []})


def test_pins_are_read_by_canonical_name() -> None:
    text = "# made by hand\ntrio==0.35.0  # why\n\nTyping_Extensions==4.16.0\n"
    assert audit.read_pins(text) == PINS


def test_what_is_installed_as_pinned_is_no_difference() -> None:
    assert audit.differences(PINS, {**PINS, "edge-meshd": "0.1.0", "pip": "26.1"}) == []
    assert audit.differences(PINS, {"trio": "0.35.0"}) == []


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({"trio": "0.36.0"}, "trio 0.36.0 is installed and constraints.txt pins 0.35.0"),
        ({"evil": "1"}, "evil 1 is installed and constraints.txt does not pin it"),
    ],
)
def test_each_difference_is_a_sentence(installed: dict[str, str], said: str) -> None:
    assert audit.differences(PINS, installed) == [said]


def test_an_advisory_is_a_finding() -> None:
    vulnerability = {"id": "PYSEC-2026-1", "fix_versions": ["0.36.0"], "aliases": []}
    told = audit.read_answer(
        answer(
            {"name": "trio", "version": "0.35.0", "vulns": [vulnerability]},
            {"name": "wsproto", "version": "1.3.2", "vulns": []},
            {"name": "ours", "skip_reason": "not found"},
        )
    )
    assert told == audit.Audit(2, ("ours",), ("trio 0.35.0: PYSEC-2026-1, mended in 0.36.0",))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Traceback (most recent call last):",
        "[]",
        answer(),
        answer({"name": "trio", "skip_reason": "Dependency not found"}),
    ],
)
def test_a_database_that_says_nothing_has_audited_nothing(text: str) -> None:
    assert audit.read_answer(text) is None
