"""The service's unit and the scripts for a board, as far as they can be tried without one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
BINARY = "/opt/meshd/venv/bin/meshd"

systemd_here = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine"
)


def run(
    *command: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env=environment,
    )


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists, since nothing is installed here."""
    path = tmp_path / "meshd.service"
    text = (DEPLOY / "meshd.service").read_text()
    assert BINARY in text
    path.write_text(text.replace(BINARY, "/bin/true"))
    return path


@systemd_here
def test_unit_is_valid(unit: Path) -> None:
    done = run("systemd-analyze", "verify", str(unit))
    assert (done.returncode, done.stderr) == (0, "")


@systemd_here
def test_a_slip_in_the_unit_would_be_seen(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHome=perhaps"))
    assert "perhaps" in run("systemd-analyze", "verify", str(unit)).stderr


@systemd_here
def test_exposure_is_ok_or_better(unit: Path) -> None:
    done = run(
        "systemd-analyze", "security", "--offline=true", "--threshold=22", "--no-pager", str(unit)
    )
    overall = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, overall
    assert "OK" in overall or "SAFE" in overall or "PERFECT" in overall


def test_unit_says_what_the_daemon_relies_on() -> None:
    lines = (DEPLOY / "meshd.service").read_text().splitlines()
    for needed in (
        "Type=notify",
        "User=meshd",
        "StateDirectory=meshd",
        "RuntimeDirectory=meshd",
        "RestrictNamespaces=user net",
        "SystemCallFilter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
        "OOMPolicy=continue",
        "MemoryMax=90%",
        "DevicePolicy=closed",
        "DeviceAllow=char-nvidia* rw",
        "DeviceAllow=char-drm rw",
    ):
        assert needed in lines
    # Globs work in groups of devices only: systemd takes a path with one literally.
    assert not [line for line in lines if line.startswith("DeviceAllow=/dev/") and "*" in line]


@pytest.mark.skipif(
    shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not on this machine"
)
def test_sysusers_file_is_valid() -> None:
    done = run("systemd-sysusers", "--dry-run", str(DEPLOY / "sysusers.d" / "meshd.conf"))
    assert done.returncode == 0, done.stderr
    assert "ignoring" not in done.stderr


@pytest.fixture
def bare_path(tmp_path: Path) -> dict[str, str]:
    """A PATH on which only a new enough `python3` and what the scripts call are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("bash", "dirname", "sed", "ls", "getconf", "cat", "c++", "make"):
        found = shutil.which(tool)
        assert found is not None, f"{tool} is needed by this test"
        (folder / tool).symlink_to(found)
    program(folder / "python3", "exit 0")
    return {"PATH": str(folder), "CUDA_HOME": str(tmp_path / "no-cuda")}


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def steps(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line[2:].strip() for line in done.stdout.splitlines() if line.startswith("+ ")]


def test_dry_run_prints_every_step_and_changes_nothing(bare_path: dict[str, str]) -> None:
    planned = steps(run(str(DEPLOY / "install.sh"), "--dry-run", environment=bare_path))
    wanted = [
        "python3 -m venv --upgrade-deps /opt/meshd/venv",
        "-DGGML_RPC=on",
        "pip install --upgrade",
        "/usr/local/bin/meshd",
        "systemd-sysusers",
        "/etc/meshd/meshd.toml",
        "-o meshd -g meshd -m 0700 /var/lib/meshd",
        "/etc/systemd/system/meshd.service",
        "systemctl enable meshd.service",
    ]
    positions = [next(i for i, step in enumerate(planned) if want in step) for want in wanted]
    assert positions == sorted(positions)
    assert not [step for step in planned if "GGML_CUDA" in step or " uv" in step]
    assert not [step for step in planned if step.startswith("apt-get")]


def test_an_old_system_gets_a_python_of_its_own(bare_path: dict[str, str]) -> None:
    program(
        Path(bare_path["PATH"]) / "python3", 'case "$2" in *version_info*) exit 1;; esac\nexit 0'
    )
    planned = steps(run(str(DEPLOY / "install.sh"), "--dry-run", environment=bare_path))
    assert "python3 -m venv /opt/meshd/uv" in planned
    assert any(
        "UV_PYTHON_INSTALL_DIR=/opt/meshd/python" in step and "python install 3.12" in step
        for step in planned
    )
    assert "/opt/meshd/python/bin/python3.12 -m venv --upgrade-deps /opt/meshd/venv" in planned


def test_cuda_is_used_where_it_is_found(bare_path: dict[str, str]) -> None:
    program(Path(bare_path["PATH"]) / "nvcc", "exit 0")
    install = str(DEPLOY / "install.sh")
    build = [
        s for s in steps(run(install, "--dry-run", environment=bare_path)) if "CMAKE_ARGS" in s
    ]
    assert len(build) == 1
    assert "-DGGML_CUDA=on" in build[0]
    assert "-DGGML_RPC=on" in build[0]
    assert "CUDACXX=" in build[0]
    assert "--no-cache-dir" in build[0]
    without = steps(run(install, "--dry-run", "--no-cuda", environment=bare_path))
    assert not [step for step in without if "GGML_CUDA" in step]
    assert [step for step in without if "GGML_RPC=on" in step]


def test_what_the_system_lacks_is_installed_first(bare_path: dict[str, str]) -> None:
    folder = Path(bare_path["PATH"])
    (folder / "c++").unlink()
    program(folder / "python3", 'case "$2" in *ensurepip*) exit 1;; esac\nexit 0')
    planned = steps(run(str(DEPLOY / "install.sh"), "--dry-run", environment=bare_path))
    assert planned[1] == "apt-get install -y --no-install-recommends python3-venv build-essential"


def test_uninstall_keeps_keys_unless_told_otherwise() -> None:
    kept = steps(run(str(DEPLOY / "uninstall.sh"), "--dry-run"))
    assert "rm -rf /opt/meshd" in kept
    assert "systemctl disable --now meshd.service" in kept
    assert not [step for step in kept if "/var/lib/meshd" in step or "userdel" in step]
    purged = steps(run(str(DEPLOY / "uninstall.sh"), "--dry-run", "--purge"))
    assert "rm -rf /etc/meshd /var/lib/meshd" in purged
    assert "userdel meshd" in purged


def test_uninstall_removes_all_that_install_made(bare_path: dict[str, str]) -> None:
    made = "\n".join(steps(run(str(DEPLOY / "install.sh"), "--dry-run", environment=bare_path)))
    removed = "\n".join(steps(run(str(DEPLOY / "uninstall.sh"), "--dry-run", "--purge")))
    for path in (
        "/opt/meshd",
        "/usr/local/bin/meshd",
        "/usr/lib/sysusers.d/meshd.conf",
        "/etc/meshd",
        "/var/lib/meshd",
        "/etc/systemd/system/meshd.service",
    ):
        assert path in made
        assert path in removed


@pytest.mark.parametrize("script", ["install.sh", "uninstall.sh"])
def test_unknown_options_are_refused(script: str) -> None:
    done = run(str(DEPLOY / script), "--dry-rum")
    assert done.returncode == 1
    assert "unknown option --dry-rum" in done.stderr
    assert "--dry-run" in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not on this machine")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*DEPLOY.glob("*.sh"), DEPLOY.parent / ".ci" / "run"]
    done = run("shellcheck", *map(str, scripts))
    assert done.returncode == 0, done.stdout
