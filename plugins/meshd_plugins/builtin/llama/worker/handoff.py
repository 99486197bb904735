"""The memory of sequences, given to and taken from other nodes that run the very same model.

Giving: `kv_export` {"tag", "caller"} is answered with an item {"head": {...}, "export": n}, and stays open: the
state is held until it is cancelled, or nothing was read of it for a while. `kv_read` {"export": n, "at", "bytes"}
is answered with {"data": bytes}: nothing is sent that was not asked for, so the daemon holds no more than it wants.
Taking: `kv_begin` {"head"}, answered with {"import": n}, stays open in the same way; as many `kv_data` {"import",
"data"} as it takes; `kv_commit` {"import"}, answered with {"tokens": n}. The head is {"tokens": little-endian 32-bit
ids, "bytes": n, "hash": BLAKE2b-256 of the data, "privacy"}; for taking it also names "caller" and "tag".

What is on its way counts among the sequences that are kept, and takes room from them: both have one bound.

What is taken is held outside of the context until all of it was checked: its length before the first byte is
taken, then its hash, then its structure (`kv_layout`). It is brought into the context only when a request of the
same caller begins with its tokens. Whether the model, its file and the build are the same is the daemon's
to check: it knows the compatibility key.
"""

from __future__ import annotations

import array
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.engine.jobs import Scope
from meshd_plugins.builtin.llama.engine.prefixes import Kept
from meshd_plugins.builtin.llama.engine.scheduler import Engine
from meshd_plugins.builtin.llama.worker.backend import LlamaBackend, SequenceState
from meshd_plugins.builtin.llama.worker.kv_layout import Layout, LayoutError, unframed
from meshd_plugins.workerkit import Link

READ_BYTES_MAX: Final = 1024 * 1024  # of one `kv_read`
EXPORTS_MAX: Final = 2  # at once
EXPORT_IDLE_S: Final = 30.0  # without a `kv_read`, after which one is dropped
IMPORTS_MAX: Final = 2  # at once
IMPORT_S: Final = 60.0  # one that is not complete by then is dropped
HASH_BYTES: Final = 32


