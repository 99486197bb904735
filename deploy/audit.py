"""Looks at what is installed beside this program: is it what was pinned, and is any of it known to be unsafe?

    .venv/bin/python deploy/audit.py

Three questions. Do the installed packages fit each other (`pip check`)? Is each the version that
constraints.txt pins? Has any a published advisory? For the last pip-audit asks an advisory database over
the network. Where none answers nothing was audited, and that is said; it is no failure of the packages, and no
success either. Exit status: 0, or 1 when a package is wrong or has an advisory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
OURS = "edge-meshd"
INSTALLERS = frozenset(
    {"pip", "setuptools", "wheel"}
)  # of the environment itself, not of what runs in it
SERVICES = ("pypi", "osv")
"""Advisory databases, in the order in which they are asked."""
ASK_DEADLINE_S = 120.0


def canonical(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str) -> dict[str, str]:
    """Version by canonical name, of lines `name==version`."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    parts = (line.partition("==") for line in lines if line)
    return {canonical(name): version for name, _, version in parts}


def differences(pinned: Mapping[str, str], installed: Mapping[str, str]) -> list[str]:
    """A sentence for each installed package that is not what was pinned."""
    told: list[str] = []
    for name, version in sorted(installed.items()):
        if name == OURS or name in INSTALLERS:
            continue
        if name not in pinned:
            told.append(f"{name} {version} is installed and constraints.txt does not pin it")
        elif pinned[name] != version:
            told.append(f"{name} {version} is installed and constraints.txt pins {pinned[name]}")
    return told


class Audit(NamedTuple):
    """What an advisory database said."""

    audited: int  # packages it knows
    unknown: tuple[str, ...]  # those it could say nothing of
    findings: tuple[str, ...]  # a line for each advisory


def read_answer(text: str) -> Audit | None:
    """What pip-audit printed as JSON; None when that is no answer or says nothing of any package."""
    try:
        rows: list[dict[str, Any]] = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    unknown = tuple(sorted(str(row["name"]) for row in rows if "skip_reason" in row))
    if len(unknown) == len(rows):
        return None
    findings = tuple(
        f"{row['name']} {row['version']}: {found['id']}, "
        f"mended in {', '.join(found['fix_versions']) or 'no version yet'}"
        for row in rows
        for found in row.get("vulns", ())
    )
    return Audit(len(rows) - len(unknown), unknown, findings)


def ask(service: str) -> Audit | None:
    """Ask one database about every pinned package; None when it cannot be reached."""
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--vulnerability-service",
        service,
        "--format",
        "json",
    ]
    command += [
        "--progress-spinner",
        "off",
        "--requirement",
        str(CONSTRAINTS),
        "--no-deps",
        "--disable-pip",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_DEADLINE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    return read_answer(done.stdout)


def say(lines: Iterable[str], mark: str = "  ") -> None:
    for line in lines:
        print(f"{mark}{line}", flush=True)


def main() -> int:
    """Print what was found; the exit status."""
    checked = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"],
        capture_output=True,
        text=True,
        check=False,
    )
    say(checked.stdout.splitlines(), "pip check: ")
    pins = read_pins(CONSTRAINTS.read_text())
    installed = {canonical(each.metadata["Name"]): each.version for each in distributions()}
    wrong = differences(pins, installed)
    say(wrong, "WRONG: ")
    if not wrong:
        print(
            f"pins: all {len(installed.keys() & pins.keys())} installed packages are the pinned ones"
        )
    if idle := sorted(pins.keys() - installed.keys()):
        print(f"pins: pinned and not installed here: {', '.join(idle)}")
    audit = next((found for found in map(ask, SERVICES) if found is not None), None)
    if audit is None:
        print("advisories: NOT AUDITED: no advisory database can be reached from this machine")
    else:
        say(audit.findings, "ADVISORY: ")
        print(f"advisories: {audit.audited} packages audited, {len(audit.findings)} advisories")
        if audit.unknown:
            print(f"advisories: NOT AUDITED, unknown to the database: {', '.join(audit.unknown)}")
    return 1 if checked.returncode or wrong or (audit is not None and audit.findings) else 0


if __name__ == "__main__":
    sys.exit(main())
