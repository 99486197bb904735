"""Downloads one file, and goes on where it was cut.

Invariant: the first `synced` bytes of the file are on the disk and are the first bytes of the version that
`validator` names. They are noted beside the file, every few seconds and at each orderly end; whatever is
behind them when a download begins is cut off, since a power cut may have left nothing there but a length.
They are added to only by an answer 206 that begins exactly there and is of the same version; any other
answer begins anew.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from meshd_plugins.builtin.llama.fetch.errors import FetchBroken, FetchRefused
from meshd_plugins.builtin.llama.fetch.exchange import (
    Exchange,
    Line,
    open_exchange,
    refuse_status,
)

CHUNK_BYTES: Final = 256 * 1024
MAGIC: Final = b"GGUF"
NOTE_BYTES_MAX: Final = 4096
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True, slots=True)
class DownloadLimits:
    """What one file may cost."""

    bytes_max: int  # of the whole file
    stall_s: float = 30.0  # without a byte; up: slower links, later notice
    window_s: float = 60.0  # in which `window_bytes` must come; up: as `stall_s`, for trickles
    window_bytes: int = 16 * 1024
    tries_max: int = 50  # connections, of one file
    vain_tries_max: int = 6  # in a row, that bring nothing
    backoff_first_s: float = 1.0
    backoff_max_s: float = 30.0
    sync_s: float = 2.0  # between two notes; down: less is lost in a power cut, more is written


@dataclass(frozen=True, slots=True)
class Note:
    """What is known of a file that is half there."""

    url: str = ""
    validator: str = ""  # a strong ETag, or a date of modification; "": it cannot be gone on with
    total: int | None = None
    synced: int = 0
    complete: bool = False
    sha256: str = ""  # as the hub says
    commit: str = ""  # of the hub's repository

    @classmethod
    def read(cls, path: Path) -> Note:
        """Read it; whatever is wrong with it, there is none."""
        try:
            raw: dict[str, Any] = json.loads(path.read_bytes()[:NOTE_BYTES_MAX])
            note = cls(**raw)
        except (OSError, ValueError, TypeError):
            return cls()
        kinds = {"url": str, "validator": str, "synced": int, "complete": bool}
        return (
            note if all(isinstance(getattr(note, k), kind) for k, kind in kinds.items()) else cls()
        )


class Download:
    """One file; `run` in one thread, `watch` in another.

    Args:
        url: http or https.
        to: where it goes; `to` with `.note` appended is what is known of it.
        limits: what it may cost.
        hub: the host's word on digest, size and revision counts.
        sized: it need not say how long it is, since its digest is known.
        tell: told of bytes so far and of all of them (None: not known).
    """

    def __init__(
        self,
        url: str,
        to: Path,
        limits: DownloadLimits,
        *,
        hub: bool = False,
        sized: bool = False,
        tell: Callable[[int, int | None], None] = lambda _so_far, _total: None,
    ) -> None:
        self._url = url
        self._to = to
        self._beside = to.with_name(f"{to.name}.note")
        self._limits = limits
        self._hub = hub
        self._sized = sized
        self._tell = tell
        self._line = Line()
        self._stop = threading.Event()
        self._note = Note()
        self._alive_at_s = time.monotonic()
        self._window_bytes = 0

    def stop(self) -> None:
        """Have `run` end soon; what has arrived stays."""
        self._stop.set()
        self._line.cut()

    def watch(self) -> None:
        """Cut a connection that brings too little. Call it every second or so."""
        if time.monotonic() - self._alive_at_s > self._limits.window_s:
            self._alive_at_s = time.monotonic()
            self._line.cut()

    def run(self) -> Note:
        """Fetch what is missing; return what is known of the whole file.

        Raises:
            FetchError: it cannot be had, or the budget is spent; what has arrived stays unless the
                message says otherwise.
        """
        limits = self._limits
        self._note = Note.read(self._beside)
        here = self._to.stat().st_size if self._to.exists() else 0
        if self._note.url != self._url or self._note.synced > here:
            self._note = Note(url=self._url)
        vain, backoff_s = 0, limits.backoff_first_s
        for _ in range(limits.tries_max):
            if self._note.complete:
                return self._note
            before = self._note.synced
            try:
                self._try()
                continue
            except FetchBroken as broken:
                error = broken
            finally:
                self._line.drop()
            if self._stop.is_set():
                raise error
            vain = 0 if self._note.synced > before else vain + 1
            if vain >= limits.vain_tries_max:
                raise error
            backoff_s = limits.backoff_first_s if vain == 0 else backoff_s
            if self._stop.wait(max(backoff_s, error.wait_s)):
                raise error
            backoff_s = min(2 * backoff_s, limits.backoff_max_s)
        raise FetchBroken(
            f"{limits.tries_max} connections were not enough; what has arrived is kept",
            "out_of_tries",
        )

    def _try(self) -> None:
        """Make one connection, and take what it brings."""
        note, self._alive_at_s, self._window_bytes = self._note, time.monotonic(), 0
        self._line.was_cut = False
        resuming = note.synced > 0 and note.validator != ""
        headers = {"User-Agent": "meshd"}
        if resuming:
            headers |= {"Range": f"bytes={note.synced}-", "If-Range": note.validator}
        exchange = open_exchange(self._url, headers, self._line, self._limits.stall_s)
        try:
            self._take(exchange, resuming=resuming)
        finally:
            exchange.close()

    def _take(self, exchange: Exchange, *, resuming: bool) -> None:
        response = exchange.response
        if response.status == 416 and resuming:
            self._begin_anew("the server has less than is here")
        if response.status == 206 and resuming:
            self._check_range(exchange)
        elif response.status == 200:
            self._note = self._described(exchange)
        elif response.status == 206:
            self._begin_anew("the server sends a part that nobody asked for")
        else:
            refuse_status(response, self._url)
        self._check_size(exchange)
        with self._open() as file:
            try:
                self._copy(exchange, file)
            finally:
                self._sync(file)
        self._settle()

    def _described(self, exchange: Exchange) -> Note:
        """What the answer says of a whole file."""
        etag, date = exchange.header("etag"), exchange.header("last-modified")
        length = exchange.header("content-length")
        note = Note(
            url=self._url,
            validator=etag if etag.startswith('"') else date if not etag else "",
            total=int(length) if length.isdecimal() and len(length) < 19 else None,
        )
        if not self._hub:
            return note
        said = exchange.origin_headers
        digest, commit = _linked_digest(exchange), said.get("x-repo-commit", "")
        size = said.get("x-linked-size", "")
        if size.isdecimal() and note.total is not None and int(size) != note.total:
            raise FetchRefused(
                f"the hub says that the file has {int(size):,} bytes, and sends {note.total:,}"
            )
        return replace(
            note,
            sha256=digest,
            commit=commit if re.fullmatch(r"[0-9a-f]{7,64}", commit) else "",
        )

    def _check_range(self, exchange: Exchange) -> None:
        """See that the answer goes on exactly where we are, in the same version."""
        note, etag = self._note, exchange.header("etag")
        found = _CONTENT_RANGE.fullmatch(exchange.header("content-range"))
        if found is None or int(found[1]) != note.synced:
            self._begin_anew("the server sends another part than it was asked for")
        assert found is not None
        total = int(found[3])
        if total != (note.total or total) or int(found[2]) + 1 != total:
            self._begin_anew("the file has another size now")
        if note.validator.startswith('"') and etag and etag != note.validator:
            self._begin_anew("the file has changed on the server")
        if self._hub and _linked_digest(exchange) != note.sha256:
            self._begin_anew("the file has changed on the hub")
        self._note = replace(note, total=total)

    def _check_size(self, exchange: Exchange) -> None:
        total, most = self._note.total, self._limits.bytes_max
        if exchange.header("content-encoding") not in ("", "identity"):
            raise FetchRefused(
                "the server sends the file in another coding than it was asked for", "refused"
            )
        if total is None and not self._sized:
            raise FetchRefused(
                "the server does not say how long the file is, so nobody can tell whether all of it came: "
                "give its --sha256",
                "no_length",
            )
        if total is not None and total > most:
            raise FetchRefused(
                f"the file has {total:,} bytes; there is room for {most:,}", "too_large"
            )

    def _begin_anew(self, why: str) -> None:
        """Forget what is here. Raises FetchBroken, so that it is tried again, within the budget."""
        self._note = Note(url=self._url)
        self._keep_note()
        raise FetchBroken(f"{why}; it begins anew", "cut_short")

    def _open(self) -> BinaryIO:
        """The file, cut back to what is known to be good, at its end."""
        descriptor = os.open(self._to, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        file = os.fdopen(descriptor, "r+b", buffering=0)
        file.truncate(self._note.synced)
        file.seek(self._note.synced)
        return file

    def _copy(self, exchange: Exchange, file: BinaryIO) -> None:
        total, most = self._note.total, self._limits.bytes_max
        head, synced_at_s = b"" if file.tell() == 0 else MAGIC, time.monotonic()
        while True:
            try:
                chunk = exchange.response.read1(CHUNK_BYTES)
            except (OSError, http.client.HTTPException, ValueError, ssl.SSLError) as error:
                raise self._broken(error) from error
            if not chunk:
                return
            if len(head) < len(MAGIC):
                head += chunk[: len(MAGIC)]
                self._check_head(head[: len(MAGIC)], exchange)
            if file.tell() + len(chunk) > most:
                raise FetchRefused(
                    f"more than the {most:,} bytes came that there is room for", "too_large"
                )
            try:
                _write(file, chunk)
            except OSError as error:
                raise FetchRefused(f"it cannot be written: {error.strerror}", "no_space") from error
            now_s = time.monotonic()
            self._window_bytes += len(chunk)
            if self._window_bytes >= self._limits.window_bytes:
                self._window_bytes, self._alive_at_s = 0, now_s
            if now_s - synced_at_s >= self._limits.sync_s:
                self._sync(file)
                synced_at_s = now_s
            self._tell(file.tell(), total)
            if self._stop.is_set():
                raise FetchBroken("stopped", "stopped")

    def _broken(self, error: Exception) -> FetchBroken:
        if self._line.was_cut or isinstance(error, TimeoutError):
            return FetchBroken("nothing comes any more", "stalled")
        return FetchBroken(
            f"the connection broke: {str(error) or type(error).__name__}", "cut_short"
        )

    def _check_head(self, head: bytes, exchange: Exchange) -> None:
        if not MAGIC.startswith(head):
            kind = exchange.header("content-type").partition(";")[0][:60]
            said = f"; the server calls it {kind}" if kind else ""
            raise FetchRefused(
                f"this is no GGUF model file: it does not begin with 'GGUF'{said}", "not_gguf"
            )

    def _sync(self, file: BinaryIO) -> None:
        with suppress(OSError):  # a disk that is full was told of by who wrote
            os.fsync(file.fileno())
            self._note = replace(self._note, synced=file.tell())
            self._keep_note()

    def _keep_note(self) -> None:
        """As a whole or not at all: a note that is ahead of its file would be a lie."""
        beside = self._beside.with_name(f"{self._beside.name}.new")
        with suppress(OSError):
            descriptor = os.open(
                beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600
            )
            with os.fdopen(descriptor, "wb") as file:
                file.write(json.dumps(asdict(self._note)).encode())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._beside)

    def _settle(self) -> None:
        """The body has ended: by itself, or because it was cut. Raises FetchBroken."""
        note = self._note
        if self._line.was_cut:
            raise FetchBroken("nothing comes any more", "stalled")
        if note.total is not None and note.synced != note.total:
            raise FetchBroken(
                f"the connection ended after {note.synced:,} of {note.total:,} bytes", "cut_short"
            )
        if note.synced < len(MAGIC):
            raise FetchRefused("this is no GGUF model file: it is empty", "not_gguf")
        self._note = replace(note, total=note.synced, complete=True)
        self._keep_note()


def _linked_digest(exchange: Exchange) -> str:
    """What the hub says of the file's SHA-256; "" where it says nothing."""
    digest = exchange.origin_headers.get("x-linked-etag", "").strip('"').lower()
    return digest if _DIGEST.fullmatch(digest) else ""


def _write(file: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
