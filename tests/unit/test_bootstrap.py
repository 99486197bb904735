"""What `make` says on a machine that lacks something: one sentence, with the command that mends it."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.support_deploy import load_script

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
VERSION = "3.12"
PYTHON = """case "$2" in
*ensurepip*) exit {venv} ;;
*'sys.exit(sys.version_info'*) exit {old} ;;
*version_info*) echo {version} ;;
*) exit 0 ;;
esac"""


class Machine:
    """A PATH with only what is put there."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.venv = folder / "venv"
        for tool in ("bash", "sed", "getconf"):
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)
        self.program("apt-get", "exit 0")
        for tool in ("cc", "c++", "make"):
            self.program(tool, "exit 0")
        self.python("python3")

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def python(
        self, name: str, *, version: str = VERSION, old: bool = False, venv: bool = True
    ) -> None:
        self.program(name, PYTHON.format(version=version, old=int(old), venv=int(not venv)))

    def without(self, name: str) -> None:
        (self.bin / name).unlink()

    def check(self, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.bin / "bash", DEPLOY / "bootstrap.sh", "--check"],
            env={"PATH": str(self.bin), "VENV": str(self.venv), **variables},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 3, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    return done.stderr.strip()


def test_a_machine_with_everything_passes(machine: Machine) -> None:
    done = machine.check()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "This machine has what it takes: python3 is Python 3.12.\n"


def test_no_python(machine: Machine) -> None:
    machine.without("python3")
    assert (
        sentence(machine.check()) == "Python is missing: sudo apt-get install python3 python3-venv"
    )


def test_old_python(machine: Machine) -> None:
    machine.python("python3", version="3.9", old=True)
    assert sentence(machine.check()) == (
        "Python 3.11 or newer is needed and python3 is 3.9: sudo apt-get install python3.11 python3.11-venv"
        " (or name another: make PYTHON=/path/to/python3.11)"
    )


def test_a_newer_python_beside_the_old_one_is_found(machine: Machine) -> None:
    machine.python("python3", version="3.10", old=True)
    machine.python("python3.13", version="3.13")
    assert "python3.13 is Python 3.13" in machine.check().stdout


def test_named_python(machine: Machine) -> None:
    machine.python("other", version="3.8", old=True)
    assert "PYTHON=other is Python 3.8 and 3.11 or newer is needed" in sentence(
        machine.check(PYTHON="other")
    )
    assert "PYTHON=absent is not a program" in sentence(machine.check(PYTHON="absent"))
    machine.python("other", version="3.11")
    assert "other is Python 3.11" in machine.check(PYTHON="other").stdout


def test_no_venv(machine: Machine) -> None:
    machine.python("python3", venv=False)
    assert sentence(machine.check()) == "python3-venv is missing: sudo apt-get install python3-venv"


def test_no_venv_of_a_versioned_python(machine: Machine) -> None:
    machine.python("python3", version="3.9", old=True)
    machine.python("python3.12", venv=False)
    assert (
        sentence(machine.check())
        == "python3.12-venv is missing: sudo apt-get install python3.12-venv"
    )


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        ("cc", "A cc compiler is missing: sudo apt-get install build-essential"),
        ("c++", "A c++ compiler is missing: sudo apt-get install build-essential"),
        ("make", "make is missing: sudo apt-get install build-essential"),
    ],
)
def test_no_tools_to_build_with(machine: Machine, tool: str, says: str) -> None:
    machine.without(tool)
    assert sentence(machine.check()) == says


def test_ninja_does_instead_of_make(machine: Machine) -> None:
    machine.without("make")
    machine.program("ninja", "exit 0")
    assert machine.check().returncode == 0


def test_a_compiler_without_headers(machine: Machine) -> None:
    machine.program("c++", "exit 1")
    assert "cannot compile (its headers are missing): sudo apt-get install" in sentence(
        machine.check()
    )


def test_other_systems_are_told_their_own_command(machine: Machine) -> None:
    machine.without("apt-get")
    machine.program("dnf", "exit 0")
    machine.without("c++")
    assert sentence(machine.check()).endswith("sudo dnf install gcc gcc-c++ make")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_log_is_a_line_for_every_tenth() -> None:
    progress = load_script(DEPLOY / "progress.py")
    out = io.StringIO()
    lines = [
        "Collecting numpy",
        *(f"  [{i}/286] Building CXX object" for i in range(1, 287)),
        "done",
    ]
    progress.watch("llama", lines, out)
    assert out.getvalue().splitlines() == [f"llama: {tenth} %" for tenth in range(0, 101, 10)]


def test_progress_on_a_terminal_is_one_line() -> None:
    progress = load_script(DEPLOY / "progress.py")
    out = Terminal()
    progress.watch("llama", ["Collecting numpy", "[ 43%] Building", "noise"], out)
    assert "\n" not in out.getvalue()
    assert "llama: collecting numpy" in out.getvalue()
    assert "llama:  43 %" in out.getvalue()


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("[1/4] a", 25),
        ("  [ 7/7] b", 100),
        ("[9/0] c", None),
        ("[100%] Built", 100),
        ("[x] d", None),
        ("1/4", None),
    ],
)
def test_percent(line: str, percent: int | None) -> None:
    assert load_script(DEPLOY / "progress.py").percent_of(line) == percent
