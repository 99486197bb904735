"""What the demo does before any daemon runs; the demo itself is run whole by `.ci/run`."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "deploy" / "demo" / "demo.py"


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The demo in a checkout of its own, so that one which runs in this checkout is left in peace."""
    folder = tmp_path / "deploy" / "demo"
    folder.mkdir(parents=True)
    return Path(shutil.copy(DEMO, folder))


def stop(demo: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(demo), "--stop"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_second_demo_leaves_the_first_one_alone(demo: Path, tmp_path: Path) -> None:
    (tmp_path / ".demo").mkdir()
    with demo.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = stop(demo)
        assert refused.returncode == 1
        assert "another demo runs in this checkout" in refused.stdout
        assert (tmp_path / ".demo").exists()
    assert stop(demo).returncode == 0
    assert not (tmp_path / ".demo").exists()


def test_ids_of_other_processes_are_not_ended(demo: Path, tmp_path: Path) -> None:
    (tmp_path / ".demo").mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / ".demo" / "pids").write_text(f"{other.pid}")
        assert stop(demo).returncode == 0
        assert other.poll() is None
        other.communicate(b"\n", timeout=30)
    assert other.returncode == 0
