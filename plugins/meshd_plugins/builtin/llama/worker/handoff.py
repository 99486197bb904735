"""The memory of sequences, given to and taken from other nodes that run the very same model.

Giving: `kv_export` {"tag", "caller"} is answered with an item {"head": {...}} and items {"data": bytes}.
Taking: `kv_begin` {"head"}, answered with {"import": n}; as many `kv_data` {"import", "data"} as it takes;
`kv_commit` {"import"}, answered with {"tokens": n}; or `kv_abort` {"import"}. The head is {"tokens": little-endian
32-bit ids, "bytes": n, "hash": BLAKE2b-256 of the data, "privacy"}; for taking it also names "caller" and "tag".

What is taken is held outside of the context until all of it was checked: its length before the first byte is
taken, then its hash, then its structure (`kv_layout`). It is brought into the context only when a request of the
same caller begins with its tokens. Whether the model, its file and the build are the same is the daemon's
to check: it knows the compatibility key.
"""

from __future__ import annotations

import array
import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshd_plugins.api import Value
from meshd_plugins.builtin.llama.engine.jobs import Scope
from meshd_plugins.builtin.llama.engine.prefixes import Kept
from meshd_plugins.builtin.llama.engine.scheduler import Engine
from meshd_plugins.builtin.llama.worker.backend import LlamaBackend, SequenceState
from meshd_plugins.builtin.llama.worker.kv_layout import Layout, LayoutError, unframed
from meshd_plugins.workerkit import Link

DATA_BYTES: Final = 1024 * 1024
BYTES_PER_STEP: Final = (
    8 * DATA_BYTES
)  # written in one turn of the loop: the engine has its turn between
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
    data: memoryview
    sent: int = 0


@dataclass(slots=True)
class _Import:
    """A sequence on its way in."""

    tokens: tuple[int, ...]
    scope: Scope
    tag: bytes
    expected_hash: bytes
    buffer: bytearray  # with the frame around it
    start: int  # where the sequence begins in the buffer
    size: int
    began_s: float
    hasher: Any  # of what came so far
    filled: int = 0


class Handoff:
    """Implements `Part`."""

    operations = ("kv_export", "kv_begin", "kv_data", "kv_commit", "kv_abort")

    def __init__(
        self, link: Link, backend: LlamaBackend, engine: Engine[Any, Any], bytes_max: int
    ) -> None:
        """Take at most `bytes_max` at once."""
        self._link = link
        self._backend = backend
        self._engine = engine
        self._bytes_max = bytes_max
        self._exports: list[_Export] = []
        self._imports: dict[int, _Import] = {}
        self._last = 0

    @property
    def busy(self) -> bool:
        """Whether something is on its way out."""
        return bool(self._exports)

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
            case "kv_begin":
                self._begin_import(call_id, message)
            case "kv_data":
                self._fill(call_id, message)
            case "kv_commit":
                self._commit(call_id, message)
            case _:
                self._imports.pop(self._find(message)[0])
                self._link.end(call_id)

    def cancel(self, call_id: int) -> None:
        """Send no more of it."""
        self._exports = [export for export in self._exports if export.call_id != call_id]

    def step(self) -> None:
        """Send the next parts, and drop what does not come to its end."""
        now_s = time.monotonic()
        for number, incoming in tuple(self._imports.items()):
            if now_s - incoming.began_s > IMPORT_S:
                del self._imports[number]
        budget = BYTES_PER_STEP
        while self._exports and budget > 0:
            export = self._exports[0]
            part = bytes(export.data[export.sent : export.sent + DATA_BYTES])
            self._link.item(export.call_id, {"data": part})
            export.sent += len(part)
            budget -= len(part)
            if export.sent == len(export.data):
                self._link.end(export.call_id)
                del self._exports[0]

    # -- out -----------------------------------------------------------------------------------------------

    def _begin_export(self, call_id: int, message: Mapping[str, Value]) -> None:
        layout = self._layout()
        tag, caller = message.get("tag"), message.get("caller")
        kept = None
        if isinstance(tag, bytes) and tag and isinstance(caller, str):
            kept = self._engine.export(tag, caller)
        if kept is None:
            raise _Refusal("not_warm", "nothing of this caller is kept by this tag")
        state: SequenceState = kept.state
        data = unframed(memoryview(state.data).cast("B")[: state.size_bytes], layout)
        head: dict[str, Value] = {
            "tokens": array.array("i", kept.tokens).tobytes(),
            "bytes": len(data),
            "hash": hashlib.blake2b(data, digest_size=HASH_BYTES).digest(),
            "privacy": kept.scope.privacy,
        }
        self._link.item(call_id, {"head": head})
        self._exports.append(_Export(call_id, data))

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
        if size > self._bytes_max:
            raise _Refusal("no_room", f"it takes {size} bytes and {self._bytes_max} may be kept")
        caller, privacy, tag = (head.get(name) for name in ("caller", "privacy", "tag"))
        before, after = layout.frame()
        self._last += 1
        self._imports[self._last] = _Import(
            tokens=tokens,
            scope=Scope(str(caller or ""), privacy if isinstance(privacy, int) else 0),
            tag=tag if isinstance(tag, bytes) else b"",
            expected_hash=digest,
            buffer=bytearray(before) + bytes(size) + after,
            start=len(before),
            size=size,
            began_s=time.monotonic(),
            hasher=hashlib.blake2b(digest_size=HASH_BYTES),
        )
        self._link.item(call_id, {"import": self._last})
        self._link.end(call_id)

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
            del self._imports[number]
            raise _Refusal("size", "more data than the head says")
        at = incoming.start + incoming.filled
        incoming.buffer[at : at + len(data)] = data
        incoming.filled += len(data)
        incoming.hasher.update(data)
        self._link.end(call_id)

    def _commit(self, call_id: int, message: Mapping[str, Value]) -> None:
        number, incoming = self._find(message)
        del self._imports[number]
        if incoming.filled != incoming.size:
            raise _Refusal("size", f"{incoming.filled} of {incoming.size} bytes came")
        data = memoryview(incoming.buffer)[incoming.start : incoming.start + incoming.size]
        if incoming.hasher.digest() != incoming.expected_hash:
            raise _Refusal("hash", "the data is not what its hash says")
        layout = self._backend.layout
        assert layout is not None, "begun with one"
        try:
            layout.check(data, len(incoming.tokens))
        except LayoutError as error:
            raise _Refusal("structure", str(error)) from None
        state = SequenceState.of(incoming.buffer)
        if not self._engine.adopt(Kept(incoming.tokens, state, incoming.scope, incoming.tag)):
            raise _Refusal("no_room", "it is here already, or there is no room")
        self._link.item(call_id, {"tokens": len(incoming.tokens)})
        self._link.end(call_id)
