"""Runs `prying_worker` under the real supervisor, here or as another user, and tells what it got at."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import trio
from tests.shell.support_supervisor import RecordingLog

from meshd.shell.supervisor import ProcessSupervisor
from meshd_plugins import seccomp
from meshd_plugins.api import WorkerSpec

WORKER = Path(__file__).with_name("prying_worker.py")
NOBODY = 65534
SECRET = "the key of this node"
CAN_RUN = (
    "import subprocess, sys, trio, msgpack, meshd_plugins.workerkit; "
    "subprocess.run([sys.executable, '-c', ''], check=True)"
)
HIDING_PROC = (
    *("unshare", "--mount", "sh", "-c"),
    'mount -t proc -o hidepid=invisible proc /proc && exec "$@"',
    "sh",
)
Try = tuple[str, str]


@dataclass(frozen=True)
class Findings:
    """What became of the tries, and what the daemon says of the worker's isolation."""

    answers: Mapping[Try, str]
    steps: Mapping[str, str]
    missing: Sequence[str]
    exposed: Sequence[str]
    resident_bytes: int

    def denied(self, name: str, argument: str = "") -> bool:
        return self.answers[name, argument].startswith("denied: ")


@contextmanager
def state_folder(owner: int) -> Iterator[Path]:
    """A state folder with a key in it, and beside it a folder with a document."""
    root = Path(mkdtemp(prefix="meshd-prying-"))
    try:
        for path, text in {"state/identity/node.key": SECRET, "home/notes": "private"}.items():
            file = root / path
            file.parent.mkdir(parents=True)
            file.write_text(text)
        (root / "state/plugins/x").mkdir(parents=True)
        (root / "state/plugins/x/own").write_text("its own")
        (root / "state/given").write_text("given")
        for each in (root, *root.rglob("*")):
            os.chown(each, owner, owner)
        yield root
    finally:
        shutil.rmtree(root)


def pry(tries: Sequence[Try], state_dir: Path, **options: Any) -> Findings:
    """Start the worker, let it try everything in turn, and end it."""
    given = os.open(state_dir / "given", os.O_RDONLY)  # as a model may lie there
    argv = (sys.executable, "-P", str(WORKER))
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    options = {"files": (given,), "environment": environment, **options}
    spec = WorkerSpec(name="prying", argv=argv, **options)
    supervisor = ProcessSupervisor(RecordingLog(), hidden=(state_dir,))

    async def body() -> Findings:
        answers: dict[Try, str] = {}
        with trio.fail_after(30):
            async with supervisor.worker(spec) as worker:
                [status] = supervisor.statistics()
                for name, argument in tries:
                    sent = str(given) if argument == "GIVEN" else argument
                    async with worker.call({"try": name, "with": sent}) as call:
                        item = await call.receive()
                        assert item is not None
                        answers[name, argument] = str(item["answer"])
                isolation, resident = status.isolation, status.resident_bytes
        return Findings(answers, isolation.steps, isolation.missing, isolation.exposed, resident)

    try:
        return trio.run(body)
    finally:
        os.close(given)


def python_for_nobody() -> str:
    """A Python that user `nobody` may run, with our dependencies; skips when there is none."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root, with setpriv, can become somebody else")
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*_as_nobody(python), "-c", CAN_RUN]
        try:
            tried = subprocess.run(command, check=False, env=_environment(), capture_output=True)
        except OSError:
            continue
        if tried.returncode == 0:
            return python
    pytest.skip("user nobody can run no Python that has our dependencies")


def pry_as_nobody(
    tries: Sequence[Try], state_dir: Path, *, namespaces: bool = True, **options: Any
) -> Findings:
    """The same, all of it as a user without privileges.

    Without `namespaces` as under a strict unit: none can be made, and /proc hides other processes.
    """
    request = {"tries": tries, "state": str(state_dir), "namespaces": namespaces, **options}
    command = [*_as_nobody(python_for_nobody()), "-m", "tests.shell.support_prying"]
    done = subprocess.run(
        [*([] if namespaces else HIDING_PROC), *command, json.dumps(request)],
        check=False,
        env=_environment(),
        capture_output=True,
        cwd=WORKER.parents[2],
    )
    assert done.returncode == 0, done.stderr.decode()
    raw = json.loads(done.stdout)
    answers = {(name, argument): answer for name, argument, answer in raw["answers"]}
    return Findings(answers, raw["steps"], raw["missing"], raw["exposed"], raw["resident_bytes"])


def _as_nobody(python: str) -> list[str]:
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", python]


def _environment() -> dict[str, str]:
    paths = [path for path in sys.path if path] + [str(WORKER.parents[2])]
    return {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(paths)}


def _deny_namespaces() -> None:
    """For this process and all that it starts, as a unit may do."""
    seccomp.NUMBERS = {name: seccomp.NUMBERS[name] for name in ("mount", "unshare")}  # type: ignore[misc]
    seccomp._bodies = lambda rules: iter(())
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no_new_privs
    assert seccomp.install_filter(libc, seccomp.FilterRules(os.getpid())) is None


def main() -> None:
    request = json.loads(sys.argv[1])
    if not request.pop("namespaces"):
        _deny_namespaces()
    tries = [(name, argument) for name, argument in request.pop("tries")]
    found = pry(tries, Path(request.pop("state")), **request)
    answers = [(name, argument, answer) for (name, argument), answer in found.answers.items()]
    told = {"steps": dict(found.steps), "missing": found.missing, "exposed": found.exposed}
    print(json.dumps({"answers": answers, "resident_bytes": found.resident_bytes, **told}))


if __name__ == "__main__":
    main()
