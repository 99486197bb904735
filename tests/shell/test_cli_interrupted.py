"""Ctrl-C at any moment of a command: it ends without a word, by the signal or with the status that shells expect.

The moments are real: a module that stands before the others on the path says that it is being imported, and
waits there. What Python does before our first line is Python's.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import pytest

from meshd.cli.failures import Exit

TIME_S: Final = 60.0
HERE: Final = "here"
WAITS: Final = f"import os\nos.write(1, b'{HERE}\\n')\nos.read(0, 1)\n"
AT_EXIT: Final = (
    f"import atexit, os\natexit.register(lambda: (os.write(1, b'{HERE}\\n'), os.read(0, 1)))\n"
)
ROOT: Final = Path(__file__).parents[2]


def script() -> list[str]:
    """What an installer makes of the entry point of pyproject.toml."""
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["meshd"]
    module, _, function = entry.partition(":")
    return [
        *(sys.executable, "-c"),
        f"import sys\nfrom {module} import {function}\nsys.exit({function}())",
    ]


COMMANDS: Final[Mapping[str, list[str]]] = {
    "script": script(),
    "module": [sys.executable, "-m", "meshd"],
}


def interrupted(folder: Path, command: list[str], *arguments: str) -> tuple[int, bytes]:
    """Start it, wait until it says where it is, send SIGINT: how it ended, and what it said of that."""
    process = subprocess.Popen(
        [*command, *arguments],
        env={**os.environ, "PYTHONPATH": str(folder), "MESHD_STATE_DIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                if line == f"{HERE}\n".encode():
                    break
            else:
                pytest.fail(f"it never was there: {process.stderr.read().decode()}")
            process.send_signal(signal.SIGINT)
            return process.wait(TIME_S), process.stderr.read()
        finally:
            process.kill()


def sleeps(pid: int) -> bool:
    """Whether the process waits for something."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("module", ["signal", "click"])
def test_while_it_imports(tmp_path: Path, command: str, module: str) -> None:
    """`signal` is the first that our first line wants."""
    (tmp_path / f"{module}.py").write_text(WAITS)
    status, said = interrupted(tmp_path, COMMANDS[command], "status")
    assert said == b""
    assert status in (-signal.SIGINT, Exit.INTERRUPTED)


@pytest.mark.parametrize("command", COMMANDS)
def test_while_a_command_imports(tmp_path: Path, command: str) -> None:
    (tmp_path / "structlog.py").write_text(WAITS)
    status, said = interrupted(
        tmp_path, COMMANDS[command], "run", "--state-dir", str(tmp_path / "state")
    )
    assert said == b""
    assert status == Exit.INTERRUPTED


@pytest.mark.parametrize("command", COMMANDS)
def test_when_all_is_done(tmp_path: Path, command: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT)
    status, said = interrupted(tmp_path, COMMANDS[command], "completion", "bash")
    assert said == b""
    assert status == -signal.SIGINT


@pytest.mark.parametrize("command", COMMANDS)
def test_at_a_question(command: str) -> None:
    question = b"Remove some-model? [y/N]:"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMANDS[command], "model", "remove", "some-model"], stdin=theirs, stderr=subprocess.PIPE
    )
    with process:
        assert process.stderr is not None
        try:
            os.close(theirs)
            assert process.stderr.read(len(question)) == question
            # A signal just before it reads would be seen with the next key only.
            while not sleeps(process.pid):
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(TIME_S) == Exit.INTERRUPTED
            assert process.stderr.read().strip() == b""
        finally:
            process.kill()
            os.close(ours)


def test_no_is_no_interruption() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMANDS["module"], "model", "remove", "some-model"], stdin=theirs, stderr=subprocess.PIPE
    )
    with process:
        assert process.stderr is not None
        try:
            os.close(theirs)
            os.write(ours, b"n\n")
            assert process.wait(TIME_S) == Exit.FAILED
            assert process.stderr.read().endswith(b"Aborted!\n")
        finally:
            process.kill()
            os.close(ours)


def test_who_ignores_it_is_left_alone(tmp_path: Path) -> None:
    """A shell starts what runs in its background so."""
    (tmp_path / "click.py").write_text(f"{WAITS}raise SystemExit(3)\n")
    started = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-m", "meshd", "status"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", started],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == f"{HERE}\n".encode()
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        assert process.wait(TIME_S) == 3