class _Refusal(Exception):
    """Why nothing is given or taken; becomes an error of kind refused."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class _Export:
    """A sequence on its way out."""

    call_id: int
    kept: Kept[SequenceState]
    data: memoryview
    read_s: float  # when something was last read of it


@dataclass(slots=True)
class _Import:
    """A sequence on its way in."""

    call_id: int  # of its beginning
    kept: Kept[SequenceState]  # over the buffer
    expected_hash: bytes
    buffer: bytearray  # with the frame around it
    start: int  # where the sequence begins in the buffer
    size: int
    began_s: float
    hasher: Any  # of what came so far
    filled: int = 0


class Handoff:
    """Implements `Part`."""

    operations = ("kv_export", "kv_read", "kv_begin", "kv_data", "kv_commit")

    def __init__(
        self,
        link: Link,
        backend: LlamaBackend,
        engine: Engine[Any, SequenceState],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Of one context; `clock` says seconds."""
        self._link = link
        self._backend = backend
        self._engine = engine
        self._clock = clock
        self._exports: dict[int, _Export] = {}
        self._imports: dict[int, _Import] = {}
        self._last = 0

    @property
    def busy(self) -> bool:
        """It only answers: nothing is done between calls but to drop what stands still."""
        return False

    def take(self, call_id: int, message: Mapping[str, Value]) -> None:
        """Begin or continue an exchange."""
        try:
            self._dispatch(call_id, message)
        except _Refusal as refusal:
            self._link.error(call_id, "refused", refusal.code, str(refusal))

    def _dispatch(self, call_id: int, message: Mapping[str, Value]) -> None:
        match message["operation"]:
            case "kv_export":
                self._begin_export(call_id, message)
            case "kv_read":
                self._read(call_id, message)
            case "kv_begin":
                self._begin_import(call_id, message)
            case "kv_data":
                self._fill(call_id, message)
            case _:
                self._commit(call_id, message)

    def cancel(self, call_id: int) -> None:
        """An export or an import is over, whole or not."""
        for number, export in tuple(self._exports.items()):
            if export.call_id == call_id:
                self._drop_export(number)
        for number, incoming in tuple(self._imports.items()):
            if incoming.call_id == call_id:
                self._drop_import(number)

    def step(self) -> None:
        """Drop what stands still."""
        now_s = self._clock()
        for number, incoming in tuple(self._imports.items()):
            if now_s - incoming.began_s > IMPORT_S:
                self._drop_import(number)
                why = f"it was not whole after {IMPORT_S:g} s"
                self._link.error(incoming.call_id, "failed", "failed", why)
        for number, export in tuple(self._exports.items()):
            if now_s - export.read_s > EXPORT_IDLE_S:
                self._drop_export(number)
                why = f"nothing was read of it for {EXPORT_IDLE_S:g} s"
                self._link.error(export.call_id, "failed", "failed", why)

    def _drop_export(self, number: int) -> None:
        self._engine.let_go(self._exports.pop(number).kept)

    def _drop_import(self, number: int) -> None:
        self._engine.let_go(self._imports.pop(number).kept)

    def _end_import(self, number: int) -> None:
        self._link.end(self._imports[number].call_id)
        self._drop_import(number)

    # -- out -----------------------------------------------------------------------------------------------

    def _begin_export(self, call_id: int, message: Mapping[str, Value]) -> None:
        layout = self._layout()
        if len(self._exports) >= EXPORTS_MAX:
            raise _Refusal("busy", "other sequences are being handed over")
        tag, caller = message.get("tag"), message.get("caller")
        kept = None
        if isinstance(tag, bytes) and tag and isinstance(caller, str):
            kept = self._engine.export(tag, caller)
        if kept is None:
            raise _Refusal("not_warm", "nothing of this caller is kept by this tag")
        if not self._engine.hold(kept):
            raise _Refusal("no_room", f"there is no room for {kept.state.size_bytes} bytes")
        state = kept.state
        data = unframed(memoryview(state.data).cast("B")[: state.size_bytes], layout)
        head: dict[str, Value] = {
            "tokens": array.array("i", kept.tokens).tobytes(),
            "bytes": len(data),
            "hash": hashlib.blake2b(data, digest_size=HASH_BYTES).digest(),
            "privacy": kept.scope.privacy,
        }
        self._last += 1
        self._exports[self._last] = _Export(call_id, kept, data, self._clock())
        self._link.item(call_id, {"head": head, "export": self._last})

    def _read(self, call_id: int, message: Mapping[str, Value]) -> None:
        number, at, size = (message.get(name) for name in ("export", "at", "bytes"))
        export = self._exports.get(number) if isinstance(number, int) else None
        if export is None:
            raise _Refusal("not_here", "no such export, or it took too long")
        if not isinstance(at, int) or not isinstance(size, int):
            raise _Refusal("size", "it does not say which bytes")
        if not 0 <= at < at + size <= len(export.data) or size > READ_BYTES_MAX:
            raise _Refusal("size", f"it has no {size} bytes at {at}, or they are too many")
        export.read_s = self._clock()
        self._link.item(call_id, {"data": bytes(export.data[at : at + size])})
        self._link.end(call_id)

    def _layout(self) -> Layout:
        if self._backend.layout is None:
            text = "the memory of this model's sequences has a form that is not handed over"
            raise _Refusal("unsupported", text)
        return self._backend.layout

    # -- in ------------------------------------------------------------------------------------------------

    def _begin_import(self, call_id: int, message: Mapping[str, Value]) -> None:
        layout = self._layout()
        raw = message.get("head")
        head: Mapping[str, Value] = raw if isinstance(raw, Mapping) else {}
        tokens, size, digest = self._read_head(head, layout)
        if len(self._imports) >= IMPORTS_MAX:
            raise _Refusal("busy", "other sequences are being taken over")
        caller, privacy, tag = (head.get(name) for name in ("caller", "privacy", "tag"))
        before, after = layout.frame()
        framed = len(before) + size + len(after)
        if framed > self._engine.room_bytes:
            raise _Refusal("no_room", f"there is no room for {framed} bytes")
        buffer = bytearray(framed)
        buffer[: len(before)], buffer[len(before) + size :] = before, after
        kept = Kept(
            tokens,
            SequenceState.of(buffer),
            Scope(str(caller or ""), privacy if isinstance(privacy, int) else 0),
            tag if isinstance(tag, bytes) else b"",
        )
        held = self._engine.hold(kept)
        assert held, "there is room"
        self._last += 1
        self._imports[self._last] = _Import(
            call_id=call_id,
            kept=kept,
            expected_hash=digest,
            buffer=buffer,
            start=len(before),
            size=size,
            began_s=self._clock(),
            hasher=hashlib.blake2b(digest_size=HASH_BYTES),
        )
        self._link.item(call_id, {"import": self._last})

    def _read_head(
        self, head: Mapping[str, Value], layout: Layout
    ) -> tuple[tuple[int, ...], int, bytes]:
        """Return tokens, bytes and hash. Raises _Refusal."""
        ids, size, digest = head.get("tokens"), head.get("bytes"), head.get("hash")
        if not isinstance(ids, bytes) or not ids or len(ids) % 4:
            raise _Refusal("structure", "the head names no tokens")
        tokens = tuple(array.array("i", ids))
        if len(tokens) >= self._backend.context_tokens:
            raise _Refusal("size", f"{len(tokens)} tokens do not fit the context")
        if not all(0 <= token < self._backend.vocabulary.size for token in tokens):
            raise _Refusal("structure", "a token is not in the vocabulary")
        expected = layout.size_bytes(len(tokens))
        if size != expected:
            raise _Refusal("size", f"{len(tokens)} tokens take {expected} bytes, not {size}")
        if not isinstance(digest, bytes) or len(digest) != HASH_BYTES:
            raise _Refusal("hash", "the head has no hash")
        return tokens, expected, digest

    def _find(self, message: Mapping[str, Value]) -> tuple[int, _Import]:
        number = message.get("import")
        if not isinstance(number, int) or number not in self._imports:
            raise _Refusal("not_here", "no such import, or it took too long")
        return number, self._imports[number]

    def _fill(self, call_id: int, message: Mapping[str, Value]) -> None:
        number, incoming = self._find(message)
        data = message.get("data")
        if not isinstance(data, bytes) or incoming.filled + len(data) > incoming.size:
            self._end_import(number)
            raise _Refusal("size", "more data than the head says")
        at = incoming.start + incoming.filled
        incoming.buffer[at : at + len(data)] = data
        incoming.filled += len(data)
        incoming.hasher.update(data)
        self._link.end(call_id)

    def _commit(self, call_id: int, message: Mapping[str, Value]) -> None:
        number, incoming = self._find(message)
        self._end_import(number)
        if incoming.filled != incoming.size:
            raise _Refusal("size", f"{incoming.filled} of {incoming.size} bytes came")
        data = memoryview(incoming.buffer)[incoming.start : incoming.start + incoming.size]
        if incoming.hasher.digest() != incoming.expected_hash:
            raise _Refusal("hash", "the data is not what its hash says")
        layout = self._backend.layout
        assert layout is not None, "begun with one"
        try:
            layout.check(data, len(incoming.kept.tokens))
        except LayoutError as error:
            raise _Refusal("structure", str(error)) from None
        if not self._engine.adopt(incoming.kept):
            raise _Refusal("no_room", "it is here already, or there is no room")
        self._link.item(call_id, {"tokens": len(incoming.kept.tokens)})
        self._link.end(call_id)
