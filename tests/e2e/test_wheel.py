"""The installed wheel runs by itself: from an empty folder, with nothing of the checkout in sight."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tests.unit.support_wheel import ROOT, build_wheel

PACKAGES = ("meshd", "meshd_cms", "meshd_naming", "meshd_plugins")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel in it; the dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    bin_python = environment / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", bin_python, "--disable-pip-version-check", "install", "--quiet",
        "--no-deps", "--no-index", wheel, cwd=folder,
    )  # fmt: skip
    site = Path(
        run(
            bin_python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    # The .pth files of the other environment, with its editable checkout, are not read this way.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def test_the_packages_come_from_the_wheel(installed: Path, empty: Path) -> None:
    code = (
        f"import importlib\nfor name in {PACKAGES}: print(importlib.import_module(name).__file__)"
    )
    files = run(installed / "bin" / "python", "-c", code, cwd=empty).split()
    assert len(files) == len(PACKAGES)
    for file in files:
        assert Path(file).is_relative_to(installed)
        assert not Path(file).is_relative_to(ROOT)


def test_the_command_runs(installed: Path, empty: Path) -> None:
    said = run(installed / "bin" / "meshd", "--version", cwd=empty)
    assert "0.1.0" in said
    assert (
        run(installed / "bin" / "python", "-m", "meshd", "--version", cwd=empty).split()[-1]
        == said.split()[-1]
    )
    assert "ask" in run(installed / "bin" / "meshd", "--help", cwd=empty)


def test_the_built_in_plugins_are_found(installed: Path, empty: Path) -> None:
    code = (
        "from importlib.metadata import entry_points\n"
        "for point in entry_points(group='meshd'): print(point.name, point.load().__file__)"
    )
    found = dict(
        line.split()
        for line in run(installed / "bin" / "python", "-c", code, cwd=empty).splitlines()
    )
    assert set(found) >= {"arithmetic", "document", "echo", "hardware", "llama"}
    for file in found.values():
        assert Path(file).is_relative_to(installed)
