"""Pictures and sounds of requests, decoded and encoded on a thread of their own.

While a medium is encoded, which may take many seconds, the sequences of others go on: the thread wakes the main
loop when all media of a request have become tokens (`engine.media`) and embeddings. Embeddings are kept as long
as a request needs them, and beyond that within a bound: the next turn of a conversation sends its pictures again.
They are found only by their own caller, as everything that was computed.
"""

from __future__ import annotations

import hashlib
import threading
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

from meshd_plugins.builtin.llama.engine.media import media_tokens
from meshd_plugins.builtin.llama.worker.media_files import MediumUnusable
from meshd_plugins.builtin.llama.worker.mtmd import Encoded, Piece
from meshd_plugins.builtin.llama.worker.parts import EXIT_MEDIA, fail
from meshd_plugins.media import NOT_BASE64, decoded

KEPT_BYTES_MAX: Final = 64 * 1024 * 1024  # of embeddings that no request needs
READ_MAX_S: Final = 900.0  # for all media of one request
WAITING_MAX: Final = 8  # requests; beyond it they are refused


@dataclass(frozen=True, slots=True)
class Read:
    """What became of the media of one request."""

    call: int
    tokens: tuple[tuple[int, ...], ...] = ()  # that stand for each of them
    wrong: str = ""  # why they could not be read


@dataclass(slots=True)
class _Order:
    call: int
    caller: str
    media: Sequence[str]
    cancelled: bool = False


@dataclass(slots=True)
class _Row:
    encoded: Encoded
    users: set[int] = field(default_factory=set[int])  # calls


class Embeddings:
    """What was encoded, by key; used from both threads."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._rows: OrderedDict[int, _Row] = OrderedDict()  # the one used last is at the end
        self._lock = threading.Lock()
        self._kept_bytes_max = kept_bytes_max

    def __getitem__(self, key: int) -> Encoded:
        """Of a call that has not ended. Raises KeyError."""
        with self._lock:
            return self._rows[key].encoded

    def use(self, key: int, call: int) -> bool:
        """Keep them until the call ends; False: they are not here."""
        with self._lock:
            row = self._rows.get(key)
            if row is not None:
                row.users.add(call)
                self._rows.move_to_end(key)
            return row is not None

    def put(self, key: int, encoded: Encoded, call: int) -> None:
        """Keep them, until the call ends at least."""
        with self._lock:
            self._rows[key] = _Row(encoded, {call})

    def ended(self, call: int) -> None:
        """A call needs none any more: what is beyond the bound goes, used longest ago first."""
        with self._lock:
            for row in self._rows.values():
                row.users.discard(call)
            idle = [key for key, row in self._rows.items() if not row.users]
            size = sum(self._rows[key].encoded.size_bytes for key in idle)
            for key in idle:
                if size <= self._kept_bytes_max:
                    break
                size -= self._rows.pop(key).encoded.size_bytes


class Encoder(Protocol):
    """What turns media into embeddings: see `mtmd.MediaEncoder`."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model can take in with it."""
        ...

    @property
    def threads(self) -> int:
        """That one encoding takes."""
        ...

    def read(self, data: bytes) -> AbstractContextManager[list[Piece]]:
        """Decode a medium; its pieces can be encoded within the context. Raises MediumUnusable."""
        ...

    def encode(self, piece: Piece) -> Encoded:
        """Compute the embeddings of a piece. Raises MediumUnusable."""
        ...


class MediaReader:
    """Used from the main thread; owns the other one."""

    def __init__(self, encoder: Encoder, wake: Callable[[], None], at_once_max: int) -> None:
        """Begin.

        Args:
            encoder: of the model.
            wake: tells the main thread that there is something in `ready`.
            at_once_max: embeddings that one step can compute.
        """
        self.embeddings = Embeddings()
        self.modalities = encoder.modalities
        self.threads = encoder.threads
        self._encoder = encoder
        self._wake = wake
        self._at_once_max = at_once_max
        self._waiting: deque[_Order] = deque()
        self._ready: deque[Read] = deque()
        self._changed = threading.Condition()
        self._current: _Order | None = None
        self._began_s = 0.0  # with the current one
        threading.Thread(target=self._run, name="media", daemon=True).start()

    @property
    def encoding(self) -> bool:
        """Whether the other thread computes."""
        return self._current is not None

    def begin(self, call: int, caller: str, media: Sequence[str]) -> bool:
        """Take the media of a request: `data:` URLs, or base64. False: too many wait."""
        with self._changed:
            if len(self._waiting) >= WAITING_MAX:
                return False
            self._waiting.append(_Order(call, caller, media))
            self._changed.notify()
        return True

    def cancel(self, call: int) -> None:
        """Nobody waits for it any more; what is being encoded is finished, and nothing behind it."""
        with self._changed:
            for order in (*self._waiting, self._current):
                if order is not None and order.call == call:
                    order.cancelled = True
        self.embeddings.ended(call)

    def ready(self) -> list[Read]:
        """What is done since this was asked last. Ends the process when the other thread hangs."""
        if self.encoding and time.monotonic() - self._began_s > READ_MAX_S:
            fail(EXIT_MEDIA, f"the media of a request took more than {READ_MAX_S:g} s")
        found: list[Read] = []
        while self._ready:
            found.append(self._ready.popleft())
        return found

    # -- the other thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                self._current = None
                while not self._waiting:
                    self._changed.wait()
                order = self._current = self._waiting.popleft()
                self._began_s = time.monotonic()
            try:
                read = Read(order.call, tuple(self._tokens(order, text) for text in order.media))
            except MediumUnusable as error:
                read = Read(order.call, wrong=str(error))
            except Exception:  # noqa: BLE001  whatever it is, all others would wait for ever
                traceback.print_exc()
                fail(EXIT_MEDIA, "reading a picture or a sound failed")
            if order.cancelled:
                self.embeddings.ended(order.call)
            else:
                self._ready.append(read)
            self._wake()

    def _tokens(self, order: _Order, text: str) -> tuple[int, ...]:
        if order.cancelled:
            raise MediumUnusable("nobody waits for it")
        tokens: list[int] = []
        with self._encoder.read(_file(text)) as pieces:
            for piece in pieces:
                if piece.key:
                    tokens += self._encoded(order, piece)
                else:
                    tokens += piece.tokens
        return tuple(tokens)

    def _encoded(self, order: _Order, piece: Piece) -> tuple[int, ...]:
        if piece.at_once and piece.count > self._at_once_max:
            raise MediumUnusable(
                f"the picture takes {piece.count} tokens at once, and a step of this model holds {self._at_once_max}"
            )
        if order.cancelled:
            raise MediumUnusable("nobody waits for it")
        digest = hashlib.blake2b(piece.key, key=order.caller.encode()[:64], digest_size=8).digest()
        key = int.from_bytes(digest, "big")
        if not self.embeddings.use(key, order.call):
            self.embeddings.put(key, self._encoder.encode(piece), order.call)
        return media_tokens(key, piece.count, piece.positions, at_once=piece.at_once)


def _file(text: str) -> bytes:
    """What a `data:` URL or base64 stands for. Raises MediumUnusable."""
    steps = decoded(text, begin=text.find(",") + 1)
    try:
        while True:
            next(steps)
            time.sleep(0)  # let go of the interpreter: the step loop needs it too
    except StopIteration as end:
        data: bytes = end.value
        return data
    except ValueError:  # although the daemon has checked it
        raise MediumUnusable(f"the picture or sound {NOT_BASE64}") from None
